"""Prompt -> mp4, with a folder of `export.py` or of the released layout.

    python -m longcat_video_fft.generate --model OUT --prompt "A cat on a wall" --output cat.mp4
        [--image first.png | --video before.mp4] [--seed 1] [--num-frames 93] [--offload]

Without a size, an image or video is given the official 480p shape nearest to its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_video_fft.options.buckets import BucketRule
from longcat_video_fft.options.launch import start_logging

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("longcat_video_fft")

SHAPE = (480, 832)
UNIT, STRIDE = 16, 4
NEEDED = ("vae", "text_encoder", "tokenizer")


def main(argv: list[str] | None = None) -> int:
    start_logging(is_main=True)
    try:
        args = parse(argv)
        generate(args)
    except (ValueError, OSError) as error:
        logger.debug("where it happened", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; raises ValueError for what cannot work, before heavy imports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--output", required=True, type=Path, help="an .mp4")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--image", type=Path, help="the first frame")
    start.add_argument("--video", type=Path, help="the video whose end is continued")
    parser.add_argument("--num-cond-frames", type=int, default=13, help="of --video")
    parser.add_argument("--num-frames", type=int, default=93)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--num-inference-steps", type=int, default=40)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=int, default=15)
    parser.add_argument("--offload", action="store_true", help="one part on the GPU at a time")
    args = parser.parse_args(argv)
    find_transformer(args.model)
    if args.output.suffix != ".mp4":
        raise ValueError(f"output={args.output}: must end in .mp4.")
    for name in ("image", "video"):
        path = getattr(args, name)
        if path is not None and not path.is_file():
            raise ValueError(f"{name}={path}: no such file ({path.absolute()}).")
    if (args.height is None) != (args.width is None):
        raise ValueError("--height and --width go together.")
    for name in ("height", "width"):
        size = getattr(args, name)
        if size is not None and (size < UNIT or size % UNIT):
            raise ValueError(f"{name}={size}: must be a multiple of {UNIT}.")
    counts = ["num_frames", "num_cond_frames"] if args.video else ["num_frames"]
    for name in counts:
        if getattr(args, name) % STRIDE != 1 or getattr(args, name) < 1:
            raise ValueError(
                f"{name}={getattr(args, name)}: must be {STRIDE}n + 1, for example 13."
            )
    if args.video and args.num_cond_frames >= args.num_frames:
        raise ValueError(f"num_cond_frames={args.num_cond_frames}: must be below num_frames.")
    for name in ("num_inference_steps", "fps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)}: must be above 0.")
    return args


def find_transformer(folder: Path) -> Path:
    """Finds transformer/ of an export, or dit/ of the released layout.

    Raises:
        ValueError: neither is there, or another part is missing.
    """
    missing = [name for name in NEEDED if not (folder / name).is_dir()]
    for name in ("transformer", "dit"):
        if (folder / name / "config.json").is_file() and not missing:
            return folder / name
    raise ValueError(
        f"model={folder}: holds no model that can generate: "
        f"{', '.join(missing) or 'transformer (or dit)'} is missing. Give a folder that "
        "longcat_video_fft.export or a finished training wrote, or one laid out as the released "
        "LongCat-Video."
    )


def generate(args: argparse.Namespace) -> None:
    """Writes args.output."""
    import torch

    from longcat_video_fft.media.video_file import write_mp4

    shape, condition = read_condition(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    pipe = load_pipeline(args.model, dtype=torch.bfloat16 if device.type == "cuda" else None)
    if args.offload and device.type == "cuda":
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)
    logger.info("loaded %s in %.0f s", args.model, time.monotonic() - started)
    started = time.monotonic()
    frames: Any = pipe(
        args.prompt,
        args.negative_prompt,
        **condition,
        height=shape[0],
        width=shape[1],
        num_frames=args.num_frames,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),  # of the CPU: the same on any device
        output_type="np",
    ).frames
    write_mp4(args.output, (frames[0] * 255 + 0.5).astype("uint8"), fps=args.fps)
    logger.info("%s in %.0f s", args.output, time.monotonic() - started)


def read_condition(args: argparse.Namespace) -> tuple[tuple[int, int], dict[str, Any]]:
    """Returns ((height, width), what the pipeline takes to start from)."""
    shape = None if args.height is None else (args.height, args.width)
    if args.image is not None:
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            picture = ImageOps.exif_transpose(Image.open(args.image)).convert("RGB")
        except UnidentifiedImageError as error:
            raise ValueError(f"image={args.image}: not a picture that can be read.") from error
        shape = shape or BucketRule().choose_shape(picture.height, picture.width)
        return shape, {"image": picture}
    if args.video is not None:
        from longcat_video_fft.media.video_file import read_frames, video_shape

        shape = shape or BucketRule().choose_shape(*video_shape(args.video))
        frames = read_frames(args.video, shape, fps=args.fps)
        return shape, {"video": frames, "num_cond_frames": args.num_cond_frames}
    return shape or SHAPE, {}


def load_pipeline(folder: Path, *, dtype: torch.dtype | None = None) -> Any:
    """Loads the pipeline of this package on the CPU; `dtype` None: float32.

    Raises:
        ValueError: a part is missing or damaged.
    """
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import UMT5EncoderModel

    from longcat_video_fft.model.pipeline import LongCatVideoPipeline
    from longcat_video_fft.model.text_encoder import load_tokenizer
    from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel

    dtype = dtype or torch.float32
    transformer = find_transformer(folder)
    index = folder / "model_index.json"
    options = json.loads(index.read_text("utf-8")) if index.is_file() else {}
    try:
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        return LongCatVideoPipeline(
            load_tokenizer(folder / "tokenizer"),
            UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype),
            AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=dtype),
            scheduler,
            LongCatVideoTransformer3DModel.from_pretrained(transformer, torch_dtype=dtype),
            max_sequence_length=options.get("max_sequence_length", 512),
        )
    except (OSError, KeyError) as error:
        raise ValueError(f"model={folder}: cannot be loaded ({error}).") from error


if __name__ == "__main__":
    sys.exit(main())

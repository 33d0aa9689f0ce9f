"""Trains a small Wan VAE from nothing, for end-to-end runs without released weights.

    python -m tests.demos.longcat_video_fft.train_vae VIDEOS OUT --minutes 3

The class, the latents (16 channels, 4 x 8 x 8 pixels each) and the folder are those of
LongCat-Video's vae/, with fewer channels inside. All videos are held in memory, so a few thousand
small ones. It ends by `--steps` or `--minutes`, whichever comes first; the learning rate follows
the one that is nearer its end. Next: tools/make_model.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_video_fft.options.buckets import FRAME_STRIDE, TOKEN_STRIDE, BucketRule
from longcat_video_fft.options.launch import start_logging
from tests.demos.longcat_video_fft.small_vae import (
    build_vae,
    decode,
    encode,
    load_vae,
    save,
    to_pixels,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from torch import Tensor

logger = logging.getLogger("longcat_video_fft")

WARMUP_STEPS = 50
# (up to which part of the training, frames of a clip): first pictures, then short clips. That gives
# more steps in the time, and of a causal VAE they are the same weights.
STAGES = ((0.3, 1), (0.65, 5), (math.inf, None))
CONTRAST_WEIGHT, SQUARE_WEIGHT = 8.0, 2.0  # in the loss
NUM_MEASURED = 1024  # videos whose latents give latents_mean and latents_std
MEASURED_AT_ONCE = 32


def main(argv: list[str] | None = None) -> int:
    start_logging(is_main=True)
    try:
        args = parse(argv)
        train(args)
    except (ValueError, OSError) as error:
        logger.debug("where it happened", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; raises ValueError for what cannot work, before heavy imports."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("videos", type=Path, help="a folder with .mp4 files, also in sub-folders")
    add("out", type=Path, help="the folder vae/ to write")
    add("--steps", type=int, default=6000)
    add("--minutes", type=float, default=math.inf)
    add("--batch-size", type=int, default=16)
    add("--learning-rate", type=float, default=1e-3)
    add("--kl-weight", type=float, default=1e-4, help="of the latents' mean KL to a unit normal")
    add("--base-dim", type=int, default=16, help="released: 96")
    add("--num-res-blocks", type=int, default=1, help="released: 2")
    add("--num-frames", type=int, default=13, help="of each video, 4n + 1")
    add("--num-held-out", type=int, default=32, help="videos to measure with, not trained on")
    add("--start-from", type=Path, help="a folder that this command wrote, trained on")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("steps", "minutes", "batch_size", "learning_rate", "base_dim", "num_res_blocks"):
        if not getattr(args, name) > 0:
            raise ValueError(f"{name}={getattr(args, name)}: must be above 0.")
    for name in ("kl_weight", "num_held_out"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"{name}={getattr(args, name)}: must not be negative.")
    if args.num_frames < 1 or args.num_frames % FRAME_STRIDE != 1:
        raise ValueError(
            f"num_frames={args.num_frames}: must be 4n + 1, for example 13: the VAE packs 4 "
            "frames into one, but the first."
        )
    if args.start_from is not None and not (args.start_from / "config.json").is_file():
        raise ValueError(f"start_from={args.start_from}: has no config.json.")
    if not args.videos.is_dir():
        raise ValueError(f"videos={args.videos}: no such folder ({args.videos.absolute()}).")
    return args


def train(args: argparse.Namespace) -> None:
    """Trains, measures the latents, and writes args.out.

    Raises:
        ValueError: the videos cannot be used, or the loss is not finite.
    """
    import torch

    from longcat_video_fft.model.vae import use_channels_last

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    videos = torch.from_numpy(read_videos(args.videos, num_frames=args.num_frames))
    num_trained = len(videos) - args.num_held_out
    if num_trained < 1:
        raise ValueError(
            f"num_held_out={args.num_held_out}: leaves none of the {len(videos)} videos of "
            f"{args.videos} to train on. Lower it."
        )
    videos = videos.to(device)
    torch.manual_seed(args.seed)
    if args.start_from is None:
        vae = build_vae(args.base_dim, args.num_res_blocks)
    else:
        vae = load_vae(args.start_from)
    vae.to(device)
    use_channels_last(vae)
    num_params = sum(p.numel() for p in vae.parameters())
    logger.info("%.1fM parameters on %s", num_params / 1e6, device)
    steps, seconds = fit(vae, videos[:num_trained], args)
    vae.eval()
    measure_latents(vae, videos[:num_trained][:NUM_MEASURED])
    psnr = measure_psnr(vae, videos[num_trained:])
    save(vae, args.out)
    record = {
        "parameters": num_params, "videos": num_trained, "steps": steps,
        "seconds": round(seconds, 1), "held_out_psnr_db": psnr and round(psnr, 2),
        "shape": list(videos.shape[1:4]),
    }  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    logger.info("%s: %s", args.out, record)


def read_videos(folder: Path, *, num_frames: int) -> np.ndarray:
    """Reads the first frames of all videos, cut to the first one's shape: (N, T, H, W, 3) uint8.

    Raises:
        ValueError: there are none, one cannot be read, or their sides are no multiples of 16.
    """
    import numpy as np

    from longcat_video_fft.media.bad_video import BadVideoError
    from longcat_video_fft.media.decoding import decode_sample
    from longcat_video_fft.media.video_file import FPS, video_shape

    paths = sorted(folder.rglob("*.mp4"))
    if not paths:
        raise ValueError(f"videos={folder}: holds no .mp4 file.")
    shape = video_shape(paths[0])
    if any(side % TOKEN_STRIDE for side in shape):
        raise ValueError(
            f"{paths[0]}: is {shape[1]} x {shape[0]}, and the sides must be multiples of "
            f"{TOKEN_STRIDE}."
        )
    rule = BucketRule(((shape[0] / shape[1], shape),), (num_frames,), target_fps=FPS)

    def read(path: Path) -> np.ndarray:
        try:
            return decode_sample(path.read_bytes(), rule).frames
        except BadVideoError as error:
            raise ValueError(f"{path}: {error}. Delete it, or give other videos.") from error

    started = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        videos = np.stack(list(pool.map(read, paths)))
    logger.info("read %d videos in %.0f s", len(videos), time.monotonic() - started)
    return videos


def fit(vae: Any, videos: Tensor, args: argparse.Namespace) -> tuple[int, float]:
    """Trains on (N, T, H, W, 3) uint8; returns the steps made and the seconds they took."""
    import torch

    device = videos.device
    is_gpu = device.type == "cuda"
    rate = torch.tensor(args.learning_rate, device=device)  # read by the recorded steps
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=is_gpu,
        capturable=is_gpu,
    )  # fmt: skip

    def train_step(clips: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        error, kl = losses(vae, to_pixels(clips))
        (error + args.kl_weight * kl).backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        return torch.stack((error, kl, norm)).detach()

    run = recorded(train_step) if is_gpu else train_step
    generator = torch.Generator().manual_seed(args.seed)
    started, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        rate.fill_(args.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress)))
        chosen = torch.randint(len(videos), (args.batch_size,), generator=generator)
        frames = next(frames for share, frames in STAGES if progress < share)
        values = run(videos[chosen.to(device), :frames])
        step += 1
        seconds = time.monotonic() - started
        progress = max(step / args.steps, seconds / 60 / args.minutes)
        if step % 50 == 0 or progress >= 1:
            log = values.tolist()  # the host waits here alone
            if not all(map(math.isfinite, log)):
                raise ValueError(f"step {step}: the loss is not finite. Lower --learning-rate.")
            logger.info(
                "step %d (%.0f s): error %.4f, KL %.2f, gradient norm %.2f", step, seconds, *log
            )
    return step, time.monotonic() - started


def recorded(train_step: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Records a CUDA graph of the step for each shape of clips: its thousands of small kernels take
    longer to start than to run."""
    import torch

    graphs: dict[Any, tuple[Any, Tensor, Tensor]] = {}

    def run(clips: Tensor) -> Tensor:
        if clips.shape not in graphs:
            given = clips.clone()
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # kernels are chosen, states made
                for _ in range(3):
                    train_step(given)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                values = train_step(given)
            graphs[clips.shape] = graph, given, values
        graph, given, values = graphs[clips.shape]
        given.copy_(clips)
        graph.replay()
        return values

    return run


def losses(vae: Any, video: Tensor) -> tuple[Tensor, Tensor]:
    """Computes (B, 3, T, H, W) in -1..1 -> error of the decoded video, and mean KL of the latents
    (Kingma and Welling 2014, appendix B).

    Pixels unlike their picture's mean count more: the plain absolute error has a resting place
    where small things are left out of the picture.
    """
    import torch

    is_gpu = video.device.type == "cuda"
    # No cache: a recorded step would keep the weights of its recording.
    with torch.autocast(video.device.type, torch.bfloat16, enabled=is_gpu, cache_enabled=False):
        mean, log_var = encode(vae, video).float().chunk(2, dim=1)
        log_var = log_var.clamp(-30.0, 20.0)
        latents = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
        decoded = decode(vae, latents)
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var)
    contrast = (video - video.mean(dim=(3, 4), keepdim=True)).abs().amax(dim=1, keepdim=True)
    weights = 1 + CONTRAST_WEIGHT * contrast
    error = (decoded.float() - video).abs()
    error = (error + SQUARE_WEIGHT * error.square()) * weights / weights.mean()
    return error.mean(), kl.mean()


def measure_latents(vae: Any, videos: Tensor) -> None:
    """Puts the latents' mean and standard deviation by channel into the VAE's config."""
    import torch

    with torch.inference_mode():
        means = [
            encode(vae, to_pixels(part)).chunk(2, dim=1)[0]
            for part in videos.split(MEASURED_AT_ONCE)
        ]
    latents = torch.cat(means).double()
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    logger.info("latents' std by channel: %s", ", ".join(f"{s:.2f}" for s in std.tolist()))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def measure_psnr(vae: Any, videos: Tensor) -> float | None:
    """Measures decoded latents against the videos, in dB over all pixels; None without videos."""
    import torch

    if not len(videos):
        return None
    error = 0.0
    with torch.inference_mode():
        for part in videos.split(MEASURED_AT_ONCE):
            pixels = to_pixels(part)
            decoded = decode(vae, encode(vae, pixels).chunk(2, dim=1)[0]).clamp(-1, 1)
            error += (decoded - pixels).square().mean().item() / 4 * len(part)  # of 0..1
    return -10 * math.log10(error / len(videos))


if __name__ == "__main__":
    sys.exit(main())

"""Makes a model's folder with nothing pretrained in it, laid out as the released LongCat-Video.

    python -m longcat_video_fft.tools.make_model OUT --size small --captions VIDEOS --vae VAE

    OUT/dit/config.json     the transformer's shape; training starts it by transformer_init random
    OUT/text_encoder/       UMT5 with fixed random weights: a word is a random direction
    OUT/tokenizer/          byte pairs of the captions, so that a usual word is one token
    OUT/vae/  scheduler/    the VAE is given, or random at the released shape

A random UMT5 distinguishes words and knows nothing of their meaning: good for few of them.
tests/demos/longcat_video_fft/train_vae.py of the repository makes a VAE.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_video_fft.dataset.captions import clean_caption
from longcat_video_fft.options.launch import start_logging

if TYPE_CHECKING:
    from collections.abc import Iterable

logger = logging.getLogger("longcat_video_fft")

# The transformer's shape, and the text encoder's, whose d_model is its caption_channels.
SIZES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "demo": (
        {"hidden_size": 192, "depth": 4, "num_heads": 6, "adaln_tembed_dim": 192},
        {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 1, "num_heads": 4},
    ),
    "small": (
        {"hidden_size": 640, "depth": 8, "num_heads": 10, "adaln_tembed_dim": 512},
        {"d_model": 256, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 8},
    ),
    "released": (
        {"hidden_size": 4096, "depth": 48, "num_heads": 32, "adaln_tembed_dim": 512},
        {"d_model": 4096, "d_kv": 64, "d_ff": 512, "num_layers": 1, "num_heads": 4},
    ),
}
RELEASED_SHIFT = 12.0  # of the scheduler; an export writes the flow_shift of its training
VOCABULARY = 2048  # at most
SPECIAL = ("<pad>", "</s>", "<unk>")


def main(argv: list[str] | None = None) -> int:
    start_logging(is_main=True)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), required=True)
    parser.add_argument("--captions", type=Path, required=True, help="a folder with .txt files")
    parser.add_argument("--vae", type=Path, help="a folder vae/; released size only: else random")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    args = parser.parse_args(argv)
    try:
        make_model(args.out, args.size, captions=args.captions, vae=args.vae, seed=args.seed)
    except (ValueError, OSError) as error:
        logger.debug("where it happened", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 1
    logger.info("a model of size %s is in %s", args.size, args.out)
    return 0


def make_model(out: Path, size: str, *, captions: Path, vae: Path | None, seed: int) -> None:
    """Writes all parts; those that are there are replaced.

    Raises:
        ValueError: no captions, no VAE, or a VAE that is not one.
    """
    if vae is None and size != "released":
        raise ValueError(
            f"vae is needed with --size {size}; "
            "tests/demos/longcat_video_fft/train_vae.py makes one."
        )
    if vae is not None and not (vae / "config.json").is_file():
        raise ValueError(
            f"vae={vae}: has no config.json. Give the folder that "
            "tests/demos/longcat_video_fft/train_vae.py wrote."
        )
    texts = read_captions(captions)
    transformer, text_encoder = SIZES[size]
    out.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(out / "tokenizer", texts)
    write_text_encoder(out / "text_encoder", text_encoder, vocabulary=vocabulary, seed=seed)
    write_transformer_config(out / "dit", transformer, captions_dim=text_encoder["d_model"])
    write_scheduler(out / "scheduler")
    if vae is None:
        write_random_vae(out / "vae", seed=seed)
    elif not (out / "vae").exists() or not vae.samefile(out / "vae"):
        shutil.rmtree(out / "vae", ignore_errors=True)
        shutil.copytree(vae, out / "vae")


def read_captions(folder: Path) -> list[str]:
    """Reads the cleaned captions; raises ValueError when there are none."""
    paths = sorted(folder.rglob("*.txt")) if folder.is_dir() else []
    if not paths:
        raise ValueError(f"captions={folder}: holds no .txt file.")
    return [clean_caption(path.read_text("utf-8")) for path in paths]


def write_tokenizer(folder: Path, texts: Iterable[str]) -> int:
    """Merges byte pairs as often as `texts` have them, and leaves any other text in bytes; ends
    every text with </s>, as UMT5's does. Returns the number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return len(fast)


def write_text_encoder(folder: Path, shape: dict[str, int], *, vocabulary: int, seed: int) -> None:
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    UMT5EncoderModel(UMT5Config(vocab_size=vocabulary, **shape)).save_pretrained(folder)  # pyright: ignore


def write_transformer_config(folder: Path, shape: dict[str, int], *, captions_dim: int) -> None:
    """Writes all that the training needs to start a transformer from nothing."""
    from diffusers import __version__ as diffusers_version

    config: dict[str, Any] = {
        "_class_name": "LongCatVideoTransformer3DModel",
        "_diffusers_version": diffusers_version,
        "in_channels": 16,
        "out_channels": 16,
        **shape,
        "caption_channels": captions_dim,
        "mlp_ratio": 4,
        "frequency_embedding_size": 256,
        "patch_size": [1, 2, 2],
        "text_tokens_zero_pad": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_scheduler(folder: Path) -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler as Scheduler,
    )

    Scheduler(shift=RELEASED_SHIFT).save_pretrained(folder)


def write_random_vae(folder: Path, *, seed: int) -> None:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    torch.manual_seed(seed)
    vae = AutoencoderKLWan()
    torch.nn.Module.to(vae, dtype=torch.bfloat16)
    vae.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())

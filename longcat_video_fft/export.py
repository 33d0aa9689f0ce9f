"""A trained transformer and the parts it came with -> a folder to generate from.

    python -m longcat_video_fft.export --checkpoint OUT/checkpoint-2500 \
        --config training_config.json --output DIR [--layout diffusers|official|both] [--ema]

needs one process and no GPU. Training ends in the same folder, OUT itself:

    model_index.json  pipeline.py        read by DiffusionPipeline.from_pretrained(OUT,
    transformer/  (weights and code)         trust_remote_code=True, torch_dtype=torch.bfloat16)
    vae/  text_encoder/  tokenizer/  scheduler/
    dit/                                 the official layout: the same weights, linked

Code ships in the export, since diffusers has no LongCat-Video. Next: generate.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from longcat_video_fft.options.launch import start_logging
from longcat_video_fft.options.load import load_config
from longcat_video_fft.training.export import LAYOUTS, export_checkpoint

logger = logging.getLogger("longcat_video_fft")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="OUT/checkpoint-N, or latest")
    parser.add_argument("--config", required=True, help="the training_config.json of the run")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, default="both")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    args, overrides = parser.parse_known_args(argv)
    start_logging(is_main=True)
    try:
        config = load_config(["--config", args.config, *overrides])
        export_checkpoint(
            args.checkpoint, config, args.output, layout=args.layout, use_ema=args.ema
        )
    except (ValueError, OSError) as error:
        logger.debug("where it happened", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 1
    logger.info("exported to %s", args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

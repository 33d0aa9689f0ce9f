"""A tiny model with all its parts, and a config beside it, for tests of the dry run."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import torch

from longcat_video_fft.model.loading import save_transformer
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from tests.longcat_video_fft.support.tiny import Tiny, write_configs

if TYPE_CHECKING:
    from pathlib import Path

TINY_DIT: dict[str, Any] = {
    "hidden_size": 64, "num_heads": 4, "depth": 3, "caption_channels": 32,
    "adaln_tembed_dim": 32, "frequency_embedding_size": 32, "text_tokens_zero_pad": True,
}  # fmt: skip


def add_dit(model: Path, **options: Any) -> None:
    torch.manual_seed(0)
    transformer = LongCatVideoTransformer3DModel(**TINY_DIT | options)
    save_transformer(transformer, model / "dit", dtype=torch.bfloat16, is_main=True)


def write_planned(folder: Path, tiny: Tiny, **training: Any) -> Path:
    """Writes a config whose model is a copy of the tiny one, with dit/; results go below
    `folder`."""
    model = folder / "model"
    shutil.copytree(tiny.model, model)
    add_dit(model)
    own = Tiny(model, tiny.videos)
    values: dict[str, Any] = {
        "output_dir": str(folder / "out"), "logging_dir": str(folder / "logs"),
        "max_train_steps": 20,
    }  # fmt: skip
    return write_configs(folder / "run", own, **{**values, **training})

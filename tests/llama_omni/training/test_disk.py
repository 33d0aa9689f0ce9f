"""Too little disk is reported before training, with both numbers."""

from __future__ import annotations

import shutil
from collections import namedtuple
from typing import TYPE_CHECKING

import pytest
from torch import nn

from llama_omni.options.config import TrainConfig
from llama_omni.training.checkpoint import check_disk

if TYPE_CHECKING:
    from pathlib import Path

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        # 1000 weights, 600 of them trained; the final model is 2 bytes a weight.
        ({"save_strategy": "no"}, 2000),
        ({"save_total_limit": 2}, 600 * 12 * 3 + 2000),
        ({"save_total_limit": 2, "optimizer_precision": "8bit"}, 600 * 4 * 3 + 2000),
        ({"save_total_limit": 2, "bf16": False}, 600 * 12 * 3 + 4000),
    ],
)
def test_room_for_checkpoints_and_final_model(
    changes: dict[str, object], needed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.ModuleDict(
        {"frozen": nn.Linear(20, 20, bias=False), "new": nn.Linear(20, 30, False)}
    )
    model["frozen"].requires_grad_(False)
    config = TrainConfig(**changes)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, needed))
    check_disk(model, config, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, needed - 1))
    with pytest.raises(ValueError, match=r"final_model needs .* are free"):
        check_disk(model, config, tmp_path)

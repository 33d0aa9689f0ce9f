"""Under HSDP the copies of parameters, states and averages stay equal, bit for bit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

from tests.longcat_video_fft.support.small_engine import make_engine, own_state, train_steps
from tests.longcat_video_fft.support.spawn import spawn

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.dist


def train_and_compare(path: Path) -> None:
    """Takes twenty steps with every optimizer; returns the share of bytes that differ between
    replicas."""
    found: dict[str, float] = {}
    for optimizer in ("adamw", "adamw_bf16", "adamw_8bit"):
        engine = make_engine(optimizer=optimizer, fsdp_replicate_size=2, ema_decay=0.9)
        train_steps(engine, 0, 20)
        for name, value in own_state(engine).items():
            own = value.contiguous().reshape(-1).view(torch.uint8)
            other = own.clone()
            dist.broadcast(other, src=0)
            count = torch.tensor([float((own != other).sum())])
            dist.all_reduce(count)
            found[f"{optimizer} {name}"] = count.item() / max(1, own.numel())
    if dist.get_rank() == 0:
        path.write_text(json.dumps(found))


def test_replicas_stay_equal(tmp_path: Path) -> None:
    spawn(train_and_compare, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) > 100
    assert {name: share for name, share in found.items() if share > 0} == {}

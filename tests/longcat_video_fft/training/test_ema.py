"""The moving average: its formula, and weights exchanged for it under FSDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from longcat_video_fft.model.sharding import local
from longcat_video_fft.training.ema import Ema
from tests.longcat_video_fft.support.small_engine import (
    differing,
    make_engine,
    make_inputs,
    own_state,
    train_steps,
)
from tests.longcat_video_fft.support.spawn import spawn


def test_average_warms_up_to_its_decay() -> None:
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    ema = Ema(module, decay=0.5)
    expected = 0.0
    for n in range(12):
        module.weight.data.fill_(n + 1.0)
        ema.update(module)
        assert module.weight.item() == n + 1  # the weights themselves stay
        decay = min(0.5, (1 + n) / (10 + n))  # 1/10, 2/11, ... and 1/2 from n = 8
        expected = decay * expected + (1 - decay) * (n + 1)
        assert ema.averages["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(0.5 * (12 + 0.5 * 11 + 0.25 * 10), rel=0.2)


def test_average_of_bf16_weights_keeps_small_changes() -> None:
    module = nn.Linear(4, 4, bias=False).bfloat16()
    module.weight.data.fill_(1.0)
    ema = Ema(module, decay=0.9999)
    ema.num_updates.fill_(10**6)
    module.weight.data.fill_(1.0 + 2**-7)
    for _ in range(10):
        ema.update(module)
    average = ema.averages["weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full((4, 4), 1 + 2**-7 * (1 - 0.9999**10)))


def swap_under_fsdp() -> None:
    inputs = make_inputs(0)
    for reshards in (True, False):
        options: dict[str, Any] = {"ema_decay": 0.5, "fsdp_reshard_after_forward": reshards}
        engine = make_engine(**options)
        train_steps(engine, 0, 3)
        ema = engine.ema
        assert ema is not None
        reference = make_engine()
        for name, param in reference.module.named_parameters():
            local(param.detach()).copy_(local(ema.averages[name]))
        with torch.no_grad():
            own, average = engine.module(*inputs), reference.module(*inputs)
            assert not torch.equal(own, average)
            with ema.swapped(engine.module):
                assert torch.equal(engine.module(*inputs), average)
            assert torch.equal(engine.module(*inputs), own)
            with pytest.raises(RuntimeError, match="validating"), ema.swapped(engine.module):
                raise RuntimeError("while validating")
            assert torch.equal(engine.module(*inputs), own)
        train_steps(engine, 3, 4)  # the next step starts from its own, too
        again = make_engine(**options)
        train_steps(again, 0, 4)
        assert differing(own_state(engine), own_state(again)) == []


def test_swapped_under_fsdp_and_back() -> None:
    """FSDP keeps some gathered weights after a forward without gradient: they must not be used."""
    spawn(swap_under_fsdp)


def test_frozen_parameters_have_no_average() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    ema = Ema(module, decay=0.5)
    assert list(ema.averages) == ["0.weight", "0.bias"]


def test_state_moves_to_another() -> None:
    module = nn.Linear(3, 2)
    ours, theirs = Ema(module, decay=0.5), Ema(nn.Linear(3, 2), decay=0.5)
    module.weight.data.add_(1.0)
    ours.update(module)
    state, read = ours.state_dict(), theirs.state_dict()
    read["num_updates"].copy_(state["num_updates"])  # in place, as a checkpoint is read
    for name, average in read["averages"].items():
        average.copy_(state["averages"][name])
    assert int(theirs.num_updates) == 1
    assert torch.equal(theirs.averages["weight"], ours.averages["weight"])

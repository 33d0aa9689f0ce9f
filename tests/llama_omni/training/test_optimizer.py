"""AdamW at three precisions: equality with torch, unbiased rounding, no lost updates, schedule."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama_omni.model.sharding import random_bits, random_keys
from llama_omni.options.config import TrainConfig
from llama_omni.stage2_trainer import parameter_groups
from llama_omni.training import optimizer
from llama_omni.training.optimizer import (
    FLOAT8_MIN,
    LowPrecisionAdamW,
    build_optimizer,
    lr_scale,
    round_stochastically,
    set_lr,
)


def build(model: nn.Module, precision: str, **options: Any) -> torch.optim.Optimizer:
    config = TrainConfig(
        optimizer_precision=precision, freeze_backbone=True, **{"learning_rate": 1e-3, **options}
    )
    named = nn.ModuleDict({"speech_generator": model})
    return build_optimizer(parameter_groups(named, config), config)


def bits(count: int, *parts: object) -> Tensor:
    return random_bits(torch.tensor([*random_keys(*parts), 0, 0], dtype=torch.int32),
                       torch.empty(count))  # fmt: skip


def fit(precision: str, *, lr: float, num_steps: int = 400) -> tuple[float, float]:
    """(first loss, last loss) of a linear regression whose weights need many small updates."""
    torch.manual_seed(0)
    inputs = torch.randn(256, 32)
    target = inputs @ (torch.randn(32, 16) + 1.0)
    model = nn.Linear(32, 16, bias=False)
    dtype = torch.float32 if precision == "fp32_master" else torch.bfloat16
    with torch.no_grad():
        model.weight.copy_(torch.ones(16, 32))
    model.to(dtype)
    if precision == "bf16":
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    else:
        optimizer = build(model, precision, learning_rate=lr)
    found = []
    for _ in range(num_steps):
        # The gradient in float32, so that the optimizers differ in nothing else.
        error = inputs @ model.weight.float().T - target
        found.append(error.square().mean().item())
        model.weight.grad = (2 * error.T @ inputs / error.numel()).to(dtype)
        optimizer.step()
    return found[0], found[-1]


def test_fp32_is_torchs_adamw() -> None:
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    options: dict[str, Any] = {"weight_decay": 0.1, "adam_beta1": 0.8, "adam_epsilon": 1e-6}
    optimizer = build(ours, "fp32_master", **options)
    reference = torch.optim.AdamW(
        theirs.parameters(), lr=1e-3, betas=(0.8, 0.999), eps=1e-6, weight_decay=0.1
    )
    for _ in range(5):
        x = torch.randn(7, 5)
        for model, opt in ((ours, optimizer), (theirs, reference)):
            opt.zero_grad()
            model(x).square().sum().backward()
            opt.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_low_precision_first_step_is_adamws(weight_decay: float) -> None:
    """Weights so large in step that bf16 holds the result: the formula, decay included."""
    ours = nn.Linear(64, 8).bfloat16()
    reference = nn.Linear(64, 8)
    reference.load_state_dict({k: v.float() for k, v in ours.state_dict().items()})
    optimizer = build(ours, "bf16_stochastic", learning_rate=1.0, weight_decay=weight_decay)
    expected = torch.optim.AdamW(reference.parameters(), lr=1.0, weight_decay=weight_decay)
    for model, opt in ((ours, optimizer), (reference, expected)):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        opt.step()
    torch.testing.assert_close(ours.weight.float(), reference.weight, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("dtype", "base", "step"),
    [
        (torch.bfloat16, 1.0, 2.0**-7),
        (torch.float8_e4m3fn, 1.0, 2.0**-3),
        (torch.float8_e4m3fn, 2.0**-6 - FLOAT8_MIN, FLOAT8_MIN),  # not normal
        (torch.float8_e4m3fn, 0.0, FLOAT8_MIN),
    ],
)
def test_stochastic_rounding_keeps_the_mean(dtype: torch.dtype, base: float, step: float) -> None:
    for share in (0.1, 0.5, 0.9):
        for sign in (1.0, -1.0):
            value = sign * (base + share * step)
            drawn = bits(40_000, share, sign)
            rounded = round_stochastically(torch.full((40_000,), value), dtype, drawn).float()
            assert set(rounded.tolist()) == {sign * base, sign * (base + step)}
            error = rounded.double().mean().item() - value
            assert abs(error) < 4 * step * math.sqrt(share * (1 - share) / 40_000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_stochastic_rounding_keeps_what_is_exact(dtype: torch.dtype) -> None:
    values = torch.randn(1000).to(dtype).float()
    assert torch.equal(round_stochastically(values, dtype, bits(1000)).float(), values)


def test_without_a_c_compiler_updates_are_not_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton needs one; the message names it, once."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("shutil.which", lambda name: None)
    optimizer._has_c_compiler.cache_clear()
    for eight_bit in (False, True):
        assert optimizer.pick_kernel("cuda", eight_bit) is optimizer.adamw_update
    assert caplog.text.count("no C compiler (gcc or clang)") == 1
    optimizer._has_c_compiler.cache_clear()


def test_plain_bf16_loses_updates_and_ours_do_not() -> None:
    lr = 2e-3  # updates under half of bf16's spacing around 1, 2^-8
    start, reached = fit("fp32_master", lr=lr, num_steps=600)
    lost = fit("bf16", lr=lr, num_steps=600)[1]
    gain = start - reached
    assert gain > 0.5 * start
    assert start - lost < 0.5 * gain
    for precision in ("bf16_stochastic", "8bit"):
        assert start - fit(precision, lr=lr, num_steps=600)[1] > 0.97 * gain


def test_8bit_states_are_small() -> None:
    model = nn.Linear(256, 64).bfloat16()
    optimizer = build(model, "8bit")
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    state = optimizer.state[model.weight]
    assert state["exp_avg"].dtype == state["exp_avg_rms"].dtype == torch.float8_e4m3fn
    assert state["exp_avg_scale"].shape == (64, 1)
    assert optimizer.state[model.bias]["exp_avg"].dtype == torch.bfloat16
    num_bytes = sum(value.nbytes for value in state.values())
    assert num_bytes / model.weight.numel() < 2.1


def test_8bit_updates_stay_bounded_where_gradients_are_small_or_stop() -> None:
    """A tiny entry beside a large one: its second moment must not vanish before its first."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(4, 64, dtype=torch.bfloat16))
    optimizer = LowPrecisionAdamW([weight], eight_bit=True, seed=0, lr=1e-3, betas=(0.9, 0.999),
                                  eps=1e-8)  # fmt: skip
    scale = torch.logspace(0, -7, 64)  # of the gradients along a row
    previous = weight.detach().clone()
    largest = 0.0
    for step in range(60):
        sign = torch.randn(4, 64)
        weight.grad = (sign * scale * (0.0 if step % 7 == 6 else 1.0)).bfloat16()
        optimizer.step()
        largest = max(largest, (weight.detach() - previous).abs().max().item())
        previous = weight.detach().clone()
    assert 1e-4 < largest < 5e-3  # AdamW itself moves by about one lr


@pytest.mark.parametrize("precision", ["bf16_stochastic", "8bit"])
def test_a_loaded_optimizer_goes_on_bitwise(precision: str) -> None:
    def gradients(step: int) -> Tensor:
        return torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).bfloat16()

    whole, resumed = (nn.Linear(16, 8, bias=False).bfloat16() for _ in range(2))
    first, second = build(whole, precision), build(resumed, precision)
    for step in range(6):
        if step == 3:
            resumed.load_state_dict(whole.state_dict())
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        whole.weight.grad = gradients(step)
        first.step()
        if step >= 3:
            resumed.weight.grad = gradients(step)
            second.step()
    assert torch.equal(whole.weight, resumed.weight)
    for name, value in first.state[whole.weight].items():
        other = second.state[resumed.weight][name]
        assert value.dtype == other.dtype
        assert torch.equal(value.float(), other.float())


def test_schedules() -> None:
    def scales(kind: str, warmup_steps: int = 2) -> list[float]:
        return [lr_scale(step, total_steps=10, warmup_steps=warmup_steps, kind=kind)
                for step in range(10)]  # fmt: skip

    assert scales("constant") == [1.0] * 10
    assert scales("constant_with_warmup") == [0.5, *[1.0] * 9]
    assert scales("linear")[:3] == [0.5, 1.0, 1.0]
    assert scales("linear")[-1] == pytest.approx(1 / 8)
    cosine = scales("cosine")
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine[6] == pytest.approx(0.5)
    assert cosine == sorted(cosine[:2]) + sorted(cosine[2:], reverse=True)
    assert scales("cosine", 1)[0] == 1.0
    assert scales("linear", 20)[-1] == 0.5  # a run shorter than its warmup


def test_groups_keep_their_ratio() -> None:
    model = nn.Linear(2, 2)
    groups = [{"params": [model.weight], "lr": 1e-3}, {"params": [model.bias], "lr": 1e-2}]
    optimizer = build_optimizer(groups, TrainConfig())
    assert set_lr(optimizer, 0.5) == 5e-4
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-3]
    assert set_lr(optimizer, 1.0) == 1e-3

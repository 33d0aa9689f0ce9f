"""AdamW at three precisions: torch's formula, unbiased rounding, no lost updates, any sharding."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longcat_video_fft.model.sharding import first_element, random_bits, random_keys
from longcat_video_fft.options.config import TrainConfig
from longcat_video_fft.training.optimizer import (
    FLOAT8_MIN,
    LowPrecisionAdamW,
    build_optimizer,
    lr_scale,
    round_stochastically,
    set_lr,
)
from longcat_video_fft.training.parallel import parameter_groups
from tests.longcat_video_fft.support.spawn import spawn

if TYPE_CHECKING:
    from pathlib import Path

LOW = ("adamw_bf16", "adamw_8bit")


def build(model: nn.Module, optimizer: str, **options: Any) -> torch.optim.Optimizer:
    config = TrainConfig(optimizer=optimizer, **{"learning_rate": 1e-3, **options})
    return build_optimizer(parameter_groups(model, config), config)


def bits(count: int, *parts: object, first: int = 0) -> Tensor:
    return random_bits(torch.tensor([*random_keys(*parts), first, 0], dtype=torch.int32),
                       torch.empty(count))  # fmt: skip


def keyed_lowbias32(x: int, key: int) -> int:
    x %= 1 << 32
    x = ((x ^ (x >> 16)) * 0x7FEB352D + key) % (1 << 32)
    x = (x ^ (x >> 15)) * 0x846CA68B % (1 << 32)
    return x ^ (x >> 16)


def fit(optimizer_name: str, *, lr: float, num_steps: int) -> tuple[float, float]:
    """Returns (first loss, last loss) of a linear regression whose weights need many small
    updates."""
    torch.manual_seed(0)
    inputs = torch.randn(256, 32)
    target = inputs @ (torch.randn(32, 16) + 1.0)
    model = nn.Linear(32, 16, bias=False)
    dtype = torch.float32 if optimizer_name == "adamw" else torch.bfloat16
    with torch.no_grad():
        model.weight.copy_(torch.ones(16, 32))
    model.to(dtype)
    if optimizer_name == "plain bf16":
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    else:
        optimizer = build(model, optimizer_name, learning_rate=lr)
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
    options: dict[str, Any] = {"adam_weight_decay": 0.1, "adam_beta1": 0.8, "adam_epsilon": 1e-6}
    optimizer = build(ours, "adamw", **options)
    groups = [{"params": [theirs.weight]}, {"params": [theirs.bias], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.999), eps=1e-6, weight_decay=0.1)
    for _ in range(5):
        x = torch.randn(7, 5)
        for model, opt in ((ours, optimizer), (theirs, reference)):
            opt.zero_grad()
            model(x).square().sum().backward()
            opt.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


@pytest.mark.parametrize("optimizer_name", LOW)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_low_precision_steps_are_adamws(optimizer_name: str, weight_decay: float) -> None:
    """Weights and lr are large, so that bf16 holds the result: the formula, decay included."""
    torch.manual_seed(0)
    ours = nn.Linear(64, 8, bias=False).bfloat16()
    reference = nn.Linear(64, 8, bias=False)
    reference.load_state_dict({k: v.float() for k, v in ours.state_dict().items()})
    options = {"learning_rate": 1.0, "adam_weight_decay": weight_decay}
    optimizer = build(ours, optimizer_name, **options)
    expected = torch.optim.AdamW(reference.parameters(), lr=1.0, weight_decay=weight_decay)
    for step in range(3):
        grads = torch.full((8, 64), 1.0 + step)
        ours.weight.grad, reference.weight.grad = grads.bfloat16(), grads
        optimizer.step()
        expected.step()
    tolerance = 0.02 if optimizer_name == "adamw_bf16" else 0.15
    torch.testing.assert_close(ours.weight.float(), reference.weight, rtol=tolerance, atol=0.05)


def test_bits_are_uniform_and_independent() -> None:
    count = 1 << 18
    words = {name: bits(count, *name) for name in [(0, 1, 1), (0, 1, 2), (0, 2, 1), (1, 1, 1)]}
    place = torch.arange(32)
    noise = 5 / (2 * math.sqrt(count))  # 5 standard deviations of the share of ones
    planes = {name: (word[:, None] >> place) & 1 for name, word in words.items()}
    for plane in planes.values():
        assert (plane.double().mean(0) - 0.5).abs().max() < noise
        for shift in (1, 2, 64, 4096):  # neighbors in a row, and rows
            assert ((plane[shift:] == plane[:-shift]).double().mean(0) - 0.5).abs().max() < noise
        for other in (1, 4, 16):  # bits of a word
            same = (plane == plane.roll(other, 1)).double().mean(0)
            assert (same - 0.5).abs().max() < noise
    first = planes[0, 1, 1]
    for name in list(planes)[1:]:
        assert ((first == planes[name]).double().mean(0) - 0.5).abs().max() < noise


def test_bits_belong_to_places() -> None:
    whole = bits(1000, 7, 3, 2)
    assert torch.equal(whole[337:], bits(663, 7, 3, 2, first=337))
    keys = torch.tensor([*random_keys(7, 3, 2), 0, 40], dtype=torch.int32)
    assert torch.equal(random_bits(keys, torch.empty(25, 40)), whole.view(25, 40))
    # The published function in unsigned arithmetic, which every machine must repeat.
    words = [key % (1 << 32) for key in random_keys(7, 3, 2)]
    assert [word % (1 << 32) for word in whole[:50].tolist()] == [
        keyed_lowbias32(place + words[0], words[1]) for place in range(50)
    ]


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
            words = bits(40_000, share, sign)
            rounded = round_stochastically(torch.full((40_000,), value), dtype, words).float()
            assert set(rounded.tolist()) == {sign * base, sign * (base + step)}
            error = rounded.double().mean().item() - value
            assert abs(error) < 4 * step * math.sqrt(share * (1 - share) / 40_000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_stochastic_rounding_keeps_what_is_exact(dtype: torch.dtype) -> None:
    values = torch.randn(1000).to(dtype).float()
    assert torch.equal(round_stochastically(values, dtype, bits(1000)).float(), values)


def test_plain_bf16_loses_updates_and_ours_do_not() -> None:
    lr = 2e-3  # updates under half of bf16's spacing around 1, 2^-8
    start, reached = fit("adamw", lr=lr, num_steps=600)
    lost = fit("plain bf16", lr=lr, num_steps=600)[1]
    gain = start - reached
    assert gain > 0.5 * start
    assert start - lost < 0.5 * gain
    for optimizer_name in LOW:
        assert start - fit(optimizer_name, lr=lr, num_steps=600)[1] > 0.97 * gain


def test_8bit_states_are_small() -> None:
    model = nn.Linear(256, 64).bfloat16()
    optimizer = build(model, "adamw_8bit")
    state = optimizer.state[model.weight]
    assert state["exp_avg"].dtype == state["exp_avg_rms"].dtype == torch.float8_e4m3fn
    assert state["exp_avg_scale"].shape == (64, 1)
    assert optimizer.state[model.bias]["exp_avg"].dtype == torch.bfloat16
    num_bytes = sum(value.nbytes for value in state.values())
    assert num_bytes / model.weight.numel() < 2.1


def test_8bit_updates_stay_bounded_where_gradients_are_small_or_stop() -> None:
    """The average of squares of a tiny entry beside a large one must not vanish before its mean."""
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


SHAPES = ((7, 12), (5, 3, 1, 2, 2), (3,), (1, 4))  # rows that do not divide, one process empty


def start_and_gradients(step: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=random).bfloat16() for shape in SHAPES]


def run_steps(optimizer_name: str, place: Any) -> tuple[list[Any], torch.optim.Optimizer]:
    """Runs three steps; `place` shards a tensor."""
    params = [nn.Parameter(place(value)) for value in start_and_gradients(0)]
    config = TrainConfig(optimizer=optimizer_name, learning_rate=1e-2)
    optimizer = build_optimizer(parameter_groups(nn.ParameterList(params), config), config)
    for step in range(1, 4):
        for param, grad in zip(params, start_and_gradients(step), strict=True):
            param.grad = place(grad)
        optimizer.step()
    return params, optimizer


def whole(value: Any) -> Tensor:
    value = value.detach().float()  # gloo sends no float8
    return value.full_tensor() if isinstance(value, DTensor) else value


def results(optimizer_name: str, place: Any) -> list[dict[str, Tensor]]:
    params, optimizer = run_steps(optimizer_name, place)
    return [
        {"weight": whole(param), **{k: whole(v) for k, v in optimizer.state[param].items()}}
        for param in params
    ]


def save_sharded_results(path: Path) -> None:
    lines = init_device_mesh("cpu", (2,))
    square = init_device_mesh("cpu", (2, 1))
    found = {}
    for optimizer_name in LOW:
        found[optimizer_name] = results(
            optimizer_name, lambda value: distribute_tensor(value, lines, [Shard(0)])
        )
        found[f"{optimizer_name} replicated"] = results(
            optimizer_name, lambda value: distribute_tensor(value, square, [Replicate(), Shard(0)])
        )
    columns = distribute_tensor(torch.zeros(4, 4), lines, [Shard(1)])
    with pytest.raises(ValueError, match="sharded by rows"):
        first_element(columns)
    if dist.get_rank() == 0:
        torch.save(found, path)


def test_two_processes_give_the_bits_of_one(tmp_path: Path) -> None:
    spawn(save_sharded_results, tmp_path / "sharded.pt")
    sharded = torch.load(tmp_path / "sharded.pt")
    for optimizer_name in LOW:
        alone = results(optimizer_name, lambda value: value)
        for name in (optimizer_name, f"{optimizer_name} replicated"):
            for ours, theirs in zip(alone, sharded[name], strict=True):
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_where_a_large_parameter_is_cut_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = results("adamw_8bit", lambda value: value)
    monkeypatch.setattr("longcat_video_fft.training.optimizer.CHUNK", {"cpu": 7, "cuda": 7})
    for ours, theirs in zip(results("adamw_8bit", lambda value: value), expected, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("optimizer_name", ["adamw", *LOW])
def test_a_loaded_optimizer_continues_bitwise(optimizer_name: str) -> None:
    def gradients(step: int) -> Tensor:
        return torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).to(dtype)

    dtype = torch.float32 if optimizer_name == "adamw" else torch.bfloat16
    first_model, second_model = (nn.Linear(16, 8, bias=False).to(dtype) for _ in range(2))
    first, second = build(first_model, optimizer_name), build(second_model, optimizer_name)
    for step in range(6):
        if step == 3:
            second_model.load_state_dict(first_model.state_dict())
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        first_model.weight.grad = gradients(step)
        first.step()
        if step >= 3:
            second_model.weight.grad = gradients(step)
            second.step()
    assert torch.equal(first_model.weight, second_model.weight)
    for name, value in first.state[first_model.weight].items():
        other = second.state[second_model.weight][name]
        assert value.dtype == other.dtype
        assert torch.equal(value.float(), other.float())


class Work(TorchDispatchMode):
    """Counts torch's operations and the values that they give."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        self.values += sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def test_speed_is_sane() -> None:
    """The hash and the rounding in plain PyTorch take some ten times a fused fp32 step, not 1000.

    That is some 110 values a weight, in operations on many weights each.
    """
    model = nn.Linear(1024, 2048, bias=False).bfloat16()
    optimizer = build(model, "adamw_8bit")
    model.weight.grad = torch.randn_like(model.weight)
    optimizer.step()
    with Work() as work:
        optimizer.step()
    num_weights = model.weight.numel()
    assert num_weights < work.values < 300 * num_weights
    assert work.operations < num_weights / 200


def test_groups_cover_all_and_decay_only_matrices() -> None:
    fixed = nn.Linear(2, 2).requires_grad_(False)
    model = nn.ModuleDict({"linear": nn.Linear(4, 3), "norm": nn.LayerNorm(3), "fixed": fixed})
    config = TrainConfig(learning_rate=1e-3, adam_weight_decay=0.2)
    decayed, plain = parameter_groups(model, config)
    assert [param.shape for param in decayed["params"]] == [(3, 4)]
    assert len(plain["params"]) == 3
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)
    optimizer = build_optimizer([decayed, plain | {"lr": 1e-2}], config)
    assert set_lr(optimizer, 0.5) == 5e-4
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-3]
    assert set_lr(optimizer, 1.0) == 1e-3


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
    assert scales("cosine", 0)[0] == 1.0
    assert scales("linear", 20)[-1] == 0.5  # a run shorter than its warmup


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer_name", LOW)
def test_the_gpu_updates_as_the_cpu_does(
    optimizer_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled kernel, for parameters there and for offloaded ones, does as plain PyTorch."""
    on_gpu = results(optimizer_name, lambda value: value.cuda())
    offloaded = results(optimizer_name, lambda value: value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = results(optimizer_name, lambda value: value)
    for there, streamed, here in zip(on_gpu, offloaded, expected, strict=True):
        for name, value in here.items():
            assert torch.equal(there[name].cpu(), streamed[name])
            # A multiply-add in one instruction may round otherwise, and then up for down.
            torch.testing.assert_close(streamed[name], value, rtol=0.13, atol=1e-3)
            assert (streamed[name] != value).double().mean() < 0.1 or name.endswith("_scale")

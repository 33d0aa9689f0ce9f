"""AdamW at three precisions, and the learning-rate schedule.

| optimizer_precision | weights | states | bytes a parameter with its gradient |
|---|---|---|---|
| fp32_master | fp32 | fp32 | 16 |
| bf16_stochastic | bf16, stochastic rounding | bf16, stochastic rounding | 8 |
| 8bit | bf16, stochastic rounding | float8 with a scale a row, stochastic rounding | 6 |

Rounding to nearest would drop every update below 1/256 of a weight, which at 2e-5 is nearly all of
them; stochastic rounding keeps them on average.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from llama_omni.options.config import TrainConfig

FLOAT8_MAX, FLOAT8_MIN = 448.0, 2.0**-9  # the largest and the smallest above 0 of float8_e4m3fn
CHUNK = 1 << 25  # elements updated at once: bounds the fp32 scratch memory to about 1 GB


def build_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over parameter groups that each carry their peak `lr`."""
    options: dict[str, Any] = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    for group in groups:
        group["peak_lr"] = group["lr"]
    if config.optimizer_precision == "fp32_master":
        return torch.optim.AdamW(groups, fused=True, **options)
    return LowPrecisionAdamW(
        groups, eight_bit=config.optimizer_precision == "8bit", seed=config.seed, **options
    )


def lr_scale(step: int, *, total_steps: int, warmup_ratio: float, kind: str) -> float:
    """Share of the peak learning rate at 0-based `step`; warmup is linear from 1/warmup_steps."""
    warmup_steps = 0 if kind == "constant" else math.ceil(total_steps * warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if kind == "linear" else 1.0


def set_lr(optimizer: Any, scale: float) -> float:
    """Sets every group to `scale` of its peak; returns the first group's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
    return optimizer.param_groups[0]["lr"]


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW for bf16 weights with bf16 or float8 states, all rounded stochastically.

    Works row by row on each process's own shard, so states shard with their parameters. The random
    bits are a function of (seed, update number, parameter, shard): a resumed run repeats them.
    """

    def __init__(
        self, params: Iterable[Any], *, eight_bit: bool, seed: int, **defaults: Any
    ) -> None:
        super().__init__(params, {"lr": 1e-3, **defaults})
        self.eight_bit = eight_bit
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore
        assert closure is None
        number = 0
        for group in self.param_groups:
            for param in group["params"]:
                number += 1
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    self._init_state(param, state)
                state["step"] += 1
                self._update(param, state, group, number)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states' own dtypes, where torch casts them to the parameter's."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                device = value.device if name == "step" else param.device
                self.state[param][name] = value.to(device)

    def _init_state(self, param: Tensor, state: dict[str, Any]) -> None:
        dtype = torch.float8_e4m3fn if self.eight_bit and param.ndim == 2 else torch.bfloat16
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_rms"):
            state[name] = torch.zeros_like(param, dtype=dtype)
            if dtype == torch.float8_e4m3fn:
                # One scale a row; as a DTensor of the same placement it is saved and resharded.
                rows = torch.zeros_like(param[:, :1].contiguous(), dtype=torch.float32)
                state[f"{name}_scale"] = rows

    def _update(self, param: Tensor, state: dict[str, Any], group: Any, number: int) -> None:
        weights, grads = local(param), local(param.grad)
        if weights.numel() == 0:
            return
        step = int(state["step"])
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        random = torch.Generator(weights.device)
        random.manual_seed(hash((self.seed, step, number, rank)) & 0x7FFFFFFFFFFF)
        beta1, beta2 = group["betas"]
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        states = {name: local(value) for name, value in state.items() if name != "step"}
        rows = max(1, CHUNK // max(1, weights[0].numel())) if weights.ndim else 1
        for start in range(0, weights.shape[0] if weights.ndim else 1, rows):
            part = slice(start, start + rows)
            w, g = (t[part] if t.ndim else t for t in (weights, grads))
            views = {name: t[part] if t.ndim else t for name, t in states.items()}
            g32 = g.float()
            avg = read_state(views, "exp_avg").lerp_(g32, 1 - beta1)
            square = read_state(views, "exp_avg_rms").square_().lerp_(g32 * g32, 1 - beta2)
            rms = square.sqrt_()
            update = (avg / correction1) / (rms / math.sqrt(correction2) + group["eps"])
            write_state(views, "exp_avg", avg, random)
            write_state(views, "exp_avg_rms", rms, random)
            new = w.float() * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update
            w.copy_(round_stochastically(new, torch.bfloat16, random))


def local(value: Any) -> Tensor:
    """This process's own part of a sharded tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def read_state(views: dict[str, Tensor], name: str) -> Tensor:
    """A state in float32; `exp_avg_rms` is the root of the second moment: half the exponents."""
    values = views[name].float()
    scale = views.get(f"{name}_scale")
    return values if scale is None else values * _as_rows(scale, values)


def write_state(
    views: dict[str, Tensor], name: str, values: Tensor, random: torch.Generator
) -> None:
    scale = views.get(f"{name}_scale")
    if scale is not None:
        peak = values.abs().flatten(1).amax(1)
        scale.copy_((peak / FLOAT8_MAX).clamp(min=1e-30).reshape(scale.shape))
        values = values / _as_rows(scale, values)
        if name == "exp_avg_rms":  # 0 under a mean that is not would make the step enormous
            values.clamp_(min=FLOAT8_MIN)
    views[name].copy_(round_stochastically(values, views[name].dtype, random))


def _as_rows(scale: Tensor, values: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (values.ndim - 1))


def round_stochastically(values: Tensor, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Rounds float32 up or down with the probabilities that keep the mean. Spoils `values`.

    Adds random bits below the kept mantissa and cuts: bf16 keeps 7 of the 23 bits, float8 3.
    """
    dropped = 16 if dtype == torch.bfloat16 else 20
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(
        0, 1 << dropped, bits.shape, dtype=torch.int32, device=bits.device, generator=random
    )
    kept = bits.add_(noise).bitwise_and_(-(1 << dropped)).view(torch.float32)
    if dtype != torch.bfloat16:
        kept = kept.clamp(-FLOAT8_MAX, FLOAT8_MAX)
    return kept.to(dtype)

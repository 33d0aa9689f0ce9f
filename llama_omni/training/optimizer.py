"""AdamW at three precisions, and the learning-rate schedule.

| optimizer | weights | states | bytes a parameter with its gradient |
|---|---|---|---|
| adamw | fp32 | fp32 | 16 |
| adamw_bf16 | bf16, stochastic rounding | bf16, stochastic rounding | 8 |
| adamw_8bit | bf16, stochastic rounding | float8 with a scale a row, stochastic rounding | 6 |

Rounding to nearest would drop every update below 1/256 of a weight, which at 1e-5 is nearly all of
them; stochastic rounding keeps them on average.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import shutil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llama_omni.model.sharding import (
    first_element,
    local,
    mix,
    random_bits,
    random_keys,
    to_int32,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from llama_omni.options.config import TrainConfig

logger = logging.getLogger(__name__)

# Of float8_e4m3fn: the largest, the smallest above 0 (the spacing near 0), the smallest normal.
FLOAT8_MAX, FLOAT8_MIN, FLOAT8_NORMAL = 448.0, 2.0**-9, 2.0**-6
# Elements updated at once: bounds the scratch memory on a GPU, stays in the cache on a CPU.
CHUNK = {"compiled": 1 << 26, "cuda": 1 << 23, "cpu": 1 << 16}


def build_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over parameter groups that each carry their peak `lr` and their `weight_decay`."""
    options: dict[str, Any] = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    for group in groups:
        group["peak_lr"] = group["lr"]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    return LowPrecisionAdamW(
        groups, eight_bit=config.optimizer == "adamw_8bit", seed=config.seed, **options
    )


def lr_scale(step: int, *, total_steps: int, warmup_steps: int, kind: str) -> float:
    """Share of the peak learning rate at 0-based `step`; warmup is linear from 1/warmup_steps."""
    warmup_steps = 0 if kind == "constant" else warmup_steps
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

    Works on each process's own shard, so states shard with their parameters. The random bits are a
    function of (seed, update number, parameter, place in the whole parameter): a resumed run
    repeats them, on any number of processes. Parameters that live in host memory (offloaded
    blocks) are streamed through the GPU where there is one.
    """

    def __init__(
        self, params: Iterable[Any], *, eight_bit: bool, seed: int, **defaults: Any
    ) -> None:
        super().__init__(params, {"lr": 1e-3, "weight_decay": 0.0, **defaults})
        self.eight_bit = eight_bit
        self.seed = seed
        self.first = {}  # element of this process's part, by parameter
        for group in self.param_groups:
            for param in group["params"]:
                self.first[param] = first_element(param)
                self._init_state(param, self.state[param])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore
        assert closure is None
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        kernel = pick_kernel(device.type, self.eight_bit)
        chunk_size = CHUNK[device.type if kernel is adamw_update else "compiled"]
        # First all numbers, in two tables: a copy to the GPU for each would take longer than the
        # updates themselves.
        updates = []  # (tensors, hyper-parameters, keys)
        number = 0
        for group in self.param_groups:
            for param in group["params"]:
                number += 1
                if param.grad is None:
                    continue
                state = self.state[param]
                state["step"] += 1
                step = int(state["step"])
                key = random_keys(self.seed, step, number)
                hyper = hyper_parameters(group, step)
                for start, chunk in self._chunks(param, state, chunk_size):
                    place = to_int32(self.first[param] + start)
                    width = chunk["weights"].shape[-1]
                    updates.append((chunk, hyper, [*key, place, width]))
        # The largest first: its size decides how the compiler cuts the work of all into blocks.
        updates.sort(key=lambda update: update[0]["weights"].numel(), reverse=True)
        rows = zip(
            [chunk for chunk, _, _ in updates],
            torch.tensor([hyper for _, hyper, _ in updates]).to(device).unbind(),
            torch.tensor([keys for _, _, keys in updates], dtype=torch.int32).to(device).unbind(),
            strict=True,
        )
        is_streaming = False
        for chunk, chunk_hyper, chunk_keys in rows:
            here = {name: part.to(device, non_blocking=True) for name, part in chunk.items()}
            kernel(here, chunk_hyper, chunk_keys)
            if chunk["weights"].device.type != device.type:
                is_streaming = True
                for name in chunk.keys() - {"grads"}:
                    chunk[name].copy_(here[name], non_blocking=True)
        if is_streaming:  # the copies back to host memory may still be under way
            torch.cuda.synchronize()

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
        is_float8 = self.eight_bit and param.ndim > 1
        dtype = torch.float8_e4m3fn if is_float8 else torch.bfloat16
        # An offloaded parameter's states, too, go through the GPU: fast from pinned memory only.
        is_pinned = param.device.type == "cpu" and torch.cuda.is_available()
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_rms"):
            state[name] = torch.zeros_like(param, dtype=dtype, pin_memory=is_pinned)
            if is_float8:
                # One scale a row; as a DTensor of the same placement it is saved and resharded.
                rows = param.detach().flatten(1)[:, :1].contiguous()
                state[f"{name}_scale"] = torch.zeros_like(rows, dtype=torch.float32)

    def _chunks(
        self, param: Tensor, state: dict[str, Any], size: int
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(place of its first element, tensors as `adamw_update` takes them), some `size` each."""
        tensors = {"weights": local(param), "grads": local(param.grad)}
        tensors |= {name: local(value) for name, value in state.items() if name != "step"}
        if tensors["weights"].numel() == 0:
            return
        # Rows where a scale belongs to each, else single elements.
        has_rows = "exp_avg_scale" in tensors
        width = tensors["weights"][0].numel() if has_rows else 1
        shape = (-1, width) if has_rows else (-1,)
        for name, value in tensors.items():
            if name == "grads":
                tensors[name] = value.reshape(shape)
            elif not name.endswith("_scale"):
                tensors[name] = value.view(shape)
        count = max(1, size // width)
        for start in range(0, len(tensors["weights"]), count):
            part = slice(start, start + count)
            yield start * width, {name: value[part] for name, value in tensors.items()}


def adamw_update(tensors: dict[str, Tensor], hyper: Tensor, keys: Tensor) -> None:
    """One AdamW update in place (Loshchilov and Hutter, 2019, algorithm 2), computed in fp32.

    Plain multiplications and additions only: on the CPU a vector loop's rest then gives the same
    bits as its body, so that the result does not depend on where a shard begins.

    Args:
        tensors: weights, grads, exp_avg, exp_avg_rms (n,), or (rows, columns) with exp_avg_scale
            and exp_avg_rms_scale (rows, 1). `exp_avg_rms` is the root of the second moment: that
            needs half the exponents.
        hyper: of `hyper_parameters`.
        keys: (4,) int32, see `sharding.random_bits`.
    """
    weights, grads = tensors["weights"], tensors["grads"].float()
    beta1, rest1, beta2, rest2, kept, step_size, unbias, eps = hyper.unbind()
    avg = read_state(tensors, "exp_avg") * beta1 + grads * rest1
    rms = read_state(tensors, "exp_avg_rms")
    rms = (rms * rms * beta2 + grads * grads * rest2).sqrt()
    updated = weights.float() * kept - step_size * (avg / (rms * unbias + eps))
    bits = random_bits(keys, weights)  # whose halves do for two
    weights.copy_(round_stochastically(updated, weights.dtype, bits))
    write_state(tensors, "exp_avg", avg, bits << 16)
    write_state(tensors, "exp_avg_rms", rms, mix(bits, keys[1]))


def pick_kernel(device: str, eight_bit: bool) -> Any:
    """`adamw_update`, fused into one pass over memory on a GPU whose compiler knows float8.

    Triton calls a C compiler; without one the update is plain PyTorch, and slower.
    """
    if device != "cuda" or (eight_bit and torch.cuda.get_device_capability() < (8, 9)):
        return adamw_update
    return _compiled_update() if _has_c_compiler() else adamw_update


@functools.cache
def _has_c_compiler() -> bool:
    found = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    if not found:
        logger.warning("no C compiler (gcc or clang): the optimizer's updates are not compiled")
    return found


@functools.cache
def _compiled_update() -> Any:
    # A shape with a row or column of one is a graph of its own; the usual limit is 8.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    # Without torch's cache on the disk: of a kernel for any size it keeps the blocks that suit the
    # size first seen, which may be a tiny model's, and then an update takes 60 times as long.
    return torch.compile(
        adamw_update, dynamic=True, fullgraph=True, options={"fx_graph_cache": False}
    )


def hyper_parameters(group: dict[str, Any], step: int) -> list[float]:
    """The 8 numbers that `adamw_update` takes, at the 1-based `step`."""
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    return [
        beta1, 1 - beta1, beta2, 1 - beta2,
        1 - lr * group["weight_decay"],
        lr / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step),
        group["eps"],
    ]  # fmt: skip


def read_state(tensors: dict[str, Tensor], name: str) -> Tensor:
    """A state in float32."""
    values = tensors[name].float()
    scale = tensors.get(f"{name}_scale")
    return values if scale is None else values * scale


def write_state(tensors: dict[str, Tensor], name: str, values: Tensor, bits: Tensor) -> None:
    scale = tensors.get(f"{name}_scale")
    if scale is not None:
        peak = values.abs().amax(1, keepdim=True)
        new_scale = (peak / FLOAT8_MAX).clamp(min=1e-30)
        scale.copy_(new_scale)
        values = values / new_scale
        if name == "exp_avg_rms":  # 0 under a mean that is not would make the step enormous
            values = values.clamp(min=FLOAT8_MIN)
    tensors[name].copy_(round_stochastically(values, tensors[name].dtype, bits))


def round_stochastically(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Rounds float32 up or down with the probabilities that keep the mean.

    Adds random bits, the upper ones of `bits`, below the kept mantissa and cuts: bf16 keeps 7 of
    the 23 bits, float8 3, but near 0, where float8's spacing does not shrink any more.
    """
    dropped = 16 if dtype == torch.bfloat16 else 20
    noise = (bits >> (32 - dropped)) & ((1 << dropped) - 1)
    kept = ((values.view(torch.int32) + noise) & -(1 << dropped)).view(torch.float32)
    if dtype != torch.bfloat16:
        size = (values.abs() / FLOAT8_MIN + noise * 2.0**-dropped).floor() * FLOAT8_MIN
        is_small = values.abs() < FLOAT8_NORMAL
        kept = torch.where(is_small, torch.copysign(size, values), kept)
        kept = kept.clamp(-FLOAT8_MAX, FLOAT8_MAX)
    return kept.to(dtype)

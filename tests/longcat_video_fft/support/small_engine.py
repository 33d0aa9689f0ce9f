"""The real engine around a tiny transformer, without data: for tests of what it saves and loads."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from longcat_video_fft.model.loading import load_weights
from longcat_video_fft.model.sharding import local
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from longcat_video_fft.options.config import TrainConfig
from longcat_video_fft.training.parallel import Engine

SIZES: dict[str, Any] = {
    "hidden_size": 32, "depth": 2, "num_heads": 2, "caption_channels": 16, "adaln_tembed_dim": 16,
    "frequency_embedding_size": 32, "text_tokens_zero_pad": True,
}  # fmt: skip


def make_engine(**options: Any) -> Engine:
    """Makes an engine on the CPU, with initial values; options of TrainConfig."""
    config = TrainConfig(**{"learning_rate": 1e-2, "mixed_precision": "no", **options})
    with torch.device("meta"):
        model = LongCatVideoTransformer3DModel(**SIZES)
    return Engine(
        model, config, torch.device("cpu"),
        load_weights=lambda m: load_weights(m, None, seed=config.seed, init="random"),
    )  # fmt: skip


def train_steps(engine: Engine, first: int, last: int) -> None:
    """Takes steps first + 1 .. last, each of one sample a process that depends on step and rank."""
    for step in range(first, last):
        inputs = make_inputs(1000 * step + dist.get_rank())
        engine.backward(engine.module(*inputs).square().mean())
        engine.clip()
        engine.step()


def make_inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 16, 2, 4, 4, generator=random)
    return latents, torch.tensor([500.0]), torch.randn(1, 1, 8, 16, generator=random)


def state_tensors(engine: Engine) -> dict[str, Any]:
    """Returns weights, optimizer states and averages by name."""
    found: dict[str, Any] = {}
    for name, param in engine.module.named_parameters():
        found[name] = param
        found |= {f"{name}/{key}": v for key, v in engine.optimizer.state.get(param, {}).items()}
    if engine.ema is not None:
        found |= {f"{name}/average": v for name, v in engine.ema.averages.items()}
        found["num_updates"] = engine.ema.num_updates
    return found


def own_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Returns clones of this process's parts."""
    return {name: local(v).detach().clone() for name, v in state_tensors(engine).items()}


def whole_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Gathers the state as float32: gloo sends no float8."""
    values = {name: v.detach().float() for name, v in state_tensors(engine).items()}
    return {
        name: v.full_tensor() if isinstance(v, DTensor) else v.clone() for name, v in values.items()
    }


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Returns the names whose bits, dtypes or presence differ."""
    return [
        name
        for name in {**ours, **theirs}
        if name not in ours
        or name not in theirs
        or ours[name].dtype != theirs[name].dtype
        or not torch.equal(ours[name].float(), theirs[name].float())
    ]

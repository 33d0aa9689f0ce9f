"""Wraps a model for one device, DDP or FSDP2 by torch; ZeRO is in `deepspeed_engine.py`.

An engine is what the training loop drives: backward, clip and step, save and load. Losses come in
as sums divided by the *global* count, so gradients are summed over processes, never averaged.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llama_omni.training.optimizer import build_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from llama_omni.options.config import TrainConfig


def compute_dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.bf16 else torch.float32


def master_dtype(config: TrainConfig) -> torch.dtype:
    """Returns the dtype in which trained parameters are kept."""
    return torch.float32 if config.optimizer_precision == "fp32_master" else torch.bfloat16


def set_dtypes(model: nn.Module, config: TrainConfig) -> None:
    """Casts trained parameters to the master dtype, frozen ones to the compute dtype (on meta)."""
    for param in model.parameters():
        dtype = master_dtype(config) if param.requires_grad else compute_dtype(config)
        param.data = param.data.to(dtype)


def shard(model: Any, config: TrainConfig) -> None:
    """Applies FSDP2, a unit a transformer layer and a root; gathers in bf16, sums in fp32."""
    mesh = init_device_mesh(
        "cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),)
    )
    policy = MixedPrecisionPolicy()
    if config.bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers = [*model.model.speech_encoder.blocks, *model.model.layers]
    if hasattr(model, "speech_generator"):
        layers += [*model.speech_generator.layers]
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


class TorchEngine:
    """Drives one device, DDP or FSDP2.

    Args:
        model: on meta, `requires_grad` set as wanted.
        load_weights: called with the wrapped, allocated model to load its weights.
        groups: makes the optimizer's parameter groups from the model.
        strategy: "ddp" or "fsdp2".
    """

    def __init__(
        self,
        model: Any,
        config: TrainConfig,
        device: torch.device,
        *,
        strategy: str,
        load_weights: Callable[[nn.Module], None],
        groups: Callable[[nn.Module], list[dict[str, Any]]],
    ) -> None:
        self.module = model
        self.device = device
        self.max_grad_norm = config.max_grad_norm
        self.is_sharded = strategy == "fsdp2"
        set_dtypes(model, config)
        if self.is_sharded:
            shard(model, config)
        model.to_empty(device=device)
        model.reset_rotary(device)
        load_weights(model)
        self.model = model
        if strategy == "ddp" and dist.get_world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.model = DistributedDataParallel(model, device_ids=ids)
        self.optimizer = build_optimizer(groups(model), config)
        # FSDP2 casts by itself; elsewhere fp32 masters need autocast to compute in bf16.
        self.uses_autocast = config.bf16 and not self.is_sharded

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.uses_autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Takes this process's share of the global mean; wrappers average, so scales it back."""
        is_ddp = isinstance(self.model, DistributedDataParallel)
        # FSDP2 reduces at every micro-batch: whole unreduced gradients would not fit.
        context = self.model.no_sync() if is_ddp and not is_last else contextlib.nullcontext()
        with context:
            (loss * dist.get_world_size()).backward()

    def clip_and_step(self) -> float:
        """Returns the global gradient norm before clipping to max_grad_norm; when it is not finite,
        nothing was stepped."""
        params = [p for p in self.module.parameters() if p.grad is not None]
        clipped = nn.utils.clip_grad_norm_(params, self.max_grad_norm, foreach=True)
        norm = float(clipped.full_tensor() if isinstance(clipped, DTensor) else clipped)
        if math.isfinite(norm):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return norm

    def save(self, folder: Path) -> None:
        """Saves trained parameters and optimizer states by torch's distributed checkpoint."""
        save(self._state(), checkpoint_id=folder / "state")

    def load(self, folder: Path) -> None:
        """Loads a checkpoint; raises ValueError when it belongs to another model."""
        try:
            self._match_older_states(folder)
            state = self._state()
            load(state, checkpoint_id=folder / "state")
        except (RuntimeError, ValueError, KeyError, CheckpointException) as error:
            raise ValueError(
                f"{folder}: does not fit this run's model or trainable set ({error}). Resume with "
                "the config that wrote it, or start again without resume_from_checkpoint."
            ) from error
        peaks = [group["peak_lr"] for group in self.optimizer.param_groups]
        set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
            group["peak_lr"] = peak  # the config's, should it have changed

    def _match_older_states(self, folder: Path) -> None:
        """Makes bf16 moments of convolutions (of a trained speech encoder) for 8bit checkpoints of
        commit c64db93 and before, which hold them so."""
        known = FileSystemReader(folder / "state").read_metadata().state_dict_metadata
        for name, param in self.module.named_parameters():
            state, path = self.optimizer.state.get(param, {}), f"optimizer.state.{name}.exp_avg"
            if "exp_avg_scale" in state and path in known and f"{path}_scale" not in known:
                for moment in ("exp_avg", "exp_avg_rms"):
                    del state[f"{moment}_scale"]
                    state[moment] = torch.zeros_like(param, dtype=torch.bfloat16)

    def _state(self) -> dict[str, Any]:
        options = StateDictOptions(ignore_frozen_params=True)
        model, optimizer = get_state_dict(self.module, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer}

"""Runs the training loop under DeepSpeed ZeRO-2 or ZeRO-3 (see `parallel.TorchEngine`).

The DeepSpeed file holds topology and offload alone. Batch sizes, clipping and precision are
written into it from the run's config; a file that states another value is an error.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from llama_omni.training.optimizer import build_optimizer
from llama_omni.training.parallel import compute_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from llama_omni.options.config import TrainConfig


def read_deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """Reads the DeepSpeed file and adds what the run's config decides.

    Raises:
        ValueError: the file is no JSON object, or contradicts the config.
    """
    path = Path(str(config.deepspeed))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable DeepSpeed JSON file ({error}).") from None
    stage = values.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage={stage!r} must be 1, 2 or 3.")
    decided: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.grad_accum_steps(dist.get_world_size()),
        "gradient_clipping": config.max_grad_norm,
        # A step with a NaN or infinite gradient is left out, and the loop then stops.
        "bf16": {"enabled": config.bf16, "check_grad_overflow": True},
    }
    for key, value in decided.items():
        if values.get(key, "auto") not in ("auto", value) and key != "bf16":
            raise ValueError(
                f"{path}: {key}={values[key]!r} contradicts the run's config, which makes it "
                f'{value!r}. Take it out of the file, or write "auto".'
            )
    for section in ("optimizer", "scheduler", "fp16"):
        if section in values:
            raise ValueError(
                f"{path}: the section {section!r} is the run's config's business. Take it out."
            )
    return {"zero_force_ds_cpu_optimizer": False, **values, **decided}


class DeepSpeedEngine:
    """Has the calls of TorchEngine."""

    def __init__(
        self,
        model: Any,
        config: TrainConfig,
        device: torch.device,
        *,
        load_weights: Callable[[nn.Module], None],
        groups: Callable[[nn.Module], list[dict[str, Any]]],
    ) -> None:
        import deepspeed

        values = read_deepspeed_config(config)
        # Whole on the CPU first; DeepSpeed moves or partitions it, and keeps fp32 masters itself.
        for param in model.parameters():
            param.data = param.data.to(compute_dtype(config))
        model.to_empty(device="cpu")
        model.reset_rotary(torch.device("cpu"))
        load_weights(model)
        self.accum_steps = values["gradient_accumulation_steps"]
        self.device = device
        self.model, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(groups(model), config),
            config=values,
            dist_init_required=False,
        )
        self.module = model

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Scales back the averages that DeepSpeed takes over processes and micro-batches."""
        self.model.set_gradient_accumulation_boundary(is_last)
        self.model.backward(loss * (dist.get_world_size() * self.accum_steps))

    def clip_and_step(self) -> float:
        """Returns the global gradient norm before clipping, which is part of DeepSpeed's step; when
        it is not finite, nothing was stepped."""
        self.model.step()
        norm = self.model.get_global_grad_norm()
        if getattr(self.optimizer, "overflow", False):
            return float("nan")
        return float("nan") if norm is None else float(norm)

    def save(self, folder: Path) -> None:
        self.model.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """Raises ValueError when DeepSpeed finds nothing that fits."""
        loaded, _ = self.model.load_checkpoint(str(folder), tag="state", load_module_strict=False)
        if loaded is None:
            raise ValueError(f"{folder}: holds no DeepSpeed checkpoint of this run's kind.")

"""Defines what a stage minimizes, and the numbers of its log lines: sums, speed, MFU.

Place in the data flow: the stage trainers make an `Objective`; `loop.py` hands each step's batches
and sums to a `Meter`, whose metrics go to `tracker.py`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from llama_omni.dataset.batch import IGNORE_INDEX
from llama_omni.model.flops import BatchSize, peak_flops, step_flops
from llama_omni.training.distributed import all_sum

if TYPE_CHECKING:
    from collections.abc import Callable

    from llama_omni.dataset.batch import Batch
    from llama_omni.options.config import TrainConfig

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Reports that a loss or gradient is NaN or infinite; every process stops before the step."""


@dataclass(frozen=True)
class Objective:
    """Defines what a stage minimizes and reports."""

    task: str  # for the model's forward
    count: Callable[[Batch], int]  # what the loss is a mean over
    unit: str  # its name in the log: tokens or units
    ratio: str  # the name of num_correct / num_predicted
    weight: float = 1.0
    infeasible: Callable[[Batch], tuple[int, int]] = field(default=lambda batch: (0, 0))


class Meter:
    """Keeps the sums between two log lines, and the speed."""

    def __init__(self, engine: Any, config: TrainConfig, objective: Objective) -> None:
        self.engine = engine
        self.config = config
        self.objective = objective
        name = torch.cuda.get_device_name() if engine.device.type == "cuda" else "cpu"
        self.peak = peak_flops(name)
        self._reset()

    def _reset(self) -> None:
        self.started = time.perf_counter()
        self.sums = torch.zeros(4, dtype=torch.float64)
        self.samples = self.tokens = 0
        self.data_seconds = self.flops = 0.0
        self.infeasible = [0, 0]

    def start_fetch(self) -> None:
        self.fetch_started = time.perf_counter()

    def end_fetch(self) -> None:
        self.data_seconds += time.perf_counter() - self.fetch_started

    def add(self, micro_batches: list[Batch], sums: torch.Tensor) -> None:
        self.sums += sums
        for batch in micro_batches:
            self.samples += len(batch.input_ids)
            self.tokens += batch.input_ids.numel()
            self.flops += batch_flops(self.engine.module.config, batch, self.config)
            for i, number in enumerate(self.objective.infeasible(batch)):
                self.infeasible[i] += number

    def flush(self, lr: float) -> dict[str, float]:
        """Returns the metrics since the last flush, over all processes."""
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.started
        local = torch.tensor([self.samples, self.tokens, self.flops, *self.infeasible])
        samples, tokens, flops, too_few, impossible = all_sum(local.double()).tolist()
        loss, count, correct, predicted = self.sums.tolist()
        metrics = {
            "train/loss": loss / max(count, 1),
            f"train/{self.objective.ratio}": correct / max(predicted, 1),
            "train/grad_norm": self.engine.grad_norm,
            "train/lr": lr,
            "speed/samples_per_sec": samples / seconds,
            "speed/tokens_per_sec": tokens / seconds,
            "speed/data_time_frac": self.data_seconds / seconds,
        }
        if self.objective.task == "units":
            metrics["train/stretched"] = too_few
            metrics["train/infeasible"] = impossible
            if impossible:
                logger.warning("%d answers had no CTC path and taught nothing", impossible)
        if self.peak is not None:
            metrics["speed/mfu"] = flops / seconds / (self.peak * dist.get_world_size())
            metrics["speed/peak_mem_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._reset()
        return metrics


def batch_flops(model_config: Any, batch: Batch, config: TrainConfig) -> float:
    """Counts the model FLOPs of one micro-batch, forward and backward."""
    frames = 0
    if batch.tgt_units is not None:
        longest = int((batch.labels != IGNORE_INDEX).sum(1).max()) * config.ctc_upsample_factor
        frames = max(longest, batch.tgt_units.shape[1])
    size = BatchSize(
        clips=len(batch.speech),
        mel_frames=batch.speech.shape[-1],
        sequences=len(batch.input_ids),
        tokens=batch.input_ids.shape[1],
        answer_tokens=batch.num_label_tokens,
        unit_frames=max(frames, 1) if config.stage == 2 else 0,
    )
    return step_flops(model_config, size, config)

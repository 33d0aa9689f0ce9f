"""Sums over the processes of a run, stops them on signals, and gives notices about DeepSpeed.

train_ds.py uses it before the training, and trainer.py in it.
"""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.integrations.deepspeed import deepspeed_config

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Add the tensor up in place over all processes, which all take part; return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class StopOnSignal(TrainerCallback):
    """Lets all processes save a checkpoint and stop after a step, on SIGTERM or SIGUSR1 to one."""

    def __init__(self) -> None:
        self.is_asked = False
        self.has_stopped = False  # the same in all processes

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _: Any) -> None:
        logger.warning("signal %d: a checkpoint will be saved after this step", number)
        self.is_asked = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        asked = torch.tensor(float(self.is_asked), device=args.device)
        if sum_over_processes(asked).item():
            self.has_stopped = True
            control.should_save = True
            control.should_training_stop = True


def stop_early(number: int, _: Any) -> None:
    """Stop before the Trainer takes the signal over, while there is nothing to save but the cache,
    which stays. Without an error: run_deepspeed.sh then queues the job again."""
    signal.signal(number, signal.SIG_IGN)  # one that comes once more would break the ending
    logger.warning("signal %d before the training began: nothing to save; stopping", number)
    raise SystemExit(0)


def leave_signals_to_the_trainer(_: int) -> None:
    """Ignore signals: SLURM sends them to every process, and a worker that died would end the run
    without saving."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def notice_optimizer_offload() -> None:
    zero = (deepspeed_config() or {}).get("zero_optimization", {})
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        logger.warning(
            "offload_optimizer is honored, but for LoRA it saves 2.5 GB in all and slows each "
            "step: better left out of the DeepSpeed config."
        )


def notice_locks() -> None:
    """Warn of locks: a process that was killed while it built an operator leaves its lock, for
    which the next one waits silently."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    for lock in folder.glob("**/lock"):
        logger.warning(
            "%s: an operator of DeepSpeed is being built, and this run waits for it. If no process "
            "builds it, one was killed there: remove the file.",
            lock,
        )

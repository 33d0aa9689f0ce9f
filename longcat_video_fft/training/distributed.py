"""The processes of a run: joining their group, sums over all of them, and signals to stop.

Used by `train.py` at the start, and by the training loop at every step.
"""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

LONGEST_WAIT = timedelta(hours=2)  # others wait while one rank writes a large checkpoint


def init_processes() -> torch.device:
    """Join the process group that torchrun, accelerate or deepspeed describe, or be alone.

    Returns:
        The device of this process.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    has_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "") != "true"
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=LONGEST_WAIT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore
    return device


def is_main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def all_sum(values: Tensor) -> Tensor:
    """Add up a CPU tensor over all processes, in place, and return it."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


class StopRequest:
    """Remembers a SIGTERM, and reports it to all processes at a step boundary."""

    def __init__(self) -> None:
        self.seen = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self.seen = True

    def is_requested(self) -> bool:
        return all_sum(torch.tensor([float(self.seen)]))[0].item() > 0


def ignore_sigterm(_: int) -> None:
    """Let a loader's worker live: SLURM signals all processes, and the step is to be finished."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

"""The processes of a training: joining them, sums over them, and a signal that ends them all."""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

LONGEST_WAIT = timedelta(hours=2)  # others wait while one rank writes a large checkpoint


def init_processes() -> torch.device:
    """Joins the process group that accelerate or torchrun describe; alone otherwise."""
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
    """The sum over all processes of a CPU tensor, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


class StopRequest:
    """Remembers a SIGTERM, and tells it to all processes at a step boundary."""

    def __init__(self) -> None:
        self.seen = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self.seen = True

    def is_requested(self) -> bool:
        return all_sum(torch.tensor([float(self.seen)]))[0].item() > 0


def ignore_sigterm(_: int) -> None:
    """In a loader's worker: SLURM signals all processes, and the training is to end its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

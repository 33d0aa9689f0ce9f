"""Runs a test's function in several gloo processes; it must be importable from its module."""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

if TYPE_CHECKING:
    from collections.abc import Callable


# Imported once, in a process from which the others are forked.
multiprocessing.set_forkserver_preload(["longcat_video_fft.training.validation"])


def spawn(function: Callable[..., None], *args: Any, processes: int = 2) -> None:
    """Calls `function(*args)` in each process; raises what any of them raises."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (function, processes, str(Path(folder) / "store"), args)
        mp.start_processes(_run, arguments, nprocs=processes, start_method="forkserver")  # pyright: ignore


def join_alone() -> None:
    """Makes a process group of this process only, unless there is a group."""
    if not dist.is_initialized():
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)


def _run(rank: int, function: Any, processes: int, store: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    try:
        function(*args)
    finally:
        dist.destroy_process_group()

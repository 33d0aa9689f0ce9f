"""The processes of one job: their ranks, one that plans for all, and a count that all share.

Work is shared out by rank and no process waits for another until the end, so one slow video holds
up nobody. The common store (of torchrun, accelerate or one's own) holds the counters that the
progress bar of rank 0 shows.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=7)  # others wait while rank 0 lists or a slow rank encodes
STALL_S = 1800.0  # no rank of those waited for got anything done for so long: stop


class Processes:
    """Joins the processes that torchrun or accelerate describe; alone otherwise."""

    def __init__(self) -> None:
        if "RANK" in os.environ:
            found = rendezvous("env://", timeout=LONGEST_WAIT)
            self.store, self.rank, self.world_size = next(found)
        else:
            self.store, self.rank, self.world_size = dist.HashStore(), 0, 1  # pyright: ignore[reportPrivateImportUsage]
        self.store.set_timeout(LONGEST_WAIT)
        self.is_main = self.rank == 0
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)

    def main_first(self, name: str, plan: Callable[[], T]) -> T | None:
        """Runs `plan` on rank 0; the others wait for it, and stop where it failed.

        Raises:
            ValueError: what rank 0 found wrong, there; a short note elsewhere.
        """
        if not self.is_main:
            self.store.wait([f"{name}/outcome"], LONGEST_WAIT)
            if self.store.get(f"{name}/outcome") != b"done":
                raise SystemExit(2)  # rank 0 says why
            return None
        try:
            result = plan()
        except BaseException:
            self.store.set(f"{name}/outcome", "failed")
            raise
        self.store.set(f"{name}/outcome", "done")
        return result

    def add(self, counter: str, number: int) -> int:
        """Adds to a counter that all processes share, and returns its value."""
        return self.store.add(counter, number)

    def wait_for_all(self, name: str, watched: str, on_tick: Callable[[], Any]) -> None:
        """Waits until every process has come here. `on_tick` is called about every second.

        Raises:
            RuntimeError: the counter `watched` has not changed for STALL_S.
        """
        self.add(f"{name}/arrived", 1)
        value, since = -1, time.monotonic()
        while (arrived := self.add(f"{name}/arrived", 0)) < self.world_size:
            on_tick()
            now = self.add(watched, 0)
            if now != value:
                value, since = now, time.monotonic()
            if time.monotonic() - since > STALL_S:
                raise RuntimeError(
                    f"{name}: {self.world_size - arrived} of {self.world_size} processes have done "
                    f"nothing for {STALL_S / 60:.0f} minutes. Look at their logs, then start again."
                )
            time.sleep(0.05 if self.world_size > 1 else 0)
        on_tick()
        # Rank 0 holds the store: it leaves last.
        self.add(f"{name}/left", 1)
        if self.is_main:
            while self.add(f"{name}/left", 0) < self.world_size:
                time.sleep(0.05)

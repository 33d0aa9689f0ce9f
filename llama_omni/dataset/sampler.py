"""Chooses the samples of each micro-batch by a pure function of (seed, position).

So training resumes exactly at any step, on any number of processes: the data position is the
global step.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

FILLER = -1  # a sample without labels, where the last batch of an epoch is not full


def steps_per_epoch(num_samples: int, global_batch_size: int, *, drop_last: bool) -> int:
    steps = num_samples / global_batch_size
    return math.floor(steps) if drop_last else math.ceil(steps)


def epoch_order(num_samples: int, *, epoch: int, seed: int) -> list[int]:
    order = list(range(num_samples))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


class MicroBatches:
    """Yields this process's micro-batches from `start_step` to `stop_step` to a DataLoader.

    A global batch is cut the same way for any process count: accumulation step, then process,
    then sample.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        micro_batch_size: int,
        accum_steps: int,
        rank: int,
        world_size: int,
        start_step: int,
        stop_step: int,
        seed: int,
        drop_last: bool = False,
        shuffle: bool = True,
    ) -> None:
        self.num_samples = num_samples
        self.micro_batch_size = micro_batch_size
        self.accum_steps = accum_steps
        self.rank = rank
        self.world_size = world_size
        self.steps = range(start_step, stop_step)
        self.seed = seed
        self.shuffle = shuffle
        self.global_batch_size = micro_batch_size * accum_steps * world_size
        self.steps_per_epoch = steps_per_epoch(
            num_samples, self.global_batch_size, drop_last=drop_last
        )

    def __len__(self) -> int:
        return len(self.steps) * self.accum_steps

    def __iter__(self) -> Iterator[list[int]]:
        order: list[int] = []
        ordered_epoch = -1
        for step in self.steps:
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != ordered_epoch:
                order = list(range(self.num_samples))
                if self.shuffle:
                    order = epoch_order(self.num_samples, epoch=epoch, seed=self.seed)
                ordered_epoch = epoch
            first = position * self.global_batch_size
            batch = order[first : first + self.global_batch_size]
            batch += [FILLER] * (self.global_batch_size - len(batch))
            for accum in range(self.accum_steps):
                start = (accum * self.world_size + self.rank) * self.micro_batch_size
                yield batch[start : start + self.micro_batch_size]

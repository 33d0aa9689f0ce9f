"""Chooses which samples form a micro-batch, and the order of these, by seed, epoch and rank.

Samples are packed to a budget of tokens, or grouped by length. A micro-batch's samples lie one
after the other without padding in either case (collator.py), and see themselves alone.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from torch.utils.data import Sampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OPEN_PACKS = 64  # looked through for room; more of them waste less, and cost time
GROUPED_BATCHES = 50  # sorted by length together, so that lengths stay mixed over an epoch


def pack(lengths: Sequence[int], max_tokens: int, *, seed: int) -> list[list[int]]:
    """Return indices of samples, each once, in packs of `max_tokens` or fewer in all.

    Raises:
        ValueError: one sample alone is longer.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    packs: list[list[int]] = []
    room: list[int] = []
    first_open = 0
    for index in order:
        length = lengths[index]
        if length > max_tokens:
            raise ValueError(
                f"sample {index} has {length:,} tokens, over max_tokens={max_tokens:,}: raise "
                "max_tokens, lower max_vision_tokens, or leave the sample out."
            )
        place = next((p for p in range(first_open, len(packs)) if room[p] >= length), None)
        if place is None:
            place = len(packs)
            packs.append([])
            room.append(max_tokens)
            first_open = max(0, len(packs) - OPEN_PACKS)
        packs[place].append(index)
        room[place] -= length
    return packs


def group_by_length(lengths: Sequence[int], batch_size: int, *, seed: int) -> list[list[int]]:
    """Return indices of samples in batches of like lengths; the last batch may be smaller."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    batches = []
    for start in range(0, len(order), GROUPED_BATCHES * batch_size):
        part = sorted(
            order[start : start + GROUPED_BATCHES * batch_size], key=lambda i: (lengths[i], i)
        )
        batches += [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
    return batches


class MicroBatchSampler(Sampler[list[int]]):
    """Yields this process's micro-batches of an epoch; every process gets the same number of them.

    Args:
        batches: of the whole epoch, as `pack` or `group_by_length` makes them.
        num_processes, rank: every `num_processes`-th micro-batch is this process's. Where they do
            not divide, the epoch's first ones come once more at its end.
    """

    def __init__(
        self, batches: Sequence[list[int]], *, num_processes: int, rank: int, seed: int
    ) -> None:
        if not batches:
            raise ValueError("there are no samples to train on.")
        self.batches = batches
        self.num_processes, self.rank, self.seed = num_processes, rank, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.batches) // self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.batches)))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        for step in range(len(self)):
            yield self.batches[order[(step * self.num_processes + self.rank) % len(order)]]

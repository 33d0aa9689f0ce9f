"""Orders samples: a pure function, complete in every epoch, the same for any split."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import pytest

from llama_omni.dataset.sampler import FILLER, MicroBatches, epoch_order, steps_per_epoch


def make(num_samples: int = 20, **options: Any) -> MicroBatches:
    given: dict[str, Any] = {
        "micro_batch_size": 2, "accum_steps": 1, "rank": 0, "world_size": 1,
        "start_step": 0, "stop_step": 10, "seed": 1,
    }  # fmt: skip
    return MicroBatches(num_samples, **given | options)


def global_batches(num_samples: int, *, size: int, world: int, accum: int) -> list[list[int]]:
    """Returns what all processes together read at each step, in the order of the global batch."""
    shape: dict[str, Any] = {"micro_batch_size": size, "accum_steps": accum, "world_size": world}
    ranks = [list(make(num_samples, rank=rank, **shape)) for rank in range(world)]
    steps = []
    for step in range(10):
        parts = [ranks[rank][step * accum + turn] for turn in range(accum) for rank in range(world)]
        steps.append(list(chain.from_iterable(parts)))
    return steps


def test_same_arguments_same_batches() -> None:
    assert list(make()) == list(make())
    assert list(make()) != list(make(seed=2))
    assert len(make(accum_steps=3)) == len(list(make(accum_steps=3))) == 30


def test_every_sample_once_an_epoch_in_a_new_order() -> None:
    batches = list(make(stop_step=20))
    first, second = (list(chain.from_iterable(part)) for part in (batches[:10], batches[10:]))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first == epoch_order(20, epoch=0, seed=1)
    assert first != list(range(20))
    unshuffled = chain.from_iterable(make(shuffle=False))
    assert list(unshuffled) == list(range(20))


@pytest.mark.parametrize("num_samples", [20, 13, 8, 5])
def test_any_split_reads_the_same_global_batches(num_samples: int) -> None:
    whole = global_batches(num_samples, size=8, world=1, accum=1)
    for size, world, accum in [(1, 1, 8), (1, 8, 1), (2, 2, 2), (4, 2, 1), (4, 1, 2), (1, 4, 2)]:
        assert global_batches(num_samples, size=size, world=world, accum=accum) == whole


def test_the_last_batch_of_an_epoch_is_filled_up() -> None:
    batches = global_batches(13, size=2, world=2, accum=2)
    assert all(len(batch) == 8 for batch in batches)
    assert batches[1][5:] == [FILLER] * 3
    counts = Counter(chain.from_iterable(batches))  # 10 steps are 5 epochs
    assert counts == {FILLER: 15, **dict.fromkeys(range(13), 5)}


def test_dropping_the_last_batch() -> None:
    batches = list(make(13, micro_batch_size=8, drop_last=True, stop_step=4))
    assert [len(set(batch)) for batch in batches] == [8] * 4
    assert all(FILLER not in batch for batch in batches)
    assert steps_per_epoch(13, 8, drop_last=True) == 1
    assert steps_per_epoch(13, 8, drop_last=False) == 2


def test_resume_continues_exactly() -> None:
    for accum in (1, 3):
        whole = list(make(13, accum_steps=accum, stop_step=12))
        rest = list(make(13, accum_steps=accum, start_step=5, stop_step=12))
        assert rest == whole[5 * accum :]

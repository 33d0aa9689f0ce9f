"""Packs and groups hold every sample once; processes share an epoch; the order is repeatable."""

from __future__ import annotations

import random

import pytest

from vss_longcat_omni.dataset.sampler import MicroBatchSampler, group_by_length, pack

LENGTHS = [random.Random(3).randint(20, 400) for _ in range(300)]


def test_packs_hold_every_sample_once_within_the_budget() -> None:
    packs = pack(LENGTHS, 1000, seed=1)
    assert sorted(index for found in packs for index in found) == list(range(300))
    totals = [sum(LENGTHS[index] for index in found) for found in packs]
    assert max(totals) <= 1000
    assert sum(LENGTHS) / (1000 * len(packs)) > 0.93  # hardly any room is left over


def test_a_sample_over_the_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"sample 1 has 1,001 tokens, over max_tokens=1,000"):
        pack([10, 1001], 1000, seed=0)


def test_groups_hold_every_sample_once_and_like_lengths() -> None:
    groups = group_by_length(LENGTHS, 4, seed=1)
    assert sorted(index for found in groups for index in found) == list(range(300))
    spans = [max(LENGTHS[i] for i in g) - min(LENGTHS[i] for i in g) for g in groups]
    assert sum(spans) / len(spans) < 20  # of 380 at most


def test_processes_share_an_epoch_and_have_equally_many() -> None:
    batches = [[index] for index in range(10)]
    samplers = [MicroBatchSampler(batches, num_processes=4, rank=r, seed=0) for r in range(4)]
    found = [list(sampler) for sampler in samplers]
    assert [len(part) for part in found] == [3, 3, 3, 3] == [len(s) for s in samplers]
    drawn = [index for part in found for batch in part for index in batch]
    assert set(drawn) == set(range(10))
    assert len(drawn) == 12  # two of them once more


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    batches = [[index] for index in range(50)]

    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = MicroBatchSampler(batches, num_processes=1, rank=0, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 2) == order(0, 2)
    assert order(0, 1) != order(0, 2) != order(1, 2)


def test_no_samples_are_errors() -> None:
    with pytest.raises(ValueError, match="no samples"):
        MicroBatchSampler([], num_processes=1, rank=0, seed=0)

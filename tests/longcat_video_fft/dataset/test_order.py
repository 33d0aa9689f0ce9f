"""The order of samples: complete, of one bucket a batch, pure, and the same on any devices."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from longcat_video_fft.dataset.sampler import BLOCK, MicroBatch, TrainingOrder, mix
from longcat_video_fft.options.buckets import Bucket

LONG, SHORT, TALL = Bucket(93, 480, 832), Bucket(73, 480, 832), Bucket(93, 832, 480)
SIZES = {LONG: 203, SHORT: 150, TALL: 11}
SAMPLES = {
    f"{bucket}/{number}.mp4": bucket for bucket, size in SIZES.items() for number in range(size)
}
Named = tuple[Bucket, tuple[str, ...]]


def build(
    samples: dict[str, Bucket] | None = None,
    *,
    batch_size: int = 2,
    seed: int = 42,
    repeats: int = 0,
) -> TrainingOrder:
    samples = SAMPLES if samples is None else samples
    return TrainingOrder(
        list(samples), list(samples.values()), batch_size=batch_size, seed=seed, repeats=repeats
    )


def name_all(
    order: TrainingOrder, positions: range | None = None, samples: dict[str, Bucket] | None = None
) -> list[Named]:
    """Returns micro-batches with names in place of indices; the first epoch's by default."""
    names = list(SAMPLES if samples is None else samples)
    batches = [order.micro_batch(p) for p in positions or range(order.epoch_length)]
    return [(batch.bucket, tuple(names[i] for i in batch.samples)) for batch in batches]


@pytest.mark.parametrize("repeats", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 500])
def test_each_epoch_holds_every_sample(batch_size: int, repeats: int) -> None:
    order = build(batch_size=batch_size, repeats=repeats)
    assert order.epoch_length == sum(
        -(-size * (1 + repeats) // batch_size) for size in SIZES.values()
    )
    for epoch in range(3):
        start = epoch * order.epoch_length
        batches = name_all(order, range(start, start + order.epoch_length))
        seen = Counter(name for _, names in batches for name in names)
        assert seen == dict.fromkeys(SAMPLES, 1 + repeats)
        for bucket, names in batches:
            assert {SAMPLES[name] for name in names} == {bucket}
        smaller = [bucket for bucket, names in batches if len(names) < batch_size]
        assert len(smaller) == len(set(smaller)), "more than one unfilled batch of a bucket"


def test_it_is_pure() -> None:
    """Built again and asked in another order, across epochs, it gives the same."""
    first, again = build(), build()
    positions = list(range(0, 3 * first.epoch_length, 5))
    asked = [first.micro_batch(p) for p in positions]
    assert [again.micro_batch(p) for p in reversed(positions)] == asked[::-1]


def test_the_order_of_the_list_does_not_matter() -> None:
    turned = dict(reversed(SAMPLES.items()))
    assert name_all(build(turned), samples=turned) == name_all(build())


def test_epochs_and_seeds_differ() -> None:
    order = build()
    length = order.epoch_length
    orders = [name_all(order), name_all(order, range(length, 2 * length)), name_all(build(seed=43))]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            # Blocks and batches both: few batches come again, at whatever place.
            assert len(set(one) & set(other)) < 0.1 * length
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 0.1 * length


def test_a_resumed_run_gets_the_tail() -> None:
    order = build()
    whole = name_all(order, range(2 * order.epoch_length + 9))
    for position in (1, 77, order.epoch_length, order.epoch_length + 3):
        assert name_all(build(), range(position, len(whole))) == whole[position:]


@pytest.mark.parametrize("world", [1, 2, 3, 8, 64])
def test_devices_part_one_stream(world: int) -> None:
    stop = 2 * build().epoch_length
    whole = name_all(build(), range(stop))
    parts = [name_all(build(), range(rank, stop, world)) for rank in range(world)]
    together = [parts[p % world][p // world] for p in range(stop)]
    assert together == whole


def test_blocks_of_one_bucket() -> None:
    """8 micro-batches in a row are of one bucket until full blocks end; then come the rest."""
    assert BLOCK == 8
    batches = name_all(build())
    counts = {bucket: -(-size // 2) for bucket, size in SIZES.items()}
    num_blocks = sum(count // BLOCK for count in counts.values())
    blocks = [batches[BLOCK * i : BLOCK * (i + 1)] for i in range(num_blocks)]
    kinds = [{bucket for bucket, _ in block} for block in blocks]
    assert all(len(kind) == 1 for kind in kinds)
    rest = Counter(bucket for bucket, _ in batches[BLOCK * num_blocks :])
    assert rest == {bucket: count % BLOCK for bucket, count in counts.items() if count % BLOCK}
    changes = sum(one != other for one, other in pairwise(kinds))
    assert changes > 3, "blocks of one bucket stay together instead of being shuffled"


def test_new_samples_do_not_move_the_old_ones() -> None:
    """In an epoch old samples of a bucket keep their order, and new ones come in between."""
    grown = {f"new/{number}.mp4": SHORT for number in range(40)} | SAMPLES

    def line(samples: dict[str, Bucket]) -> list[str]:
        order = build(samples, batch_size=len(samples))  # one batch a bucket: all its samples
        return dict(name_all(order, samples=samples))[SHORT]  # pyright: ignore[reportReturnType]

    before, after = line(SAMPLES), line(grown)
    assert tuple(name for name in after if name in SAMPLES) == before
    assert len(after) == len(before) + 40
    places = [place for place, name in enumerate(after) if name.startswith("new/")]
    assert min(places) < 40 < 110 < max(places)


def test_repeats_lie_apart() -> None:
    """A copy of a sample is a sample of its own, not the neighbor of the first."""
    order = build(repeats=1, batch_size=1)
    names = [names for _, names in name_all(order)]
    assert sum(one == other for one, other in pairwise(names)) < 10


def test_it_is_a_uniform_shuffle() -> None:
    """Over many epochs a sample's mean place is the middle; neighbors part."""
    samples = {f"{number}.mp4": LONG for number in range(64)}
    order = build(samples, batch_size=1)
    places = np.zeros((200, 64))
    for epoch in range(200):
        for place in range(64):
            (sample,) = order.micro_batch(64 * epoch + place).samples
            places[epoch, sample] = place
    standard_error = 64 / np.sqrt(12 * 200)
    assert np.abs(places.mean(0) - 31.5).max() < 5 * standard_error


def test_hashes_are_pinned() -> None:
    """Another mix would change the order of runs that are resumed."""
    values = np.array([0, 1, 2**64 - 1], dtype=np.uint64)
    assert mix(values, 42, 0).tolist() == [
        0xA1D2D4874ED78F0E, 0x0FB638FD8E678942, 0xA29BF027BA9C7DCF
    ]  # fmt: skip
    assert mix(values[:2], 42, 1).tolist() == [0x37D79965B29970A4, 0x1D3D266CC2E2F2E1]
    samples = {f"{letter}.mp4": LONG for letter in "abcdefgh"}
    order = build(samples, batch_size=3)
    expected = [(7, 4, 1), (0, 6), (5, 3, 2), (1, 7, 2)]  # the first epoch's, and one of the second
    assert [order.micro_batch(p) for p in range(4)] == [MicroBatch(LONG, s) for s in expected]


@pytest.mark.parametrize("names", [[], ["a.mp4", "a.mp4"]])
def test_errors(names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"two samples have one name|no sample to train on"):
        TrainingOrder(names, [LONG] * len(names), batch_size=1, seed=0)


def test_half_a_million_samples_take_seconds() -> None:
    names = [f"part{i % 1000:03d}/{i:06d}.mp4" for i in range(500_000)]
    buckets = [(LONG, SHORT, TALL)[i % 3] for i in range(500_000)]
    start = time.process_time()
    order = TrainingOrder(names, buckets, batch_size=1, seed=42)
    order.micro_batch(0)
    order.micro_batch(order.epoch_length)
    assert time.process_time() - start < 200  # 5 on an idle machine; hours for a loop in a loop
    assert order.epoch_length == 500_000

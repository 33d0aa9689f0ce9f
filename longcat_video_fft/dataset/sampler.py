"""Which samples make which micro-batch: a pure function of (seed, epoch, position).

Within an epoch every sample comes once (1 + `repeats` times), in micro-batches of one bucket each.
Nothing depends on the number of processes: micro-batch p belongs to whoever takes number p, so a
run resumes in the middle of an epoch from p alone, on any number of devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longcat_video_fft.options.buckets import Bucket

# So many micro-batches of one bucket follow each other, so that devices that work on one step have
# the same shapes and none waits for a longer one.
BLOCK = 8


@dataclass(frozen=True)
class MicroBatch:
    bucket: Bucket
    samples: tuple[int, ...]  # indices into the list of samples; fewer at a bucket's end


def split_held_out(names: Sequence[str], num_held_out: int) -> list[bool]:
    """Says of each sample whether it is held out: those whose names hash lowest, whatever the seed.

    More samples may take places of held-out ones, but one that was trained on never is held out.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if num_held_out >= len(names):
        raise ValueError(
            f"num_held_out_samples={num_held_out} leaves nothing to train on: there are only "
            f"{len(names)} samples. Lower it."
        )
    keys = {name: (xxhash.xxh3_64_intdigest(f"held out\0{name}".encode()), name) for name in names}
    chosen = set(sorted(keys, key=keys.__getitem__)[:num_held_out])
    return [name in chosen for name in names]


class TrainingOrder:
    """Orders samples with these names and buckets.

    Args:
        names: of the samples, all different; the order depends on the set of names, not on theirs.
        batch_size: samples a micro-batch.
        repeats: how often more a sample comes in an epoch.
    """

    def __init__(
        self,
        names: Sequence[str],
        buckets: Sequence[Bucket],
        *,
        batch_size: int,
        seed: int,
        repeats: int = 0,
    ) -> None:
        if len(set(names)) != len(names):
            raise ValueError("two samples have one name")
        if not names:
            raise ValueError("there is no sample to train on")
        self.batch_size = batch_size
        self.seed = seed
        self.kinds = sorted(set(buckets))
        number = {bucket: index for index, bucket in enumerate(self.kinds)}
        copies = 1 + repeats
        self.samples = np.repeat(np.arange(len(names)), copies)
        self.kind = np.repeat(np.array([number[bucket] for bucket in buckets]), copies)
        keys = [f"{name}\0{copy}".encode() for name in names for copy in range(copies)]
        self.hashes = np.array([xxhash.xxh3_64_intdigest(key) for key in keys], dtype=np.uint64)
        self.counts = np.bincount(self.kind, minlength=len(self.kinds))
        self.epoch_length = int(np.sum(-(-self.counts // batch_size)))  # micro-batches
        self._epoch = -1
        self._batches: list[MicroBatch] = []

    def micro_batch(self, position: int) -> MicroBatch:
        """Returns micro-batch number `position` of the whole run; epochs follow each other."""
        epoch, place = divmod(position, self.epoch_length)
        if epoch != self._epoch:
            self._batches = self._arrange(epoch)
            self._epoch = epoch
        return self._batches[place]

    def _arrange(self, epoch: int) -> list[MicroBatch]:
        keys = mix(self.hashes, self.seed, epoch)
        order = np.lexsort((keys, self.kind))
        ends = np.cumsum(self.counts)
        full: list[list[MicroBatch]] = []
        rest: list[MicroBatch] = []
        for kind, (end, count) in enumerate(zip(ends, self.counts, strict=True)):
            members = self.samples[order[end - count : end]]
            batches = [
                MicroBatch(self.kinds[kind], tuple(members[i : i + self.batch_size].tolist()))
                for i in range(0, count, self.batch_size)
            ]
            whole = len(batches) // BLOCK * BLOCK
            full += [batches[i : i + BLOCK] for i in range(0, whole, BLOCK)]
            rest += batches[whole:]
        # Blocks in random order; incomplete ones come last, so that blocks stay in step.
        shuffled = np.argsort(mix(np.arange(len(full), dtype=np.uint64), self.seed, epoch))
        last = np.argsort(mix(np.arange(len(rest), dtype=np.uint64), self.seed, epoch))
        return [b for i in shuffled for b in full[i]] + [rest[i] for i in last]


def mix(values: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Hashes (value, seed, epoch) to 64 bits, (N,) uint64 -> (N,) uint64: the finalizer of
    SplitMix64 (Steele et al. 2014), which unlike numpy's generators is the same in any version."""
    with np.errstate(over="ignore"):
        salt = xxhash.xxh3_64_intdigest(f"{seed}/{epoch}".encode())
        x = values ^ np.uint64(salt)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

"""What caches hold, what they lack, and whether it is sound; for precompute, training and plan."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from longcat_video_fft.dataset.cache import TensorCache, reject
from longcat_video_fft.dataset.samples import CAPTIONS, SAMPLES, read_captions, read_samples
from longcat_video_fft.dataset.sources import S3_SCHEME, open_caches
from longcat_video_fft.media.bad_video import REASONS
from longcat_video_fft.options.buckets import BF16_BYTES, parse_bucket
from longcat_video_fft.precompute.encoding import read_failures
from longcat_video_fft.precompute.metadata import RETRIED_ERRORS
from longcat_video_fft.storage.storage import LocalStorage

if TYPE_CHECKING:
    from longcat_video_fft.options.buckets import Bucket
    from longcat_video_fft.options.data_config import DataConfig

logger = logging.getLogger("longcat_video_fft")

SHOWN_FAILURES = 3


@dataclass(frozen=True)
class Missing:
    """Missing work is what a run has to make, in all processes together."""

    captions: int
    videos: int
    latent_bytes: int
    caption_tokens: int

    def num_bytes(self, embedding_dim: int) -> int:
        """Returns the size of all of it on the disk, with embeddings of that width in bf16."""
        return self.latent_bytes + BF16_BYTES * embedding_dim * self.caption_tokens


class CacheState:
    """Opens both caches of a data file once: what the last survey asked for, and what is there.

    Args:
        retries_failed: a video that could not be made counts as missing, and not as failed.

    Raises:
        ValueError: no such folder or bucket.
        OSError: there was no survey, or its tables cannot be read.
    """

    def __init__(self, data: DataConfig, *, retries_failed: bool = False) -> None:
        self.data = data
        self.latents, self.text = open_caches(data)
        self.samples = read_samples(self.latents.storage)
        self.captions = read_captions(self.text.storage)
        self.failures = read_failures(data.latent_cache)
        self.failed = {
            key: value
            for key, value in self.failures.items()
            if value[0] not in RETRIED_ERRORS and not retries_failed
        }

    def needs_video(self, name: str, size: int) -> bool:
        """Whether a sample's latents are still to be made."""
        return (name, size) not in self.failed and self.latents.find(name, size) is None

    @cached_property
    def num_whole(self) -> int:
        """Counts the samples with latents and caption."""
        return sum(self._is_whole(n, size, caption) for n, size, _, caption in self.samples)

    @cached_property
    def usable(self) -> list[tuple[str, Bucket]]:
        """Returns (name, bucket) of the samples that are there or, in a folder, can be made."""
        is_local = not self.data.videos.cache_dir_vae.startswith(S3_SCHEME)
        found = []
        for name, size, bucket, caption in self.samples:
            entry = self.latents.find(name, size)
            can_be_made = is_local and (name, size) not in self.failed
            if can_be_made or self._is_whole(name, size, caption):
                found.append((name, bucket if entry is None else parse_bucket(entry.bucket)))
        return found

    def _is_whole(self, name: str, size: int, caption: str) -> bool:
        return self.latents.find(name, size) is not None and self.text.find(caption) is not None

    @cached_property
    def missing(self) -> Missing:
        """Sums up what was asked for and was not there when the caches were opened."""
        videos = [b for name, size, b, _ in self.samples if self.needs_video(name, size)]
        lengths = [n for name, _, n in self.captions if self.text.find(name) is None]
        return Missing(
            captions=len(lengths),
            videos=len(videos),
            latent_bytes=sum(bucket.latent_bytes for bucket in videos),
            caption_tokens=sum(lengths),
        )

    def report(self) -> None:
        """Logs how many samples there are, and which are not, by reason.

        Raises:
            RuntimeError: a sample is neither there nor failed.
        """
        folder = self.data.latent_cache
        absent = [(n, s) for n, s, *_ in self.samples if self.latents.find(n, s) is None]
        lost = [key for key in absent if key not in self.failures]
        if lost:
            raise RuntimeError(f"{folder}: {len(lost)} samples were not made, as {lost[0]}")
        logger.info("%s: %s samples", folder, f"{len(self.samples) - len(absent):,}")
        reasons = Counter(self.failures[key][0] for key in absent)
        for reason, number in reasons.most_common():
            logger.warning("not made: %d %s (%s)", number, reason, REASONS[reason])
            named = [key for key in absent if self.failures[key][0] == reason][:SHOWN_FAILURES]
            for key in named:
                logger.warning("    %s: %s", key[0], self.failures[key][1])


def is_complete(data: DataConfig) -> bool:
    """Whether the training can start: nothing that the last survey asked for is missing."""
    if not ((data.latent_cache / SAMPLES).is_file() and (data.text_cache / CAPTIONS).is_file()):
        return False
    missing = CacheState(data).missing
    return not (missing.videos or missing.captions)


def verify(data: DataConfig, *, repairs: bool) -> int:
    """Compares every checksum; with `repairs`, what is wrong is made again by the next run."""
    num_bad = 0
    for folder in (data.latent_cache, data.text_cache):
        bad = TensorCache(LocalStorage(folder)).verify()
        for entry in bad:
            logger.error(
                "%s: %s at %d is corrupt (%s)", folder, entry.shard, entry.offset, entry.id
            )
        if repairs and bad:
            reject(folder, bad)
        num_bad += len(bad)
        logger.info("%s: %d corrupt", folder, len(bad))
    if num_bad and not repairs:
        logger.error("run again with --verify --repair, then without both, to make them again")
    return int(num_bad > 0 and not repairs)

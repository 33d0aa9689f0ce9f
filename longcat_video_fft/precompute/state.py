"""What caches hold, what they lack, and whether it is sound; for precompute and the training."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from longcat_video_fft.dataset.cache import TensorCache, open_folder, reject
from longcat_video_fft.dataset.samples import CAPTIONS, SAMPLES, read_samples
from longcat_video_fft.media.bad_video import REASONS
from longcat_video_fft.precompute.encoding import read_failures
from longcat_video_fft.precompute.metadata import RETRIED_ERRORS
from longcat_video_fft.storage.storage import LocalStorage

if TYPE_CHECKING:
    from longcat_video_fft.options.data_config import DataConfig

logger = logging.getLogger("longcat_video_fft")

SHOWN_FAILURES = 3


@dataclass(frozen=True)
class Missing:
    """What a run has to make, in all processes together."""

    captions: int
    videos: int
    num_bytes: int


def permanent(failures: dict[Any, tuple[str, str]]) -> dict[Any, tuple[str, str]]:
    """Those that another try would not mend."""
    return {key: value for key, value in failures.items() if value[0] not in RETRIED_ERRORS}


def find_missing(
    data: DataConfig,
    latents: TensorCache,
    text: TensorCache,
    *,
    failed: dict[Any, Any],
    embedding_dim: int,
) -> Missing:
    """What samples.parquet and captions.parquet ask for and the caches lack."""
    jobs = [
        bucket
        for name, size, bucket, _ in read_samples(latents.storage)
        if (name, size) not in failed and latents.find(name, size) is None
    ]
    captions = pq.read_table(data.text_cache / CAPTIONS).to_pydict()
    lengths = [
        length
        for name, length in zip(captions["caption_id"], captions["num_tokens"], strict=True)
        if text.find(name) is None
    ]
    num_bytes = sum(bucket.latent_bytes for bucket in jobs) + 2 * embedding_dim * sum(lengths)
    return Missing(captions=len(lengths), videos=len(jobs), num_bytes=num_bytes)


def is_complete(data: DataConfig) -> bool:
    """Whether the training can start: nothing that the last survey asked for is missing."""
    if not ((data.latent_cache / SAMPLES).is_file() and (data.text_cache / CAPTIONS).is_file()):
        return False
    caches = open_folder(data.latent_cache), open_folder(data.text_cache)
    failed = permanent(read_failures(data.latent_cache))
    missing = find_missing(data, *caches, failed=failed, embedding_dim=0)
    return not (missing.videos or missing.captions)


def report_result(data: DataConfig) -> None:
    """How many samples there are now, and which are not, by reason.

    Raises:
        RuntimeError: a sample is neither there nor failed.
    """

    cache, failures = open_folder(data.latent_cache), read_failures(data.latent_cache)
    samples = read_samples(cache.storage)
    absent = [(name, size) for name, size, *_ in samples if cache.find(name, size) is None]
    lost = [key for key in absent if key not in failures]
    if lost:
        raise RuntimeError(f"{data.latent_cache}: {len(lost)} samples were not made, as {lost[0]}")
    logger.info("%s: %s samples", data.latent_cache, f"{len(samples) - len(absent):,}")
    reasons = Counter(failures[key][0] for key in absent)
    for reason, number in reasons.most_common():
        logger.warning("not made: %d %s (%s)", number, reason, REASONS[reason])
        named = [key for key in absent if failures[key][0] == reason][:SHOWN_FAILURES]
        for key in named:
            logger.warning("    %s: %s", key[0], failures[key][1])


def verify(data: DataConfig, *, repairs: bool) -> int:
    """Compares every checksum; with `repairs`, what is wrong is made anew by the next run."""
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
        logger.error("run again with --verify --repair, then without both, to make them anew")
    return int(num_bad > 0 and not repairs)

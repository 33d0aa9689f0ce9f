"""The two stages of work of one process: its share of the captions, its share of the videos.

Shares are strides over the lists that `survey.py` wrote, so they do not depend on what other
processes have done meanwhile; what a cache has already is passed over. Bytes do not depend on the
share: a video is encoded alone, and a batch of captions is a fixed stretch of the list.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from longcat_video_fft.media.bad_video import BadVideoError
from longcat_video_fft.media.decoding import decode_sample
from longcat_video_fft.model.vae import COMPILE_FROM
from longcat_video_fft.storage.storage import ObjectVanishedError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from torch import Tensor

    from longcat_video_fft.dataset.cache import ShardWriter, TensorCache
    from longcat_video_fft.model.text_encoder import TextEncoder
    from longcat_video_fft.model.vae import Pending, VideoEncoder
    from longcat_video_fft.options.buckets import Bucket, BucketRule
    from longcat_video_fft.storage.storage import Storage

logger = logging.getLogger(__name__)

FAILURES_ENDING = ".failures"
Job = tuple[str, int, "Bucket", str]  # filename, size, promised bucket, caption id


class Failures:
    """Appends the videos that could not be encoded, and why, to a file of this process's own."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"rank{rank:05d}-{uuid.uuid4().hex[:12]}{FAILURES_ENDING}"

    def add(self, name: str, version: int, reason: str, message: str) -> None:
        line = {"id": name, "version": version, "reason": reason, "message": message}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        logger.warning("left out: %s: %s", name, message)


def read_failures(folder: Path) -> dict[tuple[str, int], tuple[str, str]]:
    """Returns (reason, message) by (filename, size); the newest file's line counts."""
    found: dict[tuple[str, int], tuple[str, str]] = {}
    files = sorted(folder.glob(f"*{FAILURES_ENDING}"), key=lambda path: path.stat().st_mtime_ns)
    for path in files:
        for line in path.read_text("utf-8").splitlines(keepends=True):
            if line.endswith("\n"):  # a killed process may have torn its last
                item = json.loads(line)
                found[item["id"], item["version"]] = item["reason"], item["message"]
    return found


def encode_captions(
    batches: Sequence[Sequence[tuple[str, str, int]]],
    encoder: TextEncoder,
    writer: ShardWriter,
    cache: TensorCache,
    *,
    write_batch_size: int,
    on_done: Callable[[int], None],
) -> None:
    """Embeds what is missing of these batches of (caption id, cleaned caption, tokens). A batch is
    always encoded whole."""
    waiting: list[tuple[str, Tensor, str, int]] = []

    def write() -> None:
        if waiting:
            writer.write(waiting)
            on_done(len(waiting))
            waiting.clear()

    for batch in batches:
        embeddings = encoder.encode([caption for _, caption, _ in batch])
        waiting += [
            (name, embedding, "", 0)
            for (name, *_), embedding in zip(batch, embeddings, strict=True)
            if cache.find(name) is None
        ]
        if len(waiting) >= write_batch_size:
            write()
    write()


class VideoStage:
    """Downloads and decodes ahead in threads, encodes one after the other, writes behind.

    Args:
        on_done: called with (videos done, videos failed, bytes written) after each video.
    """

    def __init__(
        self,
        storage: Storage,
        rule: BucketRule,
        encoder: VideoEncoder,
        writer: ShardWriter,
        failures: Failures,
        *,
        workers: int,
        compiles: bool,
        on_done: Callable[[int, int, int], None],
    ) -> None:
        self.storage, self.rule, self.encoder = storage, rule, encoder
        self.writer, self.failures = writer, failures
        self.workers, self.compiles, self.on_done = workers, compiles, on_done
        # Seconds of the main thread by what it waited for, and of the workers in all.
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def run(self, jobs: list[Job]) -> None:
        """Encodes every job or writes down why not."""
        promised = Counter(bucket for _, _, bucket, _ in jobs)
        worth_compiling = {b for b, number in promised.items() if number >= COMPILE_FROM}
        before: tuple[Job, Bucket, Pending] | None = None
        for job, future in self._decode_ahead(jobs):
            started = time.perf_counter()
            ready = self._take(job, future)
            self.seconds["waiting for decoding"] += time.perf_counter() - started
            if ready is None:
                continue
            pixels, bucket = ready
            started = time.perf_counter()
            is_compiled = self.compiles and bucket in worth_compiling
            pending = self.encoder.encode(pixels, compiled=is_compiled)
            self.seconds["VAE"] += time.perf_counter() - started
            if before is not None:
                self._write(*before)
            before = job, bucket, pending
        if before is not None:
            self._write(*before)

    def _decode_ahead(self, jobs: list[Job]) -> Iterator[tuple[Job, Future[Any]]]:
        waiting: deque[tuple[Job, Future[Any]]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for job in jobs:
                    waiting.append((job, pool.submit(self._decode, job)))
                    if len(waiting) > self.workers + 1:
                        yield waiting.popleft()
                while waiting:
                    yield waiting.popleft()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _decode(self, job: Job) -> tuple[Tensor, Bucket]:
        started = time.perf_counter()
        data = self.storage.read(job[0])
        read = time.perf_counter()
        sample = decode_sample(data, self.rule)
        pixels = self.encoder.prepare(sample.frames)
        self.seconds["workers: reading"] += read - started
        self.seconds["workers: decoding"] += time.perf_counter() - read
        return pixels, sample.bucket

    def _take(self, job: Job, future: Future[Any]) -> tuple[Tensor, Bucket] | None:
        """Returns the decoded video; None when it cannot be used, which is written down."""
        name, version = job[0], job[1]
        try:
            return future.result()
        except BadVideoError as error:
            self.failures.add(name, version, error.reason, str(error))
        except ObjectVanishedError as error:
            self.failures.add(name, version, "vanished", str(error))
        except StorageError as error:
            self.failures.add(name, version, "unreadable", str(error))
        self.on_done(0, 1, 0)
        return None

    def _write(self, job: Job, bucket: Bucket, pending: Pending) -> None:
        started = time.perf_counter()
        latents = pending.wait()
        ended = time.perf_counter()
        self.seconds["VAE"] += ended - started
        if not latents.isfinite().all():
            self.failures.add(job[0], job[1], "damaged", "the VAE gives NaN or infinity for it")
            self.on_done(0, 1, 0)
            return
        self.writer.write([(job[0], latents, str(bucket), job[1])])
        self.seconds["writing"] += time.perf_counter() - ended
        self.on_done(1, 0, bucket.latent_bytes)

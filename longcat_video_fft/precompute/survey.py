"""The table of videos -> what will be cached: each sample's bucket and caption, and a report.

    metadata -> CACHE/samples.parquet    a row a sample: filename, size, bucket, caption_id
             -> TEXT/captions.parquet    a row a caption: caption_id, caption, num_tokens

One process makes both before anything is encoded; the others, and the training, read them.
Buckets here are what headers promise; what is decoded decides (`media/decoding.py`).
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from tqdm import tqdm

from longcat_video_fft.dataset.captions import EMPTY_CAPTION, caption_id, clean_caption
from longcat_video_fft.dataset.samples import CAPTIONS, METADATA, SAMPLES
from longcat_video_fft.media.bad_video import REASONS
from longcat_video_fft.model.text_encoder import count_tokens
from longcat_video_fft.options.buckets import (
    BF16_BYTES,
    MAX_TOKENS,
    Bucket,
    bucket_lines,
    parse_bucket,
)
from longcat_video_fft.options.data_config import ParquetOptions
from longcat_video_fft.precompute.metadata import (
    VideoRow,
    build_table,
    pair_files,
    read_rows,
    write_table,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from longcat_video_fft.options.data_config import DataConfig
    from longcat_video_fft.storage.storage import Storage

logger = logging.getLogger(__name__)

TOKENIZED_AT_ONCE = 1024
SHOWN_NAMES = 3


@dataclass
class Survey:
    """A survey counts what there is, what is left out and why, and how much it will take."""

    buckets: Counter[Bucket] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    num_unknown: int = 0  # no length in the table; the decoded one decides
    num_variable_rate: int = 0
    num_rotated: int = 0
    num_captions: int = 0
    num_cut_captions: int = 0  # over MAX_TOKENS
    num_tokens: int = 0  # of captions that are different

    def leave_out(self, row: VideoRow, reason: str, message: str) -> None:
        self.left_out[reason] += 1
        names = self.examples.setdefault(reason, [])
        if len(names) < SHOWN_NAMES:
            names.append(f"{row.filename}: {message}" if message else row.filename)

    @property
    def num_samples(self) -> int:
        return sum(self.buckets.values())

    @property
    def latent_bytes(self) -> int:
        return sum(bucket.latent_bytes * number for bucket, number in self.buckets.items())

    def lines(self, embedding_dim: int) -> Iterator[str]:
        """Yields the report that is shown before anything is encoded."""
        total = self.num_samples + self.left_out.total()
        yield f"{total:,} videos: {self.num_samples:,} samples, {self.left_out.total():,} left out"
        yield from bucket_lines(self.buckets)
        for reason, number in self.left_out.most_common():
            yield f"  left out: {number:,} {reason} ({REASONS.get(reason, 'see metadata')})"
            for name in self.examples[reason]:
                yield f"      {name}"
        if self.num_unknown:
            yield f"  {self.num_unknown:,} of unknown length are counted as the longest"
        if self.num_variable_rate or self.num_rotated:
            yield (
                f"  {self.num_variable_rate:,} with a variable frame rate, {self.num_rotated:,} "
                "with a rotation tag: handled"
            )
        text = self.num_tokens * embedding_dim * BF16_BYTES
        yield (
            f"  {self.num_captions:,} different captions, {self.num_cut_captions:,} of them over "
            f"{MAX_TOKENS} tokens and cut there"
        )
        latents = self.latent_bytes
        yield f"  latents {latents / 1e9:,.2f} GB, caption embeddings {text / 1e9:,.2f} GB"


def find_rows(data: DataConfig, storage: Storage) -> Iterator[VideoRow]:
    """Yields the rows of the metadata backend that the config asks for."""
    videos = data.videos
    if videos.metadata_backend == "parquet":
        rows = read_rows(data.path(data.parquet.path), data.parquet)
        yield from rows if "metadata" in videos.skipped_scans else _compare(rows, storage)
        return
    table = data.latent_cache / METADATA
    is_kept = videos.preserve_data_backend_cache or "metadata" in videos.skipped_scans
    if is_kept and table.is_file():
        logger.info(
            "%s: kept as it is; files that came since are not seen (preserve_data_backend_cache)",
            table,
        )
    else:
        build_table(storage, table, reads_captions=videos.caption_strategy == "textfile")
    yield from read_rows(table, ParquetOptions())  # ours, whatever a user's table would have


def _compare(rows: Iterator[VideoRow], storage: Storage) -> Iterator[VideoRow]:
    """Compares a table's rows with the storage; skip_file_discovery "metadata" saves it."""
    listed = {pair.key: pair.size for pair in pair_files(storage.list_objects())}
    for row in rows:
        size = listed.pop(row.filename, None)
        if size is None and not row.error:
            row.error, row.message = "vanished", "in the table, not in the storage"
        row.size = size or row.size
        yield row
    for key, size in listed.items():
        yield VideoRow(filename=key, size=size, error="not_in_table")


def survey(rows: Iterable[VideoRow], data: DataConfig, tokenizer: Any) -> Survey:
    """Writes samples.parquet and captions.parquet, and returns the report.

    Raises:
        ValueError: no sample is left.
    """
    found = Survey()
    samples: list[tuple[str, int, str, str]] = []
    captions: dict[str, str] = {EMPTY_CAPTION: ""}
    for row in tqdm(rows, desc="survey", unit="video"):
        bucket = _choose_bucket(row, data, found)
        if bucket is None:
            continue
        cleaned = clean_caption(_caption(row, data))
        if not cleaned:
            found.leave_out(row, "missing_caption", row.message)
            continue
        found.buckets[bucket] += 1
        found.num_variable_rate += row.has_variable_rate
        found.num_rotated += bool(row.rotation)
        name = caption_id(cleaned)
        captions.setdefault(name, cleaned)
        samples.append((row.filename, row.size, str(bucket), name))
    if not samples:
        lines = "\n".join(found.lines(0))
        raise ValueError(f"{data.source}: no video can be used.\n{lines}")
    # By bucket first, so that a process meets one shape for a long while; then by name.
    samples.sort(key=lambda item: (parse_bucket(item[2]), item[0]))
    names = ("filename", "size", "bucket", "caption_id")
    columns = dict(zip(names, map(list, zip(*samples, strict=True)), strict=True))
    data.latent_cache.mkdir(parents=True, exist_ok=True)
    write_table(pa.table(columns), data.latent_cache / SAMPLES)
    _write_captions(captions, found, data, tokenizer)
    return found


def _caption(row: VideoRow, data: DataConfig) -> str:
    strategy = data.videos.caption_strategy
    if strategy == "instanceprompt":
        return str(data.videos.instance_prompt)
    if strategy == "filename":
        return PurePosixPath(row.filename).stem.replace("_", " ").replace("-", " ")
    return row.caption


def _choose_bucket(row: VideoRow, data: DataConfig, found: Survey) -> Bucket | None:
    """Chooses the bucket that the header promises; None (counted) when the video is left out."""
    videos, options, rule = data.videos, data.options, data.rule
    smallest = videos.minimum_image_size
    if row.error:
        found.leave_out(row, row.error, row.message)
        return None
    if row.width < 1 or row.height < 1:
        found.leave_out(row, "damaged", f"{row.width}x{row.height} in the table")
        return None
    if smallest and min(row.width, row.height) < smallest:
        found.leave_out(row, "too_small", f"{row.width}x{row.height}")
        return None
    available = rule.frames[0]
    if row.num_frames and row.duration:
        if row.num_frames < options.min_frames:
            found.leave_out(row, "min_frames", f"{row.num_frames} frames")
            return None
        if options.max_frames is not None and row.num_frames > options.max_frames:
            found.leave_out(row, "max_frames", f"{row.num_frames} frames")
            return None
        available = rule.count_frames(num_frames=row.num_frames, duration=row.duration)
    else:
        found.num_unknown += 1
    bucket = rule.choose_bucket(height=row.height, width=row.width, num_available=available)
    if bucket is None:
        found.leave_out(row, "too_short", f"{available} frames at the target rate")
    return bucket


def _write_captions(
    captions: dict[str, str], found: Survey, data: DataConfig, tokenizer: Any
) -> None:
    """Sorts captions by length, so that batches of neighbors need little padding; then by id."""
    names, texts = list(captions), list(captions.values())
    lengths: list[int] = []
    bar = tqdm(total=len(texts), desc="tokenizing", unit="caption")
    with bar:
        for start in range(0, len(texts), TOKENIZED_AT_ONCE):
            lengths += count_tokens(tokenizer, texts[start : start + TOKENIZED_AT_ONCE])
            bar.update(min(TOKENIZED_AT_ONCE, len(texts) - start))
    found.num_captions = len(texts)
    found.num_cut_captions = sum(length > MAX_TOKENS for length in lengths)
    found.num_tokens = sum(min(length, MAX_TOKENS) for length in lengths)
    order = sorted(range(len(names)), key=lambda i: (lengths[i], names[i]))
    columns = {
        "caption_id": [names[i] for i in order],
        "caption": [texts[i] for i in order],
        "num_tokens": [min(lengths[i], MAX_TOKENS) for i in order],
    }
    data.text_cache.mkdir(parents=True, exist_ok=True)
    write_table(pa.table(columns), data.text_cache / CAPTIONS)

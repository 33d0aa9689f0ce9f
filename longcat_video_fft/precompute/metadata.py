"""Stored objects -> a table with a row a video: size, rate, length, caption, or what is wrong.

Only headers are read (`media/mp4_header.py`), by ranged requests, many at once. Rows go to parts
beside the table as they come, so a killed run continues where it stopped; a table that is made
again keeps the rows of files that have not changed. `survey.py` reads the table next.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import count
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
from av.codec import Codec
from av.error import FFmpegError
from tqdm import tqdm

from longcat_video_fft.media.bad_video import BadVideoError
from longcat_video_fft.media.mp4_header import HeaderError, read_header
from longcat_video_fft.storage.storage import (
    ObjectVanishedError,
    Storage,
    StorageError,
    StoredObject,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from longcat_video_fft.options.data_config import ParquetOptions

logger = logging.getLogger(__name__)

VIDEO_ENDINGS = (".mp4", ".m4v", ".mov")
OTHER_VIDEO_ENDINGS = (".avi", ".flv", ".mkv", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
CAPTION_ENDING = ".txt"
MAX_CAPTION_BYTES = 64 * 1024
PART_ROWS = 4096
WORKERS = 256
# What another run may find fixed; other errors stay until the file changes.
RETRIED_ERRORS = ("unreadable", "vanished")
CAPTION_ERRORS = ("missing_caption", "bad_caption")
CAPTION_NOT_READ = -2  # as a caption's size


@dataclass(slots=True, kw_only=True)
class VideoRow:
    """A row describes one video. `error` is a short name and empty where the video is fine."""

    filename: str  # the key below the prefix, sub-folders included
    size: int = 0  # bytes; 0: not known
    caption: str = ""
    caption_size: int = -1  # bytes; -1: there is none; -2: not looked for
    width: int = 0  # as displayed, in pixels
    height: int = 0
    rotation: int = 0  # degrees clockwise
    num_frames: int = 0  # of the file; 0: not known
    fps: float = 0.0
    duration: float = 0.0  # seconds
    codec: str = ""
    has_variable_rate: bool = False
    error: str = ""
    message: str = ""


ARROW_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
SCHEMA = pa.schema([(name, ARROW_TYPES[kind]) for name, kind in get_type_hints(VideoRow).items()])


@dataclass(frozen=True)
class Pair:
    """A pair is a video, its caption's file where there is one, and the video that has its name."""

    key: str
    size: int
    caption_key: str | None
    caption_size: int
    same_name: str | None
    has_bad_name: bool = False  # not UTF-8, and escaped in `key`


def pair_files(objects: Iterable[StoredObject]) -> list[Pair]:
    """Returns videos in the order of their keys, each with the .txt of the same name.

    Of several with one name, the first by ending (`VIDEO_ENDINGS`, then others) is the one to take.
    """
    videos: dict[str, int] = {}
    captions: dict[str, tuple[str, int]] = {}
    badly_named: set[str] = set()
    for item in objects:
        key = escape(item.key)
        stem, ending = os.path.splitext(key)  # noqa: PTH122 - a key, not a path
        if ending.lower() == CAPTION_ENDING:
            captions[stem] = (key, item.size)
        elif ending.lower() in VIDEO_ENDINGS + OTHER_VIDEO_ENDINGS:
            videos[key] = item.size
            if key != item.key:
                badly_named.add(key)
    taken: dict[str, str] = {}
    for key in sorted(videos, key=_preference):
        taken.setdefault(os.path.splitext(key)[0], key)  # noqa: PTH122
    pairs: list[Pair] = []
    for key in sorted(videos):
        stem = os.path.splitext(key)[0]  # noqa: PTH122
        caption_key, caption_size = captions.get(stem, (None, -1))
        same_name = taken[stem] if taken[stem] != key else None
        has_bad_name = key in badly_named
        pairs.append(Pair(key, videos[key], caption_key, caption_size, same_name, has_bad_name))
    unused = captions.keys() - taken.keys()
    if unused:
        logger.warning("%d captions have no video, first %s", len(unused), captions[min(unused)][0])
    return pairs


def escape(key: str) -> str:
    """Writes what is not UTF-8 in a file's name as \\x and its number: tables hold UTF-8."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _preference(key: str) -> tuple[int, str]:
    ending = os.path.splitext(key)[1].lower()  # noqa: PTH122
    is_known = ending in VIDEO_ENDINGS
    return (VIDEO_ENDINGS.index(ending) if is_known else len(VIDEO_ENDINGS), key)


def build_table(
    storage: Storage, output: Path, *, reads_captions: bool = True, workers: int = WORKERS
) -> Path:
    """Makes or completes the table at `output`, a row for every video below the storage's root.

    Raises:
        ValueError: the bucket or folder cannot be listed, or holds no video.
    """
    pairs = pair_files(tqdm(storage.list_objects(), desc="listing", unit="object"))
    if not pairs:
        raise ValueError(
            f"{storage.location}: no videos ({', '.join(VIDEO_ENDINGS)}) there. Check the prefix."
        )
    parts = output.with_name(f"{output.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    sources = [path for path in (output, *sorted(parts.glob("part-*.parquet"))) if path.is_file()]
    done = _find_done(sources)
    missing = [pair for pair in pairs if not _is_done(pair, done, reads_captions=reads_captions)]
    logger.info("%s: %d videos, %d to look at", storage.location, len(pairs), len(missing))
    numbers = count(len(list(parts.glob("part-*.parquet"))))
    bar = tqdm(desc="headers", total=len(pairs), initial=len(pairs) - len(missing), unit="video")
    num_bad = 0
    look = partial(probe, storage, reads_captions=reads_captions)
    with bar, ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(missing), PART_ROWS):
            rows: list[VideoRow] = []
            for row in pool.map(look, missing[start : start + PART_ROWS]):
                rows.append(row)
                num_bad += bool(row.error)
                bar.set_postfix(bad=num_bad, refresh=False)
                bar.update()
            sources.append(parts / f"part-{next(numbers):06d}.parquet")
            write_rows(rows, sources[-1])
    _merge(sources, {pair.key for pair in pairs}, output)
    for part in parts.glob("*"):
        part.unlink()
    parts.rmdir()
    return output


def probe(storage: Storage, pair: Pair, *, reads_captions: bool = True) -> VideoRow:
    """Makes the row of one video. Whatever is wrong with it is noted in the row."""
    caption_size = pair.caption_size if reads_captions else CAPTION_NOT_READ
    row = VideoRow(filename=pair.key, size=pair.size, caption_size=caption_size)
    try:
        if pair.has_bad_name:
            raise BadVideoError("its name, or a folder's, is not UTF-8; rename it", "bad_name")
        if pair.same_name:
            raise BadVideoError(
                f"has the name of {pair.same_name}, which is taken; one caption is for one video",
                "same_name",
            )
        if PurePosixPath(pair.key).suffix.lower() not in VIDEO_ENDINGS:
            raise BadVideoError("no mp4 or mov; convert it, for example with ffmpeg", "not_mp4")
        if reads_captions:
            row.caption = read_caption(storage, pair)
        header = read_header(partial(storage.read_range, pair.key), pair.size)
        for name in ("width", "height", "rotation", "num_frames", "fps", "duration", "codec"):
            setattr(row, name, getattr(header, name))
        row.has_variable_rate = header.has_variable_rate
        if not can_decode(header.codec):
            raise BadVideoError(f"codec {header.codec!r} is not one that can be decoded", "codec")
    except (BadVideoError, HeaderError) as error:
        row.error, row.message = error.reason, str(error)
    except ObjectVanishedError as error:
        row.error, row.message = "vanished", str(error)
    except StorageError as error:
        row.error, row.message = "unreadable", str(error)
    return row


def read_caption(storage: Storage, pair: Pair) -> str:
    """Reads the whole text of a caption's file, all its lines.

    Raises:
        BadVideoError: there is none, it is empty, too long, or not UTF-8.
    """
    if pair.caption_key is None:
        raise BadVideoError(f"no {CAPTION_ENDING} of the same name beside it", "missing_caption")
    if pair.caption_size > MAX_CAPTION_BYTES:
        raise BadVideoError(
            f"its caption has {pair.caption_size} bytes, over {MAX_CAPTION_BYTES}", "bad_caption"
        )
    try:
        text = storage.read(pair.caption_key).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadVideoError(f"its caption is not UTF-8 ({error.reason})", "bad_caption") from error
    if not text.strip():
        raise BadVideoError("its caption is empty", "missing_caption")
    return text


@cache
def can_decode(codec: str) -> bool:
    try:
        Codec(codec, "r")
    except (ValueError, FFmpegError):
        return False
    return True


def read_rows(path: Path, columns: ParquetOptions) -> Iterator[VideoRow]:
    """Yields the rows of a table of ours, or of a user's that has less: named columns are looked
    up, and what is not there is not known.

    Raises:
        ValueError: not a parquet file, or a named column is missing.
    """
    schema = read_schema(path)
    renamed = {
        columns.filename_column: "filename",
        columns.width_column: "width",
        columns.height_column: "height",
        columns.caption_column: "caption",
    }
    fallback = columns.fallback_caption_column
    extra = [fallback] if fallback else []
    lacking = [name for name in (*renamed, *extra) if name not in schema.names]
    if lacking:
        raise ValueError(
            f"{path}: no column {', '.join(lacking)}; it has {', '.join(schema.names)}. Name them "
            "under parquet, or make the table with scripts/generate_metadata_parquet.py."
        )
    renamed |= {name: name for name in SCHEMA.names if name not in renamed.values()}
    wanted = [name for name in renamed if name in schema.names]
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=wanted + extra):
            for raw in batch.to_pylist():
                values = {renamed[name]: raw[name] for name in wanted if raw[name] is not None}
                if "filename" not in values:
                    raise ValueError(
                        f"{path}: a row has no {columns.filename_column}. Leave it out."
                    )
                if not values.get("caption") and extra:
                    values["caption"] = raw[extra[0]] or ""
                if not columns.identifier_includes_extension:
                    values["filename"] = f"{values['filename']}{VIDEO_ENDINGS[0]}"
                yield VideoRow(**values)


def read_schema(path: Path) -> pa.Schema:
    if not path.is_file():
        raise ValueError(
            f"{path}: no such table. Make it with scripts/generate_metadata_parquet.py."
        )
    try:
        return pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error}). Make it again.") from error


def write_rows(rows: list[VideoRow], path: Path) -> None:
    write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA), path)


def write_table(table: pa.Table, path: Path) -> None:
    """Writes a parquet file atomically."""
    partial_path = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, partial_path, compression="zstd")
    partial_path.replace(path)


def _find_done(sources: list[Path]) -> dict[str, tuple[int, int, str, str]]:
    """Returns (size, caption's size, error, codec) by filename; later sources win."""
    done: dict[str, tuple[int, int, str, str]] = {}
    names = ["filename", "size", "caption_size", "error", "codec"]
    for path in sources:
        if read_schema(path).names != SCHEMA.names:
            raise ValueError(
                f"{path}: a table of another form is there. Give another output, or delete it."
            )
        columns: dict[str, list[Any]] = pq.read_table(path, columns=names).to_pydict()
        values = zip(*(columns[name] for name in names), strict=True)
        done.update({key: (size, text, error, codec) for key, size, text, error, codec in values})
    return done


def _is_done(
    pair: Pair, done: dict[str, tuple[int, int, str, str]], *, reads_captions: bool
) -> bool:
    size, caption_size, error, _ = done.get(pair.key, (-1, -1, "", ""))
    if error in RETRIED_ERRORS or (error == "same_name") != bool(pair.same_name):
        return False
    if not reads_captions:  # a caption that was at fault kept the header from being read
        return size == pair.size and error not in CAPTION_ERRORS
    return size == pair.size and caption_size == pair.caption_size


def _merge(sources: list[Path], keys: set[str], output: Path) -> None:
    """Writes one table in the order of names: each key's newest row, none of keys that are gone."""
    tables = [pq.read_table(path, schema=SCHEMA) for path in sources]
    names: list[str] = pa.concat_tables(tables)["filename"].to_pylist()
    last = {name: position for position, name in enumerate(names)}
    chosen = [last[name] for name in sorted(keys & last.keys())]
    write_table(pa.concat_tables(tables).take(chosen), output)

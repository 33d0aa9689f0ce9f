"""Tensors on disk: a few large shards, an index beside each, one read a sample.

    CACHE/manifest.json                 what made the tensors; another maker is an error
                                        (`precompute/manifest.py`)
    CACHE/rank00000-3f2a9c-0000.shard   tensors one after the other
    CACHE/rank00000-3f2a9c-0000.index   a line of JSON for each of them, written after it

Every process writes shards of its own, with new names at each start, and only ever appends. A
tensor counts when its index line is whole, so a kill at any time loses what was in flight and
nothing else. A cache can be copied to S3 as it is and read there with one ranged request a sample.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from tqdm import tqdm

from longcat_video_fft.storage.storage import ObjectVanishedError, Storage, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

SHARD_BYTES = 512 * 1024 * 1024  # a shard is closed once it is this long
INDEX_ENDING, SHARD_ENDING = ".index", ".shard"
REJECTED = "rejected.jsonl"  # tensors that --verify found wrong; they are made again
READ_THREADS = 32
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float32)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An entry locates a tensor. `version` is the size of the file it was made from; 0: none."""

    id: str
    shard: str
    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: str
    checksum: str  # xxh3_64 of the bytes
    bucket: str
    version: int


class CorruptEntryError(OSError):
    """A tensor's bytes are not those that were written."""


class ShardWriter:
    """Appends tensors to shards of this process's own in `folder`."""

    def __init__(self, folder: Path, rank: int, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.prefix = f"rank{rank:05d}-{uuid.uuid4().hex[:12]}"
        self.number = 0
        self.files: tuple[int, int] | None = None  # descriptors of shard and index
        self.offset = 0

    def write(self, items: Iterable[tuple[str, Tensor, str, int]]) -> None:
        """Appends (id, tensor, bucket, version) items and makes them count, all together.

        Raises:
            OSError: the disk is full or gone; what was written before stays.
        """
        data, lines = [], []
        if self.files is None:
            self._open()
        for name, tensor, bucket, version in items:
            raw = to_bytes(tensor)
            line = {
                "id": name,
                "offset": self.offset,
                "num_bytes": len(raw),
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "checksum": xxhash.xxh3_64_hexdigest(raw),
                "bucket": bucket,
                "version": version,
            }
            data.append(raw)
            lines.append(json.dumps(line, separators=(",", ":")) + "\n")
            self.offset += len(raw)
        assert self.files is not None
        shard, index = self.files
        try:
            for raw in data:
                _write_all(shard, raw)
            # The bytes reach the disk before the line that lists them, also on power loss.
            os.fdatasync(shard)
            _write_all(index, "".join(lines).encode())
        except OSError as error:
            remedy = "what was written before is kept: free some space and start again"
            raise OSError(error.errno, f"{error.strerror}; {remedy}", str(self.folder)) from error
        if self.offset >= self.shard_bytes:
            self.close()

    def close(self) -> None:
        if self.files is not None:
            os.fsync(self.files[1])
            for descriptor in self.files:
                os.close(descriptor)
            self.files = None
            self.number += 1
            self.offset = 0

    def _open(self) -> None:
        stem = self.folder / f"{self.prefix}-{self.number:04d}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        shard = os.open(stem.with_suffix(SHARD_ENDING), flags, 0o644)
        self.files = shard, os.open(stem.with_suffix(INDEX_ENDING), flags, 0o644)


class TensorCache:
    """Reads a cache, in a folder or in S3.

    Raises:
        ValueError: no such folder or bucket.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.entries: dict[str, list[Entry]] = {}
        rejected = self._read_rejected()
        for entry in self._read_indices():
            if (entry.shard, entry.offset) not in rejected:
                self.entries.setdefault(entry.id, []).append(entry)

    def find(self, name: str, version: int = 0) -> Entry | None:
        """Finds the entry of that id, and of that version where both sizes are known."""
        for entry in self.entries.get(name, ()):
            if not (version and entry.version) or entry.version == version:
                return entry
        return None

    def __iter__(self) -> Iterator[Entry]:
        return (entry for entries in self.entries.values() for entry in entries)

    def read(self, entry: Entry) -> Tensor:
        """Reads the tensor with one request and compares its checksum.

        Raises:
            CorruptEntryError: short, or other bytes than were written.
        """
        try:
            raw = self.storage.read_range(entry.shard, entry.offset, entry.num_bytes)
        except ObjectVanishedError:
            raw = b""
        if len(raw) != entry.num_bytes or xxhash.xxh3_64_hexdigest(raw) != entry.checksum:
            raise CorruptEntryError(
                f"{self.storage.location}: {entry.id} in {entry.shard} at {entry.offset} is not "
                "what was written. Run precompute with --verify --repair, then without."
            )
        tensor = torch.frombuffer(bytearray(raw), dtype=DTYPES[entry.dtype])
        return tensor.view(entry.shape)

    def verify(self, *, workers: int = READ_THREADS) -> list[Entry]:
        """Returns the entries whose bytes are not those that were written."""
        entries = sorted(self, key=lambda e: (e.shard, e.offset))
        with ThreadPoolExecutor(workers) as pool:
            results = pool.map(self._is_sound, entries)
            bar = tqdm(results, desc="verifying", total=len(entries), unit="sample")
            return [entry for entry, is_sound in zip(entries, bar, strict=True) if not is_sound]

    def _is_sound(self, entry: Entry) -> bool:
        try:
            self.read(entry)
        except (CorruptEntryError, StorageError):
            return False
        return True

    def _read_indices(self) -> Iterator[Entry]:
        names = [item.key for item in self.storage.list_objects()]
        names = sorted(name for name in names if name.endswith(INDEX_ENDING))
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for name, raw in zip(names, pool.map(self.storage.read, names), strict=True):
                yield from parse_index(name, raw)

    def _read_rejected(self) -> set[tuple[str, int]]:
        try:
            raw = self.storage.read(REJECTED)
        except ObjectVanishedError:
            return set()
        return {(item["shard"], item["offset"]) for item in map(json.loads, raw.splitlines())}


def reject(folder: Path, entries: Iterable[Entry]) -> None:
    """Leaves these entries out from now on, so that the next run makes them again."""
    with (folder / REJECTED).open("a", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps({"shard": entry.shard, "offset": entry.offset}) + "\n")


def parse_index(name: str, raw: bytes) -> Iterator[Entry]:
    """Yields the whole lines of an index; skips the torn last one of a killed process."""
    shard = name.removesuffix(INDEX_ENDING) + SHARD_ENDING
    end = raw.rfind(b"\n") + 1
    for number, line in enumerate(raw[:end].splitlines(), 1):
        try:
            values: dict[str, Any] = json.loads(line)
            yield Entry(shard=shard, **{**values, "shape": tuple(values["shape"])})
        except (KeyError, TypeError, ValueError):
            logger.warning("%s:%d: not an entry; passed over", name, number)


def to_bytes(tensor: Tensor) -> bytes:
    """Returns the tensor's values in order; they go through uint8, as numpy has no bf16."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return np.ascontiguousarray(flat.view(torch.uint8).numpy()).tobytes()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]

"""Keeps units on disk: a folder of jsonl shards, which any number of processes append to.

Written by `quantizer.extract_units`, read by stage 2 through `load_unit_cache`. A line is one clip:

    {"path": "/data/a.wav", "size": 60844, "mtime_ns": 1763700000000000000, "units": [71, 4, 93]}

`manifest.json` names the quantizer that made them. Every process writes a shard of its own, under
a new name each time, so that nothing is ever rewritten: a line that a killed process left half
written is passed over and its clip done again, as is a clip whose audio has changed since.
"""

from __future__ import annotations

import json
import logging
import uuid
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class UnitCache:
    """Opens the cache in `folder`, made when it is not there, for units of one quantizer.

    Raises:
        ValueError: it holds units of another.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        found = read_manifest(folder)
        if found is None:
            partial = folder / f".{MANIFEST}.{uuid.uuid4().hex}"
            partial.write_text(json.dumps(identity, indent=2) + "\n", "utf-8")
            partial.replace(folder / MANIFEST)  # atomic; all ranks write the same
        elif found != identity:
            differing = [
                f"{key} {found.get(key)} there, {identity.get(key)} here"
                for key in sorted(found.keys() | identity.keys())
                if found.get(key) != identity.get(key)
            ]
            raise ValueError(
                f"{folder}: holds units of another quantizer ({'; '.join(differing)}). Give "
                "another unit_cache_dir (--cache_dir), or delete this one to extract again."
            )

    def find_missing(self, paths: Iterable[Path]) -> list[Path]:
        """Returns those of `paths` (resolved) that have no units yet, or changed since."""
        done = {_key(entry) for entry in read_entries(self.folder)}
        return [path for path in paths if _key(_describe(path)) not in done]

    def open_shard(self, rank: int) -> Shard:
        return Shard(self.folder / f"rank{rank:03d}-{uuid.uuid4().hex[:12]}.jsonl")


class Shard:
    """Appends lines to a file that is made with the first of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[str] | None = None

    def write(self, path: Path, units: list[int]) -> None:
        if self.file is None:
            self.file = self.path.open("x", encoding="utf-8")
        line = json.dumps({**_describe(path), "units": units}, separators=(",", ":"))
        self.file.write(line + "\n")
        self.file.flush()  # a killed process then loses the clip at hand alone

    def __enter__(self) -> Shard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.file is not None:
            self.file.close()


def load_unit_cache(cache_dir: Path) -> dict[str, list[int]]:
    """Reads units by str(resolved audio path); a warning counts clips that changed, left out.

    Raises:
        FileNotFoundError: no cache there.
    """
    if read_manifest(cache_dir) is None:
        raise FileNotFoundError(
            f"{cache_dir}: no unit cache there (no {MANIFEST}); make it with `python -m "
            "llama_omni.units extract`"
        )
    shared: dict[int, int] = {}  # one object an id: ten times less memory
    units: dict[str, list[int]] = {}
    stale: set[str] = set()
    for entry in read_entries(cache_dir):
        path = entry["path"]
        if _key(entry) != _key(_describe(Path(path))):
            stale.add(path)
        elif path not in units:
            units[path] = [shared.setdefault(unit, unit) for unit in entry["units"]]
    stale -= units.keys()
    if stale:
        logger.warning(
            "%s: %d clips changed or are gone since their units were made, first %s; not used",
            cache_dir,
            len(stale),
            min(stale),
        )
    return units


def read_entries(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields every whole line of every shard."""
    for shard in sorted(folder.glob("rank*.jsonl")):
        with shard.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    entry = json.loads(line) if line.endswith("\n") else None
                    if entry is not None and isinstance(entry["units"], list):
                        _key(entry)
                        yield entry
                except (KeyError, TypeError, ValueError):
                    logger.warning("%s:%d: not a whole entry; passed over", shard, number)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Reads what made the units in `folder`; None when there is no cache."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Delete {folder}.") from error


def _describe(path: Path) -> dict[str, Any]:
    """Describes a clip as it is now; sizes of -1, which match no entry, when it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return {"path": str(path), "size": -1, "mtime_ns": -1}
    return {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _key(entry: dict[str, Any]) -> tuple[str, int, int]:
    return entry["path"], entry["size"], entry["mtime_ns"]

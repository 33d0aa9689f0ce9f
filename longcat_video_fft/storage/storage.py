"""What the rest sees of stored objects: keys below a root, listed and read; and local folders.

The first step of data preparation: `list_objects` says which videos there are, `read_range` fetches
a header, `read` a whole file. A root is a folder (`LocalStorage`, here) or a bucket and prefix
(`s3_storage.open_s3`); nothing else knows the difference, and nothing is ever written to a root.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredObject:
    """An object has a key relative to the root, always with "/", and a size in bytes."""

    key: str
    size: int


class ObjectVanishedError(OSError):
    """The object is not there, or not any more."""


class StorageError(OSError):
    """One object, or one page of a listing, could not be read, after all retries."""


class Storage(Protocol):
    """A storage is a root to read from; any number of threads may share one.

    A mistake of set-up (no such bucket or folder, credentials, permission to list) raises
    ValueError from any of these methods.
    """

    @property
    def location(self) -> str:
        """Returns the folder, or s3://bucket/prefix; for messages."""
        ...

    def list_objects(self) -> Iterator[StoredObject]:
        """Yields every object below the root, in no particular order, as they are found."""
        ...

    def read(self, key: str) -> bytes:
        """Reads the whole object.

        Raises:
            ObjectVanishedError: it is not there.
            StorageError: it could not be read.
        """
        ...

    def read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        """Reads the bytes from `start` on, fewer at the object's end; b"" at or beyond it.

        Raises:
            ObjectVanishedError: it is not there.
            StorageError: it could not be read.
        """
        ...


class LocalStorage:
    """Reads the files in `folder` and its sub-folders, but those whose name begins with a dot.

    Raises:
        ValueError: no such folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self.location = str(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder}: no such folder. Give a folder that exists.")

    def list_objects(self) -> Iterator[StoredObject]:
        todo = [""]
        seen: set[tuple[int, int]] = set()  # a symlink to a folder above would never end
        while todo:
            prefix = todo.pop()
            for entry in self._list_folder(prefix, seen):
                if entry.name.startswith("."):
                    continue
                try:
                    if entry.is_dir():
                        todo.append(f"{prefix}{entry.name}/")
                    elif entry.is_file():  # no pipe or device, and no link that leads nowhere
                        yield StoredObject(prefix + entry.name, entry.stat().st_size)
                except FileNotFoundError:
                    continue  # gone since the folder was read
                except OSError as error:
                    logger.warning("%s: passed over (%s)", entry.path, error.strerror)

    def _list_folder(self, prefix: str, seen: set[tuple[int, int]]) -> list[os.DirEntry[str]]:
        folder = self.folder / prefix
        try:
            stat = folder.stat()
            identity = (stat.st_dev, stat.st_ino)
            if identity in seen:
                return []
            seen.add(identity)
            with os.scandir(folder) as entries:
                # By name, so that of two ways to one folder the same is taken each time.
                return sorted(entries, key=lambda entry: entry.name)
        except FileNotFoundError as error:
            if prefix:
                return []
            raise ValueError(f"{self.location}: this folder is not there any more.") from error
        except OSError as error:
            raise ValueError(
                f"{folder}: this folder cannot be listed ({error.strerror}). Give this user "
                "permission to read and enter it, or move it elsewhere."
            ) from error

    def read(self, key: str) -> bytes:
        return self._read(key, 0, -1)

    def read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        check_range(key, start, num_bytes)
        return self._read(key, start, num_bytes)

    def _read(self, key: str, start: int, num_bytes: int) -> bytes:
        """Reads all from `start` on where `num_bytes` is -1."""
        path = PurePosixPath(key)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{key!r}: not a key in {self.location}, it leads out of the folder.")
        try:
            with (self.folder / path).open("rb") as file:
                file.seek(start)
                return file.read(num_bytes)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ObjectVanishedError(f"{self.location}: {key} is not there (any more)") from error
        except OSError as error:
            raise StorageError(
                f"{self.location}: {key} could not be read ({error.strerror})"
            ) from error


def check_range(key: str, start: int, num_bytes: int) -> None:
    """Raises ValueError for a range that no object can have."""
    if start < 0 or num_bytes < 0:
        raise ValueError(f"{key}: no range has start {start} and {num_bytes} bytes")

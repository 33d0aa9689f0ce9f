"""Local folders: what is listed and read, and what is an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from longcat_video_fft.storage.storage import (
    LocalStorage,
    ObjectVanishedError,
    StorageError,
    StoredObject,
)


def write(folder: Path, key: str, content: bytes = b"x") -> Path:
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_local_listing(tmp_path: Path) -> None:
    folder = tmp_path / "root"
    write(folder, "a.mp4", b"123")
    write(folder, "sub/deep/b \u00e9.mp4", b"12")
    write(folder, ".hidden.mp4")
    write(folder, ".cache/c.mp4")
    write(folder, "sub/.d.mp4")
    outside = write(tmp_path, "elsewhere/e.mp4", b"12345")
    (folder / "link.mp4").symlink_to(outside)
    (folder / "broken.mp4").symlink_to(tmp_path / "none")
    (folder / "linked").symlink_to(outside.parent)
    (folder / "sub" / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.mp4")
    storage = LocalStorage(folder)
    assert storage.location == str(folder)
    assert sorted(storage.list_objects(), key=lambda item: item.key) == [
        StoredObject("a.mp4", 3),
        StoredObject("link.mp4", 5),
        StoredObject("linked/e.mp4", 5),
        StoredObject("sub/deep/b \u00e9.mp4", 2),
    ]
    assert all(len(storage.read(item.key)) == item.size for item in storage.list_objects())


def test_local_ranges(tmp_path: Path) -> None:
    write(tmp_path, "sub/a.mp4", b"0123456789")
    storage = LocalStorage(tmp_path)
    assert storage.read("sub/a.mp4") == b"0123456789"
    assert storage.read_range("sub/a.mp4", 2, 3) == b"234"
    assert storage.read_range("sub/a.mp4", 8, 100) == b"89"
    assert storage.read_range("sub/a.mp4", 10, 5) == b""
    assert storage.read_range("sub/a.mp4", 500, 5) == b""
    with pytest.raises(ValueError, match="-5 bytes"):
        storage.read_range("sub/a.mp4", 0, -5)


def test_local_keys_stay_in_the_folder(tmp_path: Path) -> None:
    write(tmp_path, "secret.mp4")
    write(tmp_path, "root/sub/a.mp4")
    storage = LocalStorage(tmp_path / "root")
    for key in ("../secret.mp4", "sub/../../secret.mp4", str(tmp_path / "secret.mp4"), "", "."):
        with pytest.raises(ValueError, match="leads out"):
            storage.read(key)


def test_local_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"none: no such folder"):
        LocalStorage(tmp_path / "none")
    path = write(tmp_path, "sub/a.mp4")
    storage = LocalStorage(tmp_path)
    with pytest.raises(StorageError, match=r"sub could not be read"):
        storage.read("sub")
    with pytest.raises(ObjectVanishedError, match=r"sub/a\.mp4/b"):
        storage.read("sub/a.mp4/b")

    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")  # root, who may run this, is denied nothing

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", deny)
        with pytest.raises(StorageError, match=r"sub/a\.mp4 could not be read \(Permission"):
            storage.read("sub/a.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", deny)
        with pytest.raises(ValueError, match=r"cannot be listed \(Permission"):
            list(storage.list_objects())
    path.unlink()
    with pytest.raises(ObjectVanishedError, match=r"sub/a\.mp4"):
        storage.read("sub/a.mp4")


def test_local_folder_that_goes_while_it_is_listed(tmp_path: Path) -> None:
    write(tmp_path, "root/a.mp4")
    write(tmp_path, "root/sub/b.mp4")
    storage = LocalStorage(tmp_path / "root")
    listing = storage.list_objects()
    assert next(listing).key == "a.mp4"
    (tmp_path / "root/sub/b.mp4").unlink()
    (tmp_path / "root/sub").rmdir()
    assert list(listing) == []

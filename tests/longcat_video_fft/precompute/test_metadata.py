"""The table of videos: pairs, what is wrong with a file, continued runs, and users' own tables."""

from __future__ import annotations

import ast
import json
import logging
import os
import struct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longcat_video_fft.media import mp4_boxes, mp4_header
from longcat_video_fft.media.bad_video import REASONS
from longcat_video_fft.options.data_config import ParquetOptions
from longcat_video_fft.options.load import load_data_config
from longcat_video_fft.precompute import metadata, survey
from longcat_video_fft.precompute.metadata import VideoRow, build_table, pair_files, read_rows
from longcat_video_fft.precompute.survey import find_rows
from longcat_video_fft.storage.storage import LocalStorage, StorageError, StoredObject
from tests.longcat_video_fft.support import mp4_samples

if TYPE_CHECKING:
    from collections.abc import Iterator

FIELDS = ("key", "caption_key", "caption_size", "same_name")


class CountingStorage:
    """A folder that notes the keys that are read, and fails on demand."""

    def __init__(self, folder: Path) -> None:
        self.inner = LocalStorage(folder)
        self.location = self.inner.location
        self.looked_at: list[str] = []  # one a video, since these files take one read
        self.failing: set[str] = set()
        self.killed_after: int | None = None

    def list_objects(self) -> Iterator[StoredObject]:
        return self.inner.list_objects()

    def read(self, key: str) -> bytes:
        return self.inner.read(key)

    def read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        if self.killed_after is not None and len(self.looked_at) >= self.killed_after:
            raise KeyboardInterrupt
        self.looked_at.append(key)
        if key in self.failing:
            raise StorageError(f"{key} could not be read")
        return self.inner.read_range(key, start, num_bytes)


@cache
def video(**options: Any) -> bytes:
    return mp4_samples.make_video(num_frames=6, **options)


def put(folder: Path, key: str, content: bytes, caption: bytes | None = b"a caption") -> None:
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption)


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    return {row["filename"]: row for row in pq.read_table(path).to_pylist()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Makes five good videos, with captions of their own."""
    for number in range(5):
        put(tmp_path / "films", f"sub{number % 2}/{number}.mp4", video(), b"clip %d" % number)
    return tmp_path / "films"


def test_pairs(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {
        "a.mp4": 10, "a.txt": 1, "sub/a.mp4": 11, "sub/a.txt": 2, "sub/deep/b.MP4": 12,
        "sub/deep/b.TXT": 3, "clash.mp4": 1, "clash.mov": 2, "clash.txt": 4, "w.webm": 1,
        "sub.x/noending": 5, "alone.txt": 9, "v.1.m4v": 3, "v.txt": 7, "image.jpg": 1,
    }  # fmt: skip
    pairs = pair_files(StoredObject(key, size) for key, size in sizes.items())
    assert [tuple(getattr(pair, name) for name in FIELDS) for pair in pairs] == [
        ("a.mp4", "a.txt", 1, None),
        ("clash.mov", "clash.txt", 4, "clash.mp4"),
        ("clash.mp4", "clash.txt", 4, None),
        ("sub/a.mp4", "sub/a.txt", 2, None),
        ("sub/deep/b.MP4", "sub/deep/b.TXT", 3, None),
        ("v.1.m4v", None, -1, None),
        ("w.webm", None, -1, None),
    ]
    assert all(pair.size == sizes[pair.key] for pair in pairs)
    assert "2 captions have no video, first alone.txt" in caplog.text


def test_which_of_one_name_is_taken() -> None:
    """The ending decides, as mp4, m4v, mov, others; then the key, where only letters' case
    differs."""
    keys = ["x.avi", "x.mp4", "y.mov", "y.M4V", "z.webm", "z.avi", "z.mov", "w.mp4", "w.MP4"]
    pairs = pair_files(StoredObject(key, 1) for key in keys)
    assert {pair.key: pair.same_name for pair in pairs} == {
        "w.MP4": None, "w.mp4": "w.MP4", "x.avi": "x.mp4", "x.mp4": None, "y.M4V": None,
        "y.mov": "y.M4V", "z.avi": "z.mov", "z.mov": None, "z.webm": "z.mov",
    }  # fmt: skip


def test_errors(tmp_path: Path) -> None:
    good = video()
    long = b"x" * (metadata.MAX_CAPTION_BYTES + 1)
    films: dict[str, tuple[bytes, bytes | None, str]] = {
        "good.mp4": (good, b"  one\ntwo\r\n\nthree ", ""),
        "bom.mp4": (good, b"\xef\xbb\xbfmarked", ""),
        "longest.mp4": (good, long[1:], ""),
        "no_caption.mp4": (good, None, "missing_caption"),
        "blank.mp4": (good, b" \n\t\xc2\xa0", "missing_caption"),
        "zero_caption.mp4": (good, b"", "missing_caption"),
        "latin.mp4": (good, "\u00e9t\u00e9".encode("latin-1"), "bad_caption"),
        "long.mp4": (good, long, "bad_caption"),
        "empty.mp4": (b"", b"c", "empty"),
        "cut.mp4": (good[: len(good) // 2], b"c", "truncated"),
        "text.mp4": (b"this is no film at all " * 9, b"c", "not_mp4"),
        "other.mkv": (good, b"c", "not_mp4"),
        "codec.mp4": (good.replace(b"avc1", b"zzz9"), b"c", "codec"),
        "sound.mp4": (good.replace(b"vide", b"soun"), b"c", "no_video"),
        "twice.avi": (good, b"c", "same_name"),
        "twice.mov": (good, b"c", "same_name"),
        "twice.mp4": (good, b"c", ""),
    }
    for key, (content, caption, _) in films.items():
        put(tmp_path / "films", key, content, caption)
    rows = rows_of(build_table(LocalStorage(tmp_path / "films"), tmp_path / "t.parquet"))
    assert {key: row["error"] for key, row in rows.items()} == {
        key: error for key, (_, _, error) in films.items()
    }
    for row in rows.values():
        assert not row["error"] or row["error"] in REASONS
        assert bool(row["message"]) == bool(row["error"])
        assert row["size"] == len(films[row["filename"]][0])
    assert rows["good.mp4"]["caption"] == "  one\ntwo\r\n\nthree "
    assert rows["bom.mp4"]["caption"] == "marked"
    assert rows["twice.avi"]["message"].startswith("has the name of twice.mp4, which is taken")
    assert list(rows) == sorted(films)


def test_names_that_are_not_utf8(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are reported by escaped names; the run continues, and the next one has nothing to do."""
    for name in (b"caf\xe9.mp4", b"sub0/\xff\xfe/7.mov", b"sub1/alone\xe9.avi"):
        put(folder, os.fsdecode(name), video(), None if b"alone" in name else b"clip")
    (folder / os.fsdecode(b"unused\xe9.txt")).write_bytes(b"words")
    storage = CountingStorage(folder)
    rows = rows_of(build_table(storage, tmp_path / "t.parquet"))
    assert {key: row["error"] for key, row in rows.items() if row["error"]} == {
        r"caf\xe9.mp4": "bad_name", r"sub0/\xff\xfe/7.mov": "bad_name",
        r"sub1/alone\xe9.avi": "bad_name",
    }  # fmt: skip
    assert rows[r"caf\xe9.mp4"]["message"] == "its name, or a folder's, is not UTF-8; rename it"
    assert len(rows) == 8
    assert r"first unused\xe9.txt" in caplog.text
    storage.looked_at.clear()
    caplog.set_level(logging.INFO)
    build_table(storage, tmp_path / "t.parquet")
    assert "8 videos, 0 to look at" in caplog.text
    (folder / os.fsdecode(b"caf\xe9.mp4")).rename(folder / "caf\u00e9.mp4")
    (folder / os.fsdecode(b"caf\xe9.txt")).rename(folder / "caf\u00e9.txt")
    rows = rows_of(build_table(storage, tmp_path / "t.parquet"))
    assert storage.looked_at == ["caf\u00e9.mp4"]
    assert (rows["caf\u00e9.mp4"]["error"], r"caf\xe9.mp4" in rows) == ("", False)


def test_reasons_are_known() -> None:
    used: set[Any] = set()
    for module in (metadata, mp4_header, mp4_boxes, survey):
        text = Path(str(module.__file__)).read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).rpartition(".")[2]
                if called in ("BadVideoError", "HeaderError", "leave_out"):
                    used |= {arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)}  # pyright: ignore
            elif isinstance(node, ast.Assign) and "row.error" in ast.unparse(node.targets[0]):
                value = node.value.elts[0] if isinstance(node.value, ast.Tuple) else node.value
                used |= {value.value} if isinstance(value, ast.Constant) else set()  # pyright: ignore
    assert {"missing_caption", "unreadable", "vanished", "too_short", "truncated"} <= used
    assert used <= REASONS.keys()
    assert set(metadata.RETRIED_ERRORS) <= REASONS.keys()


def test_measures(tmp_path: Path) -> None:
    put(tmp_path, "plain.mp4", video())
    put(tmp_path, "uneven.mp4", mp4_samples.make_video(times=[0, 40, 100, 300, 340, 400]))
    turned = bytearray(video())
    matrix = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", turned, turned.index(b"tkhd") + 44, *matrix)
    put(tmp_path, "turned.mp4", bytes(turned))
    rows = rows_of(build_table(LocalStorage(tmp_path), tmp_path / "t.parquet"))
    plain, uneven, rotated = rows["plain.mp4"], rows["uneven.mp4"], rows["turned.mp4"]
    assert (plain["width"], plain["height"], plain["rotation"]) == (96, 64, 0)
    assert (plain["num_frames"], plain["fps"], plain["duration"]) == (6, 25.0, 0.24)
    assert (plain["codec"], plain["has_variable_rate"]) == ("h264", False)
    assert (rotated["width"], rotated["height"], rotated["rotation"]) == (64, 96, 90)
    assert (uneven["num_frames"], uneven["has_variable_rate"]) == (6, True)


def test_second_run_looks_at_what_changed(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    storage = CountingStorage(folder)
    storage.failing = {"sub0/4.mp4"}
    build_table(storage, table)
    assert len(set(storage.looked_at)) == 5
    assert rows_of(table)["sub0/4.mp4"]["error"] == "unreadable"
    storage.looked_at.clear()
    build_table(storage, table)
    assert storage.looked_at == ["sub0/4.mp4"]  # again, and no other
    storage.failing.clear()
    storage.looked_at.clear()
    build_table(storage, table)
    assert storage.looked_at == ["sub0/4.mp4"]
    before = rows_of(table)
    storage.looked_at.clear()
    build_table(storage, table)
    assert not storage.looked_at
    assert rows_of(table) == before

    put(folder, "new.mp4", video(), b"new")
    put(folder, "sub0/0.mp4", video(size=(128, 64), is_noise=True), b"clip 0")
    (folder / "sub1/1.mp4").unlink()
    (folder / "sub0/2.txt").write_bytes(b"other words")
    (folder / "sub1/3.mov").write_bytes(video())
    (folder / "sub1/3.mp4").rename(folder / "sub1/3.m4v")
    build_table(storage, table)
    assert set(storage.looked_at) == {"new.mp4", "sub0/0.mp4", "sub0/2.mp4", "sub1/3.m4v"}
    rows = rows_of(table)
    assert list(rows) == [
        "new.mp4", "sub0/0.mp4", "sub0/2.mp4", "sub0/4.mp4", "sub1/3.m4v", "sub1/3.mov",
    ]  # fmt: skip
    assert rows["sub0/0.mp4"]["width"] == 128
    assert rows["sub0/2.mp4"]["caption"] == "other words"
    assert rows["sub1/3.mov"]["error"] == "same_name"
    assert rows["sub0/4.mp4"] == before["sub0/4.mp4"]
    (folder / "sub1/3.m4v").unlink()
    build_table(storage, table)
    assert rows_of(table)["sub1/3.mov"]["error"] == ""  # its rival is gone


def test_captions_asked_for_later_or_no_more(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    (folder / "sub0/0.txt").unlink()
    storage = LocalStorage(folder)
    build_table(storage, table, reads_captions=False)
    assert not any(row["caption"] or row["error"] for row in rows_of(table).values())
    build_table(storage, table)
    rows = rows_of(table)
    assert rows["sub0/0.mp4"]["error"] == "missing_caption"
    assert rows["sub1/1.mp4"]["caption"] == "clip 1"
    build_table(storage, table, reads_captions=False)
    assert rows_of(table)["sub0/0.mp4"]["error"] == ""
    assert rows_of(table)["sub0/0.mp4"]["width"] == 96


@pytest.mark.parametrize("has_table", [False, True])
def test_a_killed_run_continues(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_table: bool
) -> None:
    monkeypatch.setattr(metadata, "PART_ROWS", 2)
    table, parts = tmp_path / "t.parquet", tmp_path / "t.parquet.parts"
    if has_table:
        build_table(LocalStorage(folder), table)
        for number in range(5):
            put(folder, f"sub{number % 2}/{number}.mp4", video(size=(128, 64), is_noise=True), None)
    whole = build_table(LocalStorage(folder), tmp_path / "whole.parquet")
    storage = CountingStorage(folder)
    for already, left in ((0, 3), (2, 2)):  # a part each, and then killed
        storage.killed_after = left
        storage.looked_at.clear()
        with pytest.raises(KeyboardInterrupt):
            build_table(storage, table, workers=1)
        assert len(list(parts.glob("part-*.parquet"))) == already // 2 + 1
    storage.killed_after = None
    storage.looked_at.clear()
    build_table(storage, table, workers=1)
    assert storage.looked_at == ["sub1/3.mp4"]
    assert pq.read_table(table).equals(pq.read_table(whole))
    assert not parts.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "films", "t.parquet", "whole.parquet",
    ]  # fmt: skip


def test_bad_folders_and_tables(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none: no videos \(\.mp4"):
        build_table(LocalStorage(tmp_path / "none"), tmp_path / "t.parquet")
    pq.write_table(pa.table({"filename": ["a"]}), tmp_path / "user.parquet")
    with pytest.raises(ValueError, match=r"user\.parquet: a table of another form"):
        build_table(LocalStorage(folder), tmp_path / "user.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"text\.parquet: not a parquet file"):
        build_table(LocalStorage(folder), tmp_path / "text.parquet")


def test_user_table(tmp_path: Path) -> None:
    path = tmp_path / "user.parquet"
    columns: dict[str, list[Any]] = {
        "id": ["a", "sub/b", "c", "d"], "long": ["A", None, "", None], "w": [1, 2, None, 4],
        "h": [5, 6, 7, 8], "short": ["s", "t", "u", None], "fps": [24.0, None, 25.0, 1.0],
        "stranger": [0, 0, 0, 0],
    }  # fmt: skip
    pq.write_table(pa.table(columns), path)
    named: dict[str, Any] = {
        "filename_column": "id", "caption_column": "long", "width_column": "w",
        "height_column": "h", "identifier_includes_extension": False,
    }  # fmt: skip
    options = ParquetOptions(**named, fallback_caption_column="short")
    assert list(read_rows(path, options)) == [
        VideoRow(filename="a.mp4", caption="A", width=1, height=5, fps=24.0),
        VideoRow(filename="sub/b.mp4", caption="t", width=2, height=6),
        VideoRow(filename="c.mp4", caption="u", height=7, fps=25.0),
        VideoRow(filename="d.mp4", width=4, height=8, fps=1.0),
    ]
    plain = ParquetOptions(**{**named, "identifier_includes_extension": True})  # pyright: ignore[reportArgumentType]
    assert [(r.filename, r.caption) for r in read_rows(path, plain)][:2] == [
        ("a", "A"),
        ("sub/b", ""),
    ]
    with pytest.raises(ValueError, match=r"no column width, height; it has id, long, w, h"):
        next(read_rows(path, ParquetOptions(filename_column="id", caption_column="long")))
    with pytest.raises(ValueError, match=r"user\.parquet: no column shorter; it has id, long, w"):
        next(read_rows(path, ParquetOptions(**named, fallback_caption_column="shorter")))
    pq.write_table(pa.table(columns | {"id": ["a", None, "c", "d"]}), path)
    with pytest.raises(ValueError, match=r"user\.parquet: a row has no id"):
        list(read_rows(path, plain))
    with pytest.raises(ValueError, match=r"none\.parquet: no such table"):
        next(read_rows(tmp_path / "none.parquet", plain))


def test_our_own_table_is_read_by_our_own_columns(folder: Path, tmp_path: Path) -> None:
    """Without metadata_backend "parquet" the names of a user's columns mean nothing."""
    parquet = {"filename_column": "id", "fallback_caption_column": "short"}
    videos = {
        "dataset_type": "video", "instance_data_dir": str(folder), "cache_dir_vae": "vae",
        "parquet": parquet,
    }  # fmt: skip
    path = tmp_path / "databackend.json"
    path.write_text(json.dumps([videos, {"dataset_type": "text_embeds", "cache_dir": "text"}]))
    data = load_data_config(path)
    data.latent_cache.mkdir()
    assert len([row for row in find_rows(data, LocalStorage(folder)) if not row.error]) == 5

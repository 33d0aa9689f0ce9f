"""The table of a bucket: few reads, faults, and the script as a program."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest

from longcat_video_fft.precompute import metadata
from longcat_video_fft.precompute.metadata import build_table
from longcat_video_fft.storage import s3_storage
from longcat_video_fft.storage.s3_storage import S3Options, open_s3
from tests.longcat_video_fft.support.mp4_samples import make_video
from tests.longcat_video_fft.support.s3_server import (
    SLOW_DOWN,
    Fault,
    FaultyProxy,
    connect,
    put_objects,
)
from tests.longcat_video_fft.support.tiny import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from longcat_video_fft.storage.storage import Storage, StoredObject

SCRIPTS = ROOT / "longcat_video_fft" / "scripts"
NUM_VIDEOS = 60


def name_of(number: int) -> str:
    return f"part{number % 3}/deep/{number:04d}"


def make_objects(number: int) -> dict[str, bytes]:
    """Makes videos in three sub-prefixes; in the first of them without captions."""
    film = make_video(num_frames=3, size=(32, 32))
    objects = {f"root/{name_of(i)}.mp4": film for i in range(number)}
    return objects | {f"root/{name_of(i)}.txt": b"clip %d" % i for i in range(number) if i % 3}


@pytest.fixture(scope="module")
def small_bucket(s3_url: str) -> str:
    """Returns the name of a bucket with six videos; read it only."""
    put_objects(s3_url, "films6", make_objects(6))
    return "films6"


def open_bucket(url: str, bucket: str) -> Storage:
    return open_s3(S3Options(bucket=bucket, prefix="root", endpoint_url=url, region="us-east-1"))


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    return {row["filename"]: row for row in pq.read_table(path).to_pylist()}


class CountingStorage:
    """Notes what is asked of another storage."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.location = inner.location
        self.ranges: list[tuple[str, int]] = []

    def list_objects(self) -> Iterator[StoredObject]:
        return self.inner.list_objects()

    def read(self, key: str) -> bytes:
        return self.inner.read(key)

    def read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        self.ranges.append((key, num_bytes))
        return self.inner.read_range(key, start, num_bytes)


@pytest.mark.usefixtures("s3_environment")
def test_many_videos(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are more than a page of each sub-prefix's listing holds, and than a part of the
    table."""
    monkeypatch.setattr(s3_storage, "PAGE_KEYS", 15)
    monkeypatch.setattr(metadata, "PART_ROWS", 25)
    put_objects(s3_url, "many-films", make_objects(NUM_VIDEOS))
    storage = CountingStorage(open_bucket(s3_url, "many-films"))
    table = build_table(storage, tmp_path / "t.parquet", workers=64)
    rows = rows_of(table)
    assert list(rows) == sorted(f"{name_of(i)}.mp4" for i in range(NUM_VIDEOS))
    for number in range(NUM_VIDEOS):
        row = rows[f"{name_of(number)}.mp4"]
        if number % 3:
            found = (row["error"], row["caption"], row["width"], row["num_frames"])
            assert found == ("", f"clip {number}", 32, 3)
        else:
            assert row["error"] == "missing_caption"
    reads: dict[str, list[int]] = {}
    for key, num_bytes in storage.ranges:
        reads.setdefault(key, []).append(num_bytes)
    assert len(reads) == NUM_VIDEOS * 2 // 3  # those with captions
    assert max(len(sizes) for sizes in reads.values()) <= 2
    assert max(sum(sizes) for sizes in reads.values()) <= 256 * 1024
    storage.ranges.clear()
    build_table(storage, table, workers=64)
    assert not storage.ranges
    assert rows_of(table) == rows


@pytest.mark.usefixtures("s3_environment")
def test_large_file_takes_two_reads(s3_url: str, tmp_path: Path) -> None:
    film = make_video(num_frames=24, size=(320, 240), is_noise=True)  # moov is at the end
    assert len(film) > 512 * 1024
    put_objects(s3_url, "large-film", {"root/a.mp4": film, "root/a.txt": b"noise"})
    storage = CountingStorage(open_bucket(s3_url, "large-film"))
    rows = rows_of(build_table(storage, tmp_path / "t.parquet"))
    assert (rows["a.mp4"]["error"], rows["a.mp4"]["num_frames"]) == ("", 24)
    assert len(storage.ranges) == 2
    assert sum(num_bytes for _, num_bytes in storage.ranges) <= 256 * 1024


@pytest.mark.usefixtures("s3_environment")
def test_faults(faulty_proxy: FaultyProxy, small_bucket: str, tmp_path: Path) -> None:
    storage = open_bucket(faulty_proxy.url, small_bucket)
    faulty_proxy.add("list-type", SLOW_DOWN, times=2)
    faulty_proxy.add("0001.mp4", SLOW_DOWN, times=3)
    faulty_proxy.add("0002.mp4", Fault(after_bytes=100, then="reset"), times=2)
    faulty_proxy.add("0004.txt", Fault(status=404, code="NoSuchKey"))
    faulty_proxy.add("0005.mp4", SLOW_DOWN, times=8)
    table = build_table(storage, tmp_path / "t.parquet", workers=4)
    rows = rows_of(table)
    assert {name.split("/")[2]: row["error"] for name, row in rows.items()} == {
        "0000.mp4": "missing_caption", "0001.mp4": "", "0002.mp4": "",
        "0003.mp4": "missing_caption", "0004.mp4": "vanished", "0005.mp4": "unreadable",
    }  # fmt: skip
    assert faulty_proxy.count("0001.mp4") == 4
    build_table(storage, table)  # the server is well again
    rows = rows_of(table)
    assert [row["error"] for row in rows.values()].count("") == 4
    assert faulty_proxy.count("0001.mp4") == 4  # not looked at again


@pytest.mark.usefixtures("s3_environment")
def test_key_deleted_after_the_listing(s3_url: str, tmp_path: Path) -> None:
    class Deleting(CountingStorage):
        def list_objects(self) -> Iterator[StoredObject]:
            yield from list(self.inner.list_objects())
            connect(s3_url).delete_object(Bucket="films3", Key=f"root/{name_of(2)}.mp4")

    put_objects(s3_url, "films3", make_objects(3))
    storage = Deleting(open_bucket(s3_url, "films3"))
    table = build_table(storage, tmp_path / "t.parquet")
    assert rows_of(table)[f"{name_of(2)}.mp4"]["error"] == "vanished"
    build_table(storage, table)
    assert f"{name_of(2)}.mp4" not in rows_of(table)


def run_script(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "generate_metadata_parquet.py"), *argv],
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.usefixtures("s3_environment")
def test_script_on_a_bucket(s3_url: str, small_bucket: str, tmp_path: Path) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    argv = ["--region", "us-east-1", "--workers", "32", "--endpoint-url", s3_url]
    argv += ["--prefix", "root/", "--output", "../metadata.parquet"]
    first = run_script(folder, "--bucket", small_bucket, *argv)
    assert first.returncode == 0, first.stderr
    assert "6 videos, 6 to look at" in first.stderr
    assert "6 rows, 4 without a fault" in first.stderr
    assert "2 missing_caption (no .txt" in first.stderr
    rows = rows_of(tmp_path / "metadata.parquet")
    assert rows[f"{name_of(1)}.mp4"]["caption"] == "clip 1"
    second = run_script(folder, "--bucket", small_bucket, *argv)
    assert second.returncode == 0, second.stderr
    assert "6 videos, 0 to look at" in second.stderr
    assert rows_of(tmp_path / "metadata.parquet") == rows

    none = run_script(folder, "--bucket", "no-such-bucket", *argv)
    assert none.returncode == 1, none.stderr
    assert "Traceback" not in none.stderr
    errors = [line for line in none.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "no-such-bucket" in errors[0]
    assert none.stderr.endswith(f"{errors[0]}\n")


def test_script_on_a_folder(tmp_path: Path) -> None:
    films = tmp_path / "films" / "sub"
    films.mkdir(parents=True)
    (films / "a.mp4").write_bytes(make_video(num_frames=3))
    argv = ["--folder", str(films.parent), "--output", "out/t.parquet", "--no-captions"]
    done = run_script(tmp_path, *argv)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out" / "t.parquet")
    assert (list(rows), rows["sub/a.mp4"]["error"]) == (["sub/a.mp4"], "")

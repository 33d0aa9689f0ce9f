"""One S3 server a session, with two buckets, and a faulty proxy a test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from longcat_video_fft.storage import s3_storage
from longcat_video_fft.storage.s3_storage import S3Options, S3Storage, open_s3
from tests.longcat_video_fft.support.s3_server import (
    FaultyProxy,
    put_objects,
    set_environment,
    start_moto,
)
from tests.longcat_video_fft.support.tiny import Tiny, make_tiny

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longcat_video_fft.storage.storage import Storage

BUCKET = "films"
MANY_BUCKET = "many"
LONG_BODY = bytes(range(256)) * 4096  # 1 MB
# 1,500 objects in sub-prefixes, 1,100 of them in one: two pages of a listing.
MANY = {f"root/part{number % 3}/deep/{number:04d}.mp4": b"x" for number in range(400)} | {
    f"root/big/{number:04d}.mp4": b"xy" for number in range(1100)
}
OBJECTS = {
    "pasta/dos/videos/a.mp4": b"0123456789",
    "pasta/dos/videos/sub/b.mp4": b"bb",
    "pasta/dos/videos/sub/": b"",  # markers of folders
    "pasta/dos/videos/": b"",
    "pasta/dos/videos/odd name + \u00e9~%#?&.mp4": b"odd",
    "pasta/dos/videos/sub//double.mp4": b"double",
    "pasta/dos/videos/empty.mp4": b"",
    "pasta/dos/videos2/c.mp4": b"c",
    "pasta/dos/videos.txt": b"t",
    "long/long.mp4": LONG_BODY,
}
VIDEOS = "pasta/dos/videos"
VIDEO_KEYS = {
    key.removeprefix(f"{VIDEOS}/")
    for key in OBJECTS
    if key.startswith(f"{VIDEOS}/") and not key.endswith("/")
}


def open_films(url: str, prefix: str, **options: Any) -> S3Storage:
    """Opens the storage for a prefix of `s3_bucket`."""
    storage = open_s3(S3Options(bucket=BUCKET, prefix=prefix, endpoint_url=url, **options))
    assert isinstance(storage, S3Storage)
    return storage


def open_many(url: str, prefix: str) -> Storage:
    """Opens the storage for a prefix of `s3_many_bucket`."""
    return open_s3(S3Options(bucket=MANY_BUCKET, prefix=prefix, endpoint_url=url))


@pytest.fixture(scope="module", autouse=True)
def no_process_group_outlives_a_file() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """Returns the address of moto's server."""
    with start_moto() as url:
        yield url


@pytest.fixture(scope="session")
def s3_bucket(s3_url: str) -> str:
    """Returns the name of a bucket with `OBJECTS`; read it only."""
    put_objects(s3_url, BUCKET, OBJECTS)
    return BUCKET


@pytest.fixture(scope="session")
def s3_many_bucket(s3_url: str) -> str:
    """Returns the name of a bucket with `MANY`, apart since moto looks at all of a bucket each
    time."""
    put_objects(s3_url, MANY_BUCKET, MANY)
    return MANY_BUCKET


@pytest.fixture
def s3_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets credentials that moto takes, in the environment; short waits between attempts."""
    set_environment(monkeypatch)
    monkeypatch.setattr(s3_storage, "BACKOFF_BASE_S", 0.001)
    monkeypatch.setattr(s3_storage, "BACKOFF_CAP_S", 0.01)


@pytest.fixture
def faulty_proxy(s3_url: str) -> Iterator[FaultyProxy]:
    """Stands before moto's server; `.url` is the endpoint to use."""
    with FaultyProxy(s3_url) as proxy:
        yield proxy

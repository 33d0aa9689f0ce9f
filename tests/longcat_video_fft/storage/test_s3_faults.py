"""S3: a server or a network that is unwell, and what is tried again."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from longcat_video_fft.storage import s3_storage
from longcat_video_fft.storage.s3_storage import S3Options, S3Storage, open_s3
from longcat_video_fft.storage.storage import StorageError
from tests.longcat_video_fft.conftest import LONG_BODY, VIDEO_KEYS, VIDEOS, open_films
from tests.longcat_video_fft.support.s3_server import (
    SLOW_DOWN,
    Fault,
    FaultyProxy,
    connect,
    put_objects,
)


def limit_first_attempt(storage: S3Storage, **limits: float) -> None:
    """Shortens limits of s3_storage for the next attempt to read, and not for those after it.

    What is well must not be given up too, however busy the machine.
    """
    patch = pytest.MonkeyPatch()
    for name, seconds in limits.items():
        patch.setattr(s3_storage, name, seconds)
    hasty = S3Storage(storage.options, num_connections=1)

    def open_body(*args: Any, **options: Any) -> dict[str, Any]:
        patch.undo()
        return hasty._open(*args, **options)

    patch.setattr(storage, "_open", open_body)


@pytest.mark.usefixtures("s3_bucket", "s3_environment")
@pytest.mark.parametrize(
    "fault",
    [
        SLOW_DOWN,
        Fault(status=500, code="InternalError"),
        Fault(status=429, code="TooManyRequests"),
        Fault(status=400, code="RequestTimeout"),
    ],
    ids=lambda fault: fault.code,
)
def test_passing_errors_are_tried_again(faulty_proxy: FaultyProxy, fault: Fault) -> None:
    faulty_proxy.add("list-type", fault, times=5)
    storage = open_films(faulty_proxy.url, VIDEOS)
    faulty_proxy.add("list-type", fault, times=2)
    faulty_proxy.add("a.mp4", fault, times=7)
    assert {item.key for item in storage.list_objects()} == VIDEO_KEYS
    assert storage.read("a.mp4") == b"0123456789"
    assert faulty_proxy.count("a.mp4") == 8
    faulty_proxy.add("a.mp4", fault, times=7)
    assert storage.read_range("a.mp4", 1, 2) == b"12"


@pytest.mark.usefixtures("s3_bucket", "s3_environment")
def test_all_attempts_fail(faulty_proxy: FaultyProxy) -> None:
    storage = open_films(faulty_proxy.url, VIDEOS)
    faulty_proxy.add("a.mp4", SLOW_DOWN, times=8)
    with pytest.raises(StorageError, match=r"videos: a\.mp4: given up after 8.*503, SlowDown"):
        storage.read("a.mp4")
    assert faulty_proxy.count("a.mp4") == 8
    faulty_proxy.add("list-type", SLOW_DOWN, times=8)
    with pytest.raises(StorageError, match="SlowDown"):
        list(storage.list_objects())


def test_waits_grow_up_to_the_cap(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(s3_storage.time, "sleep", waits.append)
    monkeypatch.setattr(s3_storage, "BACKOFF_BASE_S", 0.2)
    monkeypatch.setattr(s3_storage, "BACKOFF_CAP_S", 5.0)
    options = S3Options(
        bucket="films", endpoint_url=s3_url, access_key_id="a", secret_access_key="b"
    )
    storage = S3Storage(options, num_connections=1)

    def fail() -> None:
        raise ConnectionResetError

    with pytest.raises(StorageError, match="ConnectionResetError"):
        storage._retry(fail, key="a.mp4")
    limits = [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert len(waits) == 7
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits, limits, strict=True))


@pytest.mark.usefixtures("s3_bucket", "s3_environment")
@pytest.mark.parametrize("read_range", [False, True])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(delay_s=300.0),
        Fault(after_bytes=600_000, pause_s=300.0),
        Fault(after_bytes=600_000, then="cut"),
        Fault(after_bytes=600_000, then="reset"),
        Fault(after_bytes=0, then="reset"),
    ],
    ids=["no answer", "slow body", "short body", "reset in the body", "reset before it"],
)
def test_broken_bodies_are_completed(
    faulty_proxy: FaultyProxy, fault: Fault, read_range: bool
) -> None:
    storage = open_films(faulty_proxy.url, "long")
    faulty_proxy.add("long.mp4", fault, times=2 if fault.after_bytes == 0 else 1)
    if fault.delay_s or fault.pause_s:
        limit_first_attempt(storage, READ_TIMEOUT_S=2.0)
    if read_range:
        assert storage.read_range("long.mp4", 1000, 900_000) == LONG_BODY[1000:901_000]
    else:
        assert storage.read("long.mp4") == LONG_BODY
    ranges = [
        request.headers.get("range", "")
        for request in faulty_proxy.requests
        if "long.mp4" in request.path
    ]
    assert len(ranges) == (3 if fault.after_bytes == 0 else 2)
    if fault.after_bytes:  # continues where it stopped, but for the piece that was under way
        resumed = int(ranges[1].removeprefix("bytes=").partition("-")[0]) - 1000 * read_range
        assert 256 * 1024 <= resumed <= 600_000


@pytest.mark.usefixtures("s3_environment")
def test_object_replaced_while_it_is_read(faulty_proxy: FaultyProxy, s3_url: str) -> None:
    put_objects(s3_url, "replaced", {"a.mp4": LONG_BODY})
    storage = open_s3(S3Options(bucket="replaced", endpoint_url=faulty_proxy.url))
    new_body = LONG_BODY[::-1]
    replace = partial(connect(s3_url).put_object, Bucket="replaced", Key="a.mp4", Body=new_body)
    faulty_proxy.add("a.mp4", Fault(after_bytes=600_000, meanwhile=replace, then="cut"))
    is_new = storage.read("a.mp4") == new_body  # not half of each
    assert is_new  # pytest would take minutes to show where a million bytes differ
    assert faulty_proxy.count("a.mp4") >= 2


@pytest.mark.usefixtures("s3_bucket", "s3_environment")
def test_trickling_body_is_given_up(faulty_proxy: FaultyProxy) -> None:
    storage = open_films(faulty_proxy.url, "long")
    limit_first_attempt(storage, ATTEMPT_TIMEOUT_S=0.3)
    faulty_proxy.add("long.mp4", Fault(after_bytes=600_000, pause_s=0.8))
    assert storage.read("long.mp4") == LONG_BODY
    assert faulty_proxy.count("long.mp4") == 2

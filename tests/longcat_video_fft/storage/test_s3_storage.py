"""S3 over real HTTP: what is listed and read."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from longcat_video_fft.storage import s3_storage
from longcat_video_fft.storage.s3_storage import S3Options, open_s3
from longcat_video_fft.storage.storage import ObjectVanishedError
from tests.longcat_video_fft.conftest import (
    LONG_BODY,
    MANY,
    VIDEO_KEYS,
    VIDEOS,
    open_films,
    open_many,
)
from tests.longcat_video_fft.support.s3_server import FaultyProxy, connect, put_objects


@pytest.mark.usefixtures("s3_bucket", "s3_environment")
@pytest.mark.parametrize("prefix", [VIDEOS, f"{VIDEOS}/", f"/{VIDEOS}/"])
def test_lists_the_folder_alone_and_reads_what_it_lists(s3_url: str, prefix: str) -> None:
    storage = open_films(s3_url, prefix)
    assert storage.location == f"s3://films/{VIDEOS}"
    found = list(storage.list_objects())
    assert len(found) == len(VIDEO_KEYS)
    assert {item.key for item in found} == VIDEO_KEYS
    assert all(len(storage.read(item.key)) == item.size for item in found)
    assert storage.read("odd name + \u00e9~%#?&.mp4") == b"odd"
    assert storage.read("sub//double.mp4") == b"double"


@pytest.mark.usefixtures("s3_many_bucket", "s3_environment")
def test_lists_many_objects_by_pages(faulty_proxy: FaultyProxy) -> None:
    found = list(open_many(faulty_proxy.url, "root").list_objects())
    assert len(found) == 1500
    assert {(item.key, item.size) for item in found} == {
        (key.removeprefix("root/"), len(body)) for key, body in MANY.items()
    }
    lists = [request.path for request in faulty_proxy.requests if "list-type" in request.path]
    assert all("prefix=root/" in path for path in lists)
    assert sum("prefix=root/big/" in path for path in lists) == 2  # pages
    assert sum("prefix=root/part" in path for path in lists) == 3
    assert len(lists) == 1 + 1 + 2 + 3  # the check and the first level besides


@pytest.mark.usefixtures("s3_many_bucket", "s3_environment")
def test_lists_a_flat_prefix_by_pages(
    faulty_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_storage, "PAGE_KEYS", 100)
    found = list(open_many(faulty_proxy.url, "root/big").list_objects())
    assert len(found) == len({item.key for item in found}) == 1100
    assert faulty_proxy.count("delimiter=/") == 11


@pytest.mark.usefixtures("s3_many_bucket", "s3_environment")
def test_listing_reads_no_further_than_the_caller(
    faulty_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_storage, "PAGE_KEYS", 10)
    listing = open_many(faulty_proxy.url, "root/big").list_objects()
    assert len(list(itertools.islice(listing, 25))) == 25
    listing.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert faulty_proxy.count("delimiter=/") <= 4  # of 110


@pytest.mark.usefixtures("s3_many_bucket", "s3_environment")
def test_pages_do_not_pile_up_before_a_slow_caller(
    faulty_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_storage, "LIST_THREADS", 1)
    listing = open_many(faulty_proxy.url, "root").list_objects()
    next(listing)
    time.sleep(0.5)
    assert faulty_proxy.count("list-type") == 3  # the check, the first level, one of four below
    assert len(list(listing)) == 1499


@pytest.mark.usefixtures("s3_bucket", "s3_environment")
def test_prefix_with_nothing_below_it_is_empty(s3_url: str) -> None:
    assert list(open_films(s3_url, "pasta/dos/vid").list_objects()) == []


@pytest.mark.usefixtures("s3_bucket", "s3_environment")
def test_ranges(s3_url: str) -> None:
    storage = open_films(s3_url, VIDEOS)
    assert storage.read("a.mp4") == b"0123456789"
    assert storage.read("empty.mp4") == b""
    assert storage.read_range("a.mp4", 0, 3) == b"012"
    assert storage.read_range("a.mp4", 2, 3) == b"234"
    assert storage.read_range("a.mp4", 8, 100) == b"89"
    assert storage.read_range("a.mp4", 10, 5) == b""
    assert storage.read_range("a.mp4", 500, 5) == b""
    assert storage.read_range("a.mp4", 3, 0) == b""
    assert storage.read_range("empty.mp4", 0, 5) == b""
    assert storage.read_range("sub//double.mp4", 1, 2) == b"ou"
    with pytest.raises(ValueError, match="start -1"):
        storage.read_range("a.mp4", -1, 5)


@pytest.mark.usefixtures("s3_bucket", "s3_environment")
def test_missing_key_is_said_at_once(faulty_proxy: FaultyProxy) -> None:
    storage = open_films(faulty_proxy.url, VIDEOS)
    for read in (storage.read, lambda key: storage.read_range(key, 0, 4)):
        with pytest.raises(ObjectVanishedError, match=r"none\.mp4"):
            read("none.mp4")
    assert faulty_proxy.count("none.mp4") == 2


@pytest.mark.usefixtures("s3_environment")
def test_key_that_vanishes_after_the_listing(s3_url: str) -> None:
    put_objects(s3_url, "vanishing", {"v/a.mp4": b"a", "v/b.mp4": b"b"})
    storage = open_s3(S3Options(bucket="vanishing", prefix="v", endpoint_url=s3_url))
    keys = sorted(item.key for item in storage.list_objects())
    connect(s3_url).delete_object(Bucket="vanishing", Key="v/a.mp4")
    assert keys == ["a.mp4", "b.mp4"]
    with pytest.raises(ObjectVanishedError, match=r"a\.mp4"):
        storage.read("a.mp4")
    assert storage.read("b.mp4") == b"b"


@pytest.mark.usefixtures("s3_bucket", "s3_many_bucket", "s3_environment")
def test_many_threads_share_one_storage(s3_url: str) -> None:
    storage, films = open_many(s3_url, ""), open_films(s3_url, "long")
    keys = sorted(MANY)[::5]

    def read(key: str) -> tuple[bytes, bytes]:
        return storage.read(key), films.read_range("long.mp4", len(key) * 7, 300)

    with ThreadPoolExecutor(64) as pool:
        for key, (body, part) in zip(keys, pool.map(read, keys), strict=True):
            assert body == MANY[key]
            assert part == LONG_BODY[len(key) * 7 :][:300]

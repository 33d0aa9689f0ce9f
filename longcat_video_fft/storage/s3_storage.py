"""Lists and reads S3 and what speaks its protocol (R2, MinIO): `storage.py`'s part for buckets.

boto3 finds the credentials and lists: obstore alters keys such as a//b and fails on a/./b. obstore
reads where it is installed, in Rust, so that hundreds of reads at once do not wait for Python;
else, and with `LONGCAT_NO_OBSTORE=1`, boto3 does. Nothing but `S3Storage._retry` decides what is
tried again, and when. With `s3_clients.py` and `s3_errors.py`, the one place that knows S3.

obstore's threads do not survive a fork: open the storage in the process that uses it, or pickle it
to there.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from botocore.exceptions import BotoCoreError

from longcat_video_fft.storage import s3_clients
from longcat_video_fft.storage.s3_clients import (
    CLIENT_ERRORS,
    HAS_OBSTORE,
    Body,
    S3Options,
    connect_boto3,
    connect_obstore,
    find_endpoint,
    open_with_boto3,
    open_with_obstore,
)
from longcat_video_fft.storage.s3_errors import describe_setup_mistake, diagnose
from longcat_video_fft.storage.storage import (
    ObjectVanishedError,
    Storage,
    StorageError,
    StoredObject,
    check_range,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from obstore.store import S3Store as ObstoreClient

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Tests shorten these.
MAX_ATTEMPTS = 8
MAX_CONNECT_ATTEMPTS = 3  # for the first request alone: an address that is wrong stays wrong
BACKOFF_BASE_S = 0.2
BACKOFF_CAP_S = 20.0
PAGE_KEYS = 1000  # S3 gives no more
LIST_THREADS = 32
AWS_HOST = "amazonaws.com"

# One of our own: a seeded run's random numbers must not depend on how often S3 was slow.
_jitter = random.Random()


class _Page(NamedTuple):
    objects: list[StoredObject]
    prefixes: list[str]
    next_token: str | None


def open_s3(options: S3Options, *, num_connections: int = 256) -> Storage:
    """What is below a prefix of a bucket, after one cheap request that shows that it can be listed.

    Raises:
        ValueError: no such bucket, credentials, permission, region, or no answer from the endpoint.
        StorageError: the endpoint answers, but with errors of its own only.
    """
    storage = S3Storage(options, num_connections=num_connections)
    storage.check()
    return storage


class S3Storage:
    """Use `open_s3`, which also checks that the bucket is there."""

    def __init__(self, options: S3Options, *, num_connections: int) -> None:
        prefix = options.prefix.strip("/")
        self.options = options
        self.num_connections = num_connections
        self.bucket = options.bucket
        self.root = f"{prefix}/" if prefix else ""
        self.location = f"s3://{options.bucket}/{prefix}"
        endpoint = find_endpoint(options)
        try:
            self.client, credentials = connect_boto3(
                options, endpoint, num_connections=num_connections
            )
        except (BotoCoreError, ValueError) as error:
            raise ValueError(f"{self.location}: {error}") from error
        self.endpoint: str = self.client.meta.endpoint_url
        self.obstore: ObstoreClient | None = None
        # boto3 alone reads the user's certificates from AWS_CA_BUNDLE.
        forbidden = os.environ.get("LONGCAT_NO_OBSTORE") == "1" or os.environ.get("AWS_CA_BUNDLE")
        if HAS_OBSTORE and not forbidden:
            self.obstore = connect_obstore(
                options.bucket,
                self.endpoint,
                region=self.client.meta.region_name,
                credentials=credentials,
                num_connections=num_connections,
            )
        logger.info("%s: read with %s", self.location, "obstore" if self.obstore else "boto3")

    def __reduce__(self) -> tuple[Any, ...]:
        """Connections cannot be pickled: a process that is spawned makes its own."""
        return partial(S3Storage, self.options, num_connections=self.num_connections), ()

    def check(self) -> None:
        def request() -> dict[str, Any]:
            return self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.root, MaxKeys=1)

        response = self._retry(request, key=None, opening=True)
        # boto3 follows a bucket to its region by itself, obstore does not; and each read pays.
        region = response["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
        used = self.client.meta.region_name
        if region and region != used and AWS_HOST in self.endpoint:
            raise ValueError(
                f"{self.location}: the bucket is in region {region}, not {used}. "
                f"Set region to {region}."
            )

    def list_objects(self) -> Iterator[StoredObject]:
        # (prefix, delimiter, token). The delimiter gives the first level; below it, each prefix is
        # listed flat, all of them side by side. Few are under way at a time, so that a slow reader
        # does not pile up pages.
        todo: deque[tuple[str, str, str | None]] = deque([(self.root, "/", None)])
        flying: dict[Future[_Page], tuple[str, str]] = {}
        pool = ThreadPoolExecutor(LIST_THREADS, thread_name_prefix="s3-list")
        try:
            while todo or flying:
                while todo and len(flying) < LIST_THREADS:
                    prefix, delimiter, token = todo.popleft()
                    future = pool.submit(self._list_page, prefix, delimiter, token=token)
                    flying[future] = (prefix, delimiter)
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    prefix, delimiter = flying.pop(future)
                    page = future.result()
                    if page.next_token:
                        todo.appendleft((prefix, delimiter, page.next_token))
                    todo.extend((found, "", None) for found in page.prefixes)
                    yield from page.objects
        finally:  # also where the caller stops half-way
            pool.shutdown(wait=False, cancel_futures=True)

    def _list_page(self, prefix: str, delimiter: str, *, token: str | None) -> _Page:
        arguments = {"Bucket": self.bucket, "Prefix": prefix, "MaxKeys": PAGE_KEYS}
        if delimiter:
            arguments["Delimiter"] = delimiter
        if token:
            arguments["ContinuationToken"] = token
        response = self._retry(lambda: self.client.list_objects_v2(**arguments), key=None)
        objects = [
            StoredObject(found["Key"][len(self.root) :], found["Size"])
            for found in response.get("Contents", [])
            if not found["Key"].endswith("/")  # what some tools write for a folder
        ]
        prefixes = [found["Prefix"] for found in response.get("CommonPrefixes", [])]
        return _Page(objects, prefixes, response.get("NextContinuationToken"))

    def read(self, key: str) -> bytes:
        return self._read(key, 0, None)

    def read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        check_range(key, start, num_bytes)
        return self._read(key, start, start + num_bytes) if num_bytes else b""

    def _read(self, key: str, start: int, stop: int | None) -> bytes:
        """What is there of [start, stop); to the end where `stop` is None."""
        data = bytearray()  # outlives an attempt: the next one goes on behind it
        etag: str | None = None

        def request() -> bytes:
            nonlocal etag
            if stop is not None and start + len(data) >= stop:
                return bytes(data)  # it broke off behind the last byte
            deadline = time.monotonic() + s3_clients.ATTEMPT_TIMEOUT_S
            try:
                body = self._open_body(key, start + len(data), stop, etag=etag)
            except CLIENT_ERRORS as error:
                failure = diagnose(error)
                if failure.kind == "beyond_end":
                    return bytes(data)
                if failure.kind == "changed":
                    data.clear()
                    etag = None
                raise
            etag = body.etag
            expected = len(data) + body.num_bytes
            with closing(body.chunks):
                for chunk in body.chunks:
                    data.extend(chunk)
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"not whole after {s3_clients.ATTEMPT_TIMEOUT_S:g} s")
            if len(data) != expected:
                raise ConnectionError(f"{len(data)} bytes came, {expected} were announced")
            return bytes(data)

        return self._retry(request, key=key)

    def _open_body(self, key: str, start: int, stop: int | None, *, etag: str | None) -> Body:
        """`etag`: what the bytes before were of; another object is refused then."""
        key = self.root + key
        if self.obstore is not None and not key.startswith("/"):
            try:
                return open_with_obstore(self.obstore, key, start=start, stop=stop, etag=etag)
            except ValueError:
                pass  # a key that obstore does not take, such as a//b
        return open_with_boto3(self.client, self.bucket, key, start=start, stop=stop, etag=etag)

    def _retry(self, request: Callable[[], T], *, key: str | None, opening: bool = False) -> T:
        """The one place where anything is tried again; `key` is None for a listing.

        Raises:
            ValueError, ObjectVanishedError, StorageError: see `Storage`.
        """
        name = self.location if key is None else f"{self.location}: {key}"
        attempt = 0
        while True:
            attempt += 1
            try:
                return request()
            except CLIENT_ERRORS as error:
                failure, cause = diagnose(error), error
            if failure.kind == "vanished" and key is not None:
                raise ObjectVanishedError(f"{name} is not there (any more)") from cause
            if failure.kind == "denied" and key is not None:
                raise StorageError(f"{name}: access denied ({failure.text})") from cause
            if failure.kind == "setup" or (key is None and failure.kind != "passing"):
                mistake = describe_setup_mistake(failure)
                # Without its cause: obstore's has S3's whole answer, with the access key in it.
                raise ValueError(f"{self.location} at {self.endpoint}: {mistake}")
            if failure.kind == "refused":
                raise StorageError(f"{name}: refused ({failure.text})") from cause
            if opening and failure.status is None and attempt >= MAX_CONNECT_ATTEMPTS:
                raise ValueError(
                    f"{self.location}: {self.endpoint} cannot be reached ({failure.text}). "
                    "Check endpoint_url, region and this machine's network."
                ) from cause
            if attempt >= MAX_ATTEMPTS:
                raise StorageError(
                    f"{name}: given up after {attempt} attempts ({failure.text})"
                ) from cause
            logger.debug("%s: attempt %d failed (%s)", name, attempt, failure.text)
            delay_s = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2 ** (attempt - 1))
            time.sleep(delay_s * _jitter.uniform(0.5, 1.0))

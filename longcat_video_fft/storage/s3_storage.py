"""Lists and reads S3 and what speaks its protocol (R2, MinIO): `storage.py`'s part for buckets.

boto3 finds the credentials, lists and reads, one attempt a request: nothing but `S3Storage._retry`
decides what is tried again, and when. With `s3_errors.py` the one place that knows S3.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

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

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Tests shorten these.
MAX_ATTEMPTS = 8
MAX_CONNECT_ATTEMPTS = 3  # for the first request alone: an address that is wrong stays wrong
BACKOFF_BASE_S = 0.2
BACKOFF_CAP_S = 20.0
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0  # without a single byte
ATTEMPT_TIMEOUT_S = 600.0  # of one attempt, whose body may trickle; the next one continues there
PAGE_KEYS = 1000  # S3 gives no more
LIST_THREADS = 32
CHUNK_BYTES = 256 * 1024  # at most so much is lost when a body breaks off
AWS_HOST = "amazonaws.com"
CLIENT_ERRORS = (ClientError, BotoCoreError, ResponseParserError, OSError)

# One of our own: a seeded run's random numbers must not depend on how often S3 was slow.
_jitter = random.Random()


@dataclass(frozen=True, kw_only=True)
class S3Options:
    """Says which bucket, and how to reach it. The keys count only where boto3 finds none."""

    bucket: str
    prefix: str = ""
    region: str | None = None
    endpoint_url: str | None = None
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)


class _Page(NamedTuple):
    objects: list[StoredObject]
    prefixes: list[str]
    next_token: str | None


def open_s3(options: S3Options, *, num_connections: int = 256) -> Storage:
    """Opens what is below a prefix of a bucket, after one cheap request that shows that it can be
    listed.

    Raises:
        ValueError: no such bucket, credentials, permission, region, or no answer from the endpoint.
        StorageError: the endpoint answers, but with errors of its own only.
    """
    if "LONGCAT_NO_OBSTORE" in os.environ:
        logger.warning("LONGCAT_NO_OBSTORE no longer does anything: boto3 alone reads S3.")
    storage = S3Storage(options, num_connections=num_connections)
    storage.check()
    return storage


def find_endpoint(options: S3Options) -> str | None:
    """Returns the service's address, where not Amazon's; raises ValueError for a mistake in it."""
    if not options.bucket:
        raise ValueError("bucket is empty. Give the name of the bucket.")
    if bool(options.access_key_id) != bool(options.secret_access_key):
        raise ValueError("access_key_id and secret_access_key: give both, or neither.")
    variables = (os.environ.get("AWS_ENDPOINT_URL_S3"), os.environ.get("AWS_ENDPOINT_URL"))
    endpoint = next((found for found in (options.endpoint_url, *variables) if found), None)
    if endpoint is None:
        return None
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        # Not shown: it may hold a password.
        raise ValueError("endpoint_url: give an address as https://host or https://host:port.")
    return endpoint.rstrip("/")


def connect(options: S3Options, endpoint: str | None, *, num_connections: int) -> Any:
    """Makes a boto3 client of one attempt a request; raises ValueError without credentials."""
    session = boto3.Session()
    keys = {}
    if session.get_credentials() is None:
        if not options.access_key_id or not options.secret_access_key:
            raise ValueError(
                "no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE "
                "for a profile of ~/.aws/credentials."
            )
        keys["aws_access_key_id"] = options.access_key_id
        keys["aws_secret_access_key"] = options.secret_access_key
    config = Config(
        max_pool_connections=num_connections,
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": "path" if endpoint else "auto"},
        # Else each whole object's checksum is asked for, which not every service knows.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = options.region or session.region_name or "us-east-1"
    return session.client("s3", region_name=region, endpoint_url=endpoint, config=config, **keys)


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
            self.client = connect(options, endpoint, num_connections=num_connections)
        except (BotoCoreError, ValueError) as error:
            raise ValueError(f"{self.location}: {error}") from error
        self.endpoint: str = self.client.meta.endpoint_url

    def __reduce__(self) -> tuple[Any, ...]:
        """Connections cannot be pickled: a process that is spawned makes its own."""
        return partial(S3Storage, self.options, num_connections=self.num_connections), ()

    def check(self) -> None:
        def request() -> dict[str, Any]:
            return self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.root, MaxKeys=1)

        response = self._retry(request, key=None, opening=True)
        # boto3 follows a bucket to its region by itself, but each read pays for the detour.
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
        """Reads what is there of [start, stop); to the end where `stop` is None."""
        data = bytearray()  # outlives an attempt: the next one appends to it
        etag: str | None = None

        def request() -> bytes:
            nonlocal etag
            if stop is not None and start + len(data) >= stop:
                return bytes(data)  # it broke off behind the last byte
            deadline = time.monotonic() + ATTEMPT_TIMEOUT_S
            try:
                response = self._open(key, start + len(data), stop, etag=etag)
            except CLIENT_ERRORS as error:
                failure = diagnose(error)
                if failure.kind == "beyond_end":
                    return bytes(data)
                if failure.kind == "changed":
                    data.clear()
                    etag = None
                raise
            etag = response.get("ETag")
            expected = len(data) + response["ContentLength"]
            with closing(response["Body"]) as body:  # half read, it must not return to the pool
                while chunk := body.read(CHUNK_BYTES):
                    data.extend(chunk)
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"not whole after {ATTEMPT_TIMEOUT_S:g} s")
            if len(data) != expected:
                raise ConnectionError(f"{len(data)} bytes came, {expected} were announced")
            return bytes(data)

        return self._retry(request, key=key)

    def _open(self, key: str, start: int, stop: int | None, *, etag: str | None) -> dict[str, Any]:
        """Returns an answer whose body is still to be read. `etag` is that of the bytes before;
        another object is an error then."""
        arguments: dict[str, Any] = {"Bucket": self.bucket, "Key": self.root + key}
        ranged = start > 0 or stop is not None
        if ranged:
            arguments["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        if etag:
            arguments["IfMatch"] = etag
        response = self.client.get_object(**arguments)
        if ranged and response["ResponseMetadata"]["HTTPStatusCode"] != 206:
            response["Body"].close()
            raise ValueError(f"{self.endpoint} answers a range with the whole object.")
        return response

    def _retry(self, request: Callable[[], T], *, key: str | None, opening: bool = False) -> T:
        """Retries a request: the one place where anything is tried again; `key` is None for a
        listing.

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
                # Without its cause, which holds S3's whole answer, with the access key in it.
                raise ValueError(f"{self.location} at {self.endpoint}: {mistake}")
            if failure.kind == "failed":
                raise StorageError(f"{name}: the request failed ({failure.text})") from cause
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

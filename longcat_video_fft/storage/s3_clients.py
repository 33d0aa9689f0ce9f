"""Connects to S3 by boto3 and by obstore, and opens the bytes of one object with either.

Used by `s3_storage.py` alone. Both clients get the same address, region, credentials and limits,
whatever else each would find by itself, and make one attempt: trying again is `s3_storage`'s.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

try:
    import obstore
    from obstore.exceptions import BaseError as ObstoreError
    from obstore.store import S3Store

    HAS_OBSTORE = True
except ImportError:  # an extra: boto3 reads too
    ObstoreError = OSError
    HAS_OBSTORE = False

if TYPE_CHECKING:
    from collections.abc import Generator

    from obstore import GetOptions
    from obstore.store import S3Credential
    from obstore.store import S3Store as ObstoreClient

# Tests shorten these.
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0  # without a single byte
ATTEMPT_TIMEOUT_S = 600.0  # of one attempt, whose body may trickle; the next one goes on from there
CHUNK_BYTES = 256 * 1024  # at most so much is lost when a body breaks off
CREDENTIALS_TTL = timedelta(minutes=5)  # then obstore asks boto3's again, which renew themselves

CLIENT_ERRORS = (ClientError, BotoCoreError, ResponseParserError, ObstoreError, OSError)


@dataclass(frozen=True, kw_only=True)
class S3Options:
    """Which bucket, and how to reach it. The keys count only where boto3 finds none itself."""

    bucket: str
    prefix: str = ""
    region: str | None = None
    endpoint_url: str | None = None
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)


class Body(NamedTuple):
    """The bytes of an object, or of a part of it, as they come."""

    etag: str | None
    num_bytes: int  # as announced
    chunks: Generator[bytes, None, None]


def find_endpoint(options: S3Options) -> str | None:
    """The service's address, where it is not Amazon's; raises ValueError for a mistake in these."""
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


def connect_boto3(
    options: S3Options, endpoint: str | None, *, num_connections: int
) -> tuple[Any, Credentials]:
    """The client, and the credentials that it uses."""
    session = boto3.Session()
    credentials = session.get_credentials()
    keys = {}
    if credentials is None:
        if not options.access_key_id or not options.secret_access_key:
            raise ValueError(
                "no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE "
                "for a profile of ~/.aws/credentials."
            )
        keys["aws_access_key_id"] = options.access_key_id
        keys["aws_secret_access_key"] = options.secret_access_key
        credentials = Credentials(options.access_key_id, options.secret_access_key)
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
    client = session.client("s3", region_name=region, endpoint_url=endpoint, config=config, **keys)
    return client, credentials


def connect_obstore(
    bucket: str, endpoint: str, *, region: str, credentials: Credentials, num_connections: int
) -> ObstoreClient:
    """The same as the boto3 client does, whatever obstore would find in the environment."""

    def provide() -> S3Credential:
        found = credentials.get_frozen_credentials()
        return {
            "access_key_id": found.access_key or "",
            "secret_access_key": found.secret_key or "",
            "token": found.token,
            "expires_at": datetime.now(UTC) + CREDENTIALS_TTL,
        }

    return S3Store(
        bucket,
        config={
            "endpoint": endpoint,
            "aws_endpoint_url_s3": endpoint,  # would win over the former from the environment
            "region": region,
            "skip_signature": False,
            "virtual_hosted_style_request": False,
        },
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
            "read_timeout": timedelta(seconds=READ_TIMEOUT_S),
            "timeout": timedelta(seconds=ATTEMPT_TIMEOUT_S),
            "pool_max_idle_per_host": str(num_connections),
        },
        retry_config={"max_retries": 0},
        credential_provider=provide,
    )


def open_with_boto3(
    client: Any, bucket: str, key: str, *, start: int, stop: int | None, etag: str | None
) -> Body:
    arguments: dict[str, Any] = {"Bucket": bucket, "Key": key}
    ranged = start > 0 or stop is not None
    if ranged:
        arguments["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    if etag:
        arguments["IfMatch"] = etag
    response = client.get_object(**arguments)
    if ranged and response["ResponseMetadata"]["HTTPStatusCode"] != 206:
        response["Body"].close()
        raise ValueError(f"{client.meta.endpoint_url} answers a range with the whole object.")
    chunks = _read_chunks(response["Body"])
    return Body(response.get("ETag"), response["ContentLength"], chunks)


def open_with_obstore(
    client: ObstoreClient, key: str, *, start: int, stop: int | None, etag: str | None
) -> Body:
    options: GetOptions = {}
    if stop is not None:
        options["range"] = (start, stop)
    elif start:
        options["range"] = {"offset": start}
    if etag:
        options["if_match"] = etag
    result = obstore.get(client, key, options=options)
    first, end = result.range
    chunks = (bytes(chunk) for chunk in result.stream(min_chunk_size=CHUNK_BYTES))
    return Body(result.meta["e_tag"], end - first, chunks)


def _read_chunks(body: Any) -> Generator[bytes, None, None]:
    with closing(body):  # a body left half read must not go back into the pool
        while chunk := body.read(CHUNK_BYTES):
            yield chunk

"""An S3 server on this machine (moto), and a proxy before it that spoils the chosen answers.

with start_moto() as url, FaultyProxy(url) as proxy:
    proxy.add("videos/a.mp4", Fault(status=503, code="SlowDown"), times=2)
    ...                     # requests to proxy.url
    proxy.count("videos/a.mp4")
"""

from __future__ import annotations

import fcntl
import http.client
import logging
import os
import socket
import struct
import termios
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import boto3
from botocore.config import Config
from moto.server import ThreadedMotoServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import pytest

ACCESS_KEY_ID = "AKIATESTINGTESTING12"
SECRET_ACCESS_KEY = "secret-of-the-environment"
HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "server", "date"}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault says what happens to an answer; the request reaches the server only where no `status`
    is given.

    Attributes:
        status, code: an answer of S3's kind in place of the real one.
        extra: more in that answer's body.
        headers: added to the answer.
        delay_s: waited before the answer.
        after_bytes: of the body, then follows what is below; None: all of it.
        pause_s: waited there.
        meanwhile: done there, after the pause.
        then: "continue", "cut" (the connection closes as if all were sent) or "reset".
    """

    status: int | None = None
    code: str = ""
    extra: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    after_bytes: int | None = None
    pause_s: float = 0.0
    meanwhile: Callable[[], object] = lambda: None
    then: str = "continue"


SLOW_DOWN = Fault(status=503, code="SlowDown")


@dataclass(frozen=True)
class SeenRequest:
    path: str  # unquoted, with the query
    headers: Mapping[str, str]  # names in lower case


class FaultyProxy:
    """Forwards to `upstream_url`; a context manager. `url` is the address to use instead."""

    def __init__(self, upstream_url: str) -> None:
        self.upstream = str(urlsplit(upstream_url).netloc)
        self.requests: list[SeenRequest] = []
        self.stopping = threading.Event()
        self._faults: list[list[Any]] = []  # [key_substring, fault, times left]
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, key_substring: str, fault: Fault, *, times: int = 1) -> None:
        """Adds a fault for the next `times` requests whose path or query contains
        `key_substring`."""
        with self._lock:
            self._faults.append([key_substring, fault, times])

    def count(self, key_substring: str) -> int:
        return sum(key_substring in request.path for request in self.requests)

    def take(self, request: SeenRequest) -> Fault:
        """Notes the request, and uses up one fault that is meant for it."""
        with self._lock:
            self.requests.append(request)
            for entry in self._faults:
                if entry[0] in request.path and entry[2] > 0:
                    entry[2] -= 1
                    return entry[1]
        return Fault()

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()  # ends every delay
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    proxy: FaultyProxy

    def handle_error(self, *_: object) -> None:
        """Ignores the error: that clients hang up is what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else 40 ms between headers and body
    server: _Server

    def do_GET(self) -> None:
        proxy = self.server.proxy
        headers = {name.lower(): value for name, value in self.headers.items()}
        fault = proxy.take(SeenRequest(unquote(self.path), headers))
        proxy.stopping.wait(fault.delay_s)
        if fault.status is None:
            status, headers, body = self._forward(proxy.upstream)
        else:
            status, headers = fault.status, {"Content-Type": "application/xml"}
            body = (
                f"<Error><Code>{fault.code}</Code><Message>as asked</Message>{fault.extra}</Error>"
            ).encode()
        self.send_response(status)
        for name, value in {**headers, **fault.headers, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        sent = len(body) if fault.after_bytes is None else fault.after_bytes
        self.wfile.write(body[:sent])
        proxy.stopping.wait(fault.pause_s)
        fault.meanwhile()
        if fault.then == "continue":
            self.wfile.write(body[sent:])
            return
        if fault.then == "reset":
            while _num_unreceived(self.connection) and not proxy.stopping.wait(0.01):
                pass  # the reset would discard it
            linger = struct.pack("ii", 1, 0)  # on, for no time: closing sends a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.wfile.flush()
            self.connection.close()
        self.close_connection = True

    def _forward(self, upstream: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(upstream, timeout=300)
        try:
            connection.request("GET", self.path, headers=dict(self.headers.items()))
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        kept = {
            name: value for name, value in response.getheaders() if name.lower() not in HOP_HEADERS
        }
        return response.status, kept, body

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""


def _num_unreceived(connection: socket.socket) -> int:
    """Returns the bytes that were sent and that the other side's system does not have yet."""
    return struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))[0]


@contextmanager
def start_moto() -> Iterator[str]:
    """Returns the address of an S3 server with nothing in it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def connect(url: str) -> Any:
    """Makes a boto3 client for a test's own use, whatever the environment says."""
    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY_ID,
        aws_secret_access_key=SECRET_ACCESS_KEY,
        config=Config(s3={"addressing_style": "path"}, proxies={}, max_pool_connections=16),
    )


def put_objects(url: str, bucket: str, objects: Mapping[str, bytes]) -> None:
    """Makes the bucket, if it is not there, and puts the objects in it."""
    client = connect(url)
    client.create_bucket(Bucket=bucket)
    with ThreadPoolExecutor(8) as pool:
        puts = [
            pool.submit(client.put_object, Bucket=bucket, Key=key, Body=body)
            for key, body in objects.items()
        ]
        for put in puts:
            put.result()


def set_environment(patch: pytest.MonkeyPatch) -> None:
    """Sets credentials in the environment that moto takes, and nothing of this machine's own."""
    for name in list(os.environ):
        if name.upper().startswith("AWS_") or name.upper() in ("HTTP_PROXY", "ALL_PROXY"):
            patch.delenv(name)
    patch.delenv("LONGCAT_NO_OBSTORE", raising=False)
    patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY_ID)
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_ACCESS_KEY)
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("AWS_CONFIG_FILE", os.devnull)
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)

"""A model hub of our own on this machine, for the tests of downloads.

It speaks the part of the model hub's HTTP interface that a download uses: the listing of a
repository, and files with byte ranges. It can refuse, hang up, stall, or send wrong bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_ENDINGS = (".safetensors", ".pt")  # stored as LFS files, whose digest the hub tells


@dataclass
class Repository:
    """The files of one repository, and how the hub misbehaves for it."""

    files: dict[str, bytes]
    refusal: tuple[int, str] | None = None  # HTTP status and X-Error-Code
    listed_sizes: dict[str, int] = field(default_factory=dict)
    sent_instead: dict[str, bytes] = field(default_factory=dict)
    hang_ups: int = 0  # how many times the connection breaks halfway through a large file
    stall_after: int | None = None  # bytes of a large file, then nothing more

    def listing(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.files.items():
            digest = etag(name, content)
            sibling = {"rfilename": name, "size": self.listed_sizes.get(name, len(content))}
            sibling["blobId"] = digest
            if name.endswith(LARGE_ENDINGS):
                sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        return {"id": "org/name", "sha": COMMIT, "siblings": siblings}

    def tree(self) -> list[dict[str, Any]]:
        entries = []
        for name, content in self.files.items():
            digest = etag(name, content)
            entry = {"type": "file", "path": name, "size": len(content), "oid": digest}
            if name.endswith(LARGE_ENDINGS):
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return entries


def etag(name: str, content: bytes) -> str:
    digest = hashlib.sha256 if name.endswith(LARGE_ENDINGS) else hashlib.sha1
    return digest(content).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves `repositories`; `downloads` lists each GET of a file as (name, first byte)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.downloads: list[tuple[str, int]] = []
        self.lock = threading.Lock()
        self.stalled = threading.Event()
        self.closing = threading.Event()


class HubRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the tests look at `Hub.downloads`."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|(tree))/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        repository = self.server.repositories.get(match[1]) if match else None
        if repository is None:
            self._reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif repository.refusal is not None:
            self._reply(repository.refusal[0], b"{}", {"X-Error-Code": repository.refusal[1]})
        elif (api[3] if api else file[2] if file else None) not in (None, "main", COMMIT):
            self._reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif api:
            body = repository.tree() if api[2] else repository.listing()
            self._reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        elif file:
            self._send_file(repository, file[3])

    def _send_file(self, repository: Repository, name: str) -> None:
        content = repository.files[name]
        byte_range = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(byte_range[1]) if byte_range else 0
        body = repository.sent_instead.get(name, content)[start:]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(name, content)}"'}
        if byte_range:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        end = None
        if self.command == "GET":
            with self.server.lock:
                self.server.downloads.append((name, start))
                if name.endswith(LARGE_ENDINGS) and repository.hang_ups > 0:
                    repository.hang_ups -= 1
                    end = len(body) // 2
            if name.endswith(LARGE_ENDINGS) and len(body) > (repository.stall_after or len(body)):
                end = repository.stall_after
        self._reply(206 if byte_range else 200, body, headers, end=end)
        if end is not None and end == repository.stall_after:
            self.server.stalled.set()
            self.server.closing.wait()

    def _reply(
        self, status: int, body: bytes, headers: dict[str, str], *, end: int | None = None
    ) -> None:
        """Send the headers for the whole body, and of the body what is before `end`."""
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:end])
            self.wfile.flush()
            self.close_connection = end is not None

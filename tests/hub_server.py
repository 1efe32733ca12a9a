"""A model hub on loopback, with what can go wrong on the way to one.

Two servers: the hub, which knows names, revisions and tokens, and gives small files; and a CDN on another port, to
which the hub redirects for weights, as for files in git LFS. Every request is noted, and every byte of a body counted.
"""

import hashlib
import json
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from threading import Lock, Thread
from time import sleep
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_secret"
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".model")
WHOLE_DIGEST_NBYTES = 4 << 20
SETTLED_SECONDS = 0.2


@dataclass(frozen=True)
class Request:
    """A request as it arrived. `server` is "hub" or "cdn"."""

    server: str
    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Fault:
    """What happens to requests to `server` that have `part` in their path: after `spared` of them, to `times`.

    An answer is cut off after so many bytes, and its connection closed, or `reset`.
    """

    server: str
    part: str
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    reset: bool = False
    times: int = 1
    spared: int = 0


@dataclass
class Repository:
    """A model: a directory for each revision. `token` says that it is private, `gated` that it has a licence."""

    revisions: dict[str, Path]
    private: bool = False
    gated: bool = False


class Hub:
    """The hub's state, which tests look at and change while it runs."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.moved: Counter[str] = Counter()
        """Bytes of bodies sent, by file name."""
        self.faults: list[Fault] = []
        self.salt = ""
        """Makes every file another one, by its ETag."""
        self.url = self.cdn_url = ""
        self._lock = Lock()
        self._digests: dict[tuple[Path, str], str] = {}

    def add(self, name: str, directory: Path, revision: str = "main", **access: bool) -> str:
        """Serve `directory` as a model's revision; returns the commit."""
        repository = self.repositories.setdefault(name, Repository({}, **access))
        repository.revisions[revision] = directory
        return self.commit(name, revision)

    def commit(self, name: str, revision: str) -> str:
        return hashlib.sha1(f"{name} {self.repositories[name].revisions[revision]}".encode()).hexdigest()

    def found(self, name: str, revision: str) -> tuple[str, Path] | None:
        """The commit and directory of a revision or commit."""
        for known, directory in self.repositories[name].revisions.items():
            commit = self.commit(name, known)
            if revision in (known, commit):
                return commit, directory
        return None

    def digest(self, file: Path) -> str:
        """sha256, as for a file in git LFS. Of a file that is too large for tests to read, of its beginning."""
        if (file, self.salt) not in self._digests:
            with file.open("rb") as stream:
                content = stream.read(WHOLE_DIGEST_NBYTES)
            seen = content + str(file.stat().st_size).encode() + self.salt.encode()
            self._digests[file, self.salt] = hashlib.sha256(seen).hexdigest()
        return self._digests[file, self.salt]

    def by_digest(self, digest: str) -> Path:
        return next(file for (file, _), known in self._digests.items() if known == digest)

    def digests_of(self, other: "Hub") -> None:
        """Serve from the CDN what `other` has told the digests of."""
        self._digests.update(other._digests)

    def note(self, request: Request) -> Fault | None:
        """Remember `request`; what shall go wrong with it."""
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if not fault.times or fault.server != request.server or fault.part not in request.path:
                    continue
                if fault.spared:
                    fault.spared -= 1
                else:
                    fault.times -= 1
                    return fault
        return None

    def asked(self, server: str) -> int:
        """How many requests came to a server."""
        return sum(request.server == server for request in self.requests)

    def count(self, name: str, nbytes: int) -> None:
        with self._lock:
            self.moved[name] += nbytes

    def weights_moved(self) -> int:
        """Bytes of weights sent, once that rests: what a reader that gave up had asked for is still being answered."""
        before, now = None, self._state()
        while before != now:
            sleep(SETTLED_SECONDS)
            before, now = now, self._state()
        return now[0]

    def _state(self) -> tuple[int, int]:
        """The bytes of weights sent and the number of requests, so far."""
        with self._lock:
            weights = (nbytes for name, nbytes in self.moved.items() if name.endswith((".safetensors", ".bin")))
            return sum(weights), len(self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which keeps small answers back for 40 ms
    hub: Hub
    server_name: str

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def _handle(self) -> None:
        request = Request(self.server_name, self.command, self.path, dict(self.headers.items()))
        fault = self.hub.note(request)
        if fault is not None and fault.status:
            self._answer(fault.status, b"", fault.headers)
            return
        self._cut_after = None if fault is None else fault.cut_after
        self._resets = fault is not None and fault.reset
        self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def _answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_file(self, file: Path, headers: Mapping[str, str]) -> None:
        """The file, or the range of it that is asked for."""
        size = file.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin, end = (0, size) if wanted is None else (int(wanted[1]), min(int(wanted[2] or size) + 1, size))
        if begin >= end > 0 or begin > size:
            self._answer(416, headers={"Content-Range": f"bytes */{size}"})
            return
        self.send_response(200 if wanted is None else 206)
        if wanted is not None:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        for name, value in {**headers, "Content-Length": str(end - begin), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        left = end - begin if self._cut_after is None else min(self._cut_after, end - begin)
        with file.open("rb") as stream:
            stream.seek(begin)
            while left:
                piece = stream.read(min(left, 1 << 18))
                self.hub.count(file.name, len(piece))  # before whoever receives it can ask
                self.wfile.write(piece)
                left -= len(piece)
        if self._resets:
            sleep(0.02)  # a reset overtakes what has not been read
            self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        if self._cut_after is not None:
            self.close_connection = True


class _CDNHandler(_Handler):
    server_name = "cdn"

    def answer(self) -> None:
        digest = urlsplit(self.path).path.lstrip("/").split("/")[0]
        file = self.hub.by_digest(digest)
        self._send_file(file, {"ETag": f'"cdn-{self.hub.digest(file)[:16]}"'})


class _HubHandler(_Handler):
    server_name = "hub"

    def answer(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        if path == "/api/models":
            author = parse_qs(parts.query).get("author", [""])[0]
            names = [name for name in self.hub.repositories if name.startswith(f"{author}/")]
            self._json([{"id": name} for name in names])
        elif api := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+)|(/refs))?", path):
            if self._may_read(api[1]):
                self._refs(api[1]) if api[3] else self._model(api[1], api[2] or "main")
        elif (resolved := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)) and self._may_read(resolved[1]):
            self._resolve(*resolved.groups())
        elif not resolved:
            self._answer(404)

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.hub.count("api", len(body))
        self._answer(200, body, {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _may_read(self, name: str) -> bool:
        repository = self.hub.repositories.get(name)
        knows_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not knows_token):
            self._error(404 if knows_token else 401, "RepoNotFound")
        elif repository.gated and not knows_token and "/resolve/" in self.path:
            self._error(401 if "Authorization" not in self.headers else 403, "GatedRepo")
        else:
            return True
        return False

    def _refs(self, name: str) -> None:
        branches = [
            {"name": known, "ref": f"refs/heads/{known}", "targetCommit": self.hub.commit(name, known)}
            for known in self.hub.repositories[name].revisions
        ]
        self._json({"branches": branches, "tags": [], "converts": []})

    def _model(self, name: str, revision: str) -> None:
        found = self.hub.found(name, revision)
        if found is None:
            self._error(404, "RevisionNotFound")
            return
        commit, directory = found
        siblings = []
        for file in sorted(path for path in directory.rglob("*") if path.is_file()):
            size, digest = file.stat().st_size, self.hub.digest(file)
            lfs = {"lfs": {"sha256": digest, "size": size, "pointerSize": 135}} if _is_lfs(file) else {}
            siblings.append({"rfilename": str(file.relative_to(directory)), "size": size, "blobId": digest[:40], **lfs})
        self._json({"id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def _resolve(self, name: str, revision: str, filename: str) -> None:
        found = self.hub.found(name, revision)
        if found is None:
            self._error(404, "RevisionNotFound")
            return
        commit, directory = found
        file = directory / filename
        if not file.is_file():
            self._answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        digest, size = self.hub.digest(file), file.stat().st_size
        headers = {"X-Repo-Commit": commit}
        if _is_lfs(file):
            target = f"{self.hub.cdn_url}/{digest}/{file.name}?signature=secret"
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(size), "Location": target}
            self._answer(302, b"Found. Redirecting", {**headers, **linked})
        else:
            self._send_file(file, {**headers, "ETag": f'"{digest[:40]}"'})


def _is_lfs(file: Path) -> bool:
    return file.suffix in LFS_SUFFIXES


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that runs."""
    hub = Hub()
    servers = [_server(handler, hub) for handler in (_HubHandler, _CDNHandler)]
    hub.url, hub.cdn_url = (
        f"http://{host}:{server.server_address[1]}"
        for host, server in zip(("127.0.0.1", "localhost"), servers, strict=True)
    )
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def _server(handler: Callable[..., _Handler], hub: Hub) -> ThreadingHTTPServer:
    bound = type(handler.__name__, (handler,), {"hub": hub})  # type: ignore[attr-defined, misc]
    server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
    server.daemon_threads = True
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server

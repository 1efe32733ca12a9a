"""Reading ranges of files over HTTP.

Networks fail in the middle of things. A range that breaks off goes on at the byte where it broke, and a server that is
busy is asked again when it says so, or later and later. Every answer is checked to be of the file that was planned for.

A server may send readers on to another host, as the Hub does for large files. Where a file was found is remembered, so
that the next range costs one request, until nothing comes from there. Credentials go to the host in the file's URL
and to no other.
"""

from __future__ import annotations

import re
import ssl
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from socket import SHUT_RDWR, socket
from threading import Event, Lock
from time import monotonic
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from executor.errors import RunError
from executor.patience import ATTEMPTS, BUSY, SILENT_SECONDS, TIMEOUT_SECONDS, asked_seconds, pause_seconds
from planner.expr import RemoteFile

MAX_REDIRECTS = 5

PIECE_NBYTES = 64 << 10
"""How much is waited for at a time. When a connection breaks, nobody says how much of it came."""

_REDIRECTS = {301, 302, 303, 307, 308}
_GONE = {400, 401, 403, 404, 410}
"""How a host to which readers were sent no longer gives a file: mostly, since the signed URL has expired."""

_WEB_ADDRESS = re.compile(r"https?://[!-~]+")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-\d+/(\d+|\*)")

Origin = tuple[str, str, int]
"""Scheme, host and port."""

OnWait = Callable[[str, float], None]
"""Told which server is waited for, and how many seconds, where that is long."""


class _TryAgainError(Exception):
    """What may work later; after `seconds`, where the server says so."""

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class _Location:
    """Where a server sent readers of a file, and the entity tag that it has there."""

    url: str
    etag: str | None


class _ProxyConnection(HTTPConnection):
    """A connection to a proxy that is asked for whole URLs."""

    def __init__(self, host: str, port: int, login: Mapping[str, str]) -> None:
        super().__init__(host, port, timeout=TIMEOUT_SECONDS)
        self.login = login


class RemoteReader:
    """Reads ranges of remote files. Safe to use from several threads, each of which has a connection of its own.

    `headers` are sent with each request to the host that a file's URL names. `on_wait` is told once of threads that
    wait at the same time.
    """

    def __init__(self, headers: Mapping[str, str] | None = None, on_wait: OnWait | None = None) -> None:
        self._headers = dict(headers or {})
        self._on_wait = on_wait
        self._told_until = 0.0
        self._lock = Lock()
        self._idle: dict[Origin, list[HTTPConnection]] = {}
        self._busy: dict[HTTPConnection, socket] = {}
        self._locations: dict[RemoteFile, _Location] = {}
        self._interrupted = Event()
        self._context: ssl.SSLContext | None = None

    def read_into(self, file: RemoteFile, offset: int, memory: memoryview) -> None:
        """Fill `memory` from byte `offset` of `file`.

        Raises RunError where the file is no longer what it was, where access is refused, and where the server stays
        away.
        """
        failures = 0
        while len(memory):
            try:
                count = self._read_some(file, offset, memory)
            except _TryAgainError as error:
                self._locations.pop(file, None)  # the server may send readers elsewhere by now
                failures += 1
                if failures == ATTEMPTS:
                    raise RunError(
                        f"{file.url}: byte {offset} could not be read in {ATTEMPTS} attempts: {error}"
                    ) from None
                self._pause(file, pause_seconds(failures, error.seconds))
            else:
                failures = 0
                memory, offset = memory[count:], offset + count

    def read(self, file: RemoteFile, offset: int, nbytes: int) -> bytes:
        """`nbytes` bytes from byte `offset` of `file`; raises what `read_into` raises."""
        data = bytearray(nbytes)
        self.read_into(file, offset, memoryview(data))
        return bytes(data)

    def interrupt(self) -> None:
        """Have every read that is under way fail soon."""
        self._interrupted.set()
        with self._lock:
            for under_way in self._busy.values():
                with suppress(OSError):
                    socket.shutdown(under_way, SHUT_RDWR)  # beneath TLS, which another thread is at

    def close(self) -> None:
        with self._lock:
            for connections in self._idle.values():
                for connection in connections:
                    connection.close()
            self._idle.clear()

    def _pause(self, file: RemoteFile, seconds: float) -> None:
        if seconds > SILENT_SECONDS and self._on_wait is not None:
            with self._lock:
                is_told = monotonic() < self._told_until
                self._told_until = self._told_until if is_told else monotonic() + seconds
            if not is_told:
                self._on_wait(urljoin(file.url, "/").rstrip("/"), seconds)
        if self._interrupted.wait(seconds):
            raise RunError("interrupted")

    def _read_some(self, file: RemoteFile, offset: int, memory: memoryview) -> int:
        """Read as much as one answer gives, at least a byte; returns how much."""
        done = 0
        try:
            with self._range(file, offset, len(memory)) as response:
                while done < len(memory):
                    count = response.readinto(memory[done : done + PIECE_NBYTES])
                    if not count:
                        break
                    done += count
        except (OSError, HTTPException) as error:
            if not done:
                raise _TryAgainError(_reason(error)) from None
        if self._interrupted.is_set():
            raise RunError("interrupted")
        if not done:
            raise _TryAgainError("the connection was closed before anything came")
        return done

    @contextmanager
    def _range(self, file: RemoteFile, offset: int, nbytes: int) -> Iterator[HTTPResponse]:
        """The answer that has `nbytes` bytes from `offset` on, from wherever the file is."""
        location = self._locations.get(file)
        if location is not None:
            with self._get(file, location.url, offset, nbytes) as response:
                if response.status not in _GONE | _REDIRECTS:
                    self._check_range(file, response, offset, nbytes)
                    if _etag(response, "ETag") != location.etag:
                        raise _changed(file)
                    yield response
                    return
            self._locations.pop(file, None)
        url, is_the_file = file.url, False
        for _ in range(MAX_REDIRECTS):
            at_origin = _origin(url) == _origin(file.url)
            with self._get(file, url, offset, nbytes) as response:
                if at_origin:
                    known = _etag(response, "X-Linked-Etag") or (
                        _etag(response, "ETag") if response.status in (200, 206) else None
                    )
                    if known not in (None, file.etag):
                        raise _changed(file)
                    is_the_file = is_the_file or known is not None
                if response.status in _REDIRECTS:
                    url = _redirected(file, url, response)
                    continue
                if not at_origin and response.status in _GONE:
                    raise _TryAgainError(f"{_origin(url)[1]} answers with HTTP {response.status}")
                self._check_range(file, response, offset, nbytes)
                if not is_the_file:
                    raise RunError(f"{file.url}: the server gives no ETag, so a change of the file would not show")
                if not at_origin:
                    self._locations[file] = _Location(url, _etag(response, "ETag"))
                yield response
                return
        raise RunError(f"{file.url}: the server redirects more than {MAX_REDIRECTS} times")

    def _check_range(self, file: RemoteFile, response: HTTPResponse, offset: int, nbytes: int) -> None:
        status = response.status
        if status in BUSY:
            raise _TryAgainError(f"the server answers with HTTP {status}", asked_seconds(response.headers))
        if status in (401, 403):
            raise RunError(f"{file.url}: access is refused (HTTP {status}); is the token still valid?")
        if status in (404, 410):
            raise RunError(f"{file.url}: the file is no longer there (HTTP {status})")
        if status == 416:
            raise _changed(file)
        whole = status == 200 and (offset, nbytes) == (0, file.nbytes)
        if status != 206 and not whole:
            raise RunError(f"{file.url}: the server answers a request for a range with HTTP {status}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise RunError(f"{file.url}: the server sends the file compressed, of which no ranges can be used")
        if whole:
            return
        place = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
        if place is None or int(place[1]) != offset:
            raise RunError(f"{file.url}: the server sends another range than it was asked for")
        if place[2] not in ("*", str(file.nbytes)):
            raise _changed(file)

    @contextmanager
    def _get(self, file: RemoteFile, url: str, offset: int, nbytes: int) -> Iterator[HTTPResponse]:
        """The answer to a request for a range at `url`. Its connection is used again if it was read to the end."""
        origin = _origin(url)
        headers = self._headers if origin == _origin(file.url) else {"User-Agent": "moeplan"}
        headers = {**headers, "Range": f"bytes={offset}-{offset + nbytes - 1}"}
        connection, response = self._send(origin, url, headers)
        try:
            yield response
            if response.status not in (200, 206):
                response.read(1 << 16)  # the text of a redirect or an error
        finally:
            reusable = response.isclosed() and connection.sock is not None
            with self._lock:
                self._busy.pop(connection, None)
                if reusable:
                    self._idle.setdefault(origin, []).append(connection)
            if not reusable:
                response.close()
                connection.close()

    def _send(self, origin: Origin, url: str, headers: Mapping[str, str]) -> tuple[HTTPConnection, HTTPResponse]:
        with self._lock:
            idle = self._idle.get(origin)
            known = idle.pop() if idle else None
        if known is not None:
            with suppress(OSError, HTTPException):  # servers close connections that lie idle
                return known, self._answer(known, url, headers)
        connection = self._connect(origin)
        return connection, self._answer(connection, url, headers)

    def _answer(self, connection: HTTPConnection, url: str, headers: Mapping[str, str]) -> HTTPResponse:
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Host": parts.netloc, **headers}
        if isinstance(connection, _ProxyConnection):
            target, headers = url, {**headers, **connection.login}
        try:
            if self._interrupted.is_set():
                raise RunError("interrupted")
            if connection.sock is None:
                connection.connect()
            with self._lock:
                if self._interrupted.is_set():
                    raise RunError("interrupted")
                self._busy[connection] = connection.sock  # it has none while it reads an answer that it closes after
            connection.request("GET", target, headers=headers)
            return connection.getresponse()
        except BaseException:
            with self._lock:
                self._busy.pop(connection, None)
            connection.close()
            raise

    def _connect(self, origin: Origin) -> HTTPConnection:
        """A new connection, through a proxy where the environment names one."""
        scheme, host, port = origin
        proxies = {} if proxy_bypass(host) else getproxies()
        name = scheme if scheme in proxies else "all"
        if name not in proxies:
            return self._connection(scheme, host, port)
        proxy = proxies[name] if "://" in proxies[name] else f"http://{proxies[name]}"
        try:
            at = urlsplit(proxy)
            proxy_scheme, proxy_host, proxy_port = _origin(proxy, port=80)
            if proxy_scheme != "http":
                raise ValueError("another protocol, such as SOCKS")
        except ValueError:  # it is not shown, since it may hold a password
            raise RunError(
                f"{name}_proxy: what the environment names is no address of an HTTP proxy, such as http://host:8080; "
                "correct it, or unset it"
            ) from None
        login = {}
        if at.username is not None:
            pair = f"{unquote(at.username)}:{unquote(at.password or '')}"
            login = {"Proxy-Authorization": f"Basic {b64encode(pair.encode()).decode()}"}
        if scheme == "http":
            return _ProxyConnection(proxy_host, proxy_port, login)
        connection = self._connection(scheme, proxy_host, proxy_port)
        connection.set_tunnel(host, port, headers=login)
        return connection

    def _connection(self, scheme: str, host: str, port: int) -> HTTPConnection:
        if scheme == "http":
            return HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
        with self._lock:
            if self._context is None:
                self._context = ssl.create_default_context()
        return HTTPSConnection(host, port, timeout=TIMEOUT_SECONDS, context=self._context)


def _origin(url: str, port: int | None = None) -> Origin:
    """`port` is the one where the URL names none. Raises ValueError for a host or port that cannot be."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if not host.encode("idna"):
        raise ValueError("no host")
    return parts.scheme, host, parts.port or port or (443 if parts.scheme == "https" else 80)


def _redirected(file: RemoteFile, url: str, response: HTTPResponse) -> str:
    location = response.headers.get("Location", "")
    with suppress(ValueError):
        target = urljoin(url, location)
        downgraded = _origin(target)[0] == "http" and _origin(url)[0] == "https"
        if _WEB_ADDRESS.fullmatch(target) and not downgraded:
            return target
    raise RunError(f"{file.url}: the server redirects to where nothing is read from: {location[:100]!r}")


def _etag(response: HTTPResponse, header: str) -> str | None:
    value = response.headers.get(header)
    return None if value is None else value.removeprefix("W/").strip('"')


def _changed(file: RemoteFile) -> RunError:
    return RunError(f"{file.url}: the file was changed since the merge was planned. Start again")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__

"""Plans whose sources are on another machine: what is asked for, what happens when networks and servers misbehave."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import TOKEN, Fault, Hub, serving
from plans import digest, planned, source

from executor import patience
from executor.engine import Progress, run
from executor.errors import RunError
from executor.regions import block_nbytes
from executor.remote import RemoteReader
from executor.ways import physical_nbytes
from executor.weights import Weights
from planner.expr import DType, Expr, Opaque, Read, RemoteFile, SourceFile, cast, mean, scale
from planner.plan import Plan

HEADERS = {"Authorization": f"Bearer {TOKEN}"}
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _without_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def local(tmp_path: Path) -> dict[str, Read]:
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "model").mkdir()
    return source(
        tmp_path / "model" / "model.safetensors",
        {
            "large": torch.randn(3000, 1000, generator=generator).bfloat16(),
            "left out": torch.randn(500, 1000, generator=generator).bfloat16(),
            "small": torch.randn(5, 7, generator=generator).half(),
        },
    )


@pytest.fixture
def file(hub: Hub, local: dict[str, Read], tmp_path: Path) -> RemoteFile:
    """The same file on the hub, in a private repository."""
    commit = hub.add("org/model", tmp_path / "model", private=True)
    path = tmp_path / "model" / "model.safetensors"
    url = f"{hub.url}/org/model/resolve/{commit}/model.safetensors"
    return RemoteFile(url, hub.digest(path), path.stat().st_size)


def plan_of(reads: dict[str, Read], file: RemoteFile | None = None) -> Plan:
    """In chunks of at most a MiB."""
    if file is not None:
        reads = {name: Read(file, read.offset, read.dtype, read.shape) for name, read in reads.items()}
    outputs: dict[str, Expr] = {
        "copy": reads["large"],
        "again": reads["large"],
        "half": cast(scale(reads["large"], 0.5), DType.BF16),
        "small": reads["small"],
    }
    return planned(outputs, budget=4 * MIB)


def outcome(plan: Plan, directory: Path, **options: object) -> dict[str, str]:
    directory.mkdir()
    run(plan, directory, headers=HEADERS, **options)  # type: ignore[arg-type]
    return digest(directory)


def test_a_remote_source_gives_the_bytes_that_a_local_one_gives_and_only_what_is_planned_is_moved(
    hub: Hub, local: dict[str, Read], file: RemoteFile, tmp_path: Path
) -> None:
    plan = plan_of(local, file)
    assert outcome(plan, tmp_path / "remote") == outcome(plan_of(local), tmp_path / "local")
    assert hub.weights_moved() == plan.read_nbytes == local["large"].nbytes + local["small"].nbytes
    chunks = sum(request.server == "cdn" for request in hub.requests)
    assert chunks >= 6
    assert len(hub.requests) - chunks <= plan.pool.workers  # who knows where the file is asks there at once
    assert physical_nbytes(plan, tmp_path) >= plan.written_nbytes - local["large"].nbytes  # no extents to share


@pytest.mark.parametrize("budget", [3 * MIB, 64 * MIB])
def test_the_parts_of_a_mean_may_be_remote(
    hub: Hub, local: dict[str, Read], file: RemoteFile, tmp_path: Path, budget: int
) -> None:
    """Beside local ones, and as a weight that a kernel has whole or reads as it uses it."""
    other = source(tmp_path / "other.safetensors", {"x": torch.linspace(-1, 1, 3_000_000).view(3000, 1000)})["x"]
    large = local["large"]

    def outputs(large: Read) -> dict[str, Expr]:
        averaged = cast(mean([other, large]), DType.BF16)
        block = block_nbytes(64, 1000, DType.F32)
        sums = Opaque("sums", "{}", (), DType.F32, (3000,), 0, (averaged,), block_nbytes=block)
        return {"mean": averaged, "sums": sums}

    def sums(params: Any, inputs: Any, output: torch.Tensor, weights: Weights) -> None:
        def add(begin: int, block: torch.Tensor) -> None:
            output[begin : begin + len(block)] = block.sum(dim=1)

        weights.for_each_block(weights.matrices[0], 64, add)

    digests = []
    for number, read in enumerate((large, Read(file, large.offset, large.dtype, large.shape))):
        plan, out = planned(outputs(read), budget), tmp_path / f"out {number}"
        out.mkdir()
        run(plan, out, {"sums": sums}, headers=HEADERS)
        digests.append(digest(out))
    assert digests[0] == digests[1]
    times = 1 if budget == 64 * MIB else 2
    assert hub.weights_moved() == times * large.nbytes


def test_a_plan_with_remote_sources_is_plain_data(local: dict[str, Read], file: RemoteFile) -> None:
    plan = plan_of(local, file)
    assert plan.sources == (file,)
    assert Plan.from_json(plan.to_json()) == plan
    assert TOKEN not in plan.to_json()
    assert plan.fingerprint != plan_of(local, RemoteFile(file.url, "another", file.nbytes)).fingerprint


def test_credentials_go_to_the_host_that_the_plan_names_and_to_no_other(
    hub: Hub, local: dict[str, Read], file: RemoteFile, tmp_path: Path
) -> None:
    outcome(plan_of(local, file), tmp_path / "out")
    sent = {(request.server, request.headers.get("Authorization")) for request in hub.requests}
    assert sent == {("hub", f"Bearer {TOKEN}"), ("cdn", None)}


def test_a_connection_that_is_cut_goes_on_at_the_byte_where_it_was_cut(
    hub: Hub, local: dict[str, Read], file: RemoteFile, tmp_path: Path
) -> None:
    hub.faults.append(Fault("cdn", "model", cut_after=100_001, times=7))
    plan = plan_of(local, file)
    assert outcome(plan, tmp_path / "remote") == outcome(plan_of(local), tmp_path / "local")
    assert hub.weights_moved() == plan.read_nbytes


def test_a_link_that_resets_every_connection_is_slow_and_no_more(
    hub: Hub, local: dict[str, Read], file: RemoteFile, tmp_path: Path
) -> None:
    hub.faults.append(Fault("cdn", "model", cut_after=200_000, reset=True, times=1000))
    assert outcome(plan_of(local, file), tmp_path / "remote") == outcome(plan_of(local), tmp_path / "local")


def test_a_server_that_fails_often_is_asked_again_as_long_as_something_comes_in_between(
    hub: Hub, local: dict[str, Read], file: RemoteFile
) -> None:
    for _ in range(patience.ATTEMPTS):
        hub.faults += [Fault("cdn", "model", status=503, times=2), Fault("cdn", "model", cut_after=100_001)]
    read = local["large"]
    data = RemoteReader(HEADERS).read(file, read.offset, 3_000_000)
    assert isinstance(read.file, SourceFile)
    assert data == Path(read.file.path).read_bytes()[read.offset : read.offset + 3_000_000]


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (429, {"RateLimit": '"resolvers";r=0;t=1'}),
        (429, {"Retry-After": "1"}),
        (503, {"Retry-After": "1"}),
        (522, {"Retry-After": "1"}),
    ],
)
@pytest.mark.parametrize("server", ["hub", "cdn"])
def test_a_busy_server_is_asked_again_when_it_says_so(
    hub: Hub, local: dict[str, Read], file: RemoteFile, status: int, headers: dict[str, str], server: str
) -> None:
    hub.faults.append(Fault(server, "model", status=status, headers=headers))
    started = time.monotonic()
    assert len(RemoteReader(HEADERS).read(file, local["small"].offset, 70)) == 70
    assert 1 <= time.monotonic() - started < 10


@pytest.mark.parametrize(
    "header", [None, "0", "Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:37 +9" + 20 * "9"]
)
def test_a_busy_server_that_gives_no_time_is_asked_later_and_later_and_then_no_more(
    hub: Hub, file: RemoteFile, monkeypatch: pytest.MonkeyPatch, header: str | None
) -> None:
    headers = {} if header is None else {"Retry-After": header}
    pauses: list[float] = []
    monkeypatch.setattr(RemoteReader, "_pause", lambda self, file, seconds: pauses.append(seconds))
    hub.faults.append(Fault("hub", "model", status=500, headers=headers, times=100))
    with pytest.raises(RunError, match=r"model.safetensors: byte 5 could not be read in 8 attempts: .*HTTP 500"):
        RemoteReader(HEADERS).read(file, 5, 10)
    assert len(pauses) == 7
    assert all(later > sooner / 1.01 for sooner, later in pairwise(pauses))


@pytest.mark.parametrize("status", [302, 400, 403])
def test_a_signed_address_that_has_expired_is_asked_for_again(hub: Hub, file: RemoteFile, status: int) -> None:
    reader = RemoteReader(HEADERS)
    first = reader.read(file, 0, 100)
    hub.faults.append(Fault("cdn", "model", status=status, headers={"Location": "/elsewhere"}))
    assert reader.read(file, 0, 100) == first
    assert [request.server for request in hub.requests] == ["hub", "cdn", "cdn", "hub", "cdn"]


def test_a_host_that_is_gone_is_given_up_where_the_server_names_another_by_now(hub: Hub, file: RemoteFile) -> None:
    living = hub.cdn_url
    with serving() as other:
        other.digests_of(hub)
        hub.cdn_url = other.cdn_url
        reader = RemoteReader(HEADERS)
        first = reader.read(file, 0, 100)
        assert other.asked("cdn") == 1
        reader.close()  # a server that is shut down still answers on connections that it has
    hub.cdn_url = living
    assert reader.read(file, 0, 100) == first
    assert hub.asked("cdn") == 1


def test_a_source_that_changes_during_the_run_is_refused(
    hub: Hub, local: dict[str, Read], file: RemoteFile, tmp_path: Path
) -> None:
    def change(progress: Progress) -> None:
        hub.salt = "another"

    with pytest.raises(RunError, match=r"model.safetensors: the file was changed since the merge was planned"):
        outcome(plan_of(local, file), tmp_path / "out", on_progress=change)


def test_a_source_that_changed_before_the_run_is_refused(hub: Hub, file: RemoteFile) -> None:
    hub.salt = "another"
    with pytest.raises(RunError, match="changed since the merge was planned"):
        RemoteReader(HEADERS).read(file, 0, 10)


def test_a_source_of_another_size_is_refused(file: RemoteFile) -> None:
    with pytest.raises(RunError, match="changed since the merge was planned"):
        RemoteReader(HEADERS).read(RemoteFile(file.url, file.etag, file.nbytes + 1), 0, 10)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("hub", "model", status=401), "access is refused .HTTP 401.; is the token still valid"),
        (Fault("hub", "model", status=404), "no longer there"),
        (Fault("hub", "model", status=200), "answers a request for a range with HTTP 200"),
        (Fault("cdn", "model", status=206), "another range than it was asked for"),
        (
            Fault("cdn", "model", status=206, headers={"Content-Range": f"bytes {5000 * '9'}-1/2"}),
            "another range than it was asked for",
        ),
        (Fault("hub", "model", status=206, headers={"Content-Range": "bytes 0-9/*"}), "gives no ETag, so a change"),
        (Fault("cdn", "model", status=200), "answers a request for a range with HTTP 200"),
        (Fault("cdn", "model", status=206, headers={"Content-Encoding": "gzip"}), "compressed"),
        (Fault("hub", "model", status=302, headers={"Location": "file:///etc/passwd"}), "nothing is read from"),
        (
            Fault("hub", "model", status=302, headers={"Location": "https://[x/"}),
            "nothing is read from: 'https://\\[x/'",
        ),
        (Fault("hub", "model", status=302, headers={"Location": "http://h:99999/"}), "nothing is read from"),
        (Fault("hub", "model", status=302, headers={"Location": "http://a..b/"}), "nothing is read from"),
        (Fault("hub", "model", status=302, headers={"Location": "/mod\xe8le"}), "nothing is read from"),
        (Fault("hub", "model", status=302, headers={"Location": "?"}, times=9), "redirects more than 5 times"),
    ],
)
def test_an_answer_that_cannot_be_used_is_one_message(hub: Hub, file: RemoteFile, fault: Fault, message: str) -> None:
    hub.faults.append(fault)
    with pytest.raises(RunError, match=message) as refused:
        RemoteReader(HEADERS).read(file, 0, 10)
    assert str(refused.value).startswith(file.url)


def test_what_was_interrupted_asks_nothing_more(hub: Hub, file: RemoteFile) -> None:
    reader = RemoteReader(HEADERS)
    reader.read(file, 0, 100)
    asked = len(hub.requests)
    reader.interrupt()
    with pytest.raises(RunError, match="interrupted"):
        reader.read(file, 100, 100)
    assert len(hub.requests) == asked
    reader.close()


def test_threads_that_wait_for_long_are_told_once(hub: Hub, file: RemoteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executor.remote.SILENT_SECONDS", 0.9)
    told: list[tuple[str, float]] = []
    reader = RemoteReader(HEADERS, lambda *wait: told.append(wait))
    for rounds in (1, 2):
        hub.faults.append(Fault("hub", "model", status=503, headers={"Retry-After": "1"}, times=3))
        with ThreadPoolExecutor(3) as threads:
            assert len(list(threads.map(lambda at: reader.read(file, at, 10), range(3)))) == 3
        assert told == [(hub.url, 1.0)] * rounds
        reader._locations.clear()


def test_a_run_that_is_interrupted_does_not_wait_for_a_busy_server(hub: Hub, file: RemoteFile) -> None:
    hub.faults.append(Fault("hub", "model", status=503, headers={"Retry-After": "120"}))
    reader = RemoteReader(HEADERS)
    threading.Timer(0.2, reader.interrupt).start()
    started = time.monotonic()
    with pytest.raises(RunError, match="interrupted"):
        reader.read(file, 0, 10)
    assert time.monotonic() - started < 10


@contextmanager
def silent(answer: bytes) -> Iterator[str]:
    """The address of a server that gives each request so much of an answer, and then says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    kept.append(connection)
                    connection.recv(1 << 16)
                    connection.sendall(answer)

        kept: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/model"
        for connection in kept:
            connection.close()


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_a_read_that_waits_for_the_rest_of_an_answer_is_interrupted(connection: str) -> None:
    head = "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-99/100\r\nContent-Length: 100\r\n"
    with silent(f'{head}ETag: "a"\r\nConnection: {connection}\r\n\r\nhalf'.encode()) as url:
        reader = RemoteReader()
        threading.Timer(0.3, reader.interrupt).start()
        started = time.monotonic()
        with pytest.raises(RunError, match="interrupted"):
            reader.read(RemoteFile(url, "a", 100), 0, 100)
        assert time.monotonic() - started < 10


def test_a_read_that_is_interrupted_while_it_connects_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, connect = RemoteReader(), HTTPConnection.connect

    def interrupted_meanwhile(connection: HTTPConnection) -> None:
        reader.interrupt()
        connect(connection)

    monkeypatch.setattr(HTTPConnection, "connect", interrupted_meanwhile)
    with silent(b"") as url:
        started = time.monotonic()
        with pytest.raises(RunError, match="interrupted"):
            reader.read(RemoteFile(url, "a", 100), 0, 100)
        assert time.monotonic() - started < 10


@pytest.mark.parametrize("name", ["http_proxy", "ALL_PROXY"])
def test_a_proxy_that_the_environment_names_is_used(
    hub: Hub, file: RemoteFile, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, hub.url.replace("://", "://user:word@"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    elsewhere = RemoteFile("http://hub.invalid/x", "etag", 10)
    with pytest.raises(RunError, match="no longer there"):
        RemoteReader().read(elsewhere, 0, 10)
    (request,) = hub.requests
    assert request.path == "http://hub.invalid/x"
    assert request.headers["Host"] == "hub.invalid"
    assert request.headers["Proxy-Authorization"] == "Basic dXNlcjp3b3Jk"


@pytest.mark.parametrize(
    "proxy",
    [
        "http://user:word@host:none",
        "http://[x",
        "//host:99999",
        "http://a..b:80",
        "http://",
        "socks5://user:word@host:1080",
        "https://user:word@host",
    ],
)
def test_an_address_that_no_proxy_has_is_one_message_that_shows_no_password(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(
        RunError, match=r"^http_proxy: what the environment names is no address of an HTTP proxy"
    ) as refused:
        RemoteReader().read(RemoteFile("http://hub.invalid/x", "etag", 10), 0, 10)
    assert "word" not in str(refused.value)

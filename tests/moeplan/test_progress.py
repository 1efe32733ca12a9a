"""What is seen of a merge under way."""

import re
from io import StringIO

import pytest
from rich.console import Console

from executor.engine import Progress
from moeplan import progress
from moeplan.progress import ProgressBar, ProgressLines, progress_on

GB = 10**9


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets: `clock.now`, in seconds."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def console(stream: StringIO | None = None, **options) -> tuple[Console, StringIO]:
    stream = stream or StringIO()
    return Console(file=stream, highlight=False, markup=False, **options), stream


@pytest.mark.parametrize(
    ("stream", "environment", "kind"),
    [
        (Terminal, {}, ProgressBar),
        (Terminal, {"TERM": "dumb"}, ProgressLines),
        (StringIO, {}, ProgressLines),
        (StringIO, {"FORCE_COLOR": "1"}, ProgressLines),
        (StringIO, {"TTY_COMPATIBLE": "1"}, ProgressLines),
    ],
)
def test_a_terminal_that_can_show_one_gets_a_bar_and_everything_else_gets_lines(monkeypatch, stream, environment, kind):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    shown = progress_on(console(stream())[0], 1)
    shown.stop()
    assert type(shown) is kind


def test_lines_come_now_and_then_with_bytes_rate_and_time_left(clock):
    on, stream = console(width=200)
    lines = ProgressLines(on, 100 * GB)
    clock.now += 30  # loading takes its time, and is not held against the disk
    for seconds in range(41):
        lines.show(Progress(0, 2 * GB * seconds, "" if seconds else "decoder_layer"))
        clock.now += 1
    assert stream.getvalue().splitlines() == [
        "routers: 0%, 0 bytes of 100.0 GB",
        "copying: 20%, 20.0 GB of 100.0 GB, 2.0 GB/s, 40 s left",
        "copying: 40%, 40.0 GB of 100.0 GB, 2.0 GB/s, 30 s left",
        "copying: 60%, 60.0 GB of 100.0 GB, 2.0 GB/s, 20 s left",
        "copying: 80%, 80.0 GB of 100.0 GB, 2.0 GB/s, 10 s left",
    ]


def test_how_long_routers_take_is_not_told_by_bytes(clock):
    on, stream = console(width=200)
    lines = ProgressLines(on, 100 * GB)
    lines.show(Progress(0, 0, ""))
    clock.now += 20
    lines.show(Progress(0, 80 * GB, "ridge"))
    assert stream.getvalue() == "routers: 80%, 80.0 GB of 100.0 GB\n"


def test_routing_is_told_by_its_share_alone(clock):
    on, stream = console(width=200)
    lines = ProgressLines(on, 1000)
    clock.now += 20
    lines.show(Progress(0, 371, "routing"))
    assert stream.getvalue() == "routing: 37%\n"


def test_a_merge_of_a_few_seconds_says_nothing_on_the_way(clock):
    on, stream = console()
    lines = ProgressLines(on, GB)
    for part in range(9):
        clock.now += 1
        lines.show(Progress(0, GB * part // 8, ""))
    lines.show(Progress(0, GB, "syncing"))
    lines.stop()
    assert stream.getvalue() == ""


def test_a_long_merge_says_that_it_waits_for_the_disk_at_the_end(clock):
    on, stream = console(width=200)
    lines = ProgressLines(on, GB)
    clock.now += 11
    lines.show(Progress(0, 1000, ""))
    lines.show(Progress(0, GB, "syncing"))
    assert stream.getvalue().splitlines()[-1] == "syncing: waiting until everything is on the disk"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (99, "99 s"), (150, "2 min"), (3600, "1 h 0 min"), (1e5, "27 h 47 min")]
)
def test_durations_are_rounded_to_what_one_wants_to_know(seconds, text):
    assert progress._duration(seconds) == text


def last_of_bar(doing: str, width: int) -> str:
    """What a bar shows last of 465 GB of 932, of which 123 came first."""
    on, stream = console(force_terminal=True, width=width, color_system=None)
    bar = ProgressBar(on, 932 * GB)
    bar.show(Progress(0, 123 * GB, doing))
    bar.show(Progress(0, 465 * GB, doing))
    bar.stop()
    shown = re.split(r"[\r\n]+|\x1b\[[0-9;?]*[A-Za-z]", stream.getvalue())
    assert max(map(len, shown)) <= width
    return next(line for line in reversed(shown) if line.strip())


@pytest.mark.parametrize("doing", ["", "decoder_layer", "syncing"])
@pytest.mark.parametrize("width", [40, 70, 80])
def test_a_bar_fits_a_line(doing, width):
    assert "465.0/932.0 GB" in last_of_bar(doing, width)


def test_a_bar_says_how_long_it_takes_where_that_is_told_by_bytes():
    assert re.search(r"932.0 GB +\S+ .B/s +\S+$", last_of_bar("", 80))


def test_a_bar_goes_on_with_the_time_so_far_where_that_is_not_told_by_bytes():
    assert last_of_bar("decoder_layer", 80).endswith("465.0/932.0 GB 0:00:00")
    assert re.fullmatch(r"routing +[━╸╺]+ +50% 0:00:00", last_of_bar("routing", 80))

"""Ctrl-C, in real processes: wherever one is, it ends at once, says so, and nothing that it finished is lost."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import MAIN, moeplan, outcome, snapshot, start, write_config
from hub_server import Fault, serving

MOST_SECONDS = 3.0
"""A process has 0.5 s for an orderly end. A test machine may be busy."""

GOES_ON = "error: interrupted; what is finished is kept: run the same command again to go on\n"

# A process that runs this stands still for a minute where a call blocks, and makes a file to say that it does.
STANDING_STILL = """
import os, sys, time
from pathlib import Path

def stand_still():
    Path(sys.argv[-1]).with_name("standing still").touch()
    time.sleep(60)
"""
IN_AN_IMPORT = """
class Finder:
    def find_spec(name, path, target=None):
        if name == "torch":
            stand_still()

sys.meta_path.insert(0, Finder)
"""
IN_A_READ = "os.preadv = lambda *args: stand_still()\n"
IN_THE_FINAL_SYNC = """
fsync = os.fsync

def slow_fsync(fd):
    if os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"):
        stand_still()
    fsync(fd)

os.fsync = slow_fsync
"""
SWALLOWED = """
import weakref

class Thing:
    pass

def stand_still_in_a_callback(reference):
    stand_still()

def read(*args):
    thing = Thing()
    reference = weakref.ref(thing, stand_still_in_a_callback)
    del thing

import moeplan.merging
import moeplan.planning

moeplan.planning.plan = moeplan.merging.merge = read
"""
TURNED = """
import moeplan.merging
import moeplan.planning

def plan(*args):
    try:
        stand_still()
    except KeyboardInterrupt as error:
        raise ImportError("numpy._core.umath failed to import") from error

moeplan.planning.plan = moeplan.merging.merge = plan
"""
# ml_dtypes imports numpy from C, where it prints what is raised, and raises an error of its own instead.
IN_AN_IMPORT_FROM_C = IN_AN_IMPORT.replace("torch", "numpy")
IN_A_KERNEL = """
import executor.kernel_runner

executor.kernel_runner.KernelRunner._view = lambda *args: stand_still()
"""


IN_A_DOWNLOAD = """
from huggingface_hub import file_download

http_get = file_download.http_get

def slow_get(url, file, *, expected_size, **kwargs):
    if expected_size < 200_000:  # it is not the weights
        return http_get(url, file, expected_size=expected_size, **kwargs)
    file.write(b"a half")
    file.flush()
    stand_still()

file_download.http_get = slow_get
"""

# As when Ctrl-C comes while the thread is being started, and the pool does not know of it yet.
A_THREAD_LEFT_BEHIND = """
from concurrent.futures import ThreadPoolExecutor

ThreadPoolExecutor.shutdown = lambda *args, **kwargs: None
"""


@pytest.fixture
def config(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A YAML file for a merge with prompts, which goes through everything that a merge can be at."""
    base = checkpoint("llama-plain")
    experts = [base, {"source_model": checkpoint("llama-plain", 1), "residual_scale": 0.5}]
    return write_config(tmp_path / "config.yml", base, experts, gate_mode="hidden")


def wait_until(process: subprocess.Popen[str], happened: Callable[[], object]) -> None:
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def interrupted(process: subprocess.Popen[str], number: int = signal.SIGINT) -> str:
    """Press Ctrl-C, or send another signal; returns the last thing that the process said, having seen to it that it
    ended in time and with its status."""
    process.send_signal(number)
    started = time.monotonic()
    result = outcome(process)
    assert time.monotonic() - started < MOST_SECONDS
    assert result.status == 128 + number, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines(keepends=True)[-1]  # a slow machine has time for a line of progress before
    assert last.startswith("error: interrupted")
    return last


def heeds_ctrl_c(process: subprocess.Popen[str]) -> bool:
    """Whether the process has begun to watch for Ctrl-C, by its second thread: as soon as Python itself has started."""
    return len(list(Path(f"/proc/{process.pid}/task").iterdir())) > 1


@pytest.mark.parametrize(
    "place",
    [IN_AN_IMPORT, IN_AN_IMPORT_FROM_C, IN_A_READ, IN_A_KERNEL, IN_THE_FINAL_SYNC],
    ids=["import", "import from C", "read", "kernel", "final sync"],
)
def test_a_process_that_waits_for_something_slow_ends_all_the_same(config, tmp_path, place):
    out = tmp_path / "out"
    process = start(config, out, code=STANDING_STILL + place + MAIN)
    wait_until(process, (tmp_path / "standing still").exists)
    assert interrupted(process) in (GOES_ON, "error: interrupted\n")  # where nothing was finished yet
    assert not (out / "config.json").exists()
    assert moeplan(config, out).status == 0
    assert moeplan(config, tmp_path / "whole").status == 0
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_at_whatever_moment_it_comes_the_process_ends_and_the_next_one_goes_on(config, tmp_path):
    assert moeplan(config, tmp_path / "whole").status == 0
    out = tmp_path / "out"
    for seconds in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2):
        process = start(config, out, "--quiet")
        wait_until(process, lambda process=process: heeds_ctrl_c(process))
        time.sleep(seconds)
        if process.poll() is not None:  # all is done
            break
        interrupted(process)
        assert not (out / "config.json").exists()
    if not (out / "config.json").exists():
        assert moeplan(config, out).status == 0
    assert snapshot(out) == snapshot(tmp_path / "whole")


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [(["--version"], 0, ("moeplan ", "")), (["no.yml", "--plan"], 2, ("", "error: no.yml: no such file"))],
)
def test_no_library_is_torn_down_that_a_thread_still_loads(args, status, said):
    """As a crash after a merge that was interrupted showed. `atexit` tells whether Python's own end was begun."""
    ends = "import atexit, os, threading, time; atexit.register(os._exit, 77); "
    loads = "threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); "
    assert outcome(start(*args, code=ends + MAIN)).status == 77
    ended = outcome(start(*args, code=ends + loads + MAIN))
    assert ended.status == status
    assert (ended.stdout[:8], ended.stderr[:27]) == said


def test_it_is_not_lost_where_python_cannot_raise_it(config, tmp_path):
    process = start(config, tmp_path / "out", code=STANDING_STILL + SWALLOWED + MAIN)
    wait_until(process, (tmp_path / "standing still").exists)
    assert interrupted(process) == GOES_ON


def test_it_is_not_taken_for_the_error_that_a_library_makes_of_it(config, tmp_path):
    process = start(config, tmp_path / "out", code=STANDING_STILL + TURNED + MAIN)
    wait_until(process, (tmp_path / "standing still").exists)
    assert interrupted(process) == "error: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_process_that_was_started_to_ignore_it_goes_on(config, tmp_path, number):
    """As a shell starts what a script leaves in the background, and nohup everything."""
    ignoring = {"preexec_fn": lambda: signal.signal(number, signal.SIG_IGN)}
    process = start(config, tmp_path / "out", **ignoring)
    while process.poll() is None:
        process.send_signal(number)
        time.sleep(0.02)
    assert outcome(process).status == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_pressing_it_twice_is_not_worse_than_pressing_it_once(config, tmp_path):
    process = start(config, tmp_path / "out", code=STANDING_STILL + IN_A_KERNEL + MAIN)
    wait_until(process, (tmp_path / "standing still").exists)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert interrupted(process) == GOES_ON
    assert moeplan(config, tmp_path / "out").status == 0


@pytest.mark.parametrize("when", ["while it is asked", "while it is read from"])
def test_a_server_that_does_not_answer_is_not_waited_for(checkpoint, tmp_path, when):
    config = write_config(tmp_path / "config.yml", "org/model", ["org/model", "org/other"])
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    with serving() as hub, socket.create_server(("127.0.0.1", 0)) as silent:
        for number, name in enumerate(("org/model", "org/other")):
            hub.add(name, checkpoint("llama-plain", number))
        hub.faults.append(Fault("cdn", "", status=503, headers={"Retry-After": "60"}, times=100))
        endpoint = hub.url if when == "while it is read from" else f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment["HF_ENDPOINT"] = endpoint
        process = start(config, tmp_path / "out", "--stream", env=environment)
        if endpoint == hub.url:
            wait_until(process, lambda: any(request.server == "cdn" for request in hub.requests))
        else:
            silent.settimeout(30)
            silent.accept()
        interrupted(process)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("left_behind", "number"),
    [("", signal.SIGINT), (A_THREAD_LEFT_BEHIND, signal.SIGINT), ("", signal.SIGTERM)],
    ids=["waited for", "left behind", "terminated"],
)
def test_a_download_that_is_ended_leaves_no_half_of_a_file(checkpoint, tmp_path, left_behind, number):
    config = write_config(tmp_path / "config.yml", "org/model", ["org/model"] * 2)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    with serving() as hub:
        hub.add("org/model", checkpoint("llama-plain"))
        process = start(
            config,
            tmp_path / "out",
            code=STANDING_STILL + IN_A_DOWNLOAD + left_behind + MAIN,
            env={**environment, "HF_ENDPOINT": hub.url},
        )
        wait_until(process, (tmp_path / "standing still").exists)
        blobs = tmp_path / "home" / "hub" / "models--org--model" / "blobs"
        assert len(list(blobs.glob("*.incomplete"))) == 1
        interrupted(process, number)
    assert list(blobs.glob("*.incomplete")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_scores_that_were_to_be_looked_at_do_not_stay_behind(config, tmp_path, number):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    process = start("routes", config, code=STANDING_STILL + IN_A_KERNEL + MAIN, env=environment)
    wait_until(process, (tmp_path / "standing still").exists)
    assert len(list(temporary.glob("moeplan-routes-*"))) == 1
    interrupted(process, number)
    assert list(temporary.glob("moeplan-routes-*")) == []

"""Runs one program and measures it. A process of its own, so small that none of its memory shows in the result.

    python -I -S launch.py '{"argv": [...], "out": DIR or null, "stdout": FILE, "stderr": FILE,
                             "limit_seconds": S, "disk": DIR, "keep_free_nbytes": N, "env": {...}}'

prints what it measured as JSON. Time runs from the program's start until every file in `out` is on the disk. Standard
input is a pipe that nothing comes through: when it is closed, nobody waits any longer, and the program is killed.

Peak memory: `ru_maxrss` is exact, but starts from what this process had when it spawned the program; below that, the
`VmHWM` that the program was last seen with is what there is. Bytes come from `/proc/PID/io`, which can be read until a
process that has ended is waited for.
"""

import json
import os
import select
import signal
import sys
import time

LOOK_SECONDS = 0.05
CHECK_DISK_EVERY = 10
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def field(path: str, name: str) -> int:
    """The number after `name:` in a file of /proc; 0 where it is not there."""
    try:
        with open(path) as lines:
            for line in lines:
                if line.startswith(name + ":"):
                    return int(line.split()[1])
    except OSError:
        pass
    return 0


def make_durable(directory: str) -> None:
    """Wait until all files below `directory`, and their names, are on the disk."""
    for _, _, names, directory_fd in os.fwalk(directory, topdown=False):
        for name in names:
            fd = os.open(name, os.O_RDONLY, dir_fd=directory_fd)
            os.fsync(fd)
            os.close(fd)
        os.fsync(directory_fd)


def free_nbytes(directory: str) -> int:
    disk = os.statvfs(directory)
    return disk.f_bavail * disk.f_frsize


def watch(pid: int, limit_seconds: float, disk: str, keep_free_nbytes: int) -> tuple[int, str]:
    """Wait until the process ends, or kill it. Returns the last peak seen, in bytes, and why it was killed, if so."""
    status = f"/proc/{pid}/status"
    deadline = time.monotonic() + limit_seconds
    ended = os.pidfd_open(pid)
    events = select.poll()
    events.register(ended, select.POLLIN)
    events.register(sys.stdin, 0)  # for nothing but that it is closed, which needs no asking for
    peak, looks, stopped = 0, 0, ""
    while not stopped:
        happened = [fd for fd, _ in events.poll(LOOK_SECONDS * 1000)]
        if ended in happened:
            break
        peak = max(peak, field(status, "VmHWM") * 1024)
        looks += 1
        if happened:
            stopped = "interrupted"
        elif time.monotonic() > deadline:
            stopped = f"stopped after {limit_seconds:g} s"
        elif looks % CHECK_DISK_EVERY == 0 and free_nbytes(disk) < keep_free_nbytes:
            stopped = f"stopped: less than {keep_free_nbytes / 1e9:.0f} GB were left on the disk"
    if stopped:
        os.kill(pid, signal.SIGKILL)
    os.close(ended)
    return peak, stopped


def main() -> None:
    job = json.loads(sys.argv[1])
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    redirect = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, job["stdout"], flags, 0o644),
        (os.POSIX_SPAWN_OPEN, 2, job["stderr"], flags, 0o644),
    ]
    # They are for who waits, and who waits closes the pipe. What was ignored before stays so for the program, too.
    heeded = [number for number in INTERRUPTIONS if signal.signal(number, signal.SIG_IGN) is not signal.SIG_IGN]
    environment = {**os.environ, **job["env"]}
    started = time.monotonic()
    pid = os.posix_spawn(job["argv"][0], job["argv"], environment, file_actions=redirect, setsigdef=heeded)
    seen_peak, stopped = watch(pid, job["limit_seconds"], job["disk"], job["keep_free_nbytes"])
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    program_seconds = time.monotonic() - started
    io = {name: field(f"/proc/{pid}/io", name) for name in ("read_bytes", "write_bytes", "rchar", "wchar")}
    _, status, usage = os.wait4(pid, 0)
    if not stopped and job["out"] is not None and os.access(job["out"], os.F_OK):
        make_durable(job["out"])
    seconds = time.monotonic() - started
    own_peak = field("/proc/self/status", "VmHWM") * 1024
    peak = usage.ru_maxrss * 1024
    result = {
        "seconds": seconds,
        "sync_seconds": seconds - program_seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_nbytes": peak if peak > own_peak else seen_peak,
        "disk_read_nbytes": io["read_bytes"],
        "disk_written_nbytes": io["write_bytes"],
        "read_nbytes": io["rchar"],
        "written_nbytes": io["wchar"],
        "status": os.waitstatus_to_exitcode(status),
        "stopped": stopped,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

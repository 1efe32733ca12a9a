"""The `moeplan` command, run again and again, each time in a forked process whose time and memory are measured.

A program: `python forks.py` imports the command once, then reads a JSON list of its arguments, and the directory to run
it in, from each line of standard input, and answers with a line that says how it ended. A forked process is as large as
one of its own would be, since it counts all that it shares with this one; it only starts sooner.
"""

import json
import os
import sys
import tempfile

import moeplan.cli
import moeplan.gates.cheap_embed
import moeplan.gates.random  # noqa: F401
from moeplan.__main__ import main


def run(args: list[str], directory: str) -> dict[str, object]:
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            os.chdir(directory)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            sys.argv = ["moeplan", *args]
            try:
                main()
            except SystemExit as ended:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(ended.code if isinstance(ended.code, int) else 99)
            finally:
                os._exit(98)
        _, status, usage = os.wait4(child, 0)
        stdout.seek(0)
        stderr.seek(0)
        return {
            "status": os.waitstatus_to_exitcode(status),
            "stdout": stdout.read().decode(),
            "stderr": stderr.read().decode(),
            "seconds": usage.ru_utime + usage.ru_stime,
            "peak_kib": usage.ru_maxrss,
        }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)

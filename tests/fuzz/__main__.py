"""`make fuzz`: attack every target with libFuzzer, which looks for inputs that reach new code. Needs atheris.

Ends with status 1, and leaves the input in .fuzz/, when a target raises, takes over a second of processor time, or
makes the process larger than it may be. What reached new code is kept in .fuzz/corpus, from where the next run goes on.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DIRECTORY = Path(".fuzz")
STATISTICS = {
    "executions": "stat::number_of_executed_units",
    "edges": "cov",
    "features": "ft",
    "inputs kept": "corp",
    "peak MiB": "stat::peak_rss_mb",
}
MAX_SECONDS = 1.0
MAX_MIB = 400
"""Of the whole process, with the fuzzer's own tables."""


def fuzz(name: str, arguments: list[str]) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["moeplan", "planner", "yaml", "json", "fuzz.targets"]):
        from fuzz.targets import TARGETS, seeds

    corpus = DIRECTORY / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
    target = TARGETS[name]

    def within_a_second(data: bytes) -> None:
        start = time.process_time()
        target(data)
        seconds = time.process_time() - start
        if seconds > MAX_SECONDS:
            raise TimeoutError(f"{seconds:.1f} s of processor time")

    atheris.Setup([sys.argv[0], *arguments, str(corpus)], within_a_second)
    atheris.Fuzz()


def fuzz_all(seconds: int) -> bool:
    """Fuzz each target for its share of the time, and print what came of it. True where nothing was found."""
    from fuzz.targets import MAX_NBYTES, TARGETS, WORDS

    dictionary = DIRECTORY / "words"
    dictionary.write_text("".join(f'"{word.replace(chr(92), 2 * chr(92))}"\n' for word in WORDS))

    print(f"{'target':18}" + "".join(f"{what:>12}" for what in STATISTICS) + "  found")
    sound = True
    for name in TARGETS:
        limits = [
            f"-max_total_time={seconds // len(TARGETS)}",
            f"-max_len={MAX_NBYTES}",
            f"-dict={dictionary}",
            f"-rss_limit_mb={MAX_MIB}",
            "-timeout=30",  # for what hangs; other processes take the processor away, so it is no measure
            "-print_final_stats=1",
            f"-artifact_prefix={DIRECTORY}/{name}-",
        ]
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
            process = subprocess.run(
                [sys.executable, "-m", "fuzz", "--target", name, *limits],
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "TMPDIR": scratch},
                check=False,
            )
        log = process.stderr
        (DIRECTORY / f"{name}.log").write_text(log)
        numbers = [_last(rf"{what}: *(\d+)", log) for what in STATISTICS.values()]
        found = "nothing" if process.returncode == 0 else f"see {DIRECTORY}/{name}.log"
        print(f"{name:18}" + "".join(f"{number:>12}" for number in numbers) + f"  {found}", flush=True)
        sound = sound and process.returncode == 0
    return sound


def _last(pattern: str, log: str) -> str:
    return (re.findall(pattern, log) or ["?"])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="fuzz")
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together")
    parser.add_argument("--target", help=argparse.SUPPRESS)
    known, rest = parser.parse_known_args()
    DIRECTORY.mkdir(exist_ok=True)
    if known.target:
        fuzz(known.target, rest)
    sys.exit(0 if fuzz_all(known.seconds) else 1)


main()

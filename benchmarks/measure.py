"""Runs a program in a process of its own, and measures it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import Measurement, not_run

LAUNCH = Path(__file__).with_name("launch.py")

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""Nobody is to look for anything on the network, or to speak of it."""

ERROR_CHARS = 300


@dataclass(frozen=True, slots=True)
class Limits:
    """When a program is stopped: after `seconds`, or when `disk` has less than `keep_free_nbytes` left."""

    disk: Path
    seconds: float = 1800.0
    keep_free_nbytes: int = 4 * 10**9


def measure(argv: Sequence[str], out: Path | None, log: Path, limits: Limits) -> Measurement:
    """Run `argv`, whose first word is a path, until it has ended and all files in `out` are on the disk.

    What it prints goes to `log` with the endings `.out` and `.err`. A run that fails gives a Measurement with `error`.
    """
    stdout, stderr = log.with_suffix(".out"), log.with_suffix(".err")
    job = {
        "argv": list(argv),
        "out": None if out is None else str(out),
        "stdout": str(stdout),
        "stderr": str(stderr),
        "limit_seconds": limits.seconds,
        "disk": str(limits.disk),
        "keep_free_nbytes": limits.keep_free_nbytes,
        "env": ENVIRONMENT,
    }
    load = os.getloadavg()[0]
    failed, launched = _launch(job, stderr)
    if failed:
        return not_run(_exit(failed, stderr))
    measured: dict[str, Any] = json.loads(launched)
    status, stopped = measured.pop("status"), measured.pop("stopped")
    return Measurement(
        **measured,
        load=load,
        error=stopped or (_exit(status, stderr) if status else None),
        printed=_printed_json(stdout),
    )


def _launch(job: dict[str, Any], stderr: Path) -> tuple[int, bytes]:
    """The launcher's exit status and what it prints. It and its program have ended then, also on an interruption."""
    argv = [sys.executable, "-I", "-S", str(LAUNCH), json.dumps(job)]
    with (
        open(stderr, "ab") as said,
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said) as launcher,
    ):
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        try:
            printed = launcher.stdout.read()
        finally:
            launcher.stdin.close()
            status = launcher.wait()
    return status, printed


def _exit(status: int, stderr: Path) -> str:
    said = stderr.read_text(errors="replace").strip()[-ERROR_CHARS:].replace("\n", " ")
    return f"exit status {status}: {said}"


def _printed_json(stdout: Path) -> dict[str, Any] | None:
    try:
        printed = json.loads(stdout.read_text(errors="replace"))
    except ValueError:
        return None
    return printed if isinstance(printed, dict) else None

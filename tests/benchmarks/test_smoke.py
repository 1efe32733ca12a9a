"""The whole suite on tiny models: everything runs, and what cannot, or did not, is named in the report."""

import json
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.cases import CASES

ROOT = Path(__file__).parents[2]


def test_everything_runs_on_tiny_models_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "report"
    command = [sys.executable, "-m", "benchmarks", "--smoke", "--dir", work, "--out", out, "--peer", tmp_path / "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    report = json.loads((out / "report.json").read_text())
    assert report["interrupted"] is False
    assert [case["name"] for case in report["cases"]] == [case.name for case in CASES if case.smoke and not case.large]
    for case in report["cases"]:
        for result in case["results"]:
            if result["name"].startswith("mergekit-moe"):
                assert "python -m benchmarks.peer installs it" in result["skipped"]
            elif result["skipped"] is None:
                assert {run["error"] for run in result["runs"]} == {None}
            else:  # file systems on loop devices: a matter of rights and packages
                assert case["group"] == "xfs"
    assert not any(target["holds"] is not None for target in report["targets"])
    assert list(work.iterdir()) == []

    text = (out / "report.md").read_text()
    for case in report["cases"]:
        for result in case["results"]:
            assert f"| {result['name']} |" in text
    drawn = {path.name for path in out.glob("*.png")}
    assert drawn == set() or find_spec("matplotlib") is not None
    assert all(f"![{name}]({name})" in text for name in drawn)
    assert drawn or "no plots, because matplotlib is missing" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_stopped_removes_its_files_and_reports_what_was_finished(
    number: signal.Signals, tmp_path: Path
) -> None:
    work, out = tmp_path / "work", tmp_path / "report"
    command = [sys.executable, "-m", "benchmarks", "--smoke", "--dir", work, "--out", out]
    command += ["--only", "growth-7b-8", "--only", "plan-70b-128"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        next(line for line in running.stdout if "moeplan --plan" in line)
        running.send_signal(number)
        running.communicate()
    assert running.returncode == 130
    assert list(work.iterdir()) == []
    report = json.loads((out / "report.json").read_text())
    assert report["interrupted"] is True
    assert [case["name"] for case in report["cases"]] == ["growth-7b-8"]
    assert "The run was interrupted" in (out / "report.md").read_text()


def test_a_report_that_could_not_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "benchmarks", "--smoke", "--dir", tmp_path / "work", "--out", tmp_path / "file"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Invalid value for '--out'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

"""What is warmed before a program's turn is what it loads; the peer is installed where it is told to be."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.contenders import Program
from benchmarks.programs import Programs

ROOT = Path(__file__).parents[2]


def test_the_code_of_a_program_is_the_libraries_and_bytecode_of_its_environment(tmp_path: Path) -> None:
    lib = tmp_path / "lib" / "python" / "site-packages"
    lib.mkdir(parents=True)
    for name in ("a.so", "b.so.1", "c.cpython-311.pyc", "c.py", "data"):
        (lib / name).touch()
    programs = Programs(tmp_path / "moeplan", mergekit=tmp_path / "bin" / "mergekit-moe")
    assert [file.name for file in programs.code(Program.MERGEKIT)] == ["a.so", "b.so.1", "c.cpython-311.pyc"]
    assert programs.code(Program.CP) == ()


def test_an_option_is_no_directory_to_install_the_peer_into(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.peer", "--help"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert "[directory]" in done.stdout
    assert list(tmp_path.iterdir()) == []

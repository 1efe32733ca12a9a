"""What is warmed before a program's turn is what it loads."""

from pathlib import Path

from benchmarks.contenders import Program
from benchmarks.programs import Programs


def test_the_code_of_a_program_is_the_libraries_and_bytecode_of_its_environment(tmp_path: Path) -> None:
    lib = tmp_path / "lib" / "python" / "site-packages"
    lib.mkdir(parents=True)
    for name in ("a.so", "b.so.1", "c.cpython-311.pyc", "c.py", "data"):
        (lib / name).touch()
    programs = Programs(tmp_path / "moeplan", mergekit=tmp_path / "bin" / "mergekit-moe")
    assert [file.name for file in programs.code(Program.MERGEKIT)] == ["a.so", "b.so.1", "c.cpython-311.pyc"]
    assert programs.code(Program.CP) == ()

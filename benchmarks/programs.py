"""The command line of each program that takes part."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks import page_cache
from benchmarks.cases import Case
from benchmarks.contenders import Contender, Program
from benchmarks.prompts import long_text, num_tokens, positive_prompts

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Programs:
    """Where the programs are that are not part of the system or of this suite."""

    moeplan: Path
    mergekit: Path

    def missing(self, program: Program) -> str | None:
        """Why a program cannot take part here, and what to do about it; None where it can."""
        if program is Program.MERGEKIT and not self.mergekit.exists():
            return f"{self.mergekit} is not there; python -m benchmarks.peer installs it"
        return None

    def code(self, program: Program) -> tuple[Path, ...]:
        """The libraries and bytecode of the environment that a program runs in; none for one of the system's."""
        if program is Program.CP:
            return ()
        return _code_below(self.mergekit.parent.parent if program is Program.MERGEKIT else Path(sys.prefix))


@cache
def _code_below(environment: Path) -> tuple[Path, ...]:
    files = page_cache.files_below(environment / "lib")
    return tuple(file for file in files if file.suffix == ".pyc" or ".so" in file.suffixes)


@dataclass(frozen=True, slots=True)
class Task:
    """A case made ready: where everything is that its programs work on."""

    case: Case
    sources: tuple[Path, ...]
    directory: Path

    @property
    def reference(self) -> Path:
        """The output of the reference."""
        return self.directory / "reference"

    def out(self, contender: Contender) -> Path:
        """The directory that the contender writes."""
        return self.reference if contender == self.case.reference else self.directory / "out"

    def inputs(self, contender: Contender) -> list[Path]:
        """The files that the contender reads."""
        directories = [self.reference] if contender.program is Program.CP else self.sources
        return [file for directory in directories for file in page_cache.files_below(directory)]

    def config(self, gate_mode: str) -> Path:
        """The YAML file of the merge, written on first use."""
        path = self.directory / f"{gate_mode}.yml"
        experts = [
            {"source_model": str(self.sources[model]), **self._text(gate_mode, number)}
            for number, model in enumerate(self.case.experts)
        ]
        config = {
            "base_model": str(self.sources[0]),
            "gate_mode": gate_mode,
            "dtype": "bfloat16",
            "experts": experts,
        }
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")  # JSON is YAML
        return path

    def _text(self, gate_mode: str, expert: int) -> dict[str, list[str]]:
        """What the router of an expert is made of: some prompts, for `ridge` as many tokens as it takes by default."""
        if gate_mode != "ridge":
            return {"positive_prompts": positive_prompts(expert)}
        path = self.directory / f"text-{expert}.txt"
        path.write_text(long_text(expert), encoding="utf-8")
        return {"positive_files": [str(path)]}


def command(contender: Contender, task: Task, programs: Programs) -> list[str]:
    """The command that runs `contender` on `task`."""
    return _COMMANDS[contender.program](contender, task, programs)


def _script(name: str, *args: object) -> list[str]:
    return [sys.executable, "-I", "-S", str(HERE / name), *map(str, args)]


def _write_floor(contender: Contender, task: Task, programs: Programs) -> list[str]:
    return _script("floor.py", "write", task.case.output_nbytes, task.out(contender) / "floor.bin")


def _read_floor(contender: Contender, task: Task, programs: Programs) -> list[str]:
    return _script("floor.py", "read", task.case.read_nbytes, *_weights(*task.sources))


def _read_base(contender: Contender, task: Task, programs: Programs) -> list[str]:
    return _script("floor.py", "read", task.case.models.model_nbytes, *_weights(task.sources[0]))


def _matmul(contender: Contender, task: Task, programs: Programs) -> list[str]:
    shape = task.case.models.shape
    # The last router is made of what enters the last layer, so that layer itself is never evaluated.
    layers = shape.num_layers - 1
    matrices = [f"{out}x{into}" for out, into in shape.layer_matrices().values()]
    return [
        sys.executable,
        "-I",
        str(HERE / "matmul.py"),
        str(num_tokens(len(task.case.experts))),
        str(layers),
        *matrices,
    ]


def _cp(contender: Contender, task: Task, programs: Programs) -> list[str]:
    return ["/bin/cp", "-r", *contender.options, f"{task.reference}/.", str(task.out(contender))]


def _mergekit(contender: Contender, task: Task, programs: Programs) -> list[str]:
    return [str(programs.mergekit), "--quiet", str(task.config(contender.gate_mode)), str(task.out(contender))]


def _moeplan(contender: Contender, task: Task, programs: Programs) -> list[str]:
    config = task.config(contender.gate_mode)
    return [str(programs.moeplan), str(config), str(task.out(contender)), "--json", "--quiet", *contender.options]


def _unchecked(contender: Contender, task: Task, programs: Programs) -> list[str]:
    script = [sys.executable, "-I", str(HERE / "unchecked.py")]
    return script + _moeplan(contender, task, programs)[1:]


def _weights(*directories: Path) -> list[Path]:
    return [file for directory in directories for file in sorted(directory.glob("*.safetensors"))]


_COMMANDS: dict[Program, Callable[[Contender, Task, Programs], list[str]]] = {
    Program.WRITE_FLOOR: _write_floor,
    Program.READ_FLOOR: _read_floor,
    Program.READ_BASE: _read_base,
    Program.MATMUL: _matmul,
    Program.CP: _cp,
    Program.MERGEKIT: _mergekit,
    Program.MOEPLAN: _moeplan,
    Program.UNCHECKED: _unchecked,
}

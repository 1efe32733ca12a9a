"""Installs the peer, mergekit-moe, from the package registry, into an environment of its own.

python -m benchmarks.peer [DIR]     DIR is .venv-peer if left out
"""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path
from typing import Annotated

import typer

DIRECTORY = Path(".venv-peer")

REQUIREMENTS = ("mergekit==0.1.5", "torch==2.13.0", "transformers==5.23.0")
"""What it is known to work with. mergekit asks for any torch, and the newest may bring gigabytes for GPUs along."""


def program(directory: Path) -> Path:
    """Where `mergekit-moe` is, if it has been installed into `directory`."""
    return directory.absolute() / "bin" / "mergekit-moe"


def install(directory: Annotated[Path, typer.Argument(file_okay=False)] = DIRECTORY) -> None:
    """Make the environment of mergekit-moe, or bring it to what the benchmarks need."""
    if not (directory / "bin" / "python").exists():
        venv.create(directory, with_pip=True)
    subprocess.run([directory / "bin" / "python", "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)


if __name__ == "__main__":
    typer.run(install)

"""What the command says, and where: reports, progress, warnings, and an error as one message with its exit status."""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer
from rich.console import Console, RenderableType
from rich.text import Text

import moeplan
from executor.errors import RunError, reason
from moeplan import interruption, report, report_data
from moeplan.errors import MoeplanWarning, UserError
from moeplan.output import CONFIG_COPY
from moeplan.progress import ProgressBar, ProgressLines, progress_on
from moeplan.wording import printable

if TYPE_CHECKING:
    from executor.engine import Progress
    from moeplan.verification import Verification

INTERRUPTED = "interrupted"


class Teller:
    """Says what happens: reports on standard output, everything else on standard error."""

    def __init__(self, *, as_json: bool, quiet: bool, verbose: bool) -> None:
        self._as_json = as_json
        self._quiet = quiet
        self._verbose = verbose
        self._data: dict[str, Any] = {"warnings": []}
        self._messages, self._report = _console(sys.stderr), _console(sys.stdout)
        self._progress: ProgressBar | ProgressLines | None = None

    def plan(self, merge_plan: moeplan.MergePlan, out: Path | None) -> None:
        data = report_data.plan_data(merge_plan, out)
        self._tell("plan", data, lambda data: report.plan_view(data, with_files=self._verbose))

    def result(self, result: moeplan.MergeResult, config: moeplan.MergeConfig, file: Path) -> None:
        self.stop()
        self._tell(
            "result",
            report_data.result_data(result),
            lambda data: report.result_view(data, self._routable(result, config, file)),
        )

    def _routable(self, result: moeplan.MergeResult, config: moeplan.MergeConfig, file: Path) -> Path:
        """What `moeplan routes` is to be given: the model, or, where that is not enough, the YAML `file`, or its copy
        where that was a pipe."""
        from moeplan.routes.after import is_routable  # here, so that a plan does without

        loads = self._data["plan"]["readers"] is None
        if loads and is_routable(result.path, result.run.written_nbytes, config):
            return result.path
        copy = result.path / CONFIG_COPY
        return copy if copy.exists() and not file.is_file() else file

    def _tell(self, what: str, data: dict[str, Any], view: Callable[[dict[str, Any]], RenderableType]) -> None:
        self._data[what] = data
        if not self._as_json and not self._quiet:
            with writing_to_stdout():  # rich writes at the end of what it captures, too: nothing
                with self._report.capture() as shown:
                    self._report.print(view(data))
                self._report.file.write(re.sub(r" +$", "", shown.get(), flags=re.MULTILINE))

    def warn_of_too_little_space(self) -> None:
        message = report.space_warning(self._data["plan"])
        if message:
            warnings.warn(message, MoeplanWarning, stacklevel=2)

    def verification(self, out: Path, found: Verification) -> None:
        self.stop()
        for what, lines in (("wrong: ", found.wrong), ("unknown: ", found.unknown)):
            for line in lines:
                self._say(what, "red", line)
        self._tell("verification", report_data.verification_data(out, found), report.verification_view)

    def routes(self, data: dict[str, Any]) -> None:
        from moeplan.routes.view import routes_view

        self.stop()
        self._tell("routes", data, lambda data: routes_view(data, self._report.width))

    def checked(self, nbytes: int) -> None:
        """How much of a finished model was read again."""
        from executor.engine import Progress  # here, so that a plan does without

        self.progress(Progress(nbytes, nbytes, "verifying"))

    def start(self, total_nbytes: int) -> None:
        if not self._quiet:
            self._progress = progress_on(self._messages, total_nbytes)

    def progress(self, state: Progress) -> None:
        if self._progress is not None:
            with writing_to_stderr():
                self._progress.show(state)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def warning(self, message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        """Stands in for `warnings.showwarning`. What was said is not said again."""
        if issubclass(category, MoeplanWarning) and str(message) not in self._data["warnings"]:
            self._data["warnings"].append(str(message))
            if not self._quiet:
                self._say("warning: ", "yellow", str(message))

    def note(self, message: str) -> None:
        """Something that does not matter to the result."""
        if not self._quiet:
            self._say("note: ", "dim", message)

    def error(self, message: str) -> None:
        self.stop()
        self._say("error: ", "red", message)

    def _say(self, what: str, style: str, message: str) -> None:
        with writing_to_stderr():
            self._messages.print(Text.assemble((what, style), printable(message)))

    def finish(self) -> None:
        if self._as_json:
            with writing_to_stdout():
                print(json.dumps(self._data, indent=2))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave the error to who prints: rich would end the program, and standard output first."""
        raise


def _console(stream: TextIO) -> Console:
    """`stream`, for text that is to be shown as it is. Only what a terminal shows is folded at an edge."""
    width = None if stream.isatty() else 10_000
    return _Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


@contextmanager
def writing_to_stdout() -> Iterator[None]:
    """Raises RunError where standard output takes no more; ends the program where it is a pipe that nobody reads."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        # Python would try to write the rest when it exits, and complain with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(1) from error
        raise RunError(f"standard output: {reason(error)}") from error


@contextmanager
def writing_to_stderr() -> Iterator[None]:
    """Where standard error takes no more, because the log's disk is full, say, that ends nothing: what follows goes
    unsaid."""
    try:
        yield
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stderr.fileno())


@contextmanager
def told(teller: Teller, verbose: bool, interrupted: str = INTERRUPTED) -> Iterator[None]:
    """Turn what is raised within into a message and an exit status.

    `interrupted` is the message where Ctrl-C ends the process before what is within can say more.
    """
    try:
        with interruption.in_order(interrupted), warnings.catch_warnings():
            warnings.simplefilter("always", MoeplanWarning)
            warnings.showwarning = teller.warning
            yield
        teller.finish()
    except typer.Exit:
        teller.stop()
        raise
    except (KeyboardInterrupt, Exception) as error:
        teller.stop()
        if verbose:
            with writing_to_stderr():
                traceback.print_exc()
        message, status = _explained(error)
        teller.error("; ".join([message, *_limits(error), *getattr(error, "__notes__", ())]))
        raise typer.Exit(status) from error


def _limits(error: BaseException) -> list[str]:
    """What may be behind an error that nobody raised for the user: under a limit libraries fail in odd ways."""
    if isinstance(error, UserError | KeyboardInterrupt):
        return []
    is_limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return ["the system limits this process's memory, which may be why: raise the limit (`ulimit -v`)"] * is_limited


def _explained(error: BaseException) -> tuple[str, int]:
    match error:
        case UserError():
            return str(error), error.exit_status
        case KeyboardInterrupt():
            return INTERRUPTED, interruption.STATUS
        case MemoryError():
            return "there is no memory left; give a smaller --max-memory", 1
        case FileNotFoundError(filename=None):  # of os.getcwd
            return "the working directory is not there any more; go to one that is", 1
        case OSError():
            return ": ".join(str(part) for part in (error.filename, reason(error)) if part), 1
        case ImportError():
            return f"{error}; a package that moeplan needs cannot be loaded: install it again (-v shows which)", 1
        case _:
            return f"{type(error).__name__}: {error} (a bug in moeplan: please report it with what -v shows)", 1

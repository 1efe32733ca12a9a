"""The command line: `moeplan CONFIG OUT`."""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text

import moeplan
from executor.engine import Progress
from moeplan import report
from moeplan.errors import MoeplanWarning, UserError
from moeplan.options import Options
from moeplan.progress import ProgressBar, ProgressLines, progress_on

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

OUTPUT = "Output"
RESOURCES = "Resources"
REPORTS = "Reports"


def _print_version(asked: bool) -> None:
    if asked:
        print(f"moeplan {version('moeplan')}")
        raise typer.Exit


@app.command(no_args_is_help=True)
def command(
    config: Annotated[Path, typer.Argument(help="The YAML file that names the models.", show_default=False)],
    out: Annotated[
        Path | None, typer.Argument(help="A new or empty directory for the merged model.", show_default=False)
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be done, and do nothing.", rich_help_panel=REPORTS)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print plan and result as JSON.", rich_help_panel=REPORTS)
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="The most memory to take: 2GiB, 512MB, 50%.  [default: half of what is available]",
            rich_help_panel=RESOURCES,
            show_default=False,
        ),
    ] = None,
    out_shard_size: Annotated[
        str,
        typer.Option(help="The largest output file: 5B (parameters), 500MB, 2GiB.", rich_help_panel=OUTPUT),
    ] = "5B",
    expert_layout: Annotated[
        str | None,
        typer.Option(
            help="One tensor an expert (separate), or the fused ones of transformers 5 (packed).  [default: separate]",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    random_seed: Annotated[
        int, typer.Option(min=0, help="Seed of random gates and of noise.", rich_help_panel=OUTPUT)
    ] = 0,
    copy_tokenizer: Annotated[
        bool, typer.Option(help="Copy tokenizer, chat template and generation config.", rich_help_panel=OUTPUT)
    ] = True,
    clone_tensors: Annotated[
        bool, typer.Option(help="Give every tensor bytes of its own.", rich_help_panel=OUTPUT)
    ] = False,
    allow_all_same: Annotated[
        bool,
        typer.Option(
            "--i-understand-this-is-not-useful-without-training",
            help="Merge even where all experts are one model.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    verbose: Annotated[
        int, typer.Option("-v", "--verbose", count=True, help="Say more; show tracebacks.", rich_help_panel=REPORTS)
    ] = 0,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Say only what went wrong.", rich_help_panel=REPORTS)
    ] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Merge dense models into a Mixture of Experts, as CONFIG says, and write it to OUT."""
    if out is None and not plan:
        raise typer.BadParameter("give a directory for the merged model, or --plan", param_hint="OUT")
    options = Options(
        max_memory=max_memory,
        out_shard_size=out_shard_size,
        expert_layout=expert_layout,
        random_seed=random_seed,
        copy_tokenizer=copy_tokenizer,
        clone_tensors=clone_tensors,
    )
    teller = _Teller(as_json=as_json, quiet=quiet)
    with _told(teller, verbose > 0):
        merge_config = moeplan.load_config(config, allow_all_same=allow_all_same)
        if plan or out is None:
            teller.plan(moeplan.plan(merge_config, out, options), out)
            return

        def on_plan(merge_plan: moeplan.MergePlan) -> None:
            teller.plan(merge_plan, out)
            teller.start(merge_plan.plan.written_nbytes)

        teller.result(moeplan.merge(merge_config, out, options, on_plan, teller.progress))


class _Teller:
    """Says what happens: reports on standard output, everything else on standard error."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self._as_json = as_json
        self._quiet = quiet
        self._data: dict[str, Any] = {"warnings": []}
        self._messages = Console(stderr=True, highlight=False, soft_wrap=True)
        self._report = Console(highlight=False, soft_wrap=True)
        self._progress: ProgressBar | ProgressLines | None = None

    def plan(self, merge_plan: moeplan.MergePlan, out: Path | None) -> None:
        self._tell("plan", report.plan_data(merge_plan, out), report.plan_view)

    def result(self, result: moeplan.MergeResult) -> None:
        self.stop()
        self._tell("result", report.result_data(result), report.result_view)

    def _tell(self, what: str, data: dict[str, Any], view: Callable[[dict[str, Any]], RenderableType]) -> None:
        self._data[what] = data
        if not self._as_json and not self._quiet:
            self._report.print(view(data))

    def start(self, total_nbytes: int) -> None:
        if not self._quiet:
            self._progress = progress_on(self._messages, total_nbytes)

    def progress(self, state: Progress) -> None:
        if self._progress is not None:
            self._progress.show(state)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def warning(self, message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        """Stands in for `warnings.showwarning`."""
        if issubclass(category, MoeplanWarning):
            self._data["warnings"].append(str(message))
            if not self._quiet:
                self._messages.print(Text.assemble(("warning: ", "yellow"), str(message)))

    def error(self, message: str) -> None:
        self.stop()
        self._messages.print(Text.assemble(("error: ", "red"), message))

    def finish(self) -> None:
        if self._as_json:
            print(json.dumps(self._data, indent=2))


@contextmanager
def _told(teller: _Teller, verbose: bool) -> Iterator[None]:
    """Turn what is raised within into a message and an exit status."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", MoeplanWarning)
            warnings.showwarning = teller.warning
            yield
        teller.finish()
    except (UserError, KeyboardInterrupt, OSError, MemoryError) as error:
        message, status = _explained(error)
        teller.error(message)
        if verbose:
            traceback.print_exc()
        raise typer.Exit(status) from error


def _explained(error: BaseException) -> tuple[str, int]:
    match error:
        case UserError():
            return str(error), error.exit_status
        case KeyboardInterrupt():
            return "interrupted; nothing was left behind", 130
        case MemoryError():
            return "the machine has no memory left; give a smaller --max-memory", 1
        case _:
            return str(error), 1


def main() -> None:
    """The `moeplan` command."""
    app()

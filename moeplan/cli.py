"""The command line: `moeplan CONFIG OUT`, `moeplan verify OUT`, and `moeplan routes CONFIG|OUT`."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

import moeplan
from executor.errors import RunError
from moeplan import mergekit_flags
from moeplan.errors import UserError
from moeplan.help import GroupedHelp
from moeplan.options import Options
from moeplan.staging import GOES_ON
from moeplan.telling import INTERRUPTED, Teller, told, writing_to_stdout

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
verify_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
routes_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
OTHER_COMMANDS = {"verify": verify_app, "routes": routes_app}


def _print_version(asked: bool) -> None:
    if asked:
        print(f"moeplan {version('moeplan')}")
        raise typer.Exit


def _path(text: str) -> Path:
    """A path, which pathlib takes the empty text for, too: what a variable that is not set leaves is no directory."""
    if not text:
        raise typer.BadParameter("is empty; give a path")
    return Path(text)


def _argument(metavar: str, what: str) -> Any:
    return typer.Argument(metavar=metavar, parser=_path, help=what, show_default=False)


def _unneeded(spelling: str, metavar: str | None = None) -> Any:
    """A flag of mergekit-moe that changes nothing: taken, and listed at the end of the help."""
    return typer.Option(spelling, metavar=metavar, hidden=True)


MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="The most memory to take: 2GiB, 512MB, 50%.  [default: half of what is available]",
        show_default=False,
    ),
]
NumThreads = Annotated[
    int | None,
    typer.Option(
        "-j",
        "--num-threads",
        metavar="NUMBER",
        min=1,
        help="How many threads compute.  [default: as many as there are cores]",
        show_default=False,
    ),
]
TransformersCache = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        parser=_path,
        help="Where models from the Hub are downloaded to.  [default: HF_HUB_CACHE]",
        show_default=False,
    ),
]

DeviceName = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="Where prompts are evaluated: cpu, cuda, cuda:1, auto.  [default: cpu]",
        show_default=False,
    ),
]
Cuda = Annotated[bool, typer.Option("--cuda/--no-cuda", help="The same as --device cuda.", show_default=False)]
MaxDeviceMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="The most of a GPU's memory to take.  [default: what is free]", show_default=False
    ),
]


def _device(name: str | None, cuda: bool) -> str:
    """What `--device` and `--cuda` ask for together, as in mergekit: the former decides."""
    return name or ("cuda" if cuda else "cpu")


def _refuse_a_late_word(config: Path) -> None:
    """Raises UserError for the word of another command where CONFIG is looked for: one that stands behind an option."""
    if str(config) in OTHER_COMMANDS and not config.exists():
        raise UserError(f"{config}: no such file; as a command the word comes first: moeplan {config} OUT")


@app.command(cls=GroupedHelp, no_args_is_help=True)
def command(
    context: typer.Context,
    config: Annotated[Path, _argument("CONFIG", "The YAML file that names the models.")],
    out: Annotated[Path | None, _argument("OUT", "A new or empty directory for the merged model.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, and do nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print plan and result as JSON.")] = False,
    max_memory: MaxMemory = None,
    out_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="The largest output file: 5B (parameters), 500MB, 2GiB.")
    ] = "5B",
    expert_layout: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT",
            help="One tensor an expert (separate), or the fused ones of transformers 5 (packed).  [default: separate]",
            show_default=False,
        ),
    ] = None,
    random_seed: Annotated[
        int, typer.Option(metavar="NUMBER", min=0, help="Seed of random gates, noise and drawn text.")
    ] = 0,
    num_threads: NumThreads = None,
    load_in_8bit: Annotated[
        bool, typer.Option("--load-in-8bit", help="Evaluate prompts with the base in 8 bits (bitsandbytes).")
    ] = False,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Evaluate prompts with the base in 4 bits (bitsandbytes).")
    ] = False,
    device: DeviceName = None,
    cuda: Cuda = False,
    gpu_rich: Annotated[bool, typer.Option("--gpu-rich", help="The same as --cuda.")] = False,
    max_device_memory: MaxDeviceMemory = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code/--no-trust-remote-code",
            help="Run the code that the base brings with it, to evaluate prompts (not by default).",
            show_default=False,
        ),
    ] = False,
    copy_tokenizer: Annotated[
        bool,
        typer.Option(
            help="Copy tokenizer, chat template and generation config (the default), or not.", show_default=False
        ),
    ] = True,
    write_model_card: Annotated[
        bool,
        typer.Option(help="Write README.md and moeplan_config.yml (the default), or not.", show_default=False),
    ] = True,
    clone_tensors: Annotated[
        bool,
        typer.Option(
            help="Give every tensor disk space of its own, or share it where that is possible (the default).",
            show_default=False,
        ),
    ] = False,
    check_sources: Annotated[
        bool, typer.Option("--check-sources", help="Read everything twice, and compare: finds failing disks.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an interrupted merge left, and start afresh.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model in OUT, once the new one is complete.")
    ] = False,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Read models on the Hub straight into the output, without downloading them."),
    ] = False,
    transformers_cache: TransformersCache = None,
    allow_all_same: Annotated[
        bool,
        typer.Option(
            "--i-understand-this-is-not-useful-without-training",
            help="Merge even where all experts are one model.",
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="List the output's files; show the traceback of an error.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q/", "--quiet/--no-quiet", help="Say only what went wrong.", show_default=False)
    ] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    allow_crimes: Annotated[bool | None, _unneeded("--allow-crimes/--no-allow-crimes")] = None,
    unsafe_truncate_embeddings: Annotated[
        bool | None, _unneeded("--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings")
    ] = None,
    lora_merge_cache: Annotated[str | None, _unneeded("--lora-merge-cache", "DIR")] = None,
    lora_merge_dtype: Annotated[str | None, _unneeded("--lora-merge-dtype", "DTYPE")] = None,
    low_cpu_memory: Annotated[bool | None, _unneeded("--low-cpu-memory/--no-low-cpu-memory")] = None,
    lazy_unpickle: Annotated[bool | None, _unneeded("--lazy-unpickle/--no-lazy-unpickle")] = None,
    read_to_gpu: Annotated[bool | None, _unneeded("--read-to-gpu/--no-read-to-gpu")] = None,
    multi_gpu: Annotated[bool | None, _unneeded("--multi-gpu/--no-multi-gpu")] = None,
    async_write: Annotated[bool | None, _unneeded("--async-write/--no-async-write")] = None,
    write_threads: Annotated[int | None, _unneeded("--write-threads", "NUMBER")] = None,
    safe_serialization: Annotated[bool | None, _unneeded("--safe-serialization/--no-safe-serialization")] = None,
) -> None:
    """Merge dense models into a Mixture of Experts, as CONFIG says, and write it to OUT.

    OUT may be left out with --plan. A model appears there only when it is complete; the same command goes on with a
    merge that was interrupted. The exit status is 2 for wrong usage, configuration or models, 1 for a run that
    failed, 130 after Ctrl-C.

    `moeplan verify OUT` reads a finished model again, and names what is not as it was written. `moeplan routes
    CONFIG|OUT` shows where tokens would go.
    """
    if out is None and not plan:
        raise typer.BadParameter("give a directory for the merged model, or --plan", param_hint="OUT")
    teller = Teller(as_json=as_json, quiet=quiet, verbose=verbose)
    with told(teller, verbose, INTERRUPTED if plan else f"{INTERRUPTED}; {GOES_ON}"):
        _refuse_a_late_word(config)
        for note in mergekit_flags.notes(context.params):
            teller.note(note)
        options = Options(
            max_memory=max_memory,
            out_shard_size=out_shard_size,
            expert_layout=expert_layout,
            random_seed=random_seed,
            num_threads=num_threads,
            load_in_8bit=load_in_8bit,
            load_in_4bit=load_in_4bit,
            device=_device(device, cuda or gpu_rich),
            max_device_memory=max_device_memory,
            trust_remote_code=trust_remote_code,
            copy_tokenizer=copy_tokenizer,
            write_model_card=write_model_card,
            clone_tensors=clone_tensors,
            check_sources=check_sources,
            restart=restart,
            overwrite=overwrite,
            stream=stream,
            transformers_cache=transformers_cache,
        )
        merge_config = moeplan.load_config(config, allow_all_same=allow_all_same)
        if plan or out is None:
            teller.plan(moeplan.plan(merge_config, out, options), out)
            teller.warn_of_too_little_space()
            return

        def on_plan(merge_plan: moeplan.MergePlan) -> None:
            teller.plan(merge_plan, out)
            teller.start(merge_plan.moved_nbytes)

        result = moeplan.merge(merge_config, out, options, on_plan, teller.progress)
        teller.result(result, merge_config, config)


@verify_app.command(no_args_is_help=True)
def verify_command(
    out: Annotated[Path, _argument("OUT", "A model that moeplan merged.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say only what is wrong.")] = False,
) -> None:
    """Read a finished model again, and name every tensor and file that is not what was written.

    The exit status is 0 where everything is, 1 where something is not or could not be checked, 2 where OUT holds
    nothing to check it by.
    """
    from moeplan.verification import verify  # here, because it takes numpy, which plans do without

    teller = Teller(as_json=as_json, quiet=quiet, verbose=verbose)
    with told(teller, verbose):
        found = verify(out, teller.start, teller.checked)
        teller.verification(out, found)
        if found.wrong or found.unknown:
            teller.finish()
            raise typer.Exit(1)


@routes_app.command(no_args_is_help=True)
def routes_command(
    subject: Annotated[Path, _argument("CONFIG|OUT", "The YAML file of a merge, or a model that moeplan merged.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Route this text, too (JSON lines with a `text` each, or plain); may be repeated.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=_path, help="Write a page with plots to FILE.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    max_memory: MaxMemory = None,
    random_seed: Annotated[int, typer.Option(metavar="NUMBER", min=0, help="As for the merge.")] = 0,
    num_threads: NumThreads = None,
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="As for the merge.")] = False,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="As for the merge.")] = False,
    device: DeviceName = None,
    cuda: Cuda = False,
    max_device_memory: MaxDeviceMemory = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="As for the merge.")] = False,
    transformers_cache: TransformersCache = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say only what went wrong.")] = False,
) -> None:
    """Show where tokens would go: those of the config's prompts, and of other text.

    Of a YAML file, before anything is merged, the base alone is evaluated. As far as can be, tokens are scored by
    routers that were made without their prompts. A finished model is loaded with transformers, whole.
    """
    from moeplan.routes.page import check_installed, check_place, page, write_page
    from moeplan.routes.subject import routes_of

    teller = Teller(as_json=as_json, quiet=quiet, verbose=verbose)
    with told(teller, verbose):
        if html is not None:
            check_installed()
            check_place(html, subject, text or [])
        options = Options(
            max_memory=max_memory,
            random_seed=random_seed,
            num_threads=num_threads,
            load_in_8bit=load_in_8bit,
            load_in_4bit=load_in_4bit,
            device=_device(device, cuda),
            max_device_memory=max_device_memory,
            trust_remote_code=trust_remote_code,
            transformers_cache=transformers_cache,
        )
        data = routes_of(subject, options, text or [], teller.start, teller.progress).to_data()
        teller.routes(data)
        if html is not None:
            write_page(html, page(data))


def run(args: list[str]) -> None:
    """Run the command with these arguments. Raises SystemExit."""
    try:
        with writing_to_stdout():  # the help and the version: what a command itself fails at, it has told of
            if args and args[0] in OTHER_COMMANDS:
                OTHER_COMMANDS[args[0]](args[1:], prog_name=f"moeplan {args[0]}")
            else:
                app(args, prog_name="moeplan")
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    except RunError as error:
        sys.exit(f"error: {error}")

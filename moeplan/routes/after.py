"""Where tokens go in a finished model, which transformers loads, whole, and evaluates through its experts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from executor.reader import name_of
from moeplan import architectures
from moeplan.architectures.dense import DenseModel, dense_model
from moeplan.architectures.family import Family
from moeplan.checkpoint import CONFIG, Checkpoint, open_checkpoint
from moeplan.config import Expert, MergeConfig, load_config
from moeplan.errors import MoeplanWarning, UserError
from moeplan.gates.prompts import GATE_TOKENS, Prompts, tokenize
from moeplan.memory import MIB, limit_nbytes
from moeplan.opening import naming_prompts
from moeplan.options import EVALUATION, OptionError, Options, flag, memory_nbytes
from moeplan.output import CONFIG_COPY
from moeplan.places import CheckpointError
from moeplan.progress import ROUTING
from moeplan.routers import stored
from moeplan.routes.statistics import Layer, Routes, Text, routes
from moeplan.staging import check_finished
from moeplan.tokenizer_files import FAST, SLOW
from moeplan.untrusted_json import show
from planner.expr import Read

if TYPE_CHECKING:
    import numpy as np
    import torch

    from executor.engine import Progress

LOADED_SHARE = 1.2
"""What a model takes in memory while transformers loads and evaluates it, for each byte of its tensors."""


def routes_after(
    directory: Path,
    options: Options,
    files: Sequence[str] = (),
    on_start: Callable[[int], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Routes:
    """Where the tokens of the prompts that the model in `directory` was merged by, and of `files`, go.

    `on_start` is told how many tokens there are, `on_progress` how many were evaluated. Raises UserError for
    what is no such model, where it does not fit memory, and for options that are about evaluating a base.
    """
    _check_options(options)
    check_finished(directory)
    checkpoint = open_checkpoint(directory)
    family = _family(checkpoint)
    _check_memory(checkpoint, options)
    base = dense_model(checkpoint, family.sources[0])
    count = checkpoint.integer(family.num_experts_key)
    experts_per_token = checkpoint.integer("num_experts_per_tok", maximum=count)
    routers = _routers(checkpoint, family, base, count)
    written = _config(directory)
    config = written if written is not None and len(written.experts) == count else None
    with nullcontext() if config is None else naming_prompts(config):
        prompts = tokenize(
            base,
            () if config is None else [_that_are_there(expert) for expert in config.experts],
            gate_tokens=GATE_TOKENS if config is None else config.gate_tokens,
            seed=options.random_seed,
            trust_remote_code=options.trust_remote_code,
            texts=files,
        )
    if not any((*prompts.positive, *prompts.texts)):
        raise UserError(f"{directory}: there is no text to route: {_why_no_text(written, count)}; give --text FILE")
    names = [f"expert {n}" if config is None else config.experts[n].source_model for n in range(count)]
    groups = [*prompts.positive, *prompts.texts]
    begins = len(prompts.start)
    labels = [*((names[number], number) for number in range(len(prompts.positive))), *((file, None) for file in files)]
    reads_text = config is not None and config.reads_text
    read = {prompt for group in (*prompts.positive, *prompts.negative) for prompt in group if reads_text}
    texts = [
        Text(name, expert, sum(len(prompts.tokens[prompt]) - begins for prompt in group), read.isdisjoint(group))
        for (name, expert), group in zip(labels, groups, strict=True)
    ]
    return routes(
        names,
        [text for text in texts if text.tokens],
        _layers(
            checkpoint,
            routers,
            prompts,
            [prompt for group in groups for prompt in group],
            options.threads,
            on_start,
            on_progress,
        ),
        experts_per_token,
        subject=str(directory),
        gate_mode=None if config is None else config.gate_mode,
        finished=True,
    )


def _check_options(options: Options) -> None:
    for name in (*EVALUATION, "max_device_memory"):
        if getattr(options, name) != getattr(Options(), name):
            raise OptionError(
                f"{flag(name)}: a finished model is evaluated as it is, by the CPU; leave the option "
                "out, or give the YAML file of the merge"
            )


def _family(checkpoint: Checkpoint) -> Family:
    """The family that a finished model is of, if it is one that transformers can load."""
    families = {family.model_type: family for family in architectures.FAMILIES}
    family = families.get(checkpoint.model_type)
    if family is None:
        known = ", ".join(sorted(families))
        raise CheckpointError(
            f"{checkpoint.config_file}: model_type is {checkpoint.model_type!r}, which is no model that moeplan "
            f"makes ({known}); give a merged model, or the YAML file of a merge"
        )
    if family.readers is not None:
        raise CheckpointError(
            f"{checkpoint.label}: transformers has no {family.name} of its own, so it cannot be routed when it is "
            "finished; give the YAML file of the merge"
        )
    return family


def is_routable(directory: Path, nbytes: int, config: MergeConfig) -> bool:
    """Whether `routes_after` can tell of each expert, in the model that `config` made, with tensors of so many bytes.

    It takes memory that is free, and what may not be beside the model: a tokenizer, and prompts of all, or files.
    """
    return (
        _evaluated_nbytes(nbytes) <= _free_nbytes()
        and (directory / CONFIG_COPY).exists()
        and any((directory / name).exists() for name in (FAST, SLOW))
        and all(expert.positive_prompts or expert.positive_files for expert in config.experts)
    )


def _evaluated_nbytes(nbytes: int) -> int:
    return int(LOADED_SHARE * nbytes)


def _free_nbytes() -> int:
    return min(psutil.virtual_memory().available, limit_nbytes())


def _check_memory(checkpoint: Checkpoint, options: Options) -> None:
    most = _free_nbytes() if options.max_memory is None else memory_nbytes(options.max_memory, limit_nbytes())
    needed = _evaluated_nbytes(sum(tensor.nbytes for tensor in checkpoint.tensors.values()))
    if needed > most:
        raise UserError(
            f"{checkpoint.label}: evaluating it takes {needed // MIB:,} MiB of memory, and {most // MIB:,} MiB may be "
            "taken; the YAML file of the merge takes little: give that"
        )


def _config(directory: Path) -> MergeConfig | None:
    """The config that is beside the model, if there is one."""
    path = directory / CONFIG_COPY
    return load_config(path, allow_all_same=True) if path.is_file() else None


def _why_no_text(config: MergeConfig | None, count: int) -> str:
    """Why there is no text by the `config` beside a model of `count` experts."""
    if config is None:
        return f"it has no {CONFIG_COPY}, which says what it was merged by"
    if len(config.experts) != count:
        return f"its {CONFIG_COPY} has {len(config.experts)} experts, and the model {count}"
    if any(expert.positive_files for expert in config.experts):
        return f"none of the positive_files of its {CONFIG_COPY} is found from this directory"
    return f"there are no positive prompts in its {CONFIG_COPY}"


def _that_are_there(expert: Expert) -> Expert:
    """`expert` with those of its files that are still there."""
    there = tuple(file for file in expert.positive_files if Path(file).is_file())
    for file in sorted({*expert.positive_files} - {*there}):
        gone = "is not there any more" if Path(file).is_absolute() else "is not found from this directory"
        warnings.warn(f"{file}: {gone}, so its text is left out", MoeplanWarning, stacklevel=2)
    return expert.model_copy(update={"positive_files": there})


def _layers(
    checkpoint: Checkpoint,
    routers: Sequence[Read],
    prompts: Prompts,
    order: Sequence[int],
    threads: int,
    on_start: Callable[[int], None] | None,
    on_progress: Callable[[Progress], None] | None,
) -> Iterator[Layer]:
    """Each layer's router, and its scores of the tokens of prompts in that `order`, but BOS."""
    import numpy as np
    import torch

    from executor.engine import Progress

    wanted = sorted({*order})
    if on_start is not None:
        on_start(sum(len(prompts.tokens[prompt]) for prompt in wanted))
    torch.set_num_threads(threads)
    model = _loaded(checkpoint)
    layers = model.model.layers
    rows = [torch.from_numpy(_stored(router).astype("float32")) for router in routers]
    scores: list[list[np.ndarray]] = [[] for _ in layers]

    def note(layer: int, seen: torch.Tensor) -> None:
        scores[layer].append((seen[0, len(prompts.start) :].float() @ rows[layer].T).numpy())

    for number, layer in enumerate(layers):
        layer.post_attention_layernorm.register_forward_hook(lambda _, args, seen, at=number: note(at, seen))
    done = 0
    with torch.inference_mode():
        for prompt in wanted:
            tokens = prompts.tokens[prompt]
            model.model(torch.tensor([tokens]), use_cache=False)
            done += len(tokens)
            if on_progress is not None:
                on_progress(Progress(done, done, ROUTING))
    for of_layer, router in zip(scores, rows, strict=True):
        by_prompt = dict(zip(wanted, of_layer, strict=True))
        yield Layer(np.concatenate([by_prompt[prompt] for prompt in order]), router.numpy())


def _loaded(checkpoint: Checkpoint) -> Any:
    """The model, by transformers, which draws at random what it does not find, and leaves out what it does not know.

    Raises CheckpointError where there is any such tensor, or one of another shape than config.json says.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()  # type: ignore[no-untyped-call]  # there is one for all of it
    set_verbosity_error()  # type: ignore[no-untyped-call]  # what is wrong is said here
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype="auto", local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # whatever transformers may raise at a model of others
        raise CheckpointError(
            f"{checkpoint.label}: transformers cannot load this model: {type(error).__name__}: {show(str(error))}"
        ) from error
    model, found = loaded
    if found["missing_keys"]:
        raise _damaged(checkpoint, f"there is no tensor {min(found['missing_keys'])}, which {CONFIG} asks for")
    if found["mismatched_keys"]:
        raise _misshapen(checkpoint, *min(found["mismatched_keys"]))
    if found["unexpected_keys"]:
        name = show(min(found["unexpected_keys"]))
        raise _damaged(checkpoint, f"has a tensor {name}, which {CONFIG} has no place for")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the default wants rows that are multiples of 16 bytes
    return model


def _routers(checkpoint: Checkpoint, family: Family, base: DenseModel, count: int) -> list[Read]:
    """Where each layer's router lies, `[num_experts, hidden_size]`, under the name of either layout.

    Raises CheckpointError where one is of another shape, or is missing, or a tensor of one of `count` experts is.
    """
    tensors, found = checkpoint.tensors, []
    for layer in range(base.num_layers):
        names = [layout.router.format(layer=layer) for layout in family.layouts.values()]
        name = next((name for name in names if name in tensors), None)
        if name is None:
            raise _damaged(checkpoint, f"there is no tensor {names[0]}, which a {family.name} model has")
        found.append(tensors[name])
        if found[-1].shape != (count, base.hidden_size):
            raise _misshapen(checkpoint, name, found[-1].shape, (count, base.hidden_size))
        of_experts = (
            [tensor.name.format(layer=layer, expert=expert) for tensor in layout.experts for expert in range(count)]
            for layout in family.layouts.values()
        )
        missing = min(([name for name in names if name not in tensors] for names in of_experts), key=len)
        if missing:
            raise _damaged(
                checkpoint, f"there is no tensor {missing[0]}, which a {family.name} model of {count} experts has"
            )
    return found


def _misshapen(checkpoint: Checkpoint, name: str, shape: Sequence[int], expected: Sequence[int]) -> CheckpointError:
    return _damaged(checkpoint, f"{name} has shape {list(shape)}, and {CONFIG} makes it {list(expected)}")


def _damaged(checkpoint: Checkpoint, what: str) -> CheckpointError:
    return CheckpointError(f"{checkpoint.label}: {what}; make the model again, or download it again")


def _stored(router: Read) -> np.ndarray:
    return stored(Path(name_of(router.file)), router.offset, router.dtype, router.shape)

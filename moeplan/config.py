"""What the YAML file says that names a merge, and whether that can be: each problem is named with its line.

It is mergekit-moe's format. Models are only named here; whether they exist, and fit together, is found out by
`moeplan.checkpoint` and `moeplan.architectures`, which point at a line of the file with `MergeConfig.where`.

Whatever the bytes of the file, `load_config` returns a `MergeConfig` or raises a `ConfigError`, in bounded time and
memory (see `moeplan.yaml_file`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sized
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError, PydanticKnownError

from moeplan.errors import MoeplanWarning
from moeplan.gate_modes import MODES
from moeplan.yaml_file import ConfigError, KeyLines, KeyPath, Value, dotted, read_document

if TYPE_CHECKING:
    ModeName = str
else:
    ModeName = Literal[tuple(MODES)]  # which mypy cannot read
DTypeName = Literal["float32", "float16", "bfloat16"]
Backbone = Literal["base", "average"]

ALLOW_ALL_SAME_FLAG = "--i-understand-this-is-not-useful-without-training"

_FLOAT32_MAX = 3.4028234663852886e38  # weights are scaled in float32, where more than this is infinite
_DTYPE_NICKNAMES = {
    "bf16": "bfloat16",
    "f16": "float16",
    "fp16": "float16",
    "half": "float16",
    "f32": "float32",
    "fp32": "float32",
    "float": "float32",
}

_MAX_LISTED = 20
_MAX_NAME = 4096


# ---------------------------------------------------------------------------------------------- what a config says


def _encodable(text: str) -> str:
    """`text` with each surrogate pair made the character that it stands for, as JSON has it, which is YAML, too."""
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        message = "holds half of a surrogate pair, which is no text: write the character"
        raise PydanticCustomError("rule", message) from None


def _path(text: str) -> str:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        message = "has a character that no path has in this locale: set LC_ALL=C.UTF-8, or PYTHONUTF8=1"
        raise PydanticCustomError("rule", message) from None
    return text


def _model_reference(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise PydanticCustomError("rule", "names no model: write a model's directory, or its name on the Hub")
    if len(text) > _MAX_NAME:
        raise PydanticCustomError("rule", "is a name of more than 4,096 characters, which no system takes")
    return _path(text)


def _in_one_string(reference: Any) -> Any:
    """`MODEL@REVISION+ADAPTER`, also where that is `{model: {path: …, revision: …}, lora: …}`, as mergekit takes it."""
    if not isinstance(reference, Mapping) or not {"model"} <= set(reference) <= {"model", "lora"}:
        return reference
    parts = []
    for part in (reference["model"], reference.get("lora")):
        given = part if isinstance(part, Mapping) else {"path": part}
        words = [given.get("path"), given.get("revision")]
        if not set(given) <= {"path", "revision"} or not all(word is None or isinstance(word, str) for word in words):
            return reference
        parts.append("@".join(filter(None, words)))
    return "+".join(filter(None, parts))


def _file_name(text: str) -> str:
    if not text or "\0" in text or len(text) > _MAX_NAME:
        raise PydanticCustomError("rule", "names no file: write the path of a file of text")
    return _path(text)


def _family_name(text: str) -> str:
    if not text:
        raise PydanticCustomError("rule", "names no family: remove it, and the family that fits is chosen")
    return text


def _without_torch(name: Any) -> Any:
    """`bfloat16`, also where that is spelt `torch.bfloat16`, as mergekit takes it."""
    return name.removeprefix("torch.") if isinstance(name, str) else name


def _refuse_true(expected: Literal["int_type", "float_type"]) -> BeforeValidator:
    """Numbers are read as mergekit's pydantic reads them: in quotes, too, as 1e-3, which is text in YAML, and 2.0 as 2.
    Only true is no 1."""

    def check(value: Any) -> Any:
        if isinstance(value, bool):
            raise PydanticKnownError(expected)
        return value

    return BeforeValidator(check)


def _within(least: float, most: float, numbers: str) -> AfterValidator:
    """Numbers from `least` to `most`, which are called `numbers` where another is refused."""

    def check(value: float) -> float:
        if not least <= value <= most:
            raise PydanticCustomError("limit", "must be {numbers}", {"numbers": numbers})
        return value

    return AfterValidator(check)


Whole = Annotated[int, _refuse_true("int_type")]
Real = Annotated[float, _refuse_true("float_type")]
Text = Annotated[str, Field(strict=True), AfterValidator(_encodable)]
ModelReference = Annotated[Text, BeforeValidator(_in_one_string), AfterValidator(_model_reference)]
FileName = Annotated[Text, AfterValidator(_file_name)]
FamilyName = Annotated[Text, AfterValidator(_family_name)]
NoiseScale = Annotated[Real, _within(0, _FLOAT32_MAX, "a number from 0 to 3.4e38, which is finite in float32")]
ResidualScale = Annotated[
    Real, _within(-_FLOAT32_MAX, _FLOAT32_MAX, "a number from -3.4e38 to 3.4e38, which is finite in float32")
]
NumSamples = Annotated[Whole, _within(0, 1024, "a whole number from 0 to 1,024")]
GateTokens = Annotated[Whole, _within(1, 1 << 20, "a whole number from 1 to 1,048,576")]
# What is added to a matrix must not be lost in float64's rounding of it.
Ridge = Annotated[Real, _within(1e-8, 1e6, "a number from 1e-8 to a million")]


class Expert(BaseModel):
    """A model whose MLPs become one expert of each layer.

    The down projections are multiplied by `residual_scale`; every MLP weight gets `noise_scale` × standard normal
    noise. Prompts show what the router should (positive) and should not (negative) send to this expert. More of what it
    should are passages of `positive_files`: text, or JSON lines with a `text` each; and `positive_samples`, so many
    passages that are drawn from the model itself.

    Raises pydantic's `ValidationError` (a `ValueError`) where a value is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source_model: ModelReference
    positive_prompts: tuple[Text, ...] = ()
    negative_prompts: tuple[Text, ...] = ()
    positive_files: tuple[FileName, ...] = ()
    positive_samples: NumSamples = 0
    noise_scale: NoiseScale = 0.0
    residual_scale: ResidualScale = 1.0

    @property
    def has_text(self) -> bool:
        """Whether there is anything that shows what the router should send to it."""
        return bool(self.positive_prompts or self.positive_files or self.positive_samples)


class MergeConfig(BaseModel):
    """What to merge: MLPs from `experts`, and attention, norms and embeddings, the backbone, from `base_model`.

    With the `backbone` "average" these are the mean over the experts instead, as in Branch-Train-MiX (Sukhbaatar et
    al., "Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM", 2024, arXiv 2403.07816). `dtype` None
    means the base model's own; `architecture` None means the family that fits the sources. `ridge` is the
    regularisation λ of that gate mode, `gate_tokens` how many tokens of its `positive_files` each expert gets at most.

    Raises pydantic's `ValidationError` (a `ValueError`) where a value or a combination of values is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: ModelReference
    experts: tuple[Expert, ...]
    shared_experts: tuple[Expert, ...] = ()
    gate_mode: ModeName = "hidden"
    ridge: Ridge = 0.1
    gate_tokens: GateTokens = 4096
    dtype: Annotated[DTypeName | None, BeforeValidator(_without_torch)] = None
    experts_per_token: Whole = 2
    architecture: FamilyName | None = None
    backbone: Backbone = "base"

    _lines: KeyLines = PrivateAttr(default_factory=KeyLines)

    @model_validator(mode="after")
    def _combine(self) -> MergeConfig:
        conflict = next(_conflicts(self), None)
        if conflict is None:
            return self
        path, message = conflict
        context = {"where": dotted(path), "path": path, "message": message}
        raise PydanticCustomError("rule", "{where}: {message}", context)

    def where(self, *path: str | int) -> str:
        """Name a key for a message: `where("experts", 1, "source_model")`.

        Gives `config.yml:7: experts[1].source_model`, or `experts[1].source_model` where the config was not read
        from a file. A key that the file leaves out is given the line of the nearest key around it.
        """
        return self._lines.where(path)

    @property
    def reads_text(self) -> bool:
        """Whether routers are made from prompts or other text of the experts', and are not random."""
        return MODES[self.gate_mode].reads_text

    @property
    def source_text(self) -> str:
        """The YAML file as it was written; YAML that says the same where the config was not read from a file."""
        if self._lines.text is not None:
            return self._lines.text
        data = self.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _conflicts(config: MergeConfig) -> Iterator[tuple[KeyPath, str]]:
    """The rules that tie keys together: where each is broken, and how to mend it."""
    count = len(config.experts)
    if count == 0:
        yield ("experts",), "no experts: list at least one model"
    if config.experts_per_token < 1:
        yield ("experts_per_token",), f"must be at least 1, not {config.experts_per_token}"
    if config.experts_per_token > count:
        default = "" if "experts_per_token" in config.model_fields_set else " (the default)"
        yield (
            ("experts_per_token",),
            f"{config.experts_per_token}{default} is more than the number of experts: write at most {count}",
        )
    if len(config.shared_experts) > 1:
        yield ("shared_experts", 1), "only one shared expert can be built: remove the others"
    if not config.reads_text:
        return
    for index, expert in enumerate(config.experts):
        if not expert.has_text:
            yield (
                ("experts", index, "positive_prompts"),
                f"no positive prompts, which gate_mode {config.gate_mode} makes this expert's router weights from: "
                "write at least one, or positive_files, or use gate_mode random",
            )
    for key, experts in (("experts", config.experts), ("shared_experts", config.shared_experts)):
        for index, expert in enumerate(experts):
            if expert.positive_samples and not MODES[config.gate_mode].takes_samples:
                others = " or ".join(name for name, mode in MODES.items() if mode.takes_samples)
                yield (
                    (key, index, "positive_samples"),
                    f"gate_mode {config.gate_mode} takes prompts and files alone: remove it, or use gate_mode {others}",
                )
    # Neither the order of an expert's prompts nor that of its files matters.
    prompts = {
        (
            *(tuple(sorted(texts)) for texts in (e.positive_prompts, e.negative_prompts, e.positive_files)),
            e.source_model if e.positive_samples else None,
        )
        for e in config.experts
    }
    if count > 1 and len(prompts) == 1:
        yield (
            ("experts",),
            "the prompts are the same for every expert, so the router could not tell them apart: give each expert "
            "prompts of its own, or use gate_mode random",
        )


def is_useless_without_training(config: MergeConfig) -> bool:
    """Whether prompts choose among experts that are all one model, but for what they are scaled by, and noise."""
    if not config.reads_text or len(config.experts) == 1:
        return False
    return len({os.path.realpath(expert.source_model) for expert in config.experts}) == 1


# ------------------------------------------------------------------------------------------------ reading the file


def load_config(path: str | os.PathLike[str], *, allow_all_same: bool = False) -> MergeConfig:
    """Read and check the YAML file at `path`.

    Sources that are all the same model are refused unless `allow_all_same` or the router is random: such a merge
    computes what one of them does, until it is trained. A relative `source_model` is relative to the working
    directory, not to the file.

    Raises `ConfigError`, with a line `FILE:LINE: key.path: what is wrong` for each problem. Warns (`MoeplanWarning`)
    of unknown keys, which are ignored.
    """
    file = os.fspath(path)
    document = read_document(file)
    lines = document.lines

    unknown: dict[KeyPath, str | None] = {}
    data = _keep_known(document.data, MergeConfig, (), unknown)
    misspelt = [(path, f"unknown key, did you mean {name}?") for path, name in unknown.items() if name]
    if misspelt:
        raise _config_error(lines, misspelt)
    if unknown:
        listed = [f"{lines.where(path)}: unknown key, ignored" for path in islice(unknown, _MAX_LISTED)]
        warnings.warn("\n".join([*listed, *_rest(unknown)]), MoeplanWarning, stacklevel=2)

    try:
        config = MergeConfig.model_validate(data)
    except ValidationError as invalid:
        raise _config_error(lines, [_explain(error, document.values) for error in invalid.errors()]) from None
    config._lines = lines

    if not allow_all_same and is_useless_without_training(config):
        message = (
            "all sources are the same model, so until it is trained the merge can do no more than that model, and "
            f"costs more: name different models, or, to train the result, pass {ALLOW_ALL_SAME_FLAG}"
        )
        raise _config_error(lines, [(("experts",), message)])
    return config


def _config_error(lines: KeyLines, problems: list[tuple[KeyPath, str]]) -> ConfigError:
    problems.sort(key=lambda problem: lines.line(problem[0]) or 0)
    listed = [f"{lines.where(path)}: {message}" for path, message in problems[:_MAX_LISTED]]
    return ConfigError("\n".join([*listed, *_rest(problems)]))


def _rest(items: Sized) -> list[str]:
    return [f"and {len(items) - _MAX_LISTED} more"] if len(items) > _MAX_LISTED else []


def _keep_known(
    data: dict[str, Any], model: type[BaseModel], path: KeyPath, unknown: dict[KeyPath, str | None]
) -> dict[str, Any]:
    """`data` without nulls, which mean absent, and without unknown keys, whose paths are added to `unknown`, each with
    the key that it is a misspelling of, if it is one: what stands beside that key is none."""
    kept: dict[str, Any] = {}
    for key, value in data.items():
        if key not in model.model_fields:
            # A bar that typos pass and that names with another meaning (model, models, prompts) do not.
            nearest = _nearest(key, tuple(model.model_fields), 0.75)
            unknown[(*path, key)] = None if nearest in data else nearest
        elif key in ("experts", "shared_experts") and isinstance(value, list):
            kept[key] = [
                _keep_known(item, Expert, (*path, key, index), unknown) if isinstance(item, dict) else item
                for index, item in enumerate(value)
            ]
        elif value is not None:
            kept[key] = value
    return kept


def _nearest(word: str, known: tuple[str, ...], cutoff: float) -> str | None:
    return next(iter(get_close_matches(word.lower(), known, 1, cutoff)), None)


def _nearest_dtype(name: str) -> str | None:
    name = name.lower().removeprefix("torch.")
    # Digits are most of what tells dtypes apart, so difflib alone would offer float16 for float64.
    return _DTYPE_NICKNAMES.get(name) or _nearest(name, get_args(DTypeName), 0.9)


# ------------------------------------------------------------------------------------------------ making messages


def _one_of(choices: tuple[str, ...], value: Value, suggestion: str | None) -> str:
    hint = f", did you mean {suggestion}?" if suggestion else ""
    return f"must be {', '.join(choices[:-1])} or {choices[-1]}, not {value}{hint}"


def _explain(error: ErrorDetails, values: Mapping[KeyPath, Value]) -> tuple[KeyPath, str]:
    """Where, and what to do about, an error that pydantic found in the data of a file."""
    context = error.get("ctx", {})
    path: KeyPath = context.get("path", error["loc"])
    if error["type"] == "rule":
        return path, context.get("message", error["msg"])
    if error["type"] == "missing":
        wanted = "list at least one model" if path == ("experts",) else "write the path of a model's directory"
        return path, f"missing: {wanted}"
    value = values[path]
    match error["type"]:
        case "string_type" if value.text == "":
            return path, "must be text, but nothing stands here: write the text, or remove the entry"
        case "string_type" if value.text is not None:
            message = f"must be text, but YAML reads {value} as {value.kind}: put it in quotes"
            return path, message
        case "string_type" if path[-1] in ("base_model", "source_model"):
            return path, f"must be text, not {value.kind}: write the path of the model as one string"
        case "string_type":
            return path, f"must be text, but YAML reads it as {value.kind}: put all of it in quotes"
        case "tuple_type":
            return path, f"must be a list, not {value.kind}: begin each entry with a dash, on a line of its own"
        case "model_type":
            return path, f"must be a mapping, not {value.kind}: write `source_model:` before the path of the model"
        case "limit":
            return path, f"must be {context['numbers']}, not {value}"
        case "int_type" | "int_parsing" | "int_parsing_size" | "int_from_float" | "finite_number":
            return path, f"must be a whole number such as 2, not {value}"
        case "float_type" | "float_parsing":
            return path, f"must be a number such as 0.1, not {value}"
        case "literal_error" if path == ("dtype",):
            return path, _one_of(get_args(DTypeName), value, _nearest_dtype(value.text or ""))
        case "literal_error" if path == ("backbone",):
            return path, _one_of(get_args(Backbone), value, _nearest(value.text or "", get_args(Backbone), 0.6))
        case "literal_error":
            return path, _one_of(tuple(MODES), value, _nearest(value.text or "", tuple(MODES), 0.6))
        case _:  # of a pydantic that tells more errors apart
            return path, error["msg"]

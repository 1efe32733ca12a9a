"""The YAML file that says what to merge: reading it, checking it, and knowing on which line each key stands.

It is mergekit-moe's format. Models are only named here; whether they exist, and fit together, is found out by
`moeplan.checkpoint` and `moeplan.architectures`, which point at a line of the file with `MergeConfig.where`.

A config comes from anywhere, so reading one takes bounded time and memory and executes nothing: whatever the bytes
of the file, `load_config` returns a `MergeConfig` or raises a `ConfigError`.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from moeplan.errors import MoeplanWarning, UserError

GateMode = Literal["hidden", "hidden_avg", "hidden_last", "ridge", "cheap_embed", "random", "uniform_random"]
DTypeName = Literal["float32", "float16", "bfloat16"]
Backbone = Literal["base", "average"]
KeyPath = tuple[str | int, ...]

ALLOW_ALL_SAME_FLAG = "--i-understand-this-is-not-useful-without-training"

PROMPTLESS: tuple[GateMode, ...] = ("random", "uniform_random")
"""The gate modes that read no prompts."""

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

_MAX_NBYTES = 1 << 20
_MAX_NODES = 25_000
_MAX_DEPTH = 32
_MAX_LITERAL_LENGTH = 100  # of a number or date; YAML's base-60 integers take quadratic time to read
_MAX_LISTED = 20

_MAX_NAME = 4096
_MAX_GATE_TOKENS = 1 << 20
_MAX_SAMPLES = 1024


class ConfigError(UserError):
    """The configuration is not one that can be merged. The message has one line for each problem found."""


# ---------------------------------------------------------------------------------------------- what a config says


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        message = "holds half of a surrogate pair, which is no text: write the character"
        raise PydanticCustomError("rule", message) from None
    return text


def _model_reference(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise PydanticCustomError("rule", "names no model: write a model's directory, or its name on the Hub")
    if len(text) > _MAX_NAME:
        raise PydanticCustomError("rule", "is a name of more than 4,096 characters, which no system takes")
    return text


def _file_name(text: str) -> str:
    if not text or "\0" in text or len(text) > _MAX_NAME:
        raise PydanticCustomError("rule", "names no file: write the path of a file of text")
    return text


def _family_name(text: str) -> str:
    if not text:
        raise PydanticCustomError("rule", "names no family: remove it, and the family that fits is chosen")
    return text


Text = Annotated[str, Field(strict=True), AfterValidator(_encodable)]
ModelReference = Annotated[Text, AfterValidator(_model_reference)]
FileName = Annotated[Text, AfterValidator(_file_name)]
FamilyName = Annotated[Text, AfterValidator(_family_name)]
NoiseScale = Annotated[float, Field(strict=True, ge=0, le=_FLOAT32_MAX, allow_inf_nan=False)]
NumSamples = Annotated[int, Field(strict=True, ge=0, le=_MAX_SAMPLES)]
Ridge = Annotated[float, Field(strict=True, gt=0, le=1e6, allow_inf_nan=False)]
ResidualScale = Annotated[float, Field(strict=True, ge=-_FLOAT32_MAX, le=_FLOAT32_MAX, allow_inf_nan=False)]


@dataclass(frozen=True)
class _Places:
    """The file of a config, and where its keys stand. It says nothing about the merge, so comparisons ignore it."""

    file: str = field(default="", compare=False)
    lines: Mapping[KeyPath, int] = field(default_factory=dict, compare=False)
    text: str | None = field(default=None, compare=False)

    def line(self, path: KeyPath) -> int | None:
        """The line of a key or, where the file leaves it out, of the nearest key around it."""
        return next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), None)

    def where(self, path: KeyPath) -> str:
        """`FILE:LINE: key.path`"""
        line = self.line(path)
        return _dotted(path) if line is None else f"{self.file}:{line}: {_dotted(path)}"


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
    gate_mode: GateMode = "hidden"
    ridge: Ridge = 0.1
    gate_tokens: StrictInt = 4096
    dtype: DTypeName | None = None
    experts_per_token: StrictInt = 2
    architecture: FamilyName | None = None
    backbone: Backbone = "base"

    _places: _Places = PrivateAttr(default_factory=_Places)

    @model_validator(mode="after")
    def _combine(self) -> MergeConfig:
        conflict = next(_conflicts(self), None)
        if conflict is None:
            return self
        path, message = conflict
        context = {"where": _dotted(path), "path": path, "message": message}
        raise PydanticCustomError("rule", "{where}: {message}", context)

    def where(self, *path: str | int) -> str:
        """Name a key for a message: `where("experts", 1, "source_model")`.

        Gives `config.yml:7: experts[1].source_model`, or `experts[1].source_model` where the config was not read
        from a file. A key that the file leaves out is given the line of the nearest key around it.
        """
        return self._places.where(path)

    @property
    def source_text(self) -> str:
        """The YAML file as it was written; YAML that says the same where the config was not read from a file."""
        if self._places.text is not None:
            return self._places.text
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
    if not 1 <= config.gate_tokens <= _MAX_GATE_TOKENS:
        yield ("gate_tokens",), f"must be from 1 to {_MAX_GATE_TOKENS:,}, not {config.gate_tokens}"
    if len(config.shared_experts) > 1:
        yield ("shared_experts", 1), "only one shared expert can be built: remove the others"
    if config.gate_mode in PROMPTLESS:
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
            if expert.positive_samples and config.gate_mode != "ridge":
                yield (
                    (key, index, "positive_samples"),
                    f"gate_mode {config.gate_mode} takes prompts and files alone: remove it, or use gate_mode ridge",
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
    """Whether prompts choose among experts that are all one model: the merge computes what that model does."""
    if config.gate_mode in PROMPTLESS or len(config.experts) == 1:
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
    text = _read_text(file)
    content, nodes = _read_yaml(file, text)
    places = _Places(file, {path: line for path, (line, _) in nodes.items()}, text)

    unknown: list[KeyPath] = []
    data = _keep_known(content, MergeConfig, (), unknown)
    misspelt = {path: name for path in unknown if (name := _nearest_key(path))}
    if misspelt:
        raise _config_error(places, [(path, f"unknown key, did you mean {name}?") for path, name in misspelt.items()])
    if unknown:
        listed = [f"{places.where(path)}: unknown key, ignored" for path in unknown[:_MAX_LISTED]]
        warnings.warn("\n".join([*listed, *_rest(unknown)]), MoeplanWarning, stacklevel=2)

    try:
        config = MergeConfig.model_validate(data)
    except ValidationError as invalid:
        raise _config_error(places, [_explain(error, nodes) for error in invalid.errors()]) from None
    config._places = places

    if not allow_all_same and is_useless_without_training(config):
        message = (
            "all sources are the same model, so the merge would compute what that model does and cost more: name "
            f"different models, or, to train the result, pass {ALLOW_ALL_SAME_FLAG}"
        )
        raise _config_error(places, [(("experts",), message)])
    return config


def _config_error(places: _Places, problems: list[tuple[KeyPath, str]]) -> ConfigError:
    problems.sort(key=lambda problem: places.line(problem[0]) or 0)
    listed = [f"{places.where(path)}: {message}" for path, message in problems[:_MAX_LISTED]]
    return ConfigError("\n".join([*listed, *_rest(problems)]))


def _rest(items: list[Any]) -> list[str]:
    return [f"and {len(items) - _MAX_LISTED} more"] if len(items) > _MAX_LISTED else []


def _read_text(file: str) -> str:
    try:
        mode = Path(file).stat().st_mode
        if stat.S_ISDIR(mode):
            raise ConfigError(f"{file}: is a directory: give the path of the YAML file")
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{file}: is not a regular file: give the path of the YAML file")
        with open(file, "rb") as stream:
            content = stream.read(_MAX_NBYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file: give the path of the YAML file") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError:  # a NUL in the path
        raise ConfigError(f"{file!r}: is no path: give the path of the YAML file") from None
    if len(content) > _MAX_NBYTES:
        raise ConfigError(f"{file}: larger than 1 MiB: is this really the YAML file?")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"0x{content[error.start]:02x}"
        raise ConfigError(f"{file}:{line}: not UTF-8 text (byte {byte}): save the file as UTF-8") from None


def _keep_known(data: dict[str, Any], model: type[BaseModel], path: KeyPath, unknown: list[KeyPath]) -> dict[str, Any]:
    """`data` without nulls, which mean absent, and without unknown keys, whose paths are added to `unknown`."""
    kept: dict[str, Any] = {}
    for key, value in data.items():
        if key not in model.model_fields:
            unknown.append((*path, key))
        elif key in ("experts", "shared_experts") and isinstance(value, list):
            kept[key] = [
                _keep_known(item, Expert, (*path, key, index), unknown) if isinstance(item, dict) else item
                for index, item in enumerate(value)
            ]
        elif value is not None:
            kept[key] = value
    return kept


def _nearest_key(path: KeyPath) -> str | None:
    model = MergeConfig if len(path) == 1 else Expert
    # A bar that typos pass and that names with another meaning (model, models, prompts) do not.
    return _nearest(str(path[-1]), tuple(model.model_fields), 0.75)


def _nearest(word: str, known: tuple[str, ...], cutoff: float) -> str | None:
    return next(iter(get_close_matches(word.lower(), known, 1, cutoff)), None)


def _nearest_dtype(name: str) -> str | None:
    name = name.lower().removeprefix("torch.")
    # Digits are most of what tells dtypes apart, so difflib alone would offer float16 for float64.
    return _DTYPE_NICKNAMES.get(name) or _nearest(name, get_args(DTypeName), 0.9)


# ------------------------------------------------------------------------------------------------ YAML, with lines

_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = {
    _TAG + "null": "nothing",
    _TAG + "bool": "true or false",
    _TAG + "int": "a number",
    _TAG + "float": "a number",
    _TAG + "timestamp": "a date",
    _TAG + "str": "text",
    _TAG + "merge": "a merge",
    _TAG + "value": "a default value",
}
_NODE_TAGS = {
    yaml.ScalarNode: set(_SCALAR_TAGS),
    yaml.SequenceNode: {_TAG + "seq"},
    yaml.MappingNode: {_TAG + "map"},
}
_Place = tuple[int, yaml.Node]  # the line of a key or list entry, and its value


class _ConfigLoader(yaml.SafeLoader):
    """Turns the one document of a config into plain data, and remembers where each part stands.

    What it accepts, it reads as `yaml.safe_load` does, but for `1e-3`, which is a number here.
    """

    def __init__(self, file: str, text: str) -> None:
        super().__init__(text)
        self.file = file
        self.places: dict[KeyPath, _Place] = {}
        self._peek: Callable[[], yaml.Event] = self.peek_event
        self._depth = 0
        # These count an alias as all that it stands for.
        self._deepest = 0
        self._num_nodes = 0
        self._extents: dict[yaml.Node, tuple[int, int]] = {}  # finished node -> (nodes, levels)

    def compose_root(self) -> yaml.MappingNode:
        """The file's one document."""
        root = self.get_node() if self.check_node() else None
        if root is None:
            raise ConfigError(f"{self.file}: empty: write base_model and experts")
        if self.check_node():
            message = "a second document begins here: write one document a file"
            raise self._refusal(self._peek(), message)
        if not isinstance(root, yaml.MappingNode):
            raise self._refusal(root, "must be a mapping of keys such as base_model and experts")
        return root

    def build(self, root: yaml.MappingNode) -> dict[str, Any]:
        """The data of the document. Fills `places`."""
        self.places[()] = (_line(root), root)
        return self._mapping(root, ())

    def _refusal(self, at: yaml.Node | yaml.Event, message: str, path: KeyPath = ()) -> ConfigError:
        where = f"{self.file}:{_line(at)}: {_dotted(path)}"
        return ConfigError(f"{where.removesuffix(': ')}: {message}")

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node:
        """Compose a node, within the limits on nodes and levels."""
        event = self._peek()
        nodes_before, deepest_before = self._num_nodes, self._deepest
        self._depth += 1
        self._num_nodes += 1
        self._deepest = self._depth
        self._check_limits(event)
        node = super().compose_node(parent, index)
        assert node is not None
        if isinstance(event, yaml.AliasEvent):
            if node not in self._extents:
                raise self._refusal(event, f"the alias *{_printable(event.anchor or '')} is part of what it stands for")
            num_nodes, levels = self._extents[node]
            self._num_nodes += num_nodes - 1
            self._deepest += levels - 1
            self._check_limits(event)
            node = copy(node)
            node.start_mark = event.start_mark
        elif node.tag not in _NODE_TAGS[type(node)]:
            tag = _printable(node.tag.replace(_TAG, "!!"))
            message = f"the tag {tag} is not one that a config may use: put text that begins with ! in quotes"
            raise self._refusal(event, message)
        self._extents[node] = (self._num_nodes - nodes_before, self._deepest - self._depth + 1)
        self._deepest = max(deepest_before, self._deepest)
        self._depth -= 1
        return node

    def _check_limits(self, event: yaml.Event) -> None:
        if self._num_nodes > _MAX_NODES:
            message = f"more than {_MAX_NODES:,} values, counting each alias as all that it stands for: too many"
            raise self._refusal(event, message)
        if self._deepest > _MAX_DEPTH:
            raise self._refusal(event, f"nested more than {_MAX_DEPTH} levels deep, where a config needs five")

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.places[(*path, index)] = (_line(item), item)
                items.append(self._value(item, (*path, index)))
            return items
        if node.tag == _TAG + "str":
            return node.value
        try:
            if len(node.value) > _MAX_LITERAL_LENGTH:
                raise ValueError
            return self.construct_object(node)
        except (yaml.YAMLError, AttributeError, LookupError, ValueError):
            message = f"YAML takes {_shown(node)} for {_kind(node)} and cannot read it: put it in quotes"
            raise self._refusal(node, message, path) from None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        own: dict[str, _Place] = {}
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._refusal(key_node, f"a key must be a plain word, not {_kind(key_node)}", path)
            key = key_node.value
            if key_node.tag == _TAG + "merge":
                data.update(self._merged(value_node, path))
            elif key in own:
                first_line, _ = own[key]
                message = f"written twice, first on line {first_line}: remove one"
                raise self._refusal(key_node, message, (*path, key))
            else:
                own[key] = (_line(key_node), value_node)
        # After the merges, wherever those stand: a mapping's own keys win.
        for key, place in own.items():
            self.places[(*path, key)] = place
            data[key] = self._value(place[1], (*path, key))
        return data

    def _merged(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        # Of several mappings, the first to have a key wins.
        for part in reversed(node.value) if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(part, yaml.MappingNode):
                message = f"takes a mapping or a list of mappings, not {_kind(part)}"
                raise self._refusal(part, message, (*path, "<<"))
            data.update(self._mapping(part, path))
        return data


# YAML 1.1 wants 1.0e-3, mergekit's users write 1e-3 (and its pydantic turns that text into a number).
_ConfigLoader.add_implicit_resolver(
    _TAG + "float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)


def _read_yaml(file: str, text: str) -> tuple[dict[str, Any], dict[KeyPath, _Place]]:
    """The data of a file, and where each part of it stands."""
    loader = None
    try:
        loader = _ConfigLoader(file, text)
        root = loader.compose_root()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"U+{ord(text[error.position]):04X}"
        raise ConfigError(f"{file}:{line}: the character {character} cannot stand in YAML: remove it") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = _printable(", ".join(part for part in (error.context, error.problem) if part), 200)
        advice = "check the indentation, and put text with special characters in quotes"
        raise ConfigError(f"{file}:{line}: not valid YAML: {problem}: {advice}") from None
    except (OverflowError, ValueError):  # PyYAML turns digits into characters and versions without a look
        line = loader.line + 1 if loader else 1
        message = "the number of a \\U escape or a %YAML directive is out of range: correct it"
        raise ConfigError(f"{file}:{line}: {message}") from None
    return loader.build(root), loader.places


# ------------------------------------------------------------------------------------------------ making messages


def _dotted(path: KeyPath) -> str:
    """`experts[1].source_model`"""
    dotted = ""
    for key in path:
        if isinstance(key, int):
            dotted += f"[{key}]"
        else:
            name = _printable(key) if key.strip() else repr(key)
            dotted += f".{name}" if dotted else name
    return dotted


def _printable(text: str, most: int = 60) -> str:
    short = text if len(text) <= most else f"{text[:most]}..."
    return short if short.isprintable() else repr(short)


def _line(of: yaml.Node | yaml.Event) -> int:
    return of.start_mark.line + 1 if of.start_mark else 1


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return _SCALAR_TAGS[node.tag]
    return "a mapping" if isinstance(node, yaml.MappingNode) else "a list"


def _shown(node: yaml.Node) -> str:
    """The value as typed, where that is one word or text."""
    if not isinstance(node, yaml.ScalarNode):
        return _kind(node)
    return f'"{_printable(node.value)}"' if node.style else _printable(node.value)


def _typed(node: yaml.Node) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else ""


def _one_of(choices: tuple[str, ...], node: yaml.Node, suggestion: str | None) -> str:
    hint = f", did you mean {suggestion}?" if suggestion else ""
    return f"must be {', '.join(choices[:-1])} or {choices[-1]}, not {_shown(node)}{hint}"


def _explain(error: ErrorDetails, places: Mapping[KeyPath, _Place]) -> tuple[KeyPath, str]:
    """Where, and what to do about, an error that pydantic found in the data of a file."""
    context = error.get("ctx", {})
    path: KeyPath = context.get("path", error["loc"])
    if error["type"] == "rule":
        return path, context.get("message", error["msg"])
    if error["type"] == "missing":
        wanted = "list at least one model" if path == ("experts",) else "write the path of a model's directory"
        return path, f"missing: {wanted}"
    _, node = places[path]
    match error["type"]:
        case "string_type" if isinstance(node, yaml.ScalarNode) and not node.value:
            return path, "must be text, but nothing stands here: write the text, or remove the entry"
        case "string_type" if isinstance(node, yaml.ScalarNode):
            message = f"must be text, but YAML reads {_shown(node)} as {_kind(node)}: put it in quotes"
            return path, message
        case "string_type" if path[-1] in ("base_model", "source_model"):
            return path, f"must be text, not {_kind(node)}: write the path of the model as one string"
        case "string_type":
            return path, f"must be text, but YAML reads it as {_kind(node)}: put all of it in quotes"
        case "tuple_type":
            return path, f"must be a list, not {_kind(node)}: begin each entry with a dash, on a line of its own"
        case "model_type":
            return path, f"must be a mapping, not {_kind(node)}: write `source_model:` before the path of the model"
        case "int_type":
            return path, f"must be a whole number such as 2, not {_shown(node)}"
        case "float_type":
            return path, f"must be a number such as 0.1, not {_shown(node)}"
        case "greater_than_equal" | "less_than_equal" if path[-1] == "positive_samples":
            return path, f"must be a whole number from 0 to {_MAX_SAMPLES:,}, not {_shown(node)}"
        case "finite_number" | "greater_than" | "less_than_equal" if path == ("ridge",):
            return path, f"must be a number above 0, and at most a million, not {_shown(node)}"
        case "finite_number" | "greater_than_equal" | "less_than_equal":
            least = "0" if path[-1] == "noise_scale" else "-3.4e38"
            return path, f"must be a number from {least} to 3.4e38, which is finite in float32, not {_shown(node)}"
        case "literal_error" if path == ("dtype",):
            return path, _one_of(get_args(DTypeName), node, _nearest_dtype(_typed(node)))
        case "literal_error" if path == ("backbone",):
            return path, _one_of(get_args(Backbone), node, _nearest(_typed(node), get_args(Backbone), 0.6))
        case "literal_error":
            return path, _one_of(get_args(GateMode), node, _nearest(_typed(node), get_args(GateMode), 0.6))
        case _:  # of a pydantic that tells more errors apart
            return path, error["msg"]

"""A YAML file as plain data, and where each part of it stands.

A config comes from anywhere, so reading one takes bounded memory, and bounded time once a pipe has ended, and executes
nothing: whatever the bytes of the file, `read_document` returns what it says or raises a `ConfigError` that names it,
and the line if there is one.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moeplan.errors import UserError

KeyPath = tuple[str | int, ...]
"""The keys, and the numbers of entries, that lead to a part of a document."""

_MAX_NBYTES = 1 << 20
_MAX_NODES = 25_000
_MAX_DEPTH = 32
_MAX_LITERAL_LENGTH = 100  # of a number or date; YAML's base-60 integers take quadratic time to read

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


class ConfigError(UserError):
    """The configuration is not one that can be merged. The message has one line for each problem found."""


@dataclass(frozen=True)
class KeyLines:
    """A file, its text, and the lines that its keys stand on. Any two are equal: what a config says is elsewhere."""

    file: str = field(default="", compare=False)
    lines: Mapping[KeyPath, int] = field(default_factory=dict, compare=False)
    text: str | None = field(default=None, compare=False)

    def line(self, path: KeyPath) -> int | None:
        """The line of a key or, where the file leaves it out, of the nearest key around it."""
        return next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), None)

    def where(self, path: KeyPath) -> str:
        """`FILE:LINE: key.path`"""
        line = self.line(path)
        return dotted(path) if line is None else f"{self.file}:{line}: {dotted(path)}"


@dataclass(frozen=True, slots=True)
class Value:
    """A part of a document, as messages speak of it. `line` is that of its key or, in a list, its own."""

    line: int
    node: yaml.Node

    @property
    def text(self) -> str | None:
        """What stands there, where that is one word, number or text."""
        return self.node.value if isinstance(self.node, yaml.ScalarNode) else None

    @property
    def kind(self) -> str:
        """What YAML takes it for: "a number", "a list"."""
        return _kind(self.node)

    def __str__(self) -> str:
        """As typed, where that is one word or text; else its kind."""
        return _shown(self.node)


@dataclass(frozen=True, slots=True)
class Document:
    """What a file says, and every part of that by its path."""

    data: dict[str, Any]
    values: Mapping[KeyPath, Value]
    lines: KeyLines


def read_document(file: str) -> Document:
    """The one document of a YAML file, which is a mapping. Raises ConfigError for anything else."""
    text = _read_text(file)
    root, loader = _compose(file, text)
    data = loader.build(root)
    lines = KeyLines(file, {path: value.line for path, value in loader.values.items()}, text)
    return Document(data, loader.values, lines)


def _read_text(file: str) -> str:
    """What is in the file, which is read once: it may be a pipe (`moeplan <(envsubst < merge.yml)`), or a terminal."""
    try:
        mode = Path(file).stat().st_mode
        if stat.S_ISDIR(mode):
            raise ConfigError(f"{file}: is a directory: give the path of the YAML file")
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
            raise ConfigError(f"{file}: is neither a file nor a pipe: give the path of the YAML file")
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


class _Loader(yaml.SafeLoader):
    """Turns the one document of a config into plain data, and remembers where each part stands.

    What it accepts, it reads as `yaml.safe_load` does.
    """

    def __init__(self, file: str, text: str) -> None:
        super().__init__(text)
        self.file = file
        self.values: dict[KeyPath, Value] = {}
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
        """The data of the document. Fills `values`."""
        self.values[()] = Value(_line(root), root)
        return self._mapping(root, ())

    def _refusal(self, at: yaml.Node | yaml.Event, message: str, path: KeyPath = ()) -> ConfigError:
        where = f"{self.file}:{_line(at)}: {dotted(path)}"
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
                self.values[(*path, index)] = Value(_line(item), item)
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
        own: dict[str, Value] = {}
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._refusal(key_node, f"a key must be a plain word, not {_kind(key_node)}", path)
            key = key_node.value
            if key_node.tag == _TAG + "merge":
                data.update(self._merged(value_node, path))
            elif key in own:
                message = f"written twice, first on line {own[key].line}: remove one"
                raise self._refusal(key_node, message, (*path, key))
            else:
                own[key] = Value(_line(key_node), value_node)
        # After the merges, wherever those stand: a mapping's own keys win.
        for key, value in own.items():
            self.values[(*path, key)] = value
            data[key] = self._value(value.node, (*path, key))
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


def _compose(file: str, text: str) -> tuple[yaml.MappingNode, _Loader]:
    """A file's nodes, within the limits, and what turns them into data."""
    loader = None
    try:
        loader = _Loader(file, text)
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
    return root, loader


def dotted(path: KeyPath) -> str:
    """`experts[1].source_model`"""
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            name = _printable(key) if key.strip() else repr(key)
            text += f".{name}" if text else name
    return text


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

"""Four domains of text that are on every machine that moeplan is installed on: in Python itself, and beside torch.

Files are taken in a seeded order until there is enough. Paragraphs that are nearly equal to one that was there before,
such as the licences at the top of headers, are left out, so that nothing that is held out was trained on.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

from benchmarks.routing.settings import DOMAINS, Settings

SEED = 20_000

BLOCK_CHARS = 8_000
"""What is held out, or not, together: the paragraphs of a block follow one another in a file."""

MAX_FILE_CHARS = 24_000
"""What is taken of a file of code, so that no large one is half of a domain."""

MAX_LINE_CHARS = 300
"""Longer lines are tables, not text."""

COMPARED_LETTERS = 60
"""Paragraphs of fewer letters are equal by chance, and may be there twice."""

PARAGRAPHS = re.compile(r"\n\s*\n")
SENTENCES = re.compile(r"[A-Z][^\n]+(\n[^\s\-*+>.|#=~][^\n]*)*[.:!?]")
"""Lines of prose: no lists, tables, code or headings."""

PROSE_CHARS = 100
PROSE_SHARE = 0.93
"""So much of a paragraph of English are letters, spaces, commas and full stops."""


@dataclass(frozen=True, slots=True)
class Text:
    """A domain's text, in blocks: what models are trained on, and what they are judged by."""

    domain: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


class TooLittleTextError(Exception):
    """This machine has not enough text of a domain; the message says which."""


def texts(settings: Settings) -> tuple[Text, ...]:
    """The text of each domain, as much of one as of another. Equal on machines where the same is installed."""
    return tuple(_text(domain, _SOURCES[domain], settings) for domain in DOMAINS)


def _text(domain: str, source: Callable[[], Iterator[str]], settings: Settings) -> Text:
    blocks: list[str] = []
    missing = settings.domain_chars
    for block in _blocks(_distinct(source())):
        blocks.append(block[:missing])
        missing -= len(blocks[-1])
        if not missing:
            break
    else:
        raise TooLittleTextError(f"{missing:,} of {settings.domain_chars:,} characters of {domain} are missing here")
    random.Random(SEED).shuffle(blocks)
    held_out = max(1, round(len(blocks) * settings.held_out))
    return Text(domain, tuple(blocks[held_out:]), tuple(blocks[:held_out]))


def _distinct(paragraphs: Iterable[str]) -> Iterator[str]:
    """The paragraphs of ASCII whose letters, whatever else is between them, were not there before."""
    seen: set[str] = set()
    for paragraph in paragraphs:
        letters = re.sub("[^a-z]", "", paragraph.lower())
        if letters in seen or not paragraph.isascii() or max(map(len, paragraph.splitlines())) > MAX_LINE_CHARS:
            continue
        if len(letters) >= COMPARED_LETTERS:
            seen.add(letters)
        yield paragraph


def _blocks(paragraphs: Iterable[str]) -> Iterator[str]:
    block: list[str] = []
    nchars = 0
    for paragraph in paragraphs:
        block.append(paragraph)
        nchars += len(paragraph) + 2
        if nchars >= BLOCK_CHARS:
            yield "\n\n".join(block) + "\n\n"
            block, nchars = [], 0


def _python() -> Iterator[str]:
    """The standard library, without its docstrings, which are English."""
    for file in _python_files(_standard_library()):
        lines = _read(file).splitlines()
        for node in _documented(file):
            docstring = node.body[0]
            for number in range(docstring.lineno - 1, docstring.end_lineno or docstring.lineno):
                lines[number] = ""
        yield from _paragraphs("\n".join(lines)[:MAX_FILE_CHARS])


def _cpp() -> Iterator[str]:
    """The headers of torch, but for those that it generates."""
    for file in _shuffled(file for file in (_package("torch") / "include").rglob("*.h") if file.parent.name != "ops"):
        yield from _paragraphs(_read(file)[:MAX_FILE_CHARS])


def _english() -> Iterator[str]:
    """What Python's manual says about the language, and the prose in docstrings of what is installed."""
    for topic in topics.values():
        yield from filter(_is_prose, _paragraphs(topic))
    for root in (_standard_library(), _package("numpy"), _package("torch")):
        for file in _python_files(root):
            for node in _documented(file):
                yield from filter(_is_prose, _paragraphs(ast.get_docstring(node) or ""))


def _yaml() -> Iterator[str]:
    """What torch's operators and their derivatives are generated from."""
    for file in sorted(_package("torchgen").rglob("*.yaml"), key=lambda file: file.name, reverse=True):
        yield from _paragraphs(_read(file))


_SOURCES: dict[str, Callable[[], Iterator[str]]] = dict(
    zip(DOMAINS, (_python, _cpp, _english, _yaml), strict=True),
)


def _paragraphs(text: str) -> list[str]:
    """The text between empty lines, indented as it is."""
    return [paragraph.strip("\n").rstrip() for paragraph in PARAGRAPHS.split(text) if paragraph.strip()]


def _is_prose(paragraph: str) -> bool:
    plain = len(re.findall(r"[A-Za-z ,.\n]", paragraph))
    return (
        len(paragraph) >= PROSE_CHARS
        and plain >= PROSE_SHARE * len(paragraph)
        and SENTENCES.fullmatch(paragraph) is not None
    )


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(file: Path) -> list[Documented]:
    """All that has a docstring in a Python file; nothing where it cannot be parsed."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(_read(file))
    except (SyntaxError, ValueError):
        return []
    return [node for node in ast.walk(tree) if isinstance(node, Documented) and ast.get_docstring(node)]


def _python_files(root: Path) -> list[Path]:
    """What is below `root`, but for tests, tables of characters, and what others have installed."""
    apart = {"test", "tests", "testing", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "_vendor"}
    return _shuffled(file for file in root.rglob("*.py") if apart.isdisjoint(file.relative_to(root).parts))


def _shuffled(files: Iterable[Path]) -> list[Path]:
    ordered = sorted(files)
    random.Random(SEED).shuffle(ordered)
    return ordered


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _package(name: str) -> Path:
    """The directory of an installed package, which is not imported for it."""
    found = find_spec(name)
    if found is None or found.origin is None:
        raise TooLittleTextError(f"{name}, whose files are one of the texts, is not installed")
    return Path(found.origin).parent

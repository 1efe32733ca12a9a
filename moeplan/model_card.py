"""The model card: README.md, with the metadata that the Hub reads, and how the model was made.

It depends on the plan alone, so equal merges have equal cards. The sources' own cards are downloaded from strangers: of
each, so many bytes are read, and of these only a licence whose every character is one that such a name may have.
"""

from __future__ import annotations

import os
import re
import shlex
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moeplan.architectures.family import PACKED
from moeplan.config import ALLOW_ALL_SAME_FLAG, MergeConfig, is_useless_without_training
from moeplan.errors import MoeplanWarning
from moeplan.gates import gate_mode
from moeplan.model_ref import parse_model_ref
from moeplan.options import DECISIVE, EVALUATION, flag
from moeplan.output import CARD, CONFIG_COPY
from moeplan.places import CheckpointError, opened
from moeplan.tokenizer_files import has_tokenizer
from moeplan.wording import count, runs

if TYPE_CHECKING:
    from moeplan.planning import MergePlan

TAGS = ("moe", "frankenmoe", "merge", "moeplan")
"""frankenmoe is what the Hub calls such models, whatever made them."""

MAX_NBYTES = 64 << 10
"""Of a source's card: more than the metadata of any honest one."""

# A repository's name, by the Hub's rules: at most 96 characters, no two dashes or dots in a row, neither at an end of
# either part, and no ending of git's own.
_HUB_NAME = re.compile(r"(?!.*(--|\.\.))(?!.*\.git$)\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
_CACHED = re.compile(r"models--(?P<organisation>[\w.-]+?)--(?P<name>[\w.-]+)", re.ASCII)

_METADATA = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_VALUES = {
    "license": r"[A-Za-z0-9][A-Za-z0-9.-]{0,63}",
    "license_name": r"[A-Za-z0-9][A-Za-z0-9. ()+-]{0,99}",
    "license_link": r"https://[A-Za-z0-9.-]+/[A-Za-z0-9./_~%-]{0,300}",
}
_LINES = {
    key: re.compile(rf"^{key}:[ \t]+(['\"]?)(?P<value>{value})\1[ \t]*(#.*)?\r?$", re.MULTILINE)
    for key, value in _VALUES.items()
}


_MERGED = "merged with moeplan"
"""What every card of moeplan's says."""


@dataclass(frozen=True, slots=True)
class Licence:
    """What a source's card says that its licence is, by the Hub's keys: `license: other` has a name and a link."""

    license: str
    license_name: str | None = None
    license_link: str | None = field(default=None, compare=False)
    """A model's copy of it, as a rule, so one licence has many."""

    def __str__(self) -> str:
        return self.license_name or self.license


@dataclass(frozen=True, slots=True)
class CardSource:
    """A model or adapter that was merged: how the YAML calls it, what of, its Hub name and licence, where known."""

    reference: str
    roles: tuple[str, ...]
    hub_name: str | None
    licence: Licence | None


def sources_of(config: MergeConfig, directories: Sequence[Sequence[Path]]) -> tuple[CardSource, ...]:
    """The models and adapters that `config` names, each once, by its first name.

    `directories` are those of the base, the experts, the shared experts: of each the model's, and its adapter's.
    """
    named = [("base", config.base_model)]
    named += [(f"expert {number}", expert.source_model) for number, expert in enumerate(config.experts)]
    named += [("shared expert", expert.source_model) for expert in config.shared_experts]
    found: dict[str, CardSource] = {}  # by the directory, which a YAML file may spell in several ways
    for (role, reference), paths in zip(named, directories, strict=True):
        ref = parse_model_ref(reference)
        parts = [(role, ref.model), *([] if ref.adapter is None else [(f"adapter of {role}", ref.adapter)])]
        for (use, name), path in zip(parts, paths, strict=True):
            directory = os.path.realpath(path)
            if directory in found:
                found[directory] = replace(found[directory], roles=(*found[directory].roles, use))
            else:
                found[directory] = CardSource(name, (use,), hub_name(name), read_licence(path))
    return tuple(found.values())


def warn_of_licences(merged: Iterable[CardSource]) -> None:
    """Warn where the licences that are known differ."""
    licences = {source.licence: source.reference for source in merged if source.licence is not None}
    if len(licences) > 1:
        listed = ", ".join(f"{licence} ({reference})" for licence, reference in licences.items())
        message = f"the models have different licences: {listed}; the model card names none, so add what holds"
        warnings.warn(message, MoeplanWarning, stacklevel=3)


def hub_name(reference: str) -> str | None:
    """The name on the Hub of the model that a YAML file calls `reference`; None where it has none that is known.

    A directory in huggingface_hub's cache has one, another directory has none, whatever it is called.
    """
    for part in Path(reference).parts:
        if cached := _CACHED.fullmatch(part):
            return f"{cached['organisation']}/{cached['name']}"
    name = reference.partition("@")[0]
    if os.path.lexists(reference) or len(name) > 96 or not _HUB_NAME.fullmatch(name):
        return None
    return name


def read_licence(directory: Path) -> Licence | None:
    """The licence that the card of the model in `directory` names; None where it has no card, or that names none."""
    try:
        with opened(directory, CARD) as file:
            text = file.read(MAX_NBYTES).decode("utf-8", "replace")
    except CheckpointError:
        return None
    metadata = _METADATA.search(text)
    if metadata is None:
        return None
    # By lines rather than as YAML, which takes strangers' text quadratic time and more to read.
    values = {key: match["value"] for key, line in _LINES.items() if (match := line.search(metadata[1]))}
    return Licence(**values) if "license" in values else None


def metadata(merged: Sequence[CardSource]) -> dict[str, Any]:
    """What the Hub reads. There is a licence where all models are known to have the same one, with the base's link."""
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": list(TAGS)}
    names = list(dict.fromkeys(source.hub_name for source in merged if source.hub_name is not None))
    if names:
        data |= {"base_model": names, "base_model_relation": "merge"}
    licence = merged[0].licence
    if licence is not None and all(source.licence == licence for source in merged):
        keys = ("license", "license_name", "license_link")
        data |= {key: value for key in keys if (value := getattr(licence, key)) is not None}
    return data


def is_own_card(text: str) -> bool:
    """Whether a card says what those that moeplan writes say, edited or not."""
    return any(line.startswith("A ") and f" model, {_MERGED} " in line for line in text.splitlines())


def model_card(plan: MergePlan) -> str:
    """The text of the card of what `plan` merges, in Markdown."""
    config, family = plan.config, plan.family.name
    experts, active = len(config.experts), config.experts_per_token
    backbone = "the base's" if config.backbone == "base" else "the mean over the experts'"
    lines = [
        f"# {family} of {count(experts, 'expert')}",
        "",
        f"A {family} model, {_MERGED} {version('moeplan')} from the models below: attention, norms and",
        f"embeddings are {backbone}, and each expert is the MLPs of one model.",
        *[f"Of the {experts} experts, {active} work{'s' * (active == 1)} on a token."] * (experts > 1),
        "",
        *_models(plan.merged),
        *_how_to_load_it(plan),
        "",
        *_how_it_was_made(plan),
    ]
    header = yaml.safe_dump(metadata(plan.merged), sort_keys=True, allow_unicode=True)
    return f"---\n{header}---\n" + "\n".join(lines) + "\n"


def _models(merged: Sequence[CardSource]) -> list[str]:
    rows = [f"| {_roles(source.roles)} | {_link(source)} | {source.licence or 'not known'} |" for source in merged]
    return ["| used as | model | licence |", "| --- | --- | --- |", *rows, ""]


def _roles(roles: Sequence[str]) -> str:
    """`base, experts 0-3`"""
    numbers = [int(role.removeprefix("expert ")) for role in roles if role.startswith("expert ")]
    experts = [f"expert{'s' * (len(numbers) > 1)} {runs(numbers)}"] if numbers else []
    others = [role for role in roles if not role.startswith("expert ")]
    return ", ".join([*others[:1], *experts, *others[1:]] if others[:1] == ["base"] else [*experts, *others])


def _link(source: CardSource) -> str:
    if source.hub_name is None:
        return _code(source.reference.replace("|", r"\|"))
    name, _, revision = source.reference.partition("@")
    tree = f"/tree/{revision}" if name == source.hub_name and revision else ""
    return f"[{source.reference if tree else source.hub_name}](https://huggingface.co/{source.hub_name}{tree})"


def _code(text: str) -> str:
    """`text` as Markdown's code within a line, whatever is in it."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)}{pad}{fence}"


def _how_it_was_made(plan: MergePlan) -> list[str]:
    text = plan.config.source_text
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [
        "## How it was made",
        "",
        f"`{shlex.join(['moeplan', CONFIG_COPY, 'OUT', *_options(plan)])}`, with this `{CONFIG_COPY}`:",
        "",
        f"{fence}yaml",
        *text.removesuffix("\n").split("\n"),
        fence,
    ]


def _options(plan: MergePlan) -> list[str]:
    """The options that the model's bytes depend on, where they are not the defaults."""
    given, defaults = plan.options, type(plan.options)()
    options = [] if not is_useless_without_training(plan.config) else [ALLOW_ALL_SAME_FLAG]
    evaluates = gate_mode(plan.config.gate_mode).evaluates
    for name in DECISIVE:
        value = getattr(given, name)
        if value != getattr(defaults, name) and (evaluates or name not in EVALUATION):
            options += [flag(name)] if value is True else [flag(name), str(value)]
    return options


def _how_to_load_it(plan: MergePlan) -> list[str]:
    remote = ", trust_remote_code=True" if "auto_map" in plan.model_config else ""
    of_tokenizer = remote or (", trust_remote_code=True" if any(file.suffix == ".py" for file in plan.copied) else "")
    if plan.family.readers is not None:
        needs = [f"transformers 5 cannot load it: use {plan.family.readers}.", ""]
    elif plan.family.layouts[plan.layout].experts == PACKED:
        needs = ["Its experts are the fused tensors of transformers 5, which transformers 4 cannot load.", ""]
    else:
        needs = []
    with_tokenizer = has_tokenizer(file.name for file in plan.copied)
    lines = [
        "## How to load it",
        "",
        *needs,
        "```python",
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' * with_tokenizer}",
        "",
        'path = "."  # this directory, or the model\'s name on the Hub',
        f'model = AutoModelForCausalLM.from_pretrained(path, dtype="auto"{remote})',
        *[f"tokenizer = AutoTokenizer.from_pretrained(path{of_tokenizer})"] * with_tokenizer,
        "```",
    ]
    for warning in plan.family.warnings(plan.model_config):
        lines += ["", f"Mind that {warning}."]
    if not with_tokenizer:
        lines += ["", "It has no tokenizer of its own: use the base's."]
    if not plan.config.reads_text:
        lines += ["", "Its routers are random: they choose experts by chance until the model is trained."]
    return lines

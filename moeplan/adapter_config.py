"""What `adapter_config.json` says of a LoRA adapter: ranks and scales, and which modules they are for.

It is a stranger's, as the rest of an adapter is: what says that the adapter is more than one product for each matrix is
refused, what is not known is warned of, and of the expressions in it only those are matched that cannot take long.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moeplan.errors import MoeplanWarning
from moeplan.places import MAX_CONFIG_NBYTES, CheckpointError, Place, read_json
from moeplan.untrusted_json import show

ADAPTER_CONFIG = "adapter_config.json"

MERGE_ADAPTER = (
    "merge the adapter into its base model first (peft's merge_and_unload), save the result, and give its directory"
)
"""What to do with an adapter that moeplan does not take."""

_VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "layer_replication",
    "megatron_config",
)
"""Settings that make a LoRA adapter something else than one product added to each matrix."""

_KNOWN = {
    # what is read here
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    # what says where the adapter is from
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
    # what counts in training alone, or only beside a variant, or shows in the tensors' names
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "trainable_token_indices",
    # the same of peft before 0.4
    "enable_lora",
    "merge_weights",
}
"""Every other setting of peft 0.21: what it says is applied, or changes nothing in an expert."""

_MAX_LISTED = 3

_INITS_THAT_KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""The ways to begin training after which the base's weights are what they were. The others take from them what they put
into the adapter, so the adapter belongs on a base that is not stored anywhere."""

T = TypeVar("T", int, str)

_LAYER = re.compile(r"\.(\d+)\.")
_MAX_SCALE = 1e15
_MAX_PATTERNS = 1024
_MAX_EXPRESSIONS = 16
_NAME = re.compile(r"\^?[\w.-]+")
_ATOM = r"(?:[\w.-]|\\[.dw]|\[[\w-]+\])"
_EXPRESSION = re.compile(rf"\^?(?:{_ATOM}[*+?]?)*(?:\((?:\?:)?[\w.]+(?:\|[\w.]+)*\)(?:{_ATOM}[*+?]?)*)?")
_MAX_EXPRESSION_LENGTH = 100
_MAX_REPEATS = 2


@dataclass(frozen=True)
class Targets:
    """Which modules `adapter_config.json` says that the adapter is on, and which were saved whole.

    Modules are named by the ends of their names, as peft has it. None: it does not say, or by an expression.
    """

    targets: frozenset[str] | None
    excluded: frozenset[str] | None
    layers: frozenset[int] | None
    saved: frozenset[str]

    def ignoring(self, module: str) -> str | None:
        """The setting for which peft ignores factors of `module`; None where there is none."""
        endings = _endings(module)
        if self.excluded is not None and not self.excluded.isdisjoint(endings):
            return "exclude_modules"
        if self.targets is None or module in self.targets:
            return None
        if self.targets.isdisjoint(endings):
            return "target_modules"
        layer = _LAYER.search(module)
        is_of_another = self.layers is not None and (layer is None or int(layer[1]) not in self.layers)
        return "layers_to_transform" if is_of_another else None

    def names(self, module: str) -> bool:
        """Whether `module` is one that must have factors."""
        return self.targets is not None and self.excluded is not None and self.ignoring(module) is None

    def saves(self, module: str) -> bool:
        """Whether `module`, or one that it is in, was saved whole: peft takes all whose names end so, within a part,
        too (peft/utils/other.py, `_set_trainable`)."""
        return any(f"{name}." in f"{module}." for name in self.saved)


def _endings(module: str) -> list[str]:
    """`a.b.c` → `a.b.c`, `b.c`, `c`"""
    parts = module.split(".")
    return [".".join(parts[n:]) for n in range(len(parts))]


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` says of scales and ranks, where values by pattern come before the general one, and of
    the modules that they are for."""

    rank: int
    alpha: float
    rank_pattern: list[tuple[re.Pattern[str], int]]
    alpha_pattern: list[tuple[re.Pattern[str], float]]
    rank_stabilized: bool
    targets: Targets

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """The rank of a module, such as `model.layers.0.mlp.up_proj`, and its scale."""
        rank = next((value for pattern, value in self.rank_pattern if pattern.match(module)), self.rank)
        alpha = next((value for pattern, value in self.alpha_pattern if pattern.match(module)), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_adapter_config(place: Place) -> AdapterConfig:
    """What the adapter at `place` says of itself.

    Raises CheckpointError where it says that it is more than a sum; warns of what is not known.
    """
    config = read_json(place.path, ADAPTER_CONFIG, MAX_CONFIG_NBYTES)
    file = Path(place.label) / ADAPTER_CONFIG
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{file}: `peft_type` is {show(kind)}, and moeplan adds LORA alone; {MERGE_ADAPTER}")
    variant = next((key for key in _VARIANTS if config.get(key)), None)
    if variant is not None:
        raise CheckpointError(
            f"{file}: `{variant}` is {show(config[variant])}, which is more than a product to add; {MERGE_ADAPTER}"
        )
    _warn_of_unknown(file, config)
    pattern = next((key for key in ("rank_pattern", "alpha_pattern") if config.get(key)), None)
    if config.get("target_parameters") and pattern is not None:
        raise CheckpointError(
            f"{file}: `{pattern}` is matched with other names by peft for `target_parameters` than for modules; "
            + MERGE_ADAPTER
        )
    init = config.get("init_lora_weights")
    if init not in _INITS_THAT_KEEP_THE_BASE:
        raise CheckpointError(
            f"{file}: `init_lora_weights` is {show(init)}: the adapter belongs on a base whose weights were changed "
            f"when its training began; {MERGE_ADAPTER}"
        )
    return AdapterConfig(
        rank=_rank(file, "r", config.get("r", 8)),
        alpha=_alpha(file, "lora_alpha", config.get("lora_alpha", 8)),
        rank_pattern=[(p, _rank(file, "rank_pattern", value)) for p, value in _patterns(file, config, "rank_pattern")],
        alpha_pattern=[
            (p, _alpha(file, "alpha_pattern", value)) for p, value in _patterns(file, config, "alpha_pattern")
        ],
        rank_stabilized=bool(config.get("use_rslora")),
        targets=_read_targets(config),
    )


def _warn_of_unknown(file: Path, config: Mapping[str, Any]) -> None:
    """Warn of settings that another peft has written, and which may make of the adapter what `_VARIANTS` do."""
    unknown = [key for key, value in config.items() if value and key not in _KNOWN]
    if unknown:
        listed = ", ".join(f"{show(key)} is {show(config[key])}" for key in unknown[:_MAX_LISTED])
        more = f" (and {len(unknown) - _MAX_LISTED:,} more)" if len(unknown) > _MAX_LISTED else ""
        warnings.warn(
            f"{file}: {listed}{more}, which moeplan does not know: if that changes what the adapter does, "
            + MERGE_ADAPTER,
            MoeplanWarning,
            stacklevel=2,
        )


def _read_targets(config: Mapping[str, Any]) -> Targets:
    """As peft understands it (peft/tuners/tuners_utils.py, `check_target_module_exists`), where that takes no matching
    of expressions, which are a stranger's, and no knowledge of `target_parameters`.

    Without `target_modules` it takes projections of attention (`TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`).
    """
    targets = config.get("target_modules")
    layers = config.get("layers_to_transform")
    numbers = [layers] if type(layers) is int else layers
    pattern = config.get("layers_pattern")
    is_known = not numbers or not pattern or "layers" in (pattern if isinstance(pattern, list) else [pattern])
    return Targets(
        targets=_items(targets or [], str) if is_known and not config.get("target_parameters") else None,
        excluded=_items(config.get("exclude_modules") or [], str),
        layers=_items(numbers, int) or None,
        saved=_items(config.get("modules_to_save"), str) or frozenset(),
    )


def _items(value: Any, kind: type[T]) -> frozenset[T] | None:
    """A list of `kind`, as a set; None for anything else."""
    is_list = isinstance(value, list) and all(type(item) is kind for item in value)
    return frozenset(value) if is_list else None


def _rank(file: Path, key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise CheckpointError(f"{file}: `{key}` has {show(value)} for a rank; it must be a whole number from 1 up")
    return value


def _alpha(file: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= _MAX_SCALE:
        raise CheckpointError(
            f"{file}: `{key}` has {show(value)} for a scale; it must be a number up to {_MAX_SCALE:g}"
        )
    return float(value)


def _patterns(file: Path, config: Mapping[str, Any], key: str) -> list[tuple[re.Pattern[str], Any]]:
    """The patterns under `key`, in order. Each is matched as PEFT does it (peft/utils/other.py, `get_pattern_key`).

    They are regular expressions from a stranger, which could take centuries to match. So only names are taken, and
    a few expressions with little to try: `layers\\.\\d+\\.mlp`, `.*(up|down)_proj`.
    """
    given = config.get(key) or {}
    if not isinstance(given, dict) or len(given) > _MAX_PATTERNS:
        raise CheckpointError(f"{file}: `{key}` must map at most {_MAX_PATTERNS:,} modules to values")
    expressions = [pattern for pattern in given if not _NAME.fullmatch(pattern)]
    for pattern in expressions:
        repeats = sum(pattern.count(mark) for mark in "*+") + pattern.replace("(?:", "").count("?")
        simple = len(pattern) <= _MAX_EXPRESSION_LENGTH and repeats <= _MAX_REPEATS
        if not simple or not _EXPRESSION.fullmatch(pattern) or len(expressions) > _MAX_EXPRESSIONS:
            raise CheckpointError(
                f"{file}: `{key}` has the pattern {show(pattern)}; moeplan matches names of modules, and up to "
                f"{_MAX_EXPRESSIONS} simple expressions: write names, or {MERGE_ADAPTER}"
            )
    try:
        return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in given.items()]
    except re.error as error:
        raise CheckpointError(f"{file}: `{key}` has a pattern that is no regular expression ({error})") from None

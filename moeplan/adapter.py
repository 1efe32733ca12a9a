"""LoRA adapters in PEFT's format: the factors of what is added to each matrix, beside `adapter_config.json`.

A module's weight becomes W + scale · B · A, where scale is alpha / r, or alpha / √r for rsLoRA (Kalajdzievski, "A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023); a module of `modules_to_save` is replaced. Both as PEFT
does it when it merges (peft/tuners/lora/layer.py, `merge` and `get_delta_weight`), but rounded once, from float32.
`fan_in_fan_out` changes nothing here: PEFT ignores it, too, for linear layers, and dense models have no others.

Adapters come from strangers, like checkpoints, and are opened with the same care.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeplan.adapter_config import ADAPTER_CONFIG, MERGE_ADAPTER, AdapterConfig, Targets, read_adapter_config
from moeplan.checkpoint import Tensors, open_weights
from moeplan.errors import MoeplanWarning
from moeplan.places import CheckpointError, Place, as_place
from moeplan.tensor_names import is_mlp
from moeplan.untrusted_json import show
from moeplan.wording import count
from planner.expr import Expr, Read, add_low_rank

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_BIN_WEIGHTS = "adapter_model.bin"

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class LowRankDelta:
    """`scale` · `b` `[rows, rank]` · `a` `[rank, columns]`."""

    b: Read
    a: Read
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: what it adds to a model's MLP matrices and which of them it replaces, by their names.

    `path` is the directory of its small files, `label` what the user calls it. What it does to anything else, by the
    tensors named in `left_out`, is left out, since an expert gives its MLPs alone.
    """

    path: Path
    label: str
    added: Mapping[str, LowRankDelta]
    replaced: Mapping[str, Read]
    left_out: Sequence[str]

    @property
    def reads(self) -> list[Read]:
        """Everything that it holds for MLPs."""
        return [*self.replaced.values(), *(read for delta in self.added.values() for read in (delta.b, delta.a))]

    def applied_to(self, name: str, weight: Read) -> Expr:
        """The weight `name` with the adapter on it."""
        if name in self.replaced:
            return self.replaced[name]
        if name not in self.added:
            return weight
        delta = self.added[name]
        return add_low_rank(weight, delta.b, delta.a, delta.scale)


def open_adapter(place: str | Path | Place, weights: Mapping[str, Read]) -> Adapter:
    """The LoRA adapter in a local directory, or another place, for a model with these `weights`.

    Reads its config and header.

    Raises CheckpointError, also where it was made for another model, or is of a kind that is more than a sum.
    """
    place = as_place(place)
    if not place.has(ADAPTER_CONFIG):
        raise CheckpointError(
            f"{place.label}: is no LoRA adapter; it has no {ADAPTER_CONFIG}, as peft's save_pretrained writes it"
        )
    config = read_adapter_config(place)
    is_bin = not place.has(ADAPTER_WEIGHTS) and place.has(ADAPTER_BIN_WEIGHTS)
    file = Path(place.label) / (ADAPTER_BIN_WEIGHTS if is_bin else ADAPTER_WEIGHTS)
    tensors = Tensors([open_weights(place, file.name)])
    parts = _parts(file, tensors, weights, config.targets)
    added = {weight: _delta(file, config, weight, pair, weights[weight]) for weight, pair in parts.factors.items()}
    twice = added.keys() & parts.replaced.keys()
    if twice:
        raise CheckpointError(f"{file}: {show(min(twice))} is replaced and added to at once; {MERGE_ADAPTER}")
    _check_complete(file, config.targets, [name for name in weights if is_mlp(name)], added.keys(), parts.replaced)
    return Adapter(place.path, place.label, added, parts.replaced, parts.left_out)


@dataclass(frozen=True)
class _Parts:
    """An adapter's tensors, by what becomes of them.

    `factors` has those of each product, by the weight that it is added to, and the endings of their names. `replaced`
    are weights that stand in for the model's, `left_out` the names of what is on no MLP.
    """

    factors: Mapping[str, Mapping[str, Read]]
    replaced: Mapping[str, Read]
    left_out: Sequence[str]


def _parts(file: Path, tensors: Tensors, weights: Mapping[str, Read], targets: Targets) -> _Parts:
    factors: dict[str, dict[str, Read]] = {}
    replaced: dict[str, Read] = {}
    left_out: list[str] = []
    for key, read in tensors.items():
        name, weight, factor = _taken_apart(file, key)
        if weight not in weights and (factor or is_mlp(name)):
            raise CheckpointError(
                f"{file}: tensor {show(key)} belongs to no weight of the model: was it trained on another one? If not, "
                + MERGE_ADAPTER
            )
        if not is_mlp(name):
            left_out.append(name)
        elif factor is None:
            _check_shape(file, key, read, weights[weight].shape)
            replaced[weight] = read
        else:
            ignoring = targets.ignoring(_module(weight))
            if ignoring is not None:
                raise CheckpointError(
                    f"{file}: {show(key)} is of a module that `{ignoring}` of {ADAPTER_CONFIG} leaves out, so peft "
                    f"would ignore it; mend {ADAPTER_CONFIG}, or {MERGE_ADAPTER}"
                )
            factors.setdefault(weight, {})[factor] = read
    return _Parts(factors, replaced, left_out)


def _taken_apart(file: Path, key: str) -> tuple[str, str, str | None]:
    """A tensor's name without what peft puts before it, the weight that it is for, and, of a factor, its ending."""
    if not key.startswith(_PREFIX):
        raise CheckpointError(
            f"{file}: tensor {show(key)} is not named as peft names an adapter's ({_PREFIX}…): save it with peft's "
            "save_pretrained"
        )
    name = key.removeprefix(_PREFIX)
    factor = next((ending for ending in (_A, _B) if name.endswith(ending)), None)
    return name, name if factor is None else name.removesuffix(factor) + ".weight", factor


def _check_complete(
    file: Path, targets: Targets, matrices: Iterable[str], added: Collection[str], replaced: Collection[str]
) -> None:
    """Refuse a file without a module that was saved whole, as peft does; warn of one without factors."""
    missing = []
    for weight in matrices:
        if targets.saves(_module(weight)):
            if weight not in replaced:
                raise CheckpointError(
                    f"{file}: there is no {_PREFIX}{weight}, and `modules_to_save` of {ADAPTER_CONFIG} names it; is "
                    "the file complete?"
                )
        elif targets.names(_module(weight)) and weight not in added and weight not in replaced:
            missing.append(weight)
    if missing:
        warnings.warn(
            f"{file}: there are no factors for {count(len(missing), 'module')} that `target_modules` of "
            f"{ADAPTER_CONFIG} names, {_module(missing[0])} for one: what is missing stays as the model has it",
            MoeplanWarning,
            stacklevel=2,
        )


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


def _delta(file: Path, config: AdapterConfig, name: str, factors: Mapping[str, Read], weight: Read) -> LowRankDelta:
    module = _module(name)
    for suffix in (_A, _B):
        if suffix not in factors:
            raise CheckpointError(f"{file}: there is no {_PREFIX}{module}{suffix}, and its other half is there")
    rank, scale = config.rank_and_scale(module)
    rows, columns = weight.shape
    _check_shape(file, _PREFIX + module + _A, factors[_A], (rank, columns))
    _check_shape(file, _PREFIX + module + _B, factors[_B], (rows, rank))
    return LowRankDelta(factors[_B], factors[_A], scale)


def _check_shape(file: Path, key: str, read: Read, expected: tuple[int, ...]) -> None:
    if read.shape != expected:
        raise CheckpointError(
            f"{file}: {show(key)} has shape {list(read.shape)}, and the model and {ADAPTER_CONFIG} make it "
            f"{list(expected)}; was the adapter trained on another model?"
        )

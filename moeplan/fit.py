"""The models of a merge, and whether they fit together and into the family that they shall become."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moeplan.adapter_config import MERGE_ADAPTER
from moeplan.architectures.attention import given_rope, rope
from moeplan.architectures.dense import DenseModel
from moeplan.architectures.family import Family
from moeplan.config import MergeConfig
from moeplan.errors import MoeplanWarning
from moeplan.places import CheckpointError
from moeplan.tensor_names import is_mlp
from moeplan.untrusted_json import show

MUST_AGREE = ("hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act")
SHOULD_AGREE = ("rope_theta", "vocab_size")
MUST_AGREE_TO_AVERAGE = ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
SHOULD_AGREE_TO_AVERAGE = ("rope_scaling", "sliding_window", "rms_norm_eps")
"""Settings of the base's that its MLPs, or all that is averaged, were not trained under, if they differ. A family may
have more of its own."""


@dataclass(frozen=True)
class Sources:
    """The models of a merge, in the config's order; one model may stand there many times."""

    base: DenseModel
    experts: tuple[DenseModel, ...]
    shared: tuple[DenseModel, ...]

    def named(self) -> Iterator[tuple[tuple[str | int, ...], DenseModel]]:
        """Each model with the place in the config that names it."""
        yield ("base_model",), self.base
        for key, models in (("experts", self.experts), ("shared_experts", self.shared)):
            for index, model in enumerate(models):
                yield (key, index, "source_model"), model


def check_fit(config: MergeConfig, family: Family, sources: Sources) -> None:
    """Refuse sources that cannot be put together, naming both sides; warn of differences that only deserve a word.

    Raises CheckpointError.
    """
    base = sources.base
    _refuse_what_is_lost(family, base, base.unknown_tensors())
    base.check_tensors()  # gates may need any of them
    checked = {id(base)}
    for place, expert in sources.named():
        if id(expert) in checked:
            continue
        checked.add(id(expert))
        where = config.where(*place)
        if expert.model_type != base.model_type:
            raise CheckpointError(
                f"{where}: {expert.checkpoint.label} is a {expert.model_type} model and the base "
                f"{base.checkpoint.label} a {base.model_type} model; all must be of one family"
            )
        is_averaged = config.backbone == "average" and place[0] == "experts"
        of_mlps, of_backbone = (*MUST_AGREE, *base.family.of_mlps), (*SHOULD_AGREE_TO_AVERAGE, *base.family.of_backbone)
        must_agree = (*of_mlps, *(MUST_AGREE_TO_AVERAGE if is_averaged else ()))
        should_agree = (*SHOULD_AGREE, *(of_backbone if is_averaged else ()))
        for key in dict.fromkeys((*must_agree, *should_agree)):
            its, bases = _setting(expert, key), _setting(base, key)
            if its == bases:
                continue
            difference = (
                f"{where}: {key} is {show(its)} in {expert.checkpoint.label} and {show(bases)} in the base "
                f"{base.checkpoint.label}"
            )
            if key in must_agree:
                why = "" if key in of_mlps else ", since all that is not an MLP is averaged (backbone: average)"
                raise CheckpointError(f"{difference}; they must be equal{why}")
            warnings.warn(f"{difference}; the merged model has the base's", MoeplanWarning, stacklevel=2)
        _refuse_what_is_lost(family, expert, [n for n in expert.unknown_tensors() if is_averaged or is_mlp(n)])
        if is_averaged:
            _check_backbone(expert, where)


def _check_backbone(expert: DenseModel, where: str) -> None:
    """Refuse what cannot be a part of the mean over the experts' backbones."""
    if expert.adapter is not None and expert.adapter.left_out:
        name, *others = expert.adapter.left_out
        more = f" (and {len(others)} more)" if others else ""
        raise CheckpointError(
            f"{where}: {expert.adapter.label} has {show(name)}{more}, and adapters are applied to MLPs alone, so the "
            f"mean of all else (backbone: average) would be without it; {MERGE_ADAPTER}"
        )
    try:
        expert.check_tensors()
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _setting(model: DenseModel, key: str) -> Any:
    """A setting, complete with its default; None of what the family does not have.

    RoPE's base may stand among the other parameters of RoPE.
    """
    given = given_rope(model)
    if key == "rope_theta" and isinstance(given, dict) and given.get(key) is not None:
        return given[key]
    if key == "rope_scaling":
        return rope(model)[1]
    if key == "sliding_window":
        windows = model.windows()
        return windows[0] if len({*windows}) == 1 else windows
    return model.settings.get(key)


def _refuse_what_is_lost(family: Family, model: DenseModel, names: Sequence[str]) -> None:
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise CheckpointError(
            f"{model.checkpoint.label}: a {family.name} model cannot hold {show(names[0])}{more}, and without it the "
            "merged model would compute something else"
        )

"""The merged model's config.json, written so that old and new readers understand it alike.

RoPE is written in both spellings (`moeplan.architectures.attention`), the dtype too (`torch_dtype`, `dtype`), and every
carried setting stands there even where the source left it to a default, because another family's default is another
value.
"""

from __future__ import annotations

import re
from typing import Any

from moeplan.architectures.attention import attention_settings
from moeplan.architectures.dense import DenseModel
from moeplan.architectures.family import Family
from moeplan.tensor_names import EMBEDDING
from moeplan.tokenizer_files import FAST_CLASS, SLOW_CLASS
from planner.expr import DType

DTYPE_NAMES = {DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16"}

VERSION = re.compile(r"[0-9]+(\.[0-9]+)*(\.?(a|b|rc|dev|post)[0-9]+)*")


def model_config(
    family: Family,
    base: DenseModel,
    *,
    num_experts: int,
    with_shared: bool,
    with_output_matrix: bool,
    with_slow_tokenizer: bool,
    experts_per_token: int,
    dtype: DType,
) -> dict[str, Any]:
    """The contents of config.json. Raises CheckpointError for settings of the base that `family` cannot hold.

    An output matrix that is written is never said to be tied, whatever the base says: in the place of one that is,
    transformers 4 and vLLM take the embeddings.
    """
    config = {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        **{key: base.settings.get(key) for key in family.carried},
        "tie_word_embeddings": not with_output_matrix,
        family.num_experts_key: num_experts,
        "num_experts_per_tok": experts_per_token,
        **{key: base.settings[other] for key, other in family.derived.items()},
        **family.constants,
        **attention_settings(family, base),
        "torch_dtype": DTYPE_NAMES[dtype],
        "dtype": DTYPE_NAMES[dtype],
    }
    if family.shared is not None:
        present = {key: base.settings[other] for key, other in family.shared.derived.items()}
        config |= {**family.shared.present, **present} if with_shared else family.shared.absent
    if (tokenizer := _tokenizer_class(family, base, with_slow_tokenizer)) is not None:
        config["tokenizer_class"] = tokenizer
    # Which version wrote the base, and so its tokenizer: where none is named, transformers 4.57 warns of every large
    # tokenizer as of those that were wrong in Mistral's (tokenization_utils_base.py, `_patch_mistral_regex`).
    version = base.checkpoint.config.get("transformers_version")
    if isinstance(version, str) and VERSION.fullmatch(version):
        config["transformers_version"] = version
    return config


def _tokenizer_class(family: Family, base: DenseModel, is_slow: bool) -> str | None:
    """What a tokenizer is that does not say so itself (tokenization_auto.py); None: what it is in every such family."""
    named: str | None = base.settings["tokenizer_class"]
    is_foreign = family.reads_tokenizers_of is not None and base.family not in family.reads_tokenizers_of
    plain = SLOW_CLASS if is_slow else FAST_CLASS
    return plain if named is None and is_foreign else named


def stored_dtype(model: DenseModel) -> DType:
    """The dtype a model is in: what config.json says, else that of its embeddings."""
    named = model.checkpoint.config.get("dtype") or model.checkpoint.config.get("torch_dtype")
    by_name = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    if isinstance(named, str) and named.removeprefix("torch.") in by_name:
        return by_name[named.removeprefix("torch.")]
    return model.checkpoint.tensors[EMBEDDING].dtype

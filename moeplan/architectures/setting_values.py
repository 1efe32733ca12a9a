"""What the settings of a `config.json` may be, so that none that no reader could use is carried into a merged model.

The rules are those of the configuration classes in transformers 5, which refuses the rest when it loads a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moeplan.checkpoint import Checkpoint

ACTIVATIONS = frozenset(
    [
        "gelu",
        "gelu_10",
        "gelu_accurate",
        "gelu_fast",
        "gelu_new",
        "gelu_python",
        "gelu_python_tanh",
        "gelu_pytorch_tanh",
        "hardswish",
        "laplace",
        "leaky_relu",
        "linear",
        "mish",
        "prelu",
        "quick_gelu",
        "relu",
        "relu2",
        "relu6",
        "sigmoid",
        "silu",
        "sqrtsoftplus",
        "swish",
        "tanh",
        "xielu",
    ]
)
"""What transformers can make of `hidden_act` (transformers/activations.py)."""

MAX_NUMBER = 1e15
"""Beyond any multiplier, factor or RoPE base, and well within float32."""

Kind = tuple[str, Callable[[Any], bool]]
"""What a setting must be, as a message says it, and whether a value is."""


def is_number(value: Any, minimum: float = -MAX_NUMBER, maximum: float = MAX_NUMBER) -> bool:
    """Whether a value of JSON is a number from `minimum` to `maximum`."""
    # type() and not isinstance(): True is an int to Python, but not to JSON.
    return type(value) in (int, float) and minimum <= value <= maximum


def is_token_id(value: Any) -> bool:
    """Whether a value of JSON could be a token's id; some models say -1 for none."""
    return type(value) is int and -1 <= value < 2**31


def _is_end(value: Any) -> bool:
    return all(map(is_token_id, value)) if isinstance(value, list) else value is None or is_token_id(value)


FRACTION: Kind = ("a number from 0 to 1", lambda value: is_number(value, 0, 1))
MULTIPLIER: Kind = (f"a number, of at most {MAX_NUMBER:g}", is_number)
DIVISOR: Kind = (f"a number other than 0, of at most {MAX_NUMBER:g}", lambda value: is_number(value) and value != 0)
SWITCH: Kind = ("true or false", lambda value: isinstance(value, bool))
TOKEN_ID: Kind = ("a token's id, or null", lambda value: value is None or is_token_id(value))

KINDS: Mapping[str, Kind] = {
    "hidden_act": (
        "the name of an activation function, such as silu",
        lambda value: isinstance(value, str) and value in ACTIVATIONS,
    ),
    "initializer_range": FRACTION,
    "rms_norm_eps": FRACTION,
    "attention_dropout": FRACTION,
    "use_cache": SWITCH,
    "tie_word_embeddings": SWITCH,
    "use_sliding_window": SWITCH,
    "pad_token_id": TOKEN_ID,
    "bos_token_id": TOKEN_ID,
    "eos_token_id": ("a token's id, a list of them, or null", _is_end),
    "tokenizer_class": (
        "the name of a class, or null",
        lambda value: value is None or isinstance(value, str),
    ),
    "layer_types": (
        "a list of names, one for each layer, or null",
        lambda value: value is None or (isinstance(value, list) and all(isinstance(kind, str) for kind in value)),
    ),
}
"""Of the settings that several families have, but for whole numbers, which `Checkpoint.integer` checks, and RoPE's."""


def complete_settings(checkpoint: Checkpoint, defaults: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """What `config.json` says for each key of `defaults`, else the default. A null stands where null means something.

    Raises CheckpointError for what is not of the key's kind, of `kinds` or `KINDS`.
    """
    settings, kinds = {}, {**KINDS, **kinds}
    for key, default in defaults.items():
        value = checkpoint.config.get(key, default)
        expected, is_kind = kinds.get(key, ("", lambda _: True))
        if value is None and not is_kind(None):
            value = default
        if not is_kind(value):
            raise checkpoint.wrong_value(key, expected)
        settings[key] = value
    return settings

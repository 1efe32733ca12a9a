"""A model of transformers without its weights, to evaluate one decoder layer at a time.

The model is built on the meta device from its settings, so it takes no memory. What its forward pass hands to each
decoder layer beside the hidden states (masks, position embeddings) does not depend on any weight: it is recorded once
by running the model with layers that only take notes. What it makes of the embeddings before the first layer (Granite
scales them) is what the first of them is given. So no family's forward pass is written down here, and whatever
transformers can model can be evaluated. Nor does it matter whether the code is transformers' own or, where the user
trusts it, the model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from threading import local
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
)

from executor.weights import Matrix, Weights
from moeplan.checkpoint import CONFIG
from moeplan.gates.layers import own_model_class
from moeplan.gates.linear import BlockedLinear, Padding
from moeplan.places import CheckpointError
from moeplan.tensor_names import is_mlp
from moeplan.untrusted_json import show

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a call beside the first."""


@dataclass
class _Notes:
    """What a forward pass gives to the layers: the first one's hidden states, and every call."""

    entering: torch.Tensor | None = None
    calls: list[Call] = field(default_factory=list)


class _NoteTaker(nn.Module):
    """Stands in for a decoder layer, whose attributes it has, and notes what it is called with."""

    def __init__(self, layer: nn.Module, notes: _Notes) -> None:
        super().__init__()
        self._layer = layer
        self._notes = notes

    def __getattr__(self, name: str) -> Any:
        # Code for transformers 4, as models bring it, asks a layer for its kind of attention, to choose its mask.
        layer = super().__getattr__("_layer")
        return layer if name == "_layer" else getattr(layer, name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._notes.entering is None:
            self._notes.entering = hidden_states
        self._notes.calls.append((args, kwargs))
        # Always the tensor that the first layer got: some versions index what a layer returns, and the notes
        # do not depend on it.
        return self._notes.entering


class _OneThread(nn.Module):
    """An activation function, computed in one thread: of several, each computes the end of its share otherwise (without
    vector instructions), so that the last bits would depend on how many there are."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            result: torch.Tensor = self._function(x)
        finally:
            torch.set_num_threads(threads)
        return result


class ServedLayer:
    """A decoder layer while it has its weights: a function of hidden states `[batch, tokens, hidden]`."""

    def __init__(self, skeleton: Skeleton, index: int, given: Mapping[str, torch.Tensor]) -> None:
        self._skeleton = skeleton
        self._index = index
        self._given = given

    def __call__(self, hidden_states: torch.Tensor, call: Call | None = None) -> torch.Tensor:
        """The hidden states after it. It is called with `call`, or else as at the start of a text."""
        args, kwargs = call or self._skeleton.call(self._index, hidden_states)
        layer = self._skeleton.layers[self._index]
        result = torch.func.functional_call(layer, dict(self._given), (hidden_states, *args), kwargs)
        tensor: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return tensor

    def mlp_input(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What its MLP is given, whose weights it does without."""
        seen: list[torch.Tensor] = []
        mlp = cast(nn.Module, self._skeleton.layers[self._index].mlp)
        hook = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            self(hidden_states)
        finally:
            hook.remove()
        return seen[0]


class Skeleton:
    """A model's decoder without weights.

    It is made from what `model_params` says of the `model`: of its settings by transformers, or by the code that it
    brings with it, which is run. What it is given and what it gives is on `device`; the matrices that it is served are
    not.
    """

    def __init__(self, model: Mapping[str, Any], device: str) -> None:
        self.device = torch.device(device)
        self.padding = Padding(self.device)
        self._calls: tuple[torch.Size, list[Call]] | None = None
        try:
            with torch.device("meta"):
                self._model = (_own_model if model.get("own_code") else _model)(model)
            self._model.eval()
            self._take_apart()
        except Exception as error:  # whatever transformers may raise at the settings of strangers, or their code lack
            where, reason = f"{model['path']}/{CONFIG}", f"{type(error).__name__}: {show(str(error))}"
            raise CheckpointError(f"{where}: transformers cannot make this model: {reason}") from error

    def _take_apart(self) -> None:
        """The parts that weights are served to, which transformers' models have, and strangers' may lack."""
        _make_position_embeddings(self._model, self.device)
        config = self._model.config
        self.layers = list(cast(nn.ModuleList, self._model.layers))
        self._norm, self._model.norm = cast(nn.Module, self._model.norm), nn.Identity()
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
        self._head = BlockedLinear(head, self.padding)
        self._logits_scale = 1 / getattr(config, "logits_scaling", 1.0)
        self._linears = [_serve_linears(layer, self.padding) for layer in self.layers]
        for layer in self.layers:
            _in_one_thread(cast(nn.Module, layer.mlp))

    def entering(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The hidden states that the first layer gets for these embeddings, both `[batch, tokens, hidden]`."""
        entering = self._run(embeddings).entering
        assert entering is not None  # there is at least one layer
        return entering

    def cache(self) -> DynamicCache:
        """An empty one, for texts to go on from."""
        return DynamicCache()

    def going_on(self, embeddings: torch.Tensor, cache: DynamicCache) -> tuple[torch.Tensor, list[Call]]:
        """The hidden states that the first layer gets for these embeddings, where texts go on of which `cache` has what
        layers have seen; and what each layer is called with beside its hidden states, so that it adds to `cache`."""
        notes = self._run(embeddings, past_key_values=cache, use_cache=True)
        assert notes.entering is not None  # there is at least one layer
        return notes.entering, notes.calls

    def logits(self, hidden_states: torch.Tensor, norm: torch.Tensor, matrix: Matrix, weights: Weights) -> torch.Tensor:
        """`[..., vocab_size]`, from the hidden states after the last layer, the last norm's weight and the output
        matrix."""
        normed = torch.func.functional_call(self._norm, {"weight": norm.float()}, (hidden_states,))
        with self._head.serving(matrix, weights):
            result: torch.Tensor = self._head(normed) * self._logits_scale
        return result

    def call(self, index: int, hidden_states: torch.Tensor) -> Call:
        """What layer `index` is called with beside these hidden states.

        That for the last shape is kept: masks of long prompts are large, and the plan counts those of one group alone.
        """
        if self._calls is None or self._calls[0] != hidden_states.shape:
            self._calls = None
            self._calls = hidden_states.shape, self._run(torch.zeros_like(hidden_states)).calls
        return self._calls[1][index]

    @contextmanager
    def layer(
        self, index: int, tensors: Mapping[str, torch.Tensor], matrices: Mapping[str, Matrix], weights: Weights
    ) -> Iterator[ServedLayer]:
        """Layer `index`, within.

        `tensors` (norms, biases) and `matrices` are its weights, by their names in it; it may do without all matrices
        of its MLP. `weights` goes through the matrices.
        """
        layer, linears = self.layers[index], self._linears[index]
        without = set() if any(map(is_mlp, matrices)) else set(filter(is_mlp, linears))
        expected = ({name for name, _ in layer.named_parameters()} | set(linears)) - without
        different = sorted(expected ^ {*tensors, *matrices}) or sorted(set(linears) - without ^ set(matrices))
        if different:
            raise CheckpointError(
                f"layer {index} of the base has other weights than transformers' model of it: {', '.join(different)}"
            )
        with ExitStack() as served:
            for name, matrix in matrices.items():
                served.enter_context(linears[name].serving(matrix, weights))
            yield ServedLayer(self, index, {name: tensor.to(self.device).float() for name, tensor in tensors.items()})

    def _run(self, embeddings: torch.Tensor, **settings: Any) -> _Notes:
        """The model's forward pass on embeddings `[batch, tokens, hidden]`, with layers that take notes."""
        notes = _Notes()
        self._model.layers = nn.ModuleList(_NoteTaker(layer, notes) for layer in self.layers)
        self._model(inputs_embeds=embeddings, **({"use_cache": False} | settings))
        return notes


def _model(about: Mapping[str, Any]) -> PreTrainedModel:
    """The model as transformers has it. A Mistral with windows by the layer is a Ministral (configuration_auto.py,
    `AutoConfig.from_pretrained`)."""
    model_type, settings = about["model_type"], deepcopy(about["settings"])  # transformers changes what it is given
    if settings.get("layer_types") is None:
        settings.pop("layer_types", None)
    elif model_type == "mistral":
        model_type = "ministral"
    config = AutoConfig.for_model(model_type, **settings | {"use_cache": False})
    model: PreTrainedModel = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model


def _own_model(about: Mapping[str, Any]) -> PreTrainedModel:
    """The model by its own code, which is run. All its settings reach that code."""
    config = AutoConfig.from_pretrained(about["path"], trust_remote_code=True, use_cache=False)
    kind: Any = AutoModel if own_model_class(config.to_dict()) == "AutoModel" else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_config(config, trust_remote_code=True, dtype=torch.float32).base_model
    return model


def _make_position_embeddings(model: PreTrainedModel, device: torch.device) -> None:
    """They are computed when built, so on the meta device they are not there. Raises ValueError for other buffers."""
    for name, module in list(model.named_children()):
        if module is not model.layers and any(buffer.is_meta for buffer in module.buffers()):
            setattr(model, name, type(module)(config=model.config).to(device))
    missing = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if missing:
        raise ValueError(f"it computes {missing[0]} when it is built, where moeplan has no weights")


def _serve_linears(layer: nn.Module, padding: Padding) -> dict[str, BlockedLinear]:
    """Put a `BlockedLinear` in the place of each linear layer; returns them by the names of their weights."""
    linears = {}
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            linears[f"{name}.weight"] = BlockedLinear(module, padding)
            setattr(layer.get_submodule(parent), child, linears[f"{name}.weight"])
    return linears


def _in_one_thread(mlp: nn.Module) -> None:
    """Put a `_OneThread` in the place of each activation function: a part without parts that is no linear layer."""
    for name, module in list(mlp.named_children()):
        if not isinstance(module, BlockedLinear):
            setattr(mlp, name, _OneThread(module))


class _Kept(local):
    """The last skeleton of each thread: it has weights while a layer is evaluated, which are one run's own."""

    key: tuple[Mapping[str, Any], str] | None = None
    skeleton: Skeleton


_kept = _Kept()


def skeleton(model: Mapping[str, Any], device: str) -> Skeleton:
    """The skeleton of what `model_params` says of a `model`, on `device`.

    The last one is kept, for the thread that asks: kernels of one run are run in one.
    """
    if _kept.key != (model, device):
        _kept.skeleton = Skeleton(model, device)
        _kept.key = model, device
    return _kept.skeleton

"""Where tokens would go in a merge that has not been made: through the dense base, a layer at a time, under the memory
cap. Experts are named, and never read, unless they write text of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from moeplan import gates, interruption
from moeplan.config import MergeConfig
from moeplan.gates import evaluation
from moeplan.gates.device import evaluating
from moeplan.gates.scores import Scored, Tokens, kernels, scored
from moeplan.hub import Hub, warn_of_wait
from moeplan.memory import compile_within, memory_cap, runtime_is_known
from moeplan.opening import naming_prompts, open_models
from moeplan.options import Options
from moeplan.progress import ROUTING
from moeplan.routes.statistics import Layer, Routes, Text, routes
from planner.graph import TensorGraph

if TYPE_CHECKING:
    import numpy as np

    from executor.engine import Progress

SHARD_NBYTES = 1 << 40
"""Whatever there is to say of tokens goes into one file."""


def routes_before(
    config: MergeConfig,
    subject: str,
    options: Options,
    files: Sequence[str] = (),
    on_start: Callable[[int], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Routes:
    """Where the tokens of the config's prompts, and of `files`, would go in what `config`, named `subject`, merges.

    `on_start` is told how many bytes will be written, `on_progress` how many were. Raises UserError for what cannot be
    planned, RunError where the run fails.
    """
    from executor.engine import run  # here, because it takes numpy, which other commands do without

    hub = Hub(options.transformers_cache)
    models = open_models(config, options, hub, reads_text=True)
    mode = gates.gate_mode(config.gate_mode)
    request = models.gate_request(config, options, reads_text=True, texts=files)
    with naming_prompts(config):
        device, found = evaluating(options, lambda device: scored(request.on(device), mode, subject))
    graph = TensorGraph()
    for layer, (router, scores) in enumerate(zip(found.routers, found.scores, strict=True)):
        graph.add(f"router.{layer}", router)
        graph.add(f"scores.{layer}", scores)
    modules = evaluation.modules(options.bits)
    if not runtime_is_known():  # so it is seen what they take
        for module in modules:
            import_module(module)
    plan = compile_within(memory_cap(options.max_memory, modules), graph, SHARD_NBYTES, options.threads)
    if on_start is not None:
        on_start(plan.written_nbytes)
    routing = None if on_progress is None else lambda state: on_progress(replace(state, doing=ROUTING))
    temporary = TemporaryDirectory(prefix="moeplan-routes-")
    interruption.clear_at_end(temporary.cleanup)
    with temporary as directory, device.within_budget():
        run(
            plan,
            Path(directory),
            kernels(mode),
            routing,
            headers=hub.headers,
            on_wait=warn_of_wait,
            threads=options.threads,
            imports=modules,
        )
        return routes(
            [expert.source_model for expert in config.experts],
            _texts(config, found, files),
            _layers(Path(directory) / plan.shards[0].filename, found, len(config.experts)),
            config.experts_per_token,
            subject=subject,
            gate_mode=config.gate_mode,
        )


def _texts(config: MergeConfig, found: Scored, files: Sequence[str]) -> list[Text]:
    """What has tokens, in the order of `_of_all`."""

    def text(name: str, expert: int | None, tokens: Tokens) -> Text:
        return Text(name, expert, sum(map(len, tokens.rows)), tokens.held_out)

    experts = zip(config.experts, found.experts, strict=True)
    texts = [text(expert.source_model, number, tokens) for number, (expert, tokens) in enumerate(experts)]
    texts += [text(file, None, tokens) for file, tokens in zip(files, found.texts, strict=True)]
    return [text for text in texts if text.tokens]


def _layers(path: Path, found: Scored, num_experts: int) -> Iterator[Layer]:
    from safetensors import safe_open

    rows = [row for tokens in (*found.experts, *found.texts) for prompt in tokens.rows for row in prompt]
    with safe_open(path, framework="np") as tensors:
        for layer in range(len(found.routers)):
            scores: np.ndarray = tensors.get_tensor(f"scores.{layer}")[rows]
            yield Layer(scores, tensors.get_tensor(f"router.{layer}")[:num_experts])

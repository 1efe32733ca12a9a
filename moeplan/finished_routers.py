"""The routers of a model that was just made: what they are like, and what there is to warn of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from moeplan.errors import MoeplanWarning
from moeplan.planning import MergePlan
from moeplan.routers import RouterFacts, router_facts, stored_routers
from moeplan.wording import runs


def check_routers(merge_plan: MergePlan, directory: Path) -> RouterFacts:
    """What the routers in `directory`, where the plan's shards are, are like. Warns where they are of no use."""
    layers = range(merge_plan.sources.base.num_layers)
    router = merge_plan.family.layouts[merge_plan.layout].router
    names = [router.format(layer=layer) for layer in layers]
    facts = router_facts(partial(stored_routers, directory, merge_plan.plan.shards, names))
    for message in (*_of_routers(merge_plan, facts), *_of_shared_gates(merge_plan, directory)):
        warnings.warn(message, MoeplanWarning, stacklevel=3)
    return facts


def _of_routers(merge_plan: MergePlan, facts: RouterFacts) -> Iterator[str]:
    config, num_layers = merge_plan.config, facts.num_layers
    if facts.not_finite:
        where = _layers(facts.not_finite, num_layers)
        yield f"routers hold NaN or infinities in {where}: so do the base's weights, or what it makes of these prompts"
    for expert in facts.zero:
        reason = (
            "its negative prompts take away all that its positive ones give"
            if config.experts[expert].negative_prompts
            else "its prompts give nothing that is not as much the others'"
        )
        yield f"{config.where('experts', expert)}: the router's row for this expert is zero; {reason}"
    unequal = [layer for layer in facts.degenerate if layer not in facts.not_finite]
    if unequal:
        advice = "; give them prompts that differ more" if config.reads_text else ""
        yield (
            f"routing is degenerate in {_layers(unequal, num_layers)}: the router cannot tell some experts "
            f"apart{advice}"
        )


def _of_shared_gates(merge_plan: MergePlan, directory: Path) -> Iterator[str]:
    import numpy as np

    config, shared = merge_plan.config, merge_plan.family.shared
    if shared is None or shared.gate is None or not config.shared_experts:
        return
    num_layers = merge_plan.sources.base.num_layers
    names = [shared.gate.format(layer=layer) for layer in range(num_layers)]
    gates = list(stored_routers(directory, merge_plan.plan.shards, names))
    where = f"{config.where('shared_experts', 0)}: the gate of this expert"
    not_finite = [layer for layer, gate in enumerate(gates) if not np.isfinite(gate).all()]
    if not_finite:
        yield (
            f"{where} holds NaN or infinities in {_layers(not_finite, num_layers)}: so do the base's weights, or what "
            "it makes of its prompts"
        )
    zero = [layer for layer, gate in enumerate(gates) if not gate.any()]
    if zero:
        yield (
            f"{where} is zero in {_layers(zero, num_layers)}, so half of it counts for every token; give it prompts "
            "that are not the experts'"
        )


def _layers(layers: Sequence[int], num_layers: int) -> str:
    return "all layers" if len(layers) == num_layers else f"layer{'s' * (len(layers) > 1)} {runs(layers)}"

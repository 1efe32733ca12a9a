"""What a plan, a finished merge and a check of one are for machines: what `--json` prints, and views are made of."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplan.disk import free_nbytes
from moeplan.merging import MergeResult
from moeplan.model_config import DTYPE_NAMES
from moeplan.planning import MergePlan
from moeplan.routers import RouterFacts
from planner.expr import RemoteFile, Source
from planner.plan import FileSink, KernelStep, Plan, StreamStep

if TYPE_CHECKING:
    from moeplan.verification import Verification


def plan_data(merge_plan: MergePlan, out: Path | None) -> dict[str, Any]:
    """The plan for machines. All sizes are bytes."""
    plan, config = merge_plan.plan, merge_plan.config
    return {
        "architecture": merge_plan.family.name,
        "would_fit_too": [family.name for family in merge_plan.alternatives],
        "readers": merge_plan.family.readers,
        "dtype": DTYPE_NAMES[merge_plan.dtype],
        "num_experts": len(config.experts),
        "experts_per_token": config.experts_per_token,
        "backbone": config.backbone,
        "sources": _sources(merge_plan),
        "hub": _hub(merge_plan),
        "read": {"nbytes": plan.read_nbytes, "more_than_once_nbytes": plan.reread_nbytes},
        "shared": _shared(merge_plan),
        "output": {
            "nbytes": plan.written_nbytes,
            "tensors": sum(len(shard.tensors) for shard in plan.shards),
            "shards": [
                {"file": shard.filename, "nbytes": shard.nbytes, "tensors": len(shard.tensors)} for shard in plan.shards
            ],
            "copied_files": [*(file.name for file in merge_plan.copied), *merge_plan.missing],
            "replaced_files": merge_plan.replaced_files(out),
        },
        "router": {
            "gate_mode": config.gate_mode,
            "device": merge_plan.device.name,
            "device_budget_nbytes": merge_plan.device.budget_nbytes,
            "kernels": dict(Counter(step.kernel for step in plan.kernels)),
            "evaluations": _evaluations(plan),
        },
        "memory": {
            "cap_nbytes": merge_plan.memory.nbytes,
            "forecast_nbytes": merge_plan.memory_nbytes,
            "process_nbytes": merge_plan.memory.process_nbytes,
            "is_estimate": merge_plan.memory.is_estimate,
            "buffers_nbytes": merge_plan.buffers_nbytes,
        },
        "disk": {
            "needed_nbytes": merge_plan.needed_nbytes(out),
            "free_nbytes": free_nbytes(out or Path()),
        },
        "fingerprint": plan.fingerprint,
    }


def _sources(merge_plan: MergePlan) -> list[dict[str, Any]]:
    """Each distinct model, under the first path given for it: what it is used as, what is read of it.

    A file that is part of several models counts for the first.
    """
    read_nbytes: Counter[Source] = Counter()
    for root, nbytes in merge_plan.plan.reads():
        read_nbytes[merge_plan.plan.sources[root.source]] += nbytes
    names = {"base_model": "base", "experts": "expert", "shared_experts": "shared expert"}
    used = set(merge_plan.plan.sources)
    found: dict[frozenset[Source], dict[str, Any]] = {}
    for (key, *place), model in merge_plan.sources.named():
        files = model.files
        if files not in found:
            found[files] = {
                "path": model.label,
                "used_as": [],
                "files": len(files),
                "read_nbytes": sum(read_nbytes.pop(file, 0) for file in files),
                "remote_nbytes": sum(file.nbytes for file in files & used if isinstance(file, RemoteFile)),
            }
        found[files]["used_as"].append(" ".join([names[str(key)], *map(str, place[:1])]))
    return list(found.values())


def _hub(merge_plan: MergePlan) -> dict[str, Any] | None:
    """What must come from the Hub; None where nothing must."""
    files, missing = merge_plan.remote_files, merge_plan.missing
    if not files and not missing:
        return None
    return {
        "endpoint": merge_plan.hub.endpoint,
        "cache": str(merge_plan.hub.cache),
        "stream": merge_plan.options.stream,
        "files": [{"url": file.url, "nbytes": file.nbytes} for file in files],
        "nbytes": sum(file.nbytes for file in files),
        "needed_nbytes": sum(
            nbytes
            for root, nbytes in merge_plan.plan.reads()
            if isinstance(merge_plan.plan.sources[root.source], RemoteFile)
        ),
        "beside_nbytes": sum(missing.values()),
        "download_nbytes": merge_plan.download_nbytes,
    }


def _shared(merge_plan: MergePlan) -> dict[str, int]:
    """What is read once and written to several places."""
    tensors = places = saved = 0
    for step in merge_plan.plan.steps:
        if not isinstance(step, StreamStep):
            continue
        num_places = sum(isinstance(sink, FileSink) for branch in step.branches for sink in branch.sinks)
        once = sum(nbytes for _, nbytes in step.reads())
        if num_places > 1 and once:
            tensors += 1
            places += num_places
            saved += (num_places - 1) * once
    return {"tensors": tensors, "places": places, "saved_nbytes": saved}


def _evaluations(plan: Plan) -> list[dict[str, Any]]:
    """Each kernel that goes through weights, in order: what of (`layer`: of the base), which form they have, and what
    that costs.

    `resident`: whole in memory, read once for the kernel and the copy. `streamed`, where they do not fit: read again as
    they are used, so many times. `memory_nbytes` is all that is in buffers meanwhile, chunks of the copy included.
    """
    return [
        {
            "kernel": step.kernel,
            "layer": json.loads(step.params).get("layer"),
            "shape": list(step.output.shape),
            "form": "streamed" if step.streamed else "resident",
            "weights_nbytes": sum(math.prod(view.shape) * view.dtype.itemsize for view in step.weights),
            "memory_nbytes": memory_nbytes,
            "blocks_nbytes": step.blocks_nbytes,
            "read_again_nbytes": step.streamed_nbytes,
            "times": step.passes if step.streamed else 0,
        }
        for step, memory_nbytes in zip(plan.steps, plan.memory_nbytes, strict=True)
        if isinstance(step, KernelStep) and step.weights
    ]


def result_data(result: MergeResult) -> dict[str, Any]:
    """The finished merge for machines: bytes and seconds."""
    return {
        "path": str(result.path),
        "seconds": result.seconds,
        "read_nbytes": result.run.read_nbytes,
        "written_nbytes": result.run.written_nbytes,
        "nbytes_by_path": result.run.nbytes_by_path,
        "peak_memory_nbytes": result.run.peak_resident_nbytes,
        "peak_buffers_nbytes": result.run.peak_buffer_nbytes,
        "routers": _routers(result.routers),
    }


def _routers(facts: RouterFacts | None) -> dict[str, Any] | None:
    if facts is None:
        return None
    return {
        "layers": facts.num_layers,
        "degenerate_layers": list(facts.degenerate),
        "closest_experts": facts.closest and list(facts.closest),
        "cosine": facts.cosine if facts.closest else None,
    }


def verification_data(out: Path, found: Verification) -> dict[str, Any]:
    """What was found for machines."""
    return {
        "path": str(out),
        "tensors": found.tensors,
        "read_nbytes": found.checked_nbytes,
        "wrong": found.wrong,
        "unknown": found.unknown,
    }

"""What a plan and a finished merge look like: as data for machines, as text for people."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from moeplan.memory import MIB
from moeplan.merging import MergePlan, MergeResult
from moeplan.model_config import DTYPE_NAMES
from moeplan.output import free_nbytes
from planner.plan import FileSink, KernelStep, StreamStep


def plan_data(merge_plan: MergePlan, out: Path | None) -> dict[str, Any]:
    """The plan for machines. All sizes are bytes."""
    plan, config = merge_plan.plan, merge_plan.config
    return {
        "architecture": merge_plan.family.name,
        "dtype": DTYPE_NAMES[merge_plan.dtype],
        "num_experts": len(config.experts),
        "experts_per_token": config.experts_per_token,
        "sources": _sources(merge_plan),
        "read": {"nbytes": plan.read_nbytes, "more_than_once_nbytes": plan.reread_nbytes},
        "shared": _shared(merge_plan),
        "output": {
            "nbytes": plan.written_nbytes,
            "tensors": sum(len(shard.tensors) for shard in plan.shards),
            "shards": [
                {"file": shard.filename, "nbytes": shard.nbytes, "tensors": len(shard.tensors)} for shard in plan.shards
            ],
            "copied_files": [file.name for file in merge_plan.copied],
        },
        "router": {
            "gate_mode": config.gate_mode,
            "kernels": dict(Counter(step.kernel for step in plan.steps if isinstance(step, KernelStep))),
        },
        "memory": {
            "cap_nbytes": merge_plan.memory.nbytes,
            "forecast_nbytes": merge_plan.memory_nbytes,
            "process_nbytes": merge_plan.memory.process_nbytes,
            "buffers_nbytes": plan.peak_nbytes,
        },
        "disk": {
            "needed_nbytes": merge_plan.disk_nbytes if out is None else merge_plan.needed_nbytes(out),
            "free_nbytes": free_nbytes(out if out is not None else Path.cwd()),
        },
        "fingerprint": plan.fingerprint,
    }


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
    }


def plan_view(data: dict[str, Any]) -> RenderableType:
    """What `--plan` prints, from `plan_data`."""
    sources = Table(box=None, pad_edge=False, header_style="dim")
    for column, justify in (("source", "left"), ("used as", "left"), ("files", "right"), ("read", "right")):
        sources.add_column(column, justify=justify)  # type: ignore[arg-type]
    for source in data["sources"]:
        sources.add_row(source["path"], _roles(source["used_as"]), str(source["files"]), decimal(source["read_nbytes"]))

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column()
    for name, text in _facts(data):
        facts.add_row(name, text)
    return Group(sources, Text(), facts)


def result_view(data: dict[str, Any]) -> RenderableType:
    """What a finished merge prints, from `result_data`."""
    ways = sorted(data["nbytes_by_path"].items(), key=lambda way: -way[1])
    paths = ", ".join(f"{decimal(nbytes)} {name}" for name, nbytes in ways)
    rate = data["written_nbytes"] / max(data["seconds"], 1e-9)
    return Text(
        f"{data['path']}: {decimal(data['written_nbytes'])} in {data['seconds']:.1f} s ({decimal(int(rate))}/s), "
        f"{decimal(data['read_nbytes'])} read, {paths}, peak memory {_mib(data['peak_memory_nbytes'])}"
    )


def _facts(data: dict[str, Any]) -> list[tuple[str, str]]:
    output, memory, disk, shared = data["output"], data["memory"], data["disk"], data["shared"]
    count = len(output["shards"])
    again = data["read"]["more_than_once_nbytes"]
    return [
        (
            "output",
            f"{data['architecture']}, {data['num_experts']} experts, {data['experts_per_token']} per token, "
            f"{data['dtype']}: {decimal(output['nbytes'])}, {output['tensors']} tensors in "
            f"{count} {'file' if count == 1 else 'files'}",
        ),
        ("read", decimal(data["read"]["nbytes"]) + (f", {decimal(again)} of it more than once" if again else "")),
        (
            "shared",
            f"{shared['tensors']} tensors are read once and written {shared['places']} times, which saves reading "
            f"{decimal(shared['saved_nbytes'])}"
            if shared["tensors"]
            else "nothing: every tensor is written once",
        ),
        ("router", _router(data["router"])),
        (
            "memory",
            f"{_mib(memory['forecast_nbytes'])} at most ({_mib(memory['process_nbytes'])} Python and libraries, "
            f"{_mib(memory['buffers_nbytes'])} buffers); the cap is {_mib(memory['cap_nbytes'])}",
        ),
        ("disk", f"{decimal(disk['needed_nbytes'])} needed, {decimal(disk['free_nbytes'])} free"),
    ]


def _roles(used_as: list[str]) -> str:
    experts = [role for role in used_as if role.startswith("expert")]
    others = [role for role in used_as if role not in experts]
    return ", ".join(others + (experts if len(experts) <= 4 else [f"{len(experts)} experts"]))


def _router(router: dict[str, Any]) -> str:
    layers = router["kernels"].get("decoder_layer", 0)
    evaluated = f"; the prompts go through {layers} layers of the base, one in memory at a time" if layers else ""
    return f"{router['gate_mode']}{evaluated}"


def _sources(merge_plan: MergePlan) -> list[dict[str, Any]]:
    """Each distinct source: where it is, what it is used as, what is read of it."""
    read_nbytes: Counter[str] = Counter()
    for root, nbytes in merge_plan.plan.reads():
        read_nbytes[merge_plan.plan.sources[root.source].path] += nbytes
    names = {"base_model": "base", "experts": "expert", "shared_experts": "shared expert"}
    roles = [
        (model, " ".join([names[str(key)], *map(str, place[:1])]))
        for (key, *place), model in merge_plan.sources.named()
    ]
    used_as: dict[str, list[str]] = {}
    files: dict[str, set[str]] = {}
    for model, role in roles:
        path = str(model.checkpoint.path)
        used_as.setdefault(path, []).append(role)
        files.setdefault(path, {read.file.path for read in model.checkpoint.tensors.values()})
    return [
        {
            "path": path,
            "used_as": used_as[path],
            "files": len(files[path]),
            "read_nbytes": sum(read_nbytes[file] for file in files[path]),
        }
        for path in used_as
    ]


def _shared(merge_plan: MergePlan) -> dict[str, int]:
    """What is read once and written to several places."""
    tensors = places = saved = 0
    for step in merge_plan.plan.steps:
        if not isinstance(step, StreamStep):
            continue
        count = sum(isinstance(sink, FileSink) for branch in step.branches for sink in branch.sinks)
        if count > 1:
            tensors += 1
            places += count
            saved += (count - 1) * step.numel * step.root.dtype.itemsize
    return {"tensors": tensors, "places": places, "saved_nbytes": saved}


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:,.0f} MiB" if nbytes < 10 * 1024 * MIB else f"{nbytes / (1024 * MIB):,.1f} GiB"

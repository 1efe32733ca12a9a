"""What a plan and a finished merge look like: as data for machines, as text for people."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from moeplan.disk import free_nbytes
from moeplan.memory import ESTIMATE, MIB
from moeplan.merging import MergeResult
from moeplan.model_config import DTYPE_NAMES
from moeplan.planning import MergePlan
from moeplan.routing import RouterFacts
from moeplan.wording import count
from planner.expr import RemoteFile, Source
from planner.plan import FileSink, KernelStep, Plan, StreamStep

if TYPE_CHECKING:
    from moeplan.verification import Verification


_LINE = 72
"""What there is room for beside a word, in 80 columns."""


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


def verification_view(data: dict[str, Any]) -> RenderableType:
    """What `moeplan verify` prints, from `verification_data`."""
    what = f"{count(data['tensors'], 'tensor')}, {decimal(data['read_nbytes'])}"
    wrong, unknown = len(data["wrong"]), len(data["unknown"])
    if not wrong and not unknown:
        return fact("intact", [printable(data["path"]), f"{what}: everything is as it was written"])
    found = [f"{wrong:,} not as written"] * bool(wrong) + [f"{unknown:,} that cannot be checked"] * bool(unknown)
    return fact("wrong" if wrong else "unknown", [printable(data["path"]), f"{what}: {', '.join(found)}"])


def plan_view(data: dict[str, Any], *, with_files: bool = False) -> RenderableType:
    """What `--plan` prints, from `plan_data`. No line but that of a long path is wider than 80 columns."""
    rows: list[tuple[str, ...]] = [
        (source["path"], _roles(source["used_as"]), str(source["files"]), decimal(source["read_nbytes"]))
        for source in data["sources"]
    ]
    columns = ["source", "used as", "files>", "read>"]
    if data["hub"] is not None:
        columns.append("on the Hub>")
        rows = [
            (*row, decimal(source["remote_nbytes"]) if source["remote_nbytes"] else "")
            for row, source in zip(rows, data["sources"], strict=True)
        ]
    parts: list[RenderableType] = [plain_table(columns, rows)]
    if with_files:
        files = [(shard["file"], str(shard["tensors"]), decimal(shard["nbytes"])) for shard in data["output"]["shards"]]
        files += [(f"{name} (from the base)", "", "") for name in data["output"]["copied_files"]]
        parts += [Text(), plain_table(("output file", "tensors>", "size>"), files)]
    parts.append(Text())
    parts += [fact(name, lines) for name, lines in _facts(data)]
    return Group(*parts)


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]], gap: int = 2) -> Table:
    """A table without lines, with a `gap` between columns. One whose name ends in `>` is for numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, gap, 0, 0))
    for column in columns:
        is_number = column.endswith(">")
        table.add_column(column.rstrip(">"), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def result_view(data: dict[str, Any], routable: Path) -> RenderableType:
    """What a finished merge prints, from `result_data`; `routable` is what `moeplan routes` is to be given."""
    by_path = sorted(data["nbytes_by_path"].items(), key=lambda item: -item[1])
    ways = ", ".join(f"{decimal(nbytes)} {name}" for name, nbytes in by_path)
    rate = data["written_nbytes"] / max(data["seconds"], 1e-9)
    done = fact(
        "done",
        [
            printable(data["path"]),
            f"{decimal(data['written_nbytes'])} in {data['seconds']:.1f} s ({decimal(int(rate))}/s): {ways}",
            f"{decimal(data['read_nbytes'])} read, {_mib(data['peak_memory_nbytes'])} of memory at most",
        ],
    )
    routers = data["routers"]
    return (
        done
        if routers is None or routers["closest_experts"] is None
        else Group(done, fact("routers", _said(routers, routable)))
    )


def _said(routers: dict[str, Any], routable: Path) -> list[str]:
    """What there is to say of routers after a merge: three lines."""
    first, second = routers["closest_experts"]
    degenerate = len(routers["degenerate_layers"])
    return [
        f"experts {first} and {second} are most alike: cosine {round(routers['cosine'], 2) + 0.0:.2f}, the mean of "
        f"{count(routers['layers'], 'layer')}",
        f"degenerate in {degenerate or 'none'} of them",
        f"where tokens go: moeplan routes {printable(shlex.quote(str(routable)))}",
    ]


def fact(name: str, lines: Sequence[str]) -> Table:
    """`name`, bold, before `lines`, which stand one below the other, and go on there where they are too long."""
    table = Table.grid()
    table.add_column(width=8, style="bold")
    table.add_column(overflow="fold")
    table.add_row(name, Text("\n".join(lines)))
    return table


def space_warning(data: dict[str, Any]) -> str | None:
    """What to say, from `plan_data`, where the disk is too small for the merge."""
    needed, free = data["disk"]["needed_nbytes"], data["disk"]["free_nbytes"]
    if needed <= free:
        return None
    what = (
        "what is downloaded, and the output, take"
        if data["hub"] and data["hub"]["download_nbytes"]
        else "the output takes"
    )
    return f"{what} {decimal(needed)} of disk space, and {decimal(free)} are free there"


def printable(text: str) -> str:
    """`text` with everything escaped that a terminal would obey, and no terminal can show, but line ends."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _facts(data: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """What else there is to say: a word, and lines of at most `_LINE` characters."""
    output, memory, disk = data["output"], data["memory"], data["disk"]
    again = data["read"]["more_than_once_nbytes"]
    return [
        (
            "output",
            [
                f"{data['architecture']} of {count(data['num_experts'], 'expert')}, {data['experts_per_token']} "
                f"per token, in {data['dtype']}",
                *_backbone(data["backbone"], data["num_experts"]),
                f"{decimal(output['nbytes'])}: {count(output['tensors'], 'tensor')} in "
                f"{count(len(output['shards']), 'file')}, {len(output['copied_files'])} more copied from the base",
                *_choice(data["architecture"], data["would_fit_too"]),
                *_replaced(output["replaced_files"]),
            ],
        ),
        ("read", [decimal(data["read"]["nbytes"]) + (f", {decimal(again)} of it more than once" if again else "")]),
        *([] if data["hub"] is None else [("hub", _hub_lines(data["hub"]))]),
        ("shared", [_shared_text(data["shared"])]),
        ("router", _router(data["router"])),
        (
            "memory",
            [
                f"{_mib(memory['forecast_nbytes'])} at most, of {_mib(memory['cap_nbytes'])} that it may take",
                f"({_mib(memory['process_nbytes'])} Python and libraries, {_mib(memory['buffers_nbytes'])} buffers)",
                *([f"({ESTIMATE})"] if memory["is_estimate"] else []),
            ],
        ),
        ("disk", [f"{decimal(disk['needed_nbytes'])} needed, {decimal(disk['free_nbytes'])} free"]),
    ]


def _backbone(backbone: str, num_experts: int) -> list[str]:
    """Where what is not an MLP comes from, where that is not the base."""
    if backbone == "base":
        return []
    return [f"attention, norms and embeddings: the mean over {count(num_experts, 'expert')}"]


def _choice(chosen: str, others: list[str]) -> list[str]:
    """Why this family, where others would do."""
    if not others:
        return []
    return [
        f"({' and '.join(others)} would fit, too: `architecture:` chooses;",
        f"without it, the first in mergekit's order: {chosen})",
    ]


def _replaced(names: list[str]) -> list[str]:
    """What `--overwrite` takes away, in one line."""
    if not names:
        return []
    for shown in range(min(len(names), _LINE // 2), 0, -1):
        more = f" and {len(names) - shown:,} more" if shown < len(names) else ""
        line = f"replaces {', '.join(map(printable, names[:shown]))}{more}"
        if len(line) <= _LINE:
            return [line]
    return [f"replaces {count(len(names), 'file')}"]


def _shared_text(shared: dict[str, int]) -> str:
    if not shared["tensors"]:
        return "nothing: every tensor is written once"
    return (
        f"{count(shared['tensors'], 'tensor')} read once and written {shared['places']:,} times; "
        f"saves reading {decimal(shared['saved_nbytes'])}"
    )


def _roles(used_as: list[str]) -> str:
    experts = [role for role in used_as if role.startswith("expert")]
    others = [role for role in used_as if role not in experts]
    return ", ".join(others + (experts if len(experts) <= 4 else [f"{len(experts)} experts"]))


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


def _router(router: dict[str, Any]) -> list[str]:
    mode, evaluations = router["gate_mode"], router["evaluations"]
    lines = []
    for drawn in (each for each in evaluations if each["kernel"] == "sample"):
        number, tokens = drawn["shape"]
        again = f"read for this: {decimal(drawn['read_again_nbytes'])}" if drawn["times"] else "held in memory"
        lines += [
            f"(an expert writes {count(number, 'passage')}, which takes its model of "
            f"{decimal(drawn['weights_nbytes'])}",
            f"{tokens} times, once for each token; {again})",
        ]
    of_layers: dict[int, list[dict[str, Any]]] = {}
    for each in evaluations:
        if each["layer"] is not None:
            of_layers.setdefault(each["layer"], []).append(each)
    if not of_layers:
        return [mode, *lines]
    lines.insert(0, f"{mode}: the prompts run through {count(len(of_layers), 'layer')} of the base, one at a time")
    if budget := router["device_budget_nbytes"]:
        lines.insert(1, f"(on {router['device']}, of whose memory {decimal(budget)} may be taken)")
    streamed = [of_layer for of_layer in of_layers.values() if any(each["times"] for each in of_layer)]
    resident = [of_layer for of_layer in of_layers.values() if of_layer not in streamed]
    if resident:
        largest = decimal(max(each["weights_nbytes"] for of_layer in resident for each in of_layer))
        lines.append(f"({count(len(resident), 'layer')} resident: {largest} fit; read once for this and the copy)")
    if streamed:
        kernels = [each for of_layer in streamed for each in of_layer]
        largest, blocks, again = (
            decimal(number)
            for number in (
                max(each["weights_nbytes"] for each in kernels),
                max(each["blocks_nbytes"] for each in kernels),
                sum(each["read_again_nbytes"] for each in kernels),
            )
        )
        times = max(each["times"] for each in kernels)
        lines += [
            f"({count(len(streamed), 'layer')} streamed: {largest} do not fit, blocks of them take {blocks};",
            f"{again} are read for this alone{f', each layer {times} times' if times > 1 else ''})",
        ]
    return lines


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


def _hub_lines(hub: dict[str, Any]) -> list[str]:
    """What is downloaded, from where to where; what would do."""
    lines = []
    if hub["files"]:
        what = f"{decimal(hub['nbytes'])} in {count(len(hub['files']), 'file')}"
        if hub["stream"]:
            lines.append(f"{decimal(hub['needed_nbytes'])} to be streamed from {hub['endpoint']}, of {what}")
        else:
            lines += [
                f"{what} to be downloaded from {hub['endpoint']}",
                f"to {hub['cache']}",
                f"({decimal(hub['needed_nbytes'])} of it is needed; --stream reads no more, and stores nothing)",
            ]
    if hub["beside_nbytes"]:
        lines.append(f"{decimal(hub['beside_nbytes'])} of tokenizer files to be downloaded")
    return lines


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
            once = sum(nbytes for _, nbytes in step.reads()) or step.numel * step.root.dtype.itemsize
            saved += (count - 1) * once
    return {"tensors": tensors, "places": places, "saved_nbytes": saved}


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:,.0f} MiB" if nbytes < 10 * 1024 * MIB else f"{nbytes / (1024 * MIB):,.1f} GiB"

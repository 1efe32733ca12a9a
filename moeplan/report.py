"""What a plan, a finished merge and a check of one look like in a terminal, from `report_data`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.text import Text

from moeplan.memory import ESTIMATE, MIB
from moeplan.tables import fact, plain_table
from moeplan.wording import count, printable

_LINE = 72
"""What there is room for beside a word, in 80 columns."""


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


def verification_view(data: dict[str, Any]) -> RenderableType:
    """What `moeplan verify` prints, from `verification_data`."""
    what = f"{count(data['tensors'], 'tensor')}, {decimal(data['read_nbytes'])}"
    wrong, unknown = len(data["wrong"]), len(data["unknown"])
    if not wrong and not unknown:
        return fact("intact", [printable(data["path"]), f"{what}: everything is as it was written"])
    found = [f"{wrong:,} not as written"] * bool(wrong) + [f"{unknown:,} that cannot be checked"] * bool(unknown)
    return fact("wrong" if wrong else "unknown", [printable(data["path"]), f"{what}: {', '.join(found)}"])


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


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:,.0f} MiB" if nbytes < 10 * 1024 * MIB else f"{nbytes / (1024 * MIB):,.1f} GiB"

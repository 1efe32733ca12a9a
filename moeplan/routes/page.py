"""`moeplan routes --html`: one HTML page that needs nothing else, neither files nor a network, nor scripts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from executor.errors import RunError, reason
from executor.files import write_file
from moeplan.errors import UserError
from moeplan.routes.wording import CUT, among, best, decimals, layer_cells, layer_columns, percent, shortened
from moeplan.wording import count, printable

MAX_NAMED_ROWS = 12
"""A plot names so many texts; more are numbered, in the order of the table."""

MAX_OPEN_ROWS = 16
"""Longer tables are folded."""

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --muted: #636c76; --line: #d5dae0;
  --card: #f5f7f9; --blue: #1a67c4; --orange: #b04a00; --green: #16793c; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e8ebee; --muted: #a0a8b1; --line: #3a4149;
  --card: #1e2226; --blue: #6db0ff; --orange: #ffa657; --green: #67d48b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0; } .muted, figcaption span { color: var(--muted); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.facts dt { color: var(--muted); font-size: .85rem; } .facts dd { margin: 0; font-size: 1.35rem; font-weight: 600; }
.facts small { display: block; font-size: .8rem; font-weight: 400; color: var(--muted); }
.advice { background: var(--card); border-left: .3rem solid var(--orange); border-radius: .4rem;
  padding: .7rem 1rem; margin: 1rem 0; }
.advice.none { border-color: var(--green); }
.advice h2 { margin: 0 0 .25rem; } .advice ul { margin: 0; padding-left: 1.1rem; max-width: 52rem; }
.advice li { margin: .3rem 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 2rem;
  align-items: start; }
figure { margin: 0; min-width: 0; } figcaption { margin-bottom: .5rem; } figcaption strong { display: block; }
figcaption span { font-size: .9rem; }
svg { width: 100%; max-width: 36rem; height: auto; display: block; color: var(--ink); }
svg text { font-family: inherit !important; }
svg image { image-rendering: pixelated; }
.scroll { overflow-x: auto; } .scroll:focus-visible { outline: 2px solid var(--blue); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; } thead th { color: var(--muted); }
.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
summary { cursor: pointer; font-size: 1.15rem; font-weight: 600; margin: 2rem 0 .5rem; }
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Whatever a name holds, a browser loads and runs nothing for it."""


class PageError(UserError):
    """The page cannot be drawn."""


def check_place(html: Path, subject: Path, files: Sequence[str]) -> None:
    """Raises PageError where a page about `subject` and `files` cannot be put at `html`: it would replace one of them
    or what is no page, or it would lie in a model's directory without being named as a page."""
    try:
        place = _real(html)
        if place.is_dir() or not place.parent.is_dir():
            why = "is a directory" if place.is_dir() else f"there is no directory {html.parent}"
            raise PageError(f"--html: {html}: {why}; name a file in one that there is")
        if place in map(_real, (subject, *map(Path, files))):
            raise PageError(f"--html: {html}: is what is to be routed; name another file")
        if place.is_relative_to(_real(subject)) and place.suffix != ".html":
            raise PageError(f"--html: {html}: is in the model's directory; name a file elsewhere, or one in .html")
        if place.exists() and not (place.is_file() and place.suffix == ".html"):
            raise PageError(f"--html: {html}: is there, and no page; name one in .html, or a new file")
        with TemporaryFile(dir=place.parent):
            pass
    except OSError as error:
        raise PageError(f"--html: {html}: {error.strerror}") from error


def write_page(html: Path, text: str) -> None:
    """Put `text` into the file `html`, all at once. Raises RunError."""
    place = _real(html)
    partial = place.with_name(f".moeplan-{os.getpid()}.html")
    try:
        try:
            write_file(partial, text.encode())
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"--html: {html}: {reason(error)}") from error


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def check_installed() -> None:
    """Raises PageError where there is no matplotlib, so that nobody waits for numbers that cannot be drawn."""
    if find_spec("matplotlib") is None:
        raise PageError("--html: matplotlib, which draws the plots, is not installed: pip install 'moeplan[report]'")


def page(data: dict[str, Any]) -> str:
    """The page, from `Routes.to_data()`. Equal for equal data. Raises PageError where matplotlib is not installed."""
    check_installed()
    subject = _text(data["subject"])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>Routes of {subject}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>Where tokens go: {subject}</h1>
<p class="muted">{_text(_made_of(data))}</p>
{_advice(data)}
{_key_numbers(data)}
<h2>Plots</h2>
<div class="plots">
{"".join(_figures(data))}
</div>
{_tables(data)}
</main>
</body>
</html>
"""


def _text(text: str) -> str:
    """`text` as HTML, whatever is in it."""
    return escape(printable(text))


def _made_of(data: dict[str, Any]) -> str:
    texts = data["texts"]
    tokens = sum(text["tokens"] for text in texts)
    held_out = sum(text["tokens"] for text in texts if text["held_out"])
    mode = f", gate mode {data['gate_mode']}" if data["gate_mode"] else ""
    return (
        f"{count(len(data['experts']), 'expert')}, {data['experts_per_token']} per token, "
        f"{count(len(data['layers']), 'layer')}{mode}. "
        f"{count(tokens, 'token')} in {count(len(texts), 'text')}, {held_out:,} of them held out."
    )


def _advice(data: dict[str, Any]) -> str:
    if not data["advice"]:
        return '<section class="advice none"><h2>Advice</h2><p>No problem was found.</p></section>'
    sentences = "".join(f"<li>{_sentence(sentence)}</li>\n" for sentence in data["advice"])
    return f'<section class="advice"><h2>Advice</h2><ul>\n{sentences}</ul></section>'


def _sentence(text: str) -> str:
    return f"{_text(text[:1].upper() + text[1:])}."


def _key_numbers(data: dict[str, Any]) -> str:
    overall, k, num_experts = data["overall"], data["experts_per_token"], len(data["experts"])
    facts = [
        ("entropy", percent(overall["entropy"]), "100 % is no preference"),
        ("load balance", decimals(overall["load_balance"]), "1 is even"),
    ]
    if k > 1:
        facts.insert(0, ("weight of the first", percent(overall["first_weight"]), f"{percent(1 / k)} is equal"))
    if among(data):
        facts.insert(0, (f"agreement, among {k}", percent(overall["agreement_topk"]), _chance(k / num_experts)))
    facts.insert(0, ("agreement, first", percent(overall["agreement_top1"]), _chance(1 / num_experts)))
    degenerate = sum(layer["degenerate"] for layer in data["layers"])
    facts.append(("degenerate", str(degenerate), f"of {count(len(data['layers']), 'layer')}"))
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{number or '–'}<small>{said}</small></dd></div>" for name, number, said in facts
    )
    return f'<dl class="facts">{cells}</dl>'


def _chance(share: float) -> str:
    return f"by chance {percent(share)}"


def _figures(data: dict[str, Any]) -> Iterable[str]:
    from moeplan.routes import plots  # the only use of matplotlib, which is optional

    k, num_experts, overall, layers = data["experts_per_token"], len(data["experts"]), data["overall"], data["layers"]

    def shares(key: str) -> np.ndarray:
        return np.array([layer[key] for layer in layers], dtype=float)

    yield _figure(
        "Best expert, by layer",
        f"The share of tokens for which an expert comes first, in per cent. Even: {percent(1 / num_experts)}.",
        plots.heat_map(
            "Heat map: share of tokens by layer and best expert",
            shares("top1"),
            "expert",
            "layer",
            limit=CUT / num_experts,
        ),
    )
    if among(data):
        yield _figure(
            f"Among the best {k}, by layer",
            f"The share of tokens that an expert works on, in per cent. Even: {percent(k / num_experts)}.",
            plots.heat_map(
                f"Heat map: share of tokens by layer and experts among the best {k}",
                shares("topk"),
                "expert",
                "layer",
                limit=CUT * k / num_experts,
            ),
        )
    texts = data["texts"]
    names = [shortened(printable(text["name"]), 22) for text in texts]
    yield _figure(
        "Which text goes where",
        "The share of each text's tokens by best expert, in per cent, mean over layers. Outlined: the expert whose "
        "text it is.",
        plots.heat_map(
            "Heat map: share of each text's tokens by best expert",
            np.array(overall["text_top1"], dtype=float),
            "expert",
            names if len(names) <= MAX_NAMED_ROWS else "text",
            outlined=[(row, text["expert"]) for row, text in enumerate(texts) if text["expert"] is not None],
        ),
    )
    yield _figure(
        "Layers",
        "Agreement with the texts' experts and entropy, in per cent; load balance, where 1 is even.",
        plots.layer_lines(
            "Lines: agreement, entropy and load balance over the layers", layers, among(data), num_experts
        ),
    )
    yield _figure(
        "How alike the routers' rows are",
        "The cosine between the rows of each two experts, mean over layers. Rows near 1 score tokens alike.",
        plots.heat_map(
            "Heat map: cosine between the router rows of each two experts",
            np.array(overall["cosine"], dtype=float),
            "expert",
            "expert",
            signed=True,
        ),
    )


def _figure(title: str, said: str, svg: str) -> str:
    return f"<figure><figcaption><strong>{title}</strong><span>{said}</span></figcaption>\n{svg}</figure>\n"


def _tables(data: dict[str, Any]) -> str:
    return "\n".join([_experts_table(data), _texts_table(data), _layers_table(data), *_shares_tables(data)])


def _experts_table(data: dict[str, Any]) -> str:
    overall, k = data["overall"], data["experts_per_token"]
    rows = []
    for expert, name in enumerate(data["experts"]):
        own = [text for text in data["texts"] if text["expert"] == expert]
        others = [(value, other) for other, value in enumerate(overall["cosine"][expert])]
        known = [(value, -other) for value, other in others if value is not None and other != expert]
        closest = f"{-max(known)[1]} ({decimals(max(known)[0])})" if known else ""
        tokens = sum(text["tokens"] for text in own)
        rows.append(
            [
                str(expert),
                name,
                f"{tokens:,}",
                percent(overall["top1"][expert]),
                percent(overall["topk"][expert]),
                closest,
            ]
        )
    columns = ["expert", "model", "tokens of text", "comes first", f"among {k}", "closest rows (cosine)"]
    return _table("Experts", "Means over layers.", columns, rows, text_columns=(1,))


def _texts_table(data: dict[str, Any]) -> str:
    overall, rows = data["overall"], []
    for index, text in enumerate(data["texts"]):
        shares, expert = overall["text_top1"][index], text["expert"]
        rows.append(
            [
                str(index),
                text["name"],
                f"{text['tokens']:,}",
                "yes" if text["held_out"] else "no",
                "" if expert is None else percent(shares[expert]),
                "" if expert is None else percent(overall["text_topk"][index][expert]),
                best(shares),
            ]
        )
    columns = ["text", "name", "tokens", "held out", "its expert first", "its expert works", "goes first to expert"]
    return _table("Texts", "Means over layers.", columns, rows, text_columns=(1, 6))


def _layers_table(data: dict[str, Any]) -> str:
    layers = data["layers"]
    rows = [
        [str(index), *layer_cells(data, [layer]), "degenerate" if layer["degenerate"] else ""]
        for index, layer in enumerate(layers)
    ]
    rows.append(["all", *layer_cells(data, layers), ""])
    columns = ["layer", *layer_columns(data), ""]
    said = (
        "Agree: tokens whose own expert comes first, or is among so many. Weight: of the first. Balance: of the load. "
        "Cosine: of the closest two rows. In the last row: means, but the worst condition number and the closest rows."
    )
    return _table("Layers in numbers", said, columns, rows)


def _shares_tables(data: dict[str, Any]) -> Iterable[str]:
    keys = [("top1", "Best expert by layer in numbers")]
    if k := among(data):
        keys.append(("topk", f"Among the best {k} by layer in numbers"))
    for key, title in keys:
        rows = [
            [str(index), *(f"{100 * share:.1f}" for share in layer[key])] for index, layer in enumerate(data["layers"])
        ]
        columns = ["layer", *map(str, range(len(data["experts"])))]
        yield _table(title, "Per cent of tokens; a column for each expert.", columns, rows, is_open=False)


def _table(
    title: str,
    said: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text_columns: Sequence[int] = (),
    is_open: bool = True,
) -> str:
    """A table that folds, open unless it is long. Its first column names the row."""
    css = [' class="text"' if index in text_columns else "" for index in range(len(columns))]
    head = "".join(f'<th scope="col"{of}>{_text(column)}</th>' for of, column in zip(css, columns, strict=True))
    body = "".join(
        f'<tr><th scope="row">{_text(name)}</th>'
        + "".join(f"<td{of}>{_text(cell)}</td>" for of, cell in zip(css[1:], cells, strict=True))
        + "</tr>\n"
        for name, *cells in rows
    )
    return f"""<details{" open" * (is_open and len(rows) <= MAX_OPEN_ROWS)}>
<summary>{title}</summary>
<p class="muted">{said}</p>
<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table aria-label="{title}">
<thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody>
</table></div>
</details>"""

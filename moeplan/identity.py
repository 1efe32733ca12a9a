"""What makes a merge that merge, as data, and how two of them differ, in words.

`moeplan.record` says what it is of a merge. A journal begins with it, and `moeplan.json` has it beside the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeplan.wording import printable

Identity = Mapping[str, Mapping[str, Any]]
"""What makes a merge that merge: its config, sources, options ..., each a mapping from names to what they are."""

COMMITS = "commit of"
"""The part of an identity that has the commits of models on the Hub."""

PLAN = "plan"
"""The part that follows from the others."""

FACTS = {
    "nbytes": "size",
    "mtime_ns": "time",
    "header_sha256": "header",
    "sample_sha256": "weights",
    "sha256": "content",
    "etag": "ETag",
}
"""What an identity has of files, in words."""


def difference(before: Mapping[str, Any], now: Identity) -> str:
    """What changed, in words."""
    changes: list[str] = []
    for kind in sorted({*before, *now}, key=lambda kind: (kind == PLAN, kind)):
        if kind == PLAN and changes:  # it follows from the rest
            break
        old, new = before.get(kind, {}), now.get(kind, {})
        changes += [
            _change(f"{kind} {name}", old.get(name), new.get(name))
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]
    listed = changes[:3] + ([f"and {len(changes) - 3} more"] if len(changes) > 3 else [])
    return "; ".join(listed)


def _change(what: str, old: Any, new: Any) -> str:
    facts = [fact for fact in (old, new) if isinstance(fact, dict)]
    if len(facts) == 2:
        changed = [word for key, word in FACTS.items() if old.get(key) != new.get(key)]
        return f"{what} was changed ({', '.join(changed)})"
    if facts:
        return f"{what} is {'gone' if new is None else 'new'}"
    return f"{what} was {_shown(old)} and is {_shown(new)}"


def _shown(value: Any) -> str:
    text = "absent" if value is None else printable(str(value)).replace("\n", "\\n")
    return text if len(text) <= 60 else f"{text[:60]}…"

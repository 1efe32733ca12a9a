"""How long a server that is busy is waited for, and how often it is asked again.

No request is made here, so whoever makes them in another way can be as patient without importing TLS.
"""

from __future__ import annotations

import random
import re
from email.utils import parsedate_to_datetime
from time import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from http.client import HTTPMessage

TIMEOUT_SECONDS = 30.0
"""How long nothing may come of a request that was made: longer, and the server is away."""

ATTEMPTS = 8
"""How often in a row nothing may come of a request."""

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 300.0
"""Before the next attempt. The Hub counts requests in windows of five minutes."""

SILENT_SECONDS = 5.0
"""How long a server is waited for without a word."""

BUSY = frozenset({408, 425, 429, 500, 502, 503, 504, *range(520, 525)})
"""HTTP's statuses for what may work later, and Cloudflare's for a server behind it that does not answer."""

_USED_UP = re.compile(r"\br=0;\s*t=(\d{1,9})\b")


def pause_seconds(failures: int, asked: float | None = None) -> float:
    """How long to wait when nothing came of the last `failures` requests, 1 or more: what the server has asked for, or
    twice as long each time.

    Less a random part, so that many readers do not come back together.
    """
    backoff = FIRST_PAUSE_SECONDS * 2.0 ** (failures - 1) * random.uniform(0.5, 1)
    return min(max(backoff, asked or 0.0), LONGEST_PAUSE_SECONDS)


def asked_seconds(headers: Mapping[str, str] | HTTPMessage) -> float | None:
    """The seconds that a server asks to wait in the headers of its answer; None where it does not say.

    Most say it in `Retry-After`: RFC 9110, 10.2.3, allows a number and a date. The Hub says in `RateLimit`, which is a
    draft (draft-ietf-httpapi-ratelimit-headers-09), when requests are to be had again: `"api";r=0;t=55`.
    """
    limit = _USED_UP.search(headers.get("RateLimit") or "")
    if limit is not None:
        return float(limit[1])
    value = (headers.get("Retry-After") or "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except (ValueError, OverflowError):
        return None

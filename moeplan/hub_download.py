"""How huggingface_hub is made to download: over HTTP, without bars and words of its own, and with no halves left."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from executor.settings import Shared

DOWNLOAD_NBYTES = 40 << 20
"""Memory that one download may take: huggingface_hub reads 10 MB at a time, and where the processor is short, four such
blocks are there at once."""

DOWNLOADS_AT_ONCE = 4

_HALF = re.compile(r"/blobs/[0-9a-f]+\.[0-9a-f]+\.incomplete\Z")
"""What huggingface_hub downloads into. Older versions have `DIGEST.incomplete`, and go on with it."""


class StoppedError(Exception):
    """A download that is no longer wanted."""


class SilentBar:
    """As much of tqdm as huggingface_hub uses; shows nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> SilentBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, n: float | None = 1) -> None:
        """Told how many bytes came."""

    def close(self) -> None:
        pass


@Shared
@contextmanager
def plainly() -> Iterator[None]:
    """To be entered around each download, in whichever thread: within, huggingface_hub downloads over HTTP, and logs no
    warnings about what is tried again.

    hf_xet would take gigabytes of memory, whatever the cap.
    """
    from huggingface_hub import constants

    logger = logging.getLogger("huggingface_hub")
    before = constants.HF_HUB_DISABLE_XET, logger.level
    constants.HF_HUB_DISABLE_XET = True
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET, level = before
        logger.setLevel(level)


def remove_halves() -> None:
    """Remove the files that this process is downloading into: no download goes on with one, nor ever removes it."""
    for opened in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            file = opened.readlink()
            if _HALF.search(str(file)):
                file.unlink()

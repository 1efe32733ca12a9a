"""How huggingface_hub is made to download: over HTTP, without bars and words of its own, and with no halves left."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

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


class _Plainly:
    """Within, huggingface_hub downloads over HTTP, and logs no warnings about what is tried again.

    hf_xet would take gigabytes of memory, whatever the cap. These settings are the process's: the last thread that is
    within puts them back.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._within = 0
        self._before = (False, logging.NOTSET)

    def __enter__(self) -> None:
        from huggingface_hub import constants

        logger = logging.getLogger("huggingface_hub")
        with self._lock:
            if self._within == 0:
                self._before = constants.HF_HUB_DISABLE_XET, logger.level
            self._within += 1
            constants.HF_HUB_DISABLE_XET = True
            logger.setLevel(logging.ERROR)

    def __exit__(self, *raised: object) -> None:
        from huggingface_hub import constants

        with self._lock:
            self._within -= 1
            if self._within == 0:
                constants.HF_HUB_DISABLE_XET, level = self._before
                logging.getLogger("huggingface_hub").setLevel(level)


plainly = _Plainly()
"""To be entered around each download, in whichever thread."""


def remove_halves() -> None:
    """Remove the files that this process is downloading into: no download goes on with one, nor ever removes it."""
    for opened in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            file = opened.readlink()
            if _HALF.search(str(file)):
                file.unlink()

"""moeplan without its checksums and its journal, to measure what they cost.

    python unchecked.py CONFIG OUT [OPTIONS]

There is no such option, and should be none: this takes them out of the process. Chunks are not hashed, nothing is
noted, and nothing is synced before the end.
"""

from typing import Any
from unittest.mock import patch

from executor import chunk_runner, durability
from executor.journal import Journal
from moeplan import staging
from moeplan.__main__ import main


def without_file(*args: Any) -> Journal:
    """A journal that is kept in memory and forgotten."""
    return Journal()


def no_checksum(*args: Any) -> int:
    return 0


if __name__ == "__main__":
    with (
        patch.object(staging, "Journal", without_file),
        patch.object(chunk_runner, "checksum", no_checksum),
        patch.object(durability, "SYNC_SECONDS", float("inf")),
    ):
        main()

"""Results of kernels that later kernels need, saved so that these kernels need not run again.

Which of them count, the journal says: one is put on the disk before the journal says that it is there for good, and
removed when it is sure to say that nothing needs it any more. Positions are those where the journal ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock

from xxhash import xxh3_64_intdigest

from executor.errors import RunError, naming
from executor.files import sync, write_file


class Results:
    """Results in `directory`, which is made for the first, each in a file under the name that the plan gives it.

    Safe to use from several threads. Raises RunError, from any method, where the disk is full or fails.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = Lock()
        self._dropped: dict[str, int] = {}  # and the position at which the journal says so
        self._unsynced: set[str] = set()  # which may not be on the disk

    def intact(self, checksums: Mapping[str, int], position: int) -> dict[str, int]:
        """Those of `checksums` that earlier runs left as they should be. What else they left there is dropped."""
        found = {key: checksum for key, checksum in checksums.items() if self._is_intact(key, checksum)}
        with naming(self._directory):
            left = {path.name for path in self._directory.glob("*")}
        with self._lock:
            self._unsynced.update(found)
            self._dropped.update(dict.fromkeys(left - found.keys(), position))
        return found

    def save(self, key: str, memory: memoryview) -> int:
        """Save a result; returns its checksum.

        It is put on the disk when it is to count after a restart: see `sync`. Who waited for that here would wait for
        all that the disk has been given before.
        """
        path = self._directory / key
        with self._lock:
            self._dropped.pop(key, None)  # what an earlier run left of it is not to be removed any more
        with naming(path):
            path.parent.mkdir(exist_ok=True)
            write_file(path, memory, wait=False)
        with self._lock:
            self._unsynced.add(key)
        return xxh3_64_intdigest(memory)

    def load(self, key: str, checksum: int, memory: memoryview) -> None:
        """Fill `memory` with a result that an earlier run saved. One that is damaged is left for `intact` to drop."""
        path = self._directory / key
        with naming(path), open(path, "rb") as file:
            file.readinto(memory)
        if xxh3_64_intdigest(memory) != checksum:
            raise RunError(f"{path}: is not what was saved there any more; the next run computes it again")

    def drop(self, key: str, position: int) -> None:
        """Nothing needs this result any more, as the journal says up to `position`."""
        with self._lock:
            self._dropped[key] = position

    def sync(self, position: int) -> None:
        """Wait until the results, and their names, are on the disk, but for those that are dropped by `position`."""
        with self._lock:
            gone = self._dropped_by(position)
            saved, self._unsynced = self._unsynced.difference(gone), set()
        names = (self._directory, self._directory.parent) if saved else ()
        for path in (*(self._directory / key for key in saved), *names):
            with naming(path):
                sync(path)

    def remove(self, position: int) -> None:
        """Remove what is dropped by `position`, which is on the disk."""
        with self._lock:  # since one of them may be saved again
            for key in self._dropped_by(position):
                del self._dropped[key]
                with suppress(OSError):
                    (self._directory / key).unlink()

    def _dropped_by(self, position: int) -> list[str]:
        return [key for key, end in self._dropped.items() if end <= position]

    def _is_intact(self, key: str, checksum: int) -> bool:
        try:
            return xxh3_64_intdigest((self._directory / key).read_bytes()) == checksum
        except OSError:
            return False

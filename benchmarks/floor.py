"""The floor: moves as many bytes as asked for by direct I/O, past the page cache, through one aligned buffer.

    python -I -S floor.py write NBYTES FILE    into a new, preallocated file, then fsync
    python -I -S floor.py read NBYTES FILE...  from the files in turn

prints `{"direct": true, "nbytes": N}`; `direct` is false where the file system has no direct I/O and the same was done
through the page cache.
"""

import json
import mmap
import os
import sys

PAGE = 4096
BLOCK_NBYTES = 8 << 20
"""More at a time, or several threads, moves bytes no faster on any disk tried."""


def whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def open_directly(path: str, flags: int) -> tuple[int, bool]:
    """Open a file for direct I/O; for buffered I/O where the file system refuses."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644), True
    except OSError:
        return os.open(path, flags, 0o644), False


def write(path: str, nbytes: int) -> tuple[int, bool]:
    """Write whole pages, `nbytes` rounded up, and wait until they are on the disk."""
    end = whole_pages(nbytes)
    buffer = mmap.mmap(-1, BLOCK_NBYTES)
    buffer.write(os.urandom(1 << 20) * (BLOCK_NBYTES >> 20))
    block = memoryview(buffer)
    fd, direct = open_directly(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if end:
        os.posix_fallocate(fd, 0, end)
    offset = 0
    while offset < end:
        offset += os.pwrite(fd, block[: end - offset], offset)
    os.fsync(fd)
    os.close(fd)
    return end, direct


def read(paths: list[str], nbytes: int) -> tuple[int, bool]:
    """Read from `paths`, in turn, until `nbytes`, rounded up to whole pages, have been read or the files end."""
    block = memoryview(mmap.mmap(-1, BLOCK_NBYTES))
    done, direct = 0, True
    for path in paths:
        fd, directly = open_directly(path, os.O_RDONLY)
        direct = direct and directly
        offset, end = 0, os.fstat(fd).st_size
        while offset < end and done < nbytes:
            count = os.preadv(fd, [block[: whole_pages(nbytes - done)]], offset)
            offset += count
            done += count
        os.close(fd)
    return done, direct


def main() -> None:
    action, nbytes, *paths = sys.argv[1:]
    if action == "write":
        moved, direct = write(paths[0], int(nbytes))
    else:
        moved, direct = read(paths, int(nbytes))
    print(json.dumps({"direct": direct, "nbytes": moved}))


if __name__ == "__main__":
    main()

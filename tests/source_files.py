"""Files that plans read, and that nobody opens."""

from planner.expr import SourceFile

FILES = tuple(SourceFile(1, inode, 1 << 40, 0, f"/models/{inode}") for inode in range(3))
FACTORS = SourceFile(1, 3, 1 << 40, 0, "/adapters/3")

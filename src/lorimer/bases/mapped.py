"""A file's bytes as an array: read from the disk as they are touched, given back when asked."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class MappedFile:
    """All bytes of a file that is not empty. Raises OSError if it cannot be mapped."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # Copy-on-write, because torch warns of memory that cannot be written. Nobody writes.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.bytes: Bytes = np.frombuffer(self._map, dtype=np.uint8)

    def release(self) -> None:
        """Let the system take back the memory that reading filled; what is touched again is read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

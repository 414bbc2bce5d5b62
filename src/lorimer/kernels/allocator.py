"""Keep freed memory in the process instead of giving it back after every operation.

By default glibc returns large blocks to the system at once, and each new one then costs a page
fault for every 4 KiB: widening 25 MB of logits took 33 ms and more in place of 3 to 8 ms.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from functools import cache

# Numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# What mallopt takes at most on every version: it holds an int, and old ones refuse more than 32 MiB.
LARGEST, LARGEST_OLD = (1 << 31) - 1, 32 << 20


# oneDNN keeps code for the last 1,024 sizes of matrix products, hundreds of KB each. A run whose packs
# are of few sizes needs a fraction of them.
KEPT_PRODUCTS = "128"


def _c_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(ctypes.util.find_library("c"))
    except (OSError, TypeError):
        return None


@cache
def keep_freed_memory() -> bool:
    """Ask the C library to reuse freed blocks; false where it cannot be asked (not glibc)."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KEPT_PRODUCTS)
    mallopt = getattr(_c_library(), "mallopt", None)
    if mallopt is None:
        return False
    trim = mallopt(M_TRIM_THRESHOLD, LARGEST)
    return bool(trim and (mallopt(M_MMAP_THRESHOLD, LARGEST) or mallopt(M_MMAP_THRESHOLD, LARGEST_OLD)))


def give_back_freed_memory() -> None:
    """Give freed blocks back to the system now, those between others too. After loading a base the heap has
    holes of the sizes that loading asked for, which no step asks for again."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)

"""The C library's memory allocator, told to keep what torch frees.

A network on a CPU allocates and frees the same activations at each step. glibc gives them back to the system and gets
new pages for them, each a page fault. The same settings stand in the environment of the demo and the benchmarks as
MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ (bootstrap.py).
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_KEPT = 2**30  # bytes


def keep_freed_memory() -> None:
    """Keep freed memory in this process. Does nothing where the C library is not glibc."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_TRIM_THRESHOLD, _KEPT)
            mallopt(_MMAP_THRESHOLD, _KEPT)

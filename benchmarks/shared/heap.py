"""Memory without chance."""

import ctypes
import sys


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed in place of giving it back; returns whether it is one that can be told.

    What is given back has to be asked for again page by page. glibc gives back what lies free at the end of the heap,
    if it is more than 64 MiB: after each step of one way, say, and never in another, for something small lies behind.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    map_threshold, trim_threshold = -3, -1  # of malloc.h; setting one of them ends the adaption of the other
    return bool(mallopt(map_threshold, 2**25) and mallopt(trim_threshold, 2**31 - 1))

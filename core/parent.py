"""A child never outlives its parent, however the parent ends."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded now: between fork and exec is no time for it


def die_with_parent() -> None:
    """Linux: the kernel kills this process when its parent dies, kill -9 included. Elsewhere leases do without."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

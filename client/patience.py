"""Looking at something again and again until it has ended."""

import time
from collections.abc import Callable
from typing import TypeVar

from client.errors import StillUnderWay

T = TypeVar("T")


def wait(
    look: Callable[[], T],
    has_ended: Callable[[T], bool],
    state: Callable[[T], str],
    seconds: float,
    every_seconds: float = 0.5,
) -> T:
    """What is seen once it has ended. Raises StillUnderWay, with its `state` in words, after so many seconds."""
    end = time.monotonic() + seconds
    while not has_ended(found := look()):
        if time.monotonic() > end:
            raise StillUnderWay(f"{state(found)} after {seconds:.0f} s")
        time.sleep(every_seconds)
    return found

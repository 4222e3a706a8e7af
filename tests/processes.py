"""Processes and ports of this machine, as tests look at them."""

import contextlib
import os
import random
import socket
from pathlib import Path


def is_running(pid: int) -> bool:
    """Whether a process of that number is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def free_port(also_above: int = 0) -> int:
    """A port that nobody listens on, below the range from which the kernel takes its own; `also_above` a second one."""
    while True:
        port = random.randrange(12_000, 22_000 if also_above else 32_000)
        if all(_is_free(port + offset) for offset in {0, also_above}):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def children(pid: int) -> list[int]:
    """Direct children, where the kernel tells."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def descendants(pid: int) -> list[int]:
    """Of every generation."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found

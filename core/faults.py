"""Crash points for tests: `FAULT=name[:nth]:kill|raise|stop|sleep` makes the nth passing of a point go wrong."""

import os
import signal
import threading
import time
from collections import Counter

_seen: Counter[str] = Counter()
_lock = threading.Lock()


class InjectedFault(RuntimeError):
    """What a point raises when the fault says so."""


def point(name: str) -> None:
    """Mark an instant at which the process may die; see FAULTS in docs/operations.md."""
    wanted = os.environ.get("FAULT")
    if not wanted or wanted.split(":")[0] != name:
        return
    _, *middle, action = wanted.split(":")
    with _lock:
        _seen[name] += 1
        if _seen[name] != int(middle[0] if middle else 1):
            return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "sleep":
        time.sleep(3600)
    elif action == "raise":
        raise InjectedFault(name)
    else:
        raise ValueError(f"FAULT: unknown action {action!r}: one of kill, raise, stop, sleep")

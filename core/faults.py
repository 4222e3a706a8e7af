"""Crash points for tests: `FAULT=name[:nth]:kill|raise|stop|sleep` makes the nth passing of a point go wrong.

`FAULT=@file` takes those words from a file, which is looked for at every passing. The first process that they concern
takes the file away (it is `file.taken` then) and goes wrong alone: so a running service can be hit again and again.
"""

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

POINTS = frozenset(
    {
        # API
        "body_staged",  # an upload lies in the spool, whole
        "before_commit",
        "after_commit_before_publish",
        "after_commit_before_reply",
        "flag_set",  # a running job's row says that it shall stop; not committed
        "tombstoned",  # a file's or an adapter's row says that it is deleted; not committed
        # upkeep
        "after_publish_before_mark",
        "mid_object_delete",  # the row is forgotten, its object not yet removed
        # workers
        "received",  # a Celery message, before anything is claimed
        "claimed",  # a dataset, a job, a request for images, an evaluation
        "heartbeat",  # a lease has just been extended
        "dataset_loaded",
        "mid_step",  # after the backward pass
        "rank_step",  # the same in another process of a job on several devices
        "after_step",
        "object_put",  # stored, and no row names it yet: a checkpoint, a dataset's report
        "before_pointer_commit",
        "after_pointer_commit",
        "final_put",  # an adapter, before it is stored
        "before_succeeded",
        "after_succeeded_before_ack",
        "adapter_applied",  # to a slot, before a step is drawn with it
        "mid_sample",
        "evaluation_chunk",
        # the object store
        "object_staged",  # of a folder: written, under no name yet
        "upload_part",  # of a file: the nth piece has gone out
    }
)

_passed: Counter[tuple[str, int]] = Counter()
_lock = threading.Lock()


class InjectedFault(RuntimeError):
    """What a point raises when the fault says so."""


def point(name: str) -> None:
    """Mark an instant at which the process may die; `POINTS` has them all."""
    told = os.environ.get("FAULT")
    if not told:
        return
    file = Path(told[1:]) if told.startswith("@") else None
    fault, told_at = _read(file) if file else (told, 0)
    if not fault:
        return
    wanted, *middle, action = fault.split(":")
    if wanted not in POINTS:
        raise ValueError(f"FAULT: unknown point {wanted!r}: one of {', '.join(sorted(POINTS))}")
    if wanted != name:
        return
    with _lock:
        _passed[fault, told_at] += 1
        if _passed[fault, told_at] != int(middle[0] if middle else 1):
            return
        if file and not _take(file):
            return
    _go_wrong(name, action)


def _read(file: Path) -> tuple[str, int]:
    """The fault, and when it was told: the same words written again are another fault."""
    try:
        return file.read_text().strip(), file.stat().st_mtime_ns
    except FileNotFoundError:
        return "", 0


def _take(file: Path) -> bool:
    try:
        file.rename(f"{file}.taken")
    except FileNotFoundError:
        return False
    return True


def _go_wrong(name: str, action: str) -> None:
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

"""Run one of our modules in a process of its own: bare environment, no inherited files, bounded time and output."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_TICK_SECONDS = 0.5
_CHUNK = 64 * 1024
_STDERR_KEPT = 8 * 1024


@dataclass(frozen=True)
class Outcome:
    """How the process ended: its exit status (minus the signal), what it wrote, and whether we had to end it."""

    returncode: int
    stdout: bytes
    stderr: bytes
    timed_out: bool
    too_long: bool

    @property
    def signal(self) -> int | None:
        return -self.returncode if self.returncode < 0 else None


def run(
    module: str,
    request: dict[str, Any],
    *,
    wall_seconds: float,
    max_output_bytes: int = 64 * 1024**2,
    on_tick: Callable[[], object] = lambda: None,
) -> Outcome:
    """Run `python -m module` with the request on its stdin. `on_tick`, called twice a second, ends it by raising."""
    deadline = time.monotonic() + wall_seconds
    stdout, stderr = bytearray(), bytearray()
    timed_out = too_long = False
    environment = {"PYTHONPATH": str(_ROOT), "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C.UTF-8"}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each thread would cost address space
    process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
        [sys.executable, "-s", "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd="/",
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ, stdout)
            selector.register(process.stderr, selectors.EVENT_READ, stderr)
            try:
                process.stdin.write(json.dumps(request).encode())
                process.stdin.close()
            except BrokenPipeError:
                pass  # it died at once; its exit status says why
            next_tick = time.monotonic()
            while selector.get_map():
                moment = time.monotonic()
                timed_out = moment >= deadline
                too_long = len(stdout) > max_output_bytes
                if timed_out or too_long:
                    break
                if moment >= next_tick:
                    on_tick()
                    next_tick = moment + _TICK_SECONDS
                for key, _ in selector.select(min(_TICK_SECONDS, deadline - moment)):
                    chunk = os.read(key.fd, _CHUNK)
                    if not chunk:
                        selector.unregister(key.fileobj)
                    key.data.extend(chunk)
                    del stderr[:-_STDERR_KEPT]
        if not (timed_out or too_long):
            timed_out = _outlives(process, deadline)
    finally:
        _kill_group(process)
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()
    return Outcome(process.returncode, bytes(stdout), bytes(stderr), timed_out, too_long)


def _outlives(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Wait for its end without collecting it: until then its id, and so its group's, stays its own."""
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() >= deadline:
            return True
        time.sleep(0.002)
    return False


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the process, if it has not ended itself, and whatever it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

"""Validate an archive: the deep checks in a sandboxed child, its end in words, the pack in place or nothing at all."""

import hashlib
import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.datasets import sandbox
from core.datasets.intake import quick_check
from core.datasets.limits import Limits
from core.datasets.report import Refused, Report, quoted
from core.errors import Unavailable

_log = logging.getLogger(__name__)
_PARSER_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}


class ValidationInterrupted(Unavailable):
    """The child was killed from outside. Try again, but not for ever: its memory's end looks like this, too."""

    code = "validation_interrupted"


class ScratchUnavailable(Unavailable):
    """The disk that archive and pack are worked on is full or broken: no dataset's fault."""

    code = "scratch_unavailable"


def validate(
    archive: Path,
    out: Path,
    limits: Limits | None = None,
    *,
    class_name: str = "default",
    on_tick: Callable[[], object] = lambda: None,
    module: str = "core.datasets.child",
) -> Report:
    """Read `archive` in a child process and write its pack to `out`. A refusal is a report too, and leaves no `out`.

    `class_name` names the class of a flat archive. `on_tick` is called twice a second while the child works (a lease
    may be extended there); what it raises stops the child. Raises `Unavailable` where the trouble is ours.
    """
    limits = limits or Limits()
    part = out.absolute().with_name(out.name + ".part")
    part.unlink(missing_ok=True)
    try:
        quick_check(archive, limits)
    except Refused as refusal:
        return Report.error(refusal.code, str(refusal))
    request = {
        "archive": str(archive.absolute()),
        "out": str(part),
        "limits": limits.to_json(),
        "class_name": class_name,
    }
    try:
        outcome = sandbox.run(module, request, wall_seconds=limits.wall_seconds, on_tick=on_tick)
        report = _judge(outcome, limits)
        if report.status == "processed":
            with part.open("rb") as file:
                report = report.with_sha256(hashlib.file_digest(file, "sha256").hexdigest())
            os.replace(part, out)
        return report
    finally:
        part.unlink(missing_ok=True)


def _judge(outcome: sandbox.Outcome, limits: Limits) -> Report:
    """What the child said or, where it could say nothing, what its end means."""
    messages = _messages(outcome.stdout)
    reading = next((message["reading"] for message in reversed(messages) if "reading" in message), None)
    where = f"reading {quoted(reading)}" if reading else "reading the archive"
    last = messages[-1] if messages else {}
    if outcome.returncode == 0 and "report" in last and (report := _report(last["report"])):
        return report
    if outcome.returncode == 0 and "unavailable" in last:
        raise ScratchUnavailable(f"the dataset's pack could not be written ({last['unavailable']})")
    if outcome.timed_out or outcome.signal == signal.SIGALRM:
        return Report.error(
            "too_slow", f"{where} took more than {limits.wall_seconds:g} seconds; send fewer or smaller images"
        )
    if outcome.signal == signal.SIGXCPU:
        return Report.error(
            "too_slow", f"{where} took more than {limits.cpu_seconds} CPU seconds; send fewer or smaller images"
        )
    if outcome.signal == signal.SIGPROF:
        fault = f"took more than {limits.image_cpu_seconds:g} CPU seconds; remove that file or save it anew"
        return Report.error("too_slow", f"{where} {fault}")
    if outcome.signal in _PARSER_CRASHES:
        return Report.error("decode_failed", f"{where} crashed the decoder; remove that file or save it anew")
    if outcome.signal is not None and not outcome.too_long:
        raise ValidationInterrupted(f"the validating process was ended by {signal.Signals(outcome.signal).name}")
    _log.error(
        "dataset.unreadable", extra={"stderr": outcome.stderr.decode("utf-8", "replace"), "status": outcome.returncode}
    )
    return Report.error("unreadable", f"{where} failed in a way that we did not foresee; pack the images again")


def _messages(stdout: bytes) -> list[dict[str, Any]]:
    """The child's whole lines (the last may be cut where it died), or none if a broken decoder wrote into them."""
    try:
        messages = [json.loads(line) for line in stdout.split(b"\n")[:-1]]
    except ValueError:
        return []
    return [message for message in messages if isinstance(message, dict)]


def _report(data: dict[str, Any]) -> Report | None:
    try:
        return Report.from_json(data)
    except (KeyError, TypeError, AttributeError):
        return None

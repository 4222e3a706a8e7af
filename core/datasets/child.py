"""The process that opens hostile archives: `python -m core.datasets.child`, a request on stdin, JSON lines on stdout.

It limits itself before it reads anything, knows no secrets, and may die of what it reads; the parent says what that
means.
"""

import errno
import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from core.datasets.limits import Limits
from core.datasets.report import Report

_OUR_FAULT = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ESTALE}


def confine(limits: Limits) -> None:
    """From here on the process has this much memory, time and disk, and no more."""
    signal.alarm(int(limits.wall_seconds) + 5)  # should the parent be gone
    for kind, most in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_FSIZE, limits.max_pack_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most + 1 if kind == resource.RLIMIT_CPU else most))


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    limits = Limits.from_json(request["limits"])
    confine(limits)
    say(answer(Path(request["archive"]), Path(request["out"]), limits, request["class_name"]))


def answer(archive: Path, out: Path, limits: Limits, class_name: str) -> dict[str, Any]:
    from core.datasets.normalise import normalise  # noqa: PLC0415  # the parsers load under the limits

    current = None

    def announce(name: str) -> None:
        nonlocal current
        current = name
        say({"reading": name})
        signal.setitimer(signal.ITIMER_PROF, limits.image_cpu_seconds)  # its signal ends us, in the midst of C code too

    try:
        with out.open("xb") as file:
            report = normalise(archive, file, limits, class_name, announce)
    except MemoryError:
        detail = f"reading {current!r} takes more memory than the {limits.memory_bytes} bytes that a dataset may use"
        report = Report.error("too_much_memory", detail)
    except OSError as error:
        if error.errno == errno.EFBIG:
            detail = f"the images come to more than {limits.max_pack_bytes} bytes; send fewer"
            report = Report.error("dataset_too_large", detail)
        elif error.errno in _OUR_FAULT:
            return {"unavailable": errno.errorcode[error.errno]}
        else:
            raise
    return {"report": report.to_json()}


def say(message: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(message, ensure_ascii=False).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

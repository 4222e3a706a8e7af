"""What killed processes left in a folder of temporary files: removed when nobody has written to it for an hour."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

AGE_SECONDS = 3600.0


def clear(folder: Path, age_seconds: float = AGE_SECONDS) -> int:
    """Remove the files and folders directly in `folder` that are so old, and say how many.

    What cannot be removed stays for the next time, and a folder that is not there has none: this never raises.
    """
    try:
        entries = list(folder.iterdir())
        oldest = _clock(folder) - age_seconds
    except OSError:
        return 0
    old = [entry for entry in entries if _written_at(entry) < oldest]
    for entry in old:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with suppress(OSError):
                entry.unlink()
    return len(old)


def _clock(folder: Path) -> float:
    """The time by the clock that stamps the files: to a wrong clock of ours, files in use would look old."""
    os.utime(folder)
    return folder.stat().st_mtime


def _written_at(entry: Path) -> float:
    """When anything in it was last written; never, for what is gone meanwhile."""
    inside = [Path(root) / name for root, _, names in os.walk(entry) for name in ("", *names)]
    times: list[float] = []
    for path in [entry, *inside]:
        with suppress(OSError):
            times.append(path.lstat().st_mtime)
    return max(times, default=float("inf"))

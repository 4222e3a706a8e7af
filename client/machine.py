"""What this machine is and has, as far as a report or a check wants to know."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_DISTRIBUTION = "difffit-service"


@dataclass(frozen=True)
class Torch:
    version: str
    threads: int
    device: str


def find_torch() -> Torch | None:
    """Asked in a process of its own: importing torch takes seconds and memory. None where it does not import."""
    question = (
        "import json, torch; device = 'cuda' if torch.cuda.is_available() else 'cpu';"
        "print(json.dumps([torch.__version__, torch.get_num_threads(), device]))"
    )
    try:
        done = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, timeout=120, check=True)  # noqa: S603 - our own words
        return Torch(*json.loads(done.stdout))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def version() -> str:
    """Of this installation."""
    try:
        return importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def missing_packages(extra: str | None = None) -> list[str]:
    """Names that this installation asks for (or that `extra` adds) and that are not there."""
    try:
        wanted = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return [_DISTRIBUTION]
    marks = [(re.split(r"[\s\[<>=!~;(]", line, maxsplit=1)[0], _extra_of(line)) for line in wanted]
    return [name for name, belongs in marks if belongs == extra and not _is_installed(name)]


def processor() -> str:
    """The model's name, as Linux tells it; elsewhere what Python knows."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> tuple[int, int] | None:
    """(available, total); None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
        figures = {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
        return figures["MemAvailable"], figures["MemTotal"]
    except (OSError, KeyError):
        return None


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _extra_of(requirement: str) -> str | None:
    found = re.search(r"extra\s*==\s*['\"]([\w-]+)", requirement)
    return found[1] if found else None


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True

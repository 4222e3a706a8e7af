"""Whether the service could run on this machine."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from client import machine
from client.cli.output import size
from client.config import Config
from client.doctor.finding import Finding, Level
from client.doctor.settings import Settings

_GB = 1000**3


def python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info[:2] != (3, 11):
        return Finding("fail", "python", version, "the service is built for Python 3.11: make setup with python3.11")
    return Finding("ok", "python", f"{version} ({sys.executable})")


def packages(extra: str | None, purpose: str) -> Finding:
    missing = machine.missing_packages(extra)
    if missing:
        return Finding("fail", "packages", f"{purpose}: missing {', '.join(missing)}", "run make setup")
    return Finding("ok", "packages", f"{purpose}: all there")


def torch(settings: Settings | None) -> Finding:
    found = machine.find_torch()
    if found is None:
        return Finding("fail", "torch", "does not import", "run make setup; without it nothing trains or draws")
    threads = f", threads of a worker: {settings.threads}" if settings else ""
    text = f"{found.version} on {found.device}{threads}"
    if not found.version.startswith("2.13."):
        return Finding("warn", "torch", text, "2.13 is what was tested")
    return Finding("ok", "torch", text)


def memory() -> Finding:
    found = machine.memory_bytes()
    if found is None:
        return Finding("warn", "memory", "unknown on this system", "4 GB are comfortable")
    available, total = found
    text = f"{size(available)} of {size(total)} available"
    if available < 1.5 * _GB:
        return Finding("fail", "memory", text, "the service needs some 1.5 GB: end other programs")
    return (
        Finding("warn", "memory", text, "4 GB are comfortable")
        if available < 4 * _GB
        else Finding("ok", "memory", text)
    )


def folder(settings: Settings, config: Config) -> Iterator[Finding]:
    """The data folder: whether there is room, whether it can be written, and whether the other commands look there."""
    ours = settings.data_dir.absolute()
    yield _disk(ours)
    yield _writable(ours)
    if config.data_dir.absolute() != ours:
        advice = f"export DIFFFIT_DATA_DIR={ours}: the command line does not read .env"
        yield Finding("warn", "data folder", f"other commands look for the service in {config.data_dir}", advice)


def bases(settings: Settings) -> Iterator[Finding]:
    for name in settings.bases:
        place = Path(name)
        if (place / "model_index.json").is_file():
            yield Finding("ok", "base", f"{place.name}, {size(machine.folder_bytes(place))}")
        elif not place.is_absolute() and name.count("/") == 1 and not place.exists():
            yield Finding("warn", "base", f"{name}: a hub name, fetched at the first start", "needs the network then")
        else:
            advice = "clone the repository whole, or set DIFFFIT_BASES to a DiTPipeline folder"
            yield Finding("fail", "base", f"{place} holds no model_index.json", advice)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(_existing(folder)).free
    if free < _GB:
        return Finding("fail", "disk", f"{size(free)} free for {folder}", "make room: 1 GB at least")
    level: Level = "warn" if free < 5 * _GB else "ok"
    return Finding(level, "disk", f"{size(free)} free for {folder}", "5 GB are comfortable" if level == "warn" else "")


def _writable(folder: Path) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
    except OSError as error:
        advice = "choose another with DIFFFIT_DATA_DIR or difffit up --data-dir"
        return Finding("fail", "data folder", f"{folder} cannot be written: {error.strerror}", advice)
    state = "is there" if folder.is_dir() else "will be made at the first start"
    return Finding("ok", "data folder", f"{folder} {state}")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.is_dir())

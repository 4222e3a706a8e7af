"""`difffit doctor`: what keeps the service from running here, and what to do about it."""

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import typer
from rich.markup import escape

from client import machine
from client.api import DiffFit
from client.cli.output import console, size
from client.config import Config, find_config
from client.errors import ApiError, ClientError, Unreachable

Level = Literal["ok", "warn", "fail"]
_STYLE: dict[Level, str] = {"ok": "green", "warn": "yellow", "fail": "red"}
_GB = 1000**3
_PACKAGED_BASE = Path(__file__).parents[2] / "models" / "emoji-dit-64"


@dataclass(frozen=True)
class Finding:
    """`advice` says what to do where the level is not ok."""

    level: Level
    subject: str
    text: str
    advice: str = ""


def doctor() -> None:
    """Check this machine and the service. Exit code 1 where something must be mended."""
    failed = False
    for finding in examine(find_config()):
        failed = failed or finding.level == "fail"
        mark = f"[{_STYLE[finding.level]}]{finding.level:4}[/]" if console.is_terminal else f"{finding.level:4}"
        advice = f"; {finding.advice}" if finding.advice else ""
        console.print(f"{mark}  {finding.subject:12} {escape(finding.text + advice)}")
    if failed:
        raise typer.Exit(1)


def examine(config: Config) -> Iterator[Finding]:
    """Each finding as soon as it is known."""
    yield _python()
    yield from _packages()
    yield _torch()
    yield _disk(config.data_dir)
    yield _memory()
    yield _data_dir(config.data_dir)
    yield from _bases(os.environ.get("DIFFFIT_BASES"))
    yield from _service(config)


def _python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info[:2] != (3, 11):
        return Finding("fail", "python", version, "the service is built for Python 3.11: make setup with python3.11")
    return Finding("ok", "python", f"{version} ({sys.executable})")


def _packages() -> Iterator[Finding]:
    for extra, purpose in ((None, "api and client"), ("worker", "worker")):
        missing = machine.missing_packages(extra)
        if missing:
            yield Finding("fail", "packages", f"{purpose}: missing {', '.join(missing)}", "run make setup")
        else:
            yield Finding("ok", "packages", f"{purpose}: all there")


def _torch() -> Finding:
    found = machine.find_torch()
    if found is None:
        return Finding("fail", "torch", "does not import", "run make setup; without it nothing trains or draws")
    threads = os.environ.get("DIFFFIT_THREADS", "1")
    text = f"{found.version} on {found.device}, threads of a worker: {threads}"
    if not found.version.startswith("2.13."):
        return Finding("warn", "torch", text, "2.13 is what was tested")
    return Finding("ok", "torch", text)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(_existing(folder)).free
    if free < _GB:
        return Finding("fail", "disk", f"{size(free)} free for {folder}", "make room: 1 GB at least")
    level: Level = "warn" if free < 5 * _GB else "ok"
    return Finding(level, "disk", f"{size(free)} free for {folder}", "5 GB are comfortable" if level == "warn" else "")


def _memory() -> Finding:
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


def _data_dir(folder: Path) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
    except OSError as error:
        advice = "choose another with DIFFFIT_DATA_DIR or difffit up --data-dir"
        return Finding("fail", "data folder", f"{folder} cannot be written: {error.strerror}", advice)
    state = "is there" if folder.is_dir() else "will be made at the first start"
    return Finding("ok", "data folder", f"{folder.absolute()} {state}")


def _bases(setting: str | None) -> Iterator[Finding]:
    named = [item.strip() for item in (setting or "").split(",") if item.strip()] or [str(_PACKAGED_BASE)]
    for name in named:
        folder = Path(name)
        if (folder / "model_index.json").is_file():
            yield Finding("ok", "base", f"{folder.name}, {size(machine.folder_bytes(folder))}")
        elif not folder.is_absolute() and name.count("/") == 1 and not folder.exists():
            yield Finding("warn", "base", f"{name}: a hub name, fetched at the first start", "needs the network then")
        else:
            advice = "clone the repository whole, or set DIFFFIT_BASES to a DiTPipeline folder"
            yield Finding("fail", "base", f"{folder} holds no model_index.json", advice)


def _service(config: Config) -> Iterator[Finding]:
    with DiffFit(config.url, config.api_key, timeout=5, retries=0) as client:
        try:
            client.health()
        except Unreachable:
            yield _port(config.url)
            return
        except ApiError as error:
            yield Finding(
                "fail", "service", f"{config.url} answers, but not as DiffFit: {error}", "choose another port"
            )
            return
        yield Finding("ok", "service", f"answers at {config.url}")
        yield from _readiness(client)
        yield _key(client, config)


def _port(url: str) -> Finding:
    """Nobody answers as an HTTP service. Is the port of this machine free for one?"""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or (443 if parts.scheme == "https" else 80)
    if host not in ("127.0.0.1", "localhost", "::1"):
        return Finding("fail", "service", f"no answer from {url}", "is DIFFFIT_URL right, and the service running?")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Finding("fail", "port", f"{port} cannot be had: {error.strerror}", "difffit up --port another")
    return Finding("warn", "service", f"not running; port {port} is free", "start it: difffit up")


def _readiness(client: DiffFit) -> Iterator[Finding]:
    try:
        checks = _checks(client.ready())
    except ApiError as error:
        checks = _checks(error.body)
        if not checks:
            yield Finding("fail", "ready", str(error), "see the logs in the data folder")
    except Unreachable as error:
        yield Finding("fail", "ready", str(error), "see the logs in the data folder")
        return
    for name, (is_well, text) in checks.items():
        advice = "" if is_well else "see the logs in the data folder"
        yield Finding("ok" if is_well else "warn" if name == "broker" else "fail", name, text, advice)


def _checks(body: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    """`{"checks": {name: "ok" | "reason" | {"status": …, "detail": …}}}` as (is well, words)."""
    found: dict[str, tuple[bool, str]] = {}
    for name, value in (body.get("checks") or {}).items():
        status, detail = (value.get("status"), value.get("detail")) if isinstance(value, dict) else (value, None)
        is_well = status in ("ok", True)
        found[name] = (is_well, str(detail or ("ready" if is_well else status)))
    return found


def _key(client: DiffFit, config: Config) -> Finding:
    if config.api_key is None:
        return Finding(
            "fail", "key", "none found", f"set DIFFFIT_API_KEY (looked in {config.data_dir / 'api_key'} too)"
        )
    try:
        count = len(client.models.list())
    except ClientError as error:
        return Finding("fail", "key", f"from {config.source}: {error}", "make one with difffit keys create")
    return Finding("ok", "key", f"from {config.source}, opens {count} models")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())

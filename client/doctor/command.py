"""`difffit doctor`: what keeps the service from running here, and what to do about it."""

from collections.abc import Iterator

import typer
from rich.markup import escape

from client.cli.output import console
from client.config import Config, find_config, is_local
from client.doctor import machine, service
from client.doctor.finding import Finding, Level
from client.doctor.settings import find_settings
from client.errors import ClientError

_STYLE: dict[Level, str] = {"ok": "green", "warn": "yellow", "fail": "red"}


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
    """Each finding as soon as it is known. A service elsewhere needs nothing of this machine but the client."""
    yield machine.python()
    yield machine.packages(None, "api and client")
    if not is_local(config.url):
        yield from service.examine(config, None)
        return
    yield machine.packages("worker", "worker")
    try:
        settings = find_settings()
    except ClientError as error:
        settings = None
        yield Finding("fail", "settings", str(error), "mend it in .env or in the environment")
    yield machine.torch(settings)
    yield machine.memory()
    if settings is not None:
        yield from machine.folder(settings, config)
        yield from machine.bases(settings)
    yield from service.examine(config, settings)

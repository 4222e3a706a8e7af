"""`difffit up`: hand over to the supervisor, which is a program of the service."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def up(
    data_dir: Annotated[Path | None, typer.Option(help="Folder for all data; default: .difffit")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: 8321.")] = None,
    host: Annotated[str | None, typer.Option(help="Default: 127.0.0.1, this machine alone.")] = None,
) -> None:
    """Start the whole service in the foreground. Ctrl-C stops it; the next start finds all data and goes on."""
    given = {"DIFFFIT_DATA_DIR": data_dir, "DIFFFIT_PORT": port, "DIFFFIT_HOST": host}
    environment = os.environ | {name: str(value) for name, value in given.items() if value is not None}
    sys.stdout.flush()
    # the supervisor takes this process over, so that signals reach it without a detour
    os.execve(sys.executable, [sys.executable, "-m", "core.local.up"], environment)  # noqa: S606 - our own words

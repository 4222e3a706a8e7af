"""What must be so before the service starts; each failure is one clear line."""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from core.errors import DomainError
from core.settings import Settings


class CannotStart(DomainError):
    """Said to whoever runs `difffit up`; it names what to change."""

    code = "cannot_start"


def check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise CannotStart(
            f"cannot write to the data folder {folder}: {error.strerror}; choose another --data-dir"
        ) from error


def lock_folder(folder: Path) -> IO[str]:
    """Held for the life of the process: two services on one folder would fight over the broker and the port."""
    file = (folder / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise CannotStart(f"{folder} is in use by a service that runs already (process {owner})") from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise CannotStart(f"port {port} on {host} is taken; choose another --port") from error
            raise CannotStart(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
            ) from error


def check_bases(settings: Settings) -> None:
    """Every base that is named as a folder must be one, with its weights."""
    from core.bases import Catalog  # noqa: PLC0415  # reads hundreds of MB to digest them: only when starting

    if not settings.bases:
        raise CannotStart("no base model is named: set DIFFFIT_BASES to a DiTPipeline folder or a hub name")
    try:
        Catalog(settings.bases).all()
    except DomainError as error:
        raise CannotStart(f"a base model of DIFFFIT_BASES cannot be used: {error}") from error

"""A service to show things on: the one that runs in the folder already, or one that we start and stop."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from client.api import DiffFit
from client.cli.output import say
from client.config import Config, find_config
from client.errors import ApiError, ClientError, Unreachable

_START_SECONDS = 120.0
_STOP_SECONDS = 45.0


@dataclass
class Service:
    client: DiffFit
    data_dir: Path
    process: subprocess.Popen[bytes] | None
    """None where it ran before us: then it is not ours to stop."""
    keep: bool


@contextmanager
def running_service(data_dir: Path | None, keep: bool) -> Iterator[Service]:
    """Yields once the service is ready. Stops it at the end if we started it, unless it is to be kept."""
    config = find_config(data_dir=data_dir)
    client = _found(config)
    if client is not None:
        say(f"using the service at {client.base_url}")
        with client:
            yield Service(client, config.data_dir, None, keep=True)
        return
    if "DIFFFIT_URL" in os.environ:
        raise ClientError(f"no service opens at {config.url} (DIFFFIT_URL): start it there, or unset DIFFFIT_URL")
    process, url = _start(config)
    try:
        with _await(process, url, config.data_dir) as client:
            service = Service(client, config.data_dir, process, keep)
            yield service
            keep = service.keep
    except BaseException:
        keep = False
        raise
    finally:
        if not keep:
            _stop(process)


def _found(config: Config) -> DiffFit | None:
    """A client of the service that answers there, if our key opens it."""
    if config.api_key is None:
        return None
    quick = DiffFit(config.url, config.api_key, timeout=5, retries=0)
    try:
        quick.models.list()
    except (ApiError, Unreachable):
        return None
    finally:
        quick.close()
    return DiffFit(config.url, config.api_key)


def _start(config: Config) -> tuple[subprocess.Popen[bytes], str]:
    parts = urlsplit(config.url)
    port = _free_port(parts.port or 8321)
    if port != parts.port:
        say(f"port {parts.port} is taken by another program; using {port}")
    log = _log_file(config.data_dir)
    environment = os.environ | {
        "DIFFFIT_DATA_DIR": str(config.data_dir.absolute()),
        "DIFFFIT_HOST": "127.0.0.1",
        "DIFFFIT_PORT": str(port),
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "core.local.up"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us: we stop it in order
        )
    return process, f"http://127.0.0.1:{port}"


def _await(process: subprocess.Popen[bytes], url: str, data_dir: Path) -> DiffFit:
    """Ready, and with a key. Raises ClientError that quotes what the service said."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ClientError(_last_words(data_dir) or f"the service ended with {process.returncode}")
        key = find_config(data_dir=data_dir).api_key
        client = DiffFit(url, key or "none", timeout=60, retries=0)
        try:
            client.ready()
            if key is not None:
                client.close()
                return DiffFit(url, key)
        except (ApiError, Unreachable):
            pass
        client.close()
        time.sleep(0.2)
    raise ClientError(f"the service was not ready after {_START_SECONDS:.0f} s: see {data_dir / 'logs'}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """In order: workers checkpoint; only what does not end is killed."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # its children die with it
        process.wait()


def _log_file(data_dir: Path) -> Path:
    try:
        (data_dir / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClientError(f"cannot write to the data folder {data_dir}: {error.strerror}") from error
    return data_dir / "logs" / "up.log"


def _last_words(data_dir: Path) -> str:
    lines = [line for line in (data_dir / "logs" / "up.log").read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("difffit: ") if lines else ""


def _free_port(wanted: int) -> int:
    """`wanted`, or one that the system gives where that is taken."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ClientError("no port of 127.0.0.1 is free")

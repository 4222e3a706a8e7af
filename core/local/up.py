"""`python -m core.local.up`: the whole service on one machine, in the foreground, with its data in one folder.

Every child dies with this process: it is stopped in order on SIGINT and SIGTERM, and by the kernel should we be killed.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from core.db.migrate import upgrade
from core.db.session import Database
from core.errors import DomainError
from core.local.bootstrap import bootstrap, key_file
from core.local.broker import await_broker, broker_command
from core.local.checks import CannotStart, check_bases, check_folder, check_port, lock_folder
from core.parent import die_with_parent
from core.settings import Settings, get_settings

_STOP_SECONDS = 20.0
_START_SECONDS = 60.0


@dataclass
class Child:
    """One process of the service, restarted when it ends by itself, slower each time."""

    name: str
    command: list[str]
    log: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    not_before: float = 0.0
    started: float = field(default=0.0)

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(  # noqa: S603  # our own words
                self.command,
                stdout=out,
                stderr=out,
                env=self.environment,
                start_new_session=True,  # the terminal's Ctrl-C is for us alone: we stop children in order
                preexec_fn=die_with_parent,
            )
        self.started = time.monotonic()

    def tend(self, say: Callable[[str], None]) -> None:
        if self.process is None or self.process.poll() is None:
            return
        if self.not_before == 0.0:
            self.failures = 0 if time.monotonic() - self.started > 60 else self.failures + 1
            wait = min(30.0, 2.0**self.failures - 1)
            self.not_before = time.monotonic() + wait
            say(f"{self.name} ended with {self.process.returncode}; starting it again in {wait:.0f} s (see {self.log})")
        if time.monotonic() >= self.not_before:
            self.not_before = 0.0
            self.start()

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number) if number == signal.SIGKILL else self.process.send_signal(number)

    def end(self, seconds: float) -> None:
        """Wait for what was told to stop, and kill it where it takes too long."""
        if self.process is None:
            return
        try:
            self.process.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self.process.wait()


class Service:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.data_dir.absolute()
        self._children: list[Child] = []
        self._broker: Child | None = None
        self._lock: IO[str] | None = None
        self._stopping = threading.Event()

    def run(self) -> None:
        """Until SIGINT or SIGTERM. Raises CannotStart before anything is started."""
        settings = self._settings
        check_folder(self._folder)
        self._lock = lock_folder(self._folder)
        check_port(settings.host, settings.port)
        check_bases(settings)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        try:
            self._start()
            while not self._stopping.wait(0.2):
                for child in self._tended():
                    child.tend(_say)
        finally:
            self._stop()

    def _start(self) -> None:
        settings = self._settings
        logs = self._folder / "logs"
        logs.mkdir(exist_ok=True)
        database = Database(settings.database)
        try:
            upgrade(settings.database)
            made = bootstrap(database, self._folder)
        finally:
            database.close()
        if settings.broker_url is None:
            command = broker_command(settings.broker_socket, self._folder / "broker")
            self._broker = Child("broker", command, logs / "broker.log", dict(os.environ))
            self._broker.start()
            await_broker(settings.broker_socket, self._broker.is_running, self._broker.log)
        self._children = [
            self._child("api", "api"),
            self._child("upkeep", "worker.upkeep"),
            self._child("datasets", *_celery("datasets", "datasets")),
            self._child("device", *_celery("device", _DEVICE_QUEUES[settings.role])),
        ]
        for child in self._children:
            child.start()
        self._await_ready()
        url = url_of(settings.host, settings.port)
        (self._folder / "url").write_text(f"{url}\n")  # where the command line finds us
        _say(f"DiffFit is up at {url}; data in {self._folder}; Ctrl-C stops it")
        if made:
            _say(f"made the tenant 'default' and its API key: {made}")
        elif key_file(self._folder).exists():
            _say(f"API key: {key_file(self._folder)}")

    def _tended(self) -> list[Child]:
        return [*self._children, self._broker] if self._broker else self._children

    def _child(self, name: str, module: str, *words: str) -> Child:
        threads = str(self._settings.threads)
        environment = os.environ | {
            "DIFFFIT_DATA_DIR": str(self._folder),
            "DIFFFIT_HOST": self._settings.host,
            "DIFFFIT_PORT": str(self._settings.port),
            "OMP_NUM_THREADS": threads,
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, "-m", module, *words]
        return Child(name, command, self._folder / "logs" / f"{name}.log", environment)

    def _await_ready(self) -> None:
        url = f"{url_of(self._settings.host, self._settings.port)}/readyz"
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and not self._stopping.is_set():
            try:
                with urllib.request.urlopen(url, timeout=2) as reply:  # noqa: S310 - our own address
                    if json.load(reply):
                        return
            except OSError:
                api = self._children[0]
                if api.process is not None and api.process.poll() is not None:
                    raise CannotStart(f"the API ended with {api.process.returncode}: see {api.log}") from None
                time.sleep(0.1)
        if not self._stopping.is_set():
            raise CannotStart(f"the API was not ready after {_START_SECONDS:.0f} s: see {self._children[0].log}")

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping.set()

    def _stop(self) -> None:
        """Workers first, so that they can write their last checkpoint; the broker last."""
        if not self._children and self._broker is None:
            return
        _say("stopping")
        for child in reversed(self._children):
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        for child in self._children:
            child.end(deadline - time.monotonic())
        if self._broker is not None:
            self._broker.signal(signal.SIGTERM)
            self._broker.end(5)
        _say("stopped")


_DEVICE_QUEUES = {"both": "train,sample", "train": "train", "sample": "sample"}


def url_of(host: str, port: int) -> str:
    """Where a service that listens on `host` is found from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared with, never bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _celery(name: str, queues: str) -> list[str]:
    return ["celery", "-A", "worker.app", "worker", "-Q", queues, "-n", f"{name}@%h", "--concurrency", "1"]


def _say(line: str) -> None:
    sys.stdout.write(f"difffit: {line}\n")
    sys.stdout.flush()


def main() -> int:
    """Settings come from the environment and .env; the command line passes its options on as environment."""
    try:
        Service(get_settings()).run()
    except DomainError as error:
        sys.stderr.write(f"difffit: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

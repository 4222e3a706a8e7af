"""The whole service as processes, as a user starts it, and the few calls that the stories need."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx

from tests.processes import descendants, free_port

READY_SECONDS = 90.0
ENDED = ("succeeded", "failed", "cancelled")

Answer = TypeVar("Answer")


class RunningService:
    """`difffit up` on a folder; `stop` and `start` again find the same data."""

    def __init__(self, folder: Path, base: Path, **settings: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("DIFFFIT_")},
            "DIFFFIT_DATA_DIR": str(folder),
            "DIFFFIT_PORT": str(self.port),
            "DIFFFIT_BASES": str(base),
            "DIFFFIT_SWEEP_SECONDS": "0.5",
            "DIFFFIT_THREADS": "1",
            **{f"DIFFFIT_{name.upper()}": value for name, value in settings.items()},
        }
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> "RunningService":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "core.local.up"],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise AssertionError(f"the service ended: {self._process.stdout and self._process.stdout.read()}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/readyz").status_code == 200 and self.key_file.exists():
                    return self
            time.sleep(0.1)
        raise AssertionError(f"the service was not ready after {READY_SECONDS} s\n{self.logs()}")

    def stop(self) -> str:
        """Ctrl-C; returns what it printed."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        printed, _ = self._process.communicate(timeout=60)
        assert self._process.returncode == 0, printed
        return printed

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate(timeout=10)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def key_file(self) -> Path:
        return self.folder / "api_key"

    def client(self) -> httpx.Client:
        key = self.key_file.read_text().strip()
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=120)

    def children(self) -> list[int]:
        """Every process below the supervisor."""
        return descendants(self.pid)

    def logs(self) -> str:
        parts = [f"== {path.name}\n{path.read_text()[-4000:]}" for path in sorted((self.folder / "logs").glob("*.log"))]
        return "\n".join(parts)


@contextlib.contextmanager
def running(folder: Path, base: Path, **settings: str) -> Iterator[RunningService]:
    service = RunningService(folder, base, **settings).start()
    try:
        yield service
    except BaseException:
        sys.stderr.write(service.logs())
        raise
    finally:
        service.kill()


def wait_for(ask: Callable[[], Answer], is_right: Callable[[Answer], bool], seconds: float = 120) -> Answer:
    """Ask until the answer is right; the last answer is in the error."""
    deadline = time.monotonic() + seconds
    while True:
        answer = ask()
        if is_right(answer):
            return answer
        assert time.monotonic() < deadline, f"still {answer!r}"
        time.sleep(0.05)


def push(client: httpx.Client, archive: bytes, name: str = "images.zip") -> dict[str, Any]:
    """Upload and wait for the verdict."""
    reply = client.post("/v1/files", files={"file": (name, archive)}, data={"purpose": "fine-tune"})
    assert reply.status_code == 200, reply.text
    file_id = reply.json()["id"]
    return wait_for(lambda: client.get(f"/v1/files/{file_id}").json(), lambda file: file["status"] != "uploaded")


def train(client: httpx.Client, model: str, file_id: str, **hyperparameters: Any) -> dict[str, Any]:
    body = {
        "model": model,
        "training_file": file_id,
        "seed": 7,
        "method": {"type": "difffit", "difffit": {"hyperparameters": hyperparameters}},
    }
    reply = client.post("/v1/fine_tuning/jobs", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def job(client: httpx.Client, job_id: str) -> dict[str, Any]:
    return client.get(f"/v1/fine_tuning/jobs/{job_id}").json()


def reaches(client: httpx.Client, job_id: str, step: int) -> dict[str, Any]:
    """Wait until the job is past `step`; that it ended before is a failure, said at once."""
    found = wait_for(
        lambda: job(client, job_id), lambda found: step_of(found) > step or found["status"] in ENDED, seconds=120
    )
    assert found["status"] == "running", found
    return found


def ended(client: httpx.Client, job_id: str, seconds: float = 180) -> dict[str, Any]:
    return wait_for(lambda: job(client, job_id), lambda found: found["status"] in ENDED, seconds)


def step_of(found: dict[str, Any]) -> int:
    """How far a job is; it has no progress before its first step."""
    return found["progress"]["step"] if found["progress"] else 0


def adapter_of(client: httpx.Client, found: dict[str, Any]) -> dict[str, Any]:
    return client.get(f"/v1/adapters/{found['adapter_id']}").json()

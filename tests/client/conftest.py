"""The real API on a port of this machine, over SQLite and a folder; a thread does what workers would, in little."""

import hashlib
import io
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from PIL import Image

from api import image_stream
from api.app import create_app
from client.api import DiffFit
from client.cli.app import main
from core.bases import Catalog
from core.datasets import service as datasets
from core.db.session import Database
from core.evaluations import service as evaluations
from core.jobs import attempts, claims
from core.samples import service as samples
from core.samples.service import SamplePlan
from core.settings import Settings
from core.storage import keys, open_store
from core.tenants import service as tenants
from tests import rows
from tests.conftest import make_settings


def png(colour: tuple[int, int, int] = (200, 30, 30), width: int = 16, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 16), colour).save(buffer, kind)
    return buffer.getvalue()


class Worker:
    """Validates every dataset, trains in two steps, draws, measures the same for all: real rows and bytes, no torch."""

    def __init__(self, settings: Settings) -> None:
        self.verdict = "processed"
        self.validates = True
        self.trains = True
        self.draws = True
        self.finishes: Callable[[], bool] = lambda: True  # asked once partial images are there, for 10 s at most
        self.claimed: list[SamplePlan] = []
        self._settings = settings
        self._database = Database(settings.database)
        self._store = open_store(settings)
        self._catalog = Catalog(settings.bases)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker")

    def __enter__(self) -> "Worker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._database.close()

    def _run(self) -> None:
        while not self._over.wait(0.02):
            if self.validates:
                self._validate()
            if self.trains:
                self._train()
            if self.draws:
                self._draw()
            self._measure()

    def _validate(self) -> None:
        with self._database.write() as session:
            if plan := datasets.claim(session, rows.WORKER, rows.LEASE):
                rows.settle(session, plan, self.verdict)

    def _train(self) -> None:
        with self._database.write() as session:
            plan = claims.claim(session, rows.WORKER, rows.LEASE, self._catalog)
        if plan is None:
            return
        total = plan.spec.steps
        for step in (total // 2, total):
            body = {"step": step, "total_steps": total, "train_loss": 1 / step, "valid_loss": 1.2 / step}
            with self._database.write() as session:
                standing = attempts.report(session, plan, step=step, progress=body, device_seconds=0.1)
                if not standing.goes_on:
                    attempts.stop(session, plan, standing)
                    return
                attempts.add_metric(session, plan, step, body)
            with self._database.write() as session:
                rows.make_checkpoint(session, plan, step)
            key = keys.preview(plan.tenant_id, plan.job_id, plan.attempt, step)
            data = png(width=32)
            self._store.put(key, data, "image/png")
            digest = hashlib.sha256(data).hexdigest()
            given = {"key": key, "sha256": digest, "size": len(data), "classes": ["a", "b"], "seeds": [1, 2]}
            with self._database.write() as session:
                attempts.add_preview(session, plan, step=step, **given)
        row = rows.adapter_for(plan, plan.suffix or "")
        data = b"weights of " + plan.job_id.encode()
        row.sha256, row.bytes = hashlib.sha256(data).hexdigest(), len(data)
        row.base_fingerprint = rows.base_of(self._catalog).fingerprint
        row.object_key = keys.adapter(plan.tenant_id, plan.job_id, row.sha256)
        self._store.put(row.object_key, data)
        with self._database.write() as session:
            attempts.finish(session, plan, row, {})

    def _draw(self) -> None:
        with self._database.write() as session:
            plans = samples.claim(session, rows.WORKER, rows.LEASE, self._catalog, 100)
        for plan in plans:
            self.claimed.append(plan)
            if not self._show(plan):
                continue
            images = []
            for index in range(plan.spec.n):
                data = png((index, plan.spec.seed % 256, 9), kind=plan.spec.output_format)
                key = keys.image(plan.tenant_id, plan.sample_id, plan.attempt, index)
                self._store.put(key, data, "image/png")
                digest = hashlib.sha256(data).hexdigest()
                images.append({"key": key, "sha256": digest, "bytes": len(data), "seed": plan.spec.seed + index})
            stats = {"batch_size": len(plans), "distinct_adapters": 2, "compute_ms": 5.0, "queue_ms": 1.0}
            with self._database.write() as session:
                samples.finish(session, plan, images, stats)

    def _show(self, plan: SamplePlan) -> bool:
        """Partial images; whether those that follow are still wanted."""
        for number in range(len(plan.spec.partial_steps)):
            for index in range(plan.spec.n):
                key = keys.partial_image(plan.tenant_id, plan.sample_id, plan.attempt, index, number)
                data = png((index, number, 99), kind=plan.spec.output_format)
                self._store.put(key, data)
                partial = {"key": key, "sha256": hashlib.sha256(data).hexdigest(), "index": index, "number": number}
                with self._database.write() as session:
                    samples.add_partial(session, plan, partial)
        late = time.monotonic() + 10
        while not self.finishes() and time.monotonic() < late:
            with self._database.write() as session:
                if samples.list_cancelled(session, [plan.sample_id]):
                    return not samples.stop(session, plan)
            time.sleep(0.01)
        return True

    def _measure(self) -> None:
        with self._database.write() as session:
            if plan := evaluations.claim(session, rows.WORKER, rows.LEASE, self._catalog):
                evaluations.finish(session, plan, rows.EVALUATED)


@dataclass
class Service:
    url: str
    key: str
    worker: Worker


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    rows.make_catalog(folder)
    return folder / "tiny-dit"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path, tiny_base: Path) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    shutil.copyfile(sqlite_template, folder / "difffit.db")
    settings = make_settings(folder, bases=str(tiny_base), log_level="error")
    database = Database(settings.database)
    with database.write() as session:
        tenant = rows.make_tenant(session, "client-tests")
        secret = tenants.create_key(session, tenant.id, "test").secret
    database.close()
    server = uvicorn.Server(uvicorn.Config(create_app(settings), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, name="api")
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive(), "the API did not start"
        assert time.monotonic() < deadline, "the API did not start in time"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with Worker(settings) as worker:
        yield Service(f"http://127.0.0.1:{port}", secret, worker)
    server.should_exit = True
    thread.join()


@pytest.fixture
def client(service: Service) -> Iterator[DiffFit]:
    with DiffFit(service.url, service.key) as client:
        yield client


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def line(self, number: int = 0) -> str:
        return self.out.splitlines()[number]


Run = Callable[..., Outcome]


@pytest.fixture
def difffit(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """The command as a user types it, in an empty folder, against the running API."""
    monkeypatch.setenv("DIFFFIT_URL", service.url)
    monkeypatch.setenv("DIFFFIT_API_KEY", service.key)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["difffit", *words])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams look for partial images all the time: there is no broker here whose word would rouse them."""
    monkeypatch.setattr(image_stream, "_PING_SECONDS", 0.02)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of two classes."""
    folder = tmp_path / "pets"
    for kind in ("cat", "dog"):
        (folder / kind).mkdir(parents=True)
        for number in range(3):
            (folder / kind / f"{number}.png").write_bytes(png((number * 60, 10, len(kind))))
    return folder

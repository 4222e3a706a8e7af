"""The API on SQLite and a folder, in this process; a worker is played by the services that workers call."""

import functools
import hashlib
import io
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from sqlalchemy.orm import Session

from api.app import create_app
from core.bases import Catalog
from core.datasets import service as datasets
from core.db.session import Database
from core.jobs import attempts, claims
from core.models import Adapter, Dataset, Tenant
from core.samples import service as samples
from core.samples.service import SamplePlan
from core.settings import Settings
from core.storage import keys, open_store
from core.storage.base import ObjectStore
from core.tenants import service as tenants
from tests import rows
from tests.conftest import make_settings


@functools.cache  # a zip holds the time of its making: two of them may differ
def archive(images: int = 4, side: int = 16) -> bytes:
    """A zip of two class folders."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for index in range(images):
            picture = io.BytesIO()
            Image.new("RGB", (side, side), (index, 0, 0)).save(picture, "PNG")
            file.writestr(f"{'ab'[index % 2]}/{index}.png", picture.getvalue())
    return data.getvalue()


@dataclass
class Owner:
    """A tenant with one of everything that has an id, and a client that holds its key."""

    tenant: Tenant
    key_id: str
    client: TestClient
    ids: dict[str, str] = field(default_factory=dict)


@dataclass
class Service:
    app: FastAPI
    settings: Settings
    database: Database
    store: ObjectStore
    catalog: Catalog
    open: TestClient

    def owner(self) -> Owner:
        with self.database.write() as session:
            tenant = rows.make_tenant(session)
            key = tenants.create_key(session, tenant.id, "test")
        return Owner(tenant, key.key.id, self.client(key.secret))

    def client(self, secret: str) -> TestClient:
        """Shares the running app: no lifespan of its own."""
        client = TestClient(self.app, raise_server_exceptions=False, headers={"Authorization": f"Bearer {secret}"})
        client.portal = self.open.portal
        return client

    def dataset(self, owner: Owner, status: str = "processed") -> Dataset:
        with self.database.write() as session:
            dataset = rows.make_dataset(session, owner.tenant, status)
        data = archive()
        with self.database.write() as session:
            dataset = session.merge(dataset)
            dataset.sha256, dataset.bytes = hashlib.sha256(data).hexdigest(), len(data)
            dataset.report_key = keys.report(owner.tenant.id, dataset.id, 1) if status != "uploaded" else None
        self.store.put(dataset.object_key, data)
        return dataset

    def dataset_ready(self, file_id: str) -> str:
        """What a worker says of an upload that is good."""
        with self.database.write() as session:
            plan = datasets.claim(session, "datasets@test", rows.LEASE)
            assert plan is not None
            assert plan.dataset_id == file_id
            assert rows.settle(session, plan)
        return file_id

    def trained(self, owner: Owner) -> tuple[str, Adapter]:
        """A job that has ended well, with a checkpoint, a metric, a preview and an adapter."""
        self.dataset(owner)
        with self.database.write() as session:
            job = rows.make_job(session, owner.tenant, self.catalog, rows.make_dataset(session, owner.tenant))
        with self.database.write() as session:
            plan = rows.claim_job(session, self.catalog)
            assert plan.job_id == job.id
            rows.report_step(session, plan, 5)
            attempts.add_metric(session, plan, 5, {"train_loss": 0.5, "valid_loss": 0.6, "total_steps": 10})
            rows.make_checkpoint(session, plan, 5)
            key = keys.preview(owner.tenant.id, job.id, 1, 5)
            digest = hashlib.sha256(b"png").hexdigest()
            attempts.add_preview(session, plan, step=5, key=key, sha256=digest, size=3, classes=["a"], seeds=[1])
        self.store.put(key, b"png", "image/png")
        with self.database.write() as session:
            adapter = self.adapter(session, plan)
            assert attempts.finish(session, plan, adapter, {})
        return job.id, adapter

    def adapter(self, session: Session, plan: claims.Plan) -> Adapter:
        data = b"weights" + plan.job_id.encode()
        adapter = rows.adapter_for(plan)
        adapter.sha256, adapter.bytes = hashlib.sha256(data).hexdigest(), len(data)
        adapter.object_key = keys.adapter(plan.tenant_id, "x", adapter.sha256)
        adapter.base_fingerprint = rows.base_of(self.catalog).fingerprint
        self.store.put(adapter.object_key, data)
        return adapter

    def draw(self, count: int = 1) -> None:
        """What a device worker does with the requests that wait."""
        with self.database.write() as session:
            plans = samples.claim(session, rows.WORKER, rows.LEASE, self.catalog, 100)
        assert len(plans) == count
        for plan in plans:
            self.deliver(plan)

    def deliver(self, plan: SamplePlan) -> None:
        """What it does when a request's images are drawn."""
        images = []
        for index in range(plan.spec.n):
            data = f"picture {plan.spec.seed + index}".encode()
            key = keys.image(plan.tenant_id, plan.sample_id, plan.attempt, index)
            self.store.put(key, data, "image/png")
            digest = hashlib.sha256(data).hexdigest()
            images.append({"key": key, "sha256": digest, "bytes": len(data), "seed": plan.spec.seed + index})
        with self.database.write() as session:
            stats = {"adapter_residency": "hot", "batch_size": plan.spec.n, "queue_ms": 30.0, "compute_ms": 200.0}
            assert samples.finish(session, plan, images, stats)

    def objects(self) -> list[str]:
        return [info.key for info in self.store.list()]

    def spooled(self) -> list[Path]:
        return list((self.settings.data_dir / "spool").glob("*"))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    rows.make_catalog(folder)
    return folder / "tiny-dit"


@pytest.fixture
def service_settings(tmp_path: Path, sqlite_template: Path, base_folder: Path) -> Settings:
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copyfile(sqlite_template, folder / "difffit.db")
    return make_settings(folder, bases=str(base_folder), image_wait_seconds=5.0, log_level="error")


@contextmanager
def opened(settings: Settings) -> Iterator[Service]:
    """The API on these settings, in this process."""
    app = create_app(settings)
    with TestClient(app, raise_server_exceptions=False) as client:
        database = Database(settings.database)
        yield Service(app, settings, database, open_store(settings), Catalog(settings.bases), client)
        database.close()


@pytest.fixture
def service(service_settings: Settings) -> Iterator[Service]:
    with opened(service_settings) as service:
        yield service


@pytest.fixture
def owner(service: Service) -> Owner:
    return service.owner()


@pytest.fixture
def client(owner: Owner) -> TestClient:
    return owner.client


@pytest.fixture
def victim(service: Service) -> Owner:
    """A tenant with one of everything."""
    owner = service.owner()
    job_id, adapter = service.trained(owner)
    sample = owner.client.post(
        "/v1/images/generations", json={"model": "tiny-dit"}, headers={"Prefer": "respond-async"}
    ).json()
    service.draw()
    evaluation = owner.client.post("/v1/evaluations", json={"model": adapter.model, "file": service.dataset(owner).id})
    owner.ids = {
        "file_id": service.dataset(owner).id,
        "job_id": job_id,
        "preview_id": owner.client.get(f"/v1/fine_tuning/jobs/{job_id}/previews").json()["data"][0]["id"],
        "adapter_id": adapter.id,
        "model_id:path": adapter.model,
        "generation_id": sample["id"],
        "index": "0",
        "evaluation_id": evaluation.json()["id"],
        "key_id": owner.client.post("/v1/api_keys", json={"name": "second"}).json()["id"],
    }
    return owner


def upload(client: TestClient, data: bytes | None = None, **headers: str) -> Any:
    files = {"file": ("shapes.zip", archive() if data is None else data, "application/zip")}
    return client.post("/v1/files", files=files, data={"purpose": "fine-tune"}, headers=headers)


def job_body(file_id: str, **fields: Any) -> dict[str, Any]:
    method = {"type": "difffit", "difffit": {"hyperparameters": {"steps": 10}}}
    return {"model": "tiny-dit", "training_file": file_id, "method": method, **fields}


def unknown(noun: str) -> str:
    return f"{noun}-{uuid4().hex[:25]}"


def assert_problem(response: Any, status: int, code: str, pointer: str | None = None) -> dict[str, Any]:
    """The reply is a whole problem document of this status and code, at this field."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert body["error"]["code"] == code, body
    assert body["type"] == f"urn:difffit:error:{code}"
    assert {"title", "detail", "instance", "errors"} <= body.keys()
    if pointer is not None:
        assert pointer in [item["pointer"] for item in body["errors"]], body
    return body

"""What worker tests work on, and the few verbs that they need."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import select, update

from core.clock import utc_now
from core.datasets import service as datasets
from core.datasets.limits import Limits
from core.datasets.validation import validate
from core.ids import new_id
from core.jobs import service as jobs
from core.jobs import upkeep
from core.models import Adapter, Dataset, Evaluation, Job, JobEvent, Sample
from core.samples import service as samples
from core.samples import spec as sample_spec
from core.samples.spec import Asked
from core.storage import keys
from core.tenants import service as tenants
from tests.e2e.shapes import shapes_zip
from worker.pump import Pump
from worker.runtime import Runtime
from worker.services import Services

MODEL = "tiny-dit"


@dataclass
class Shop:
    services: Services
    runtime: Runtime
    tenant_id: str
    dataset_id: str

    @classmethod
    def opened(cls, services: Services, runtime: Runtime) -> "Shop":
        with services.database.write() as session:
            tenant_id = tenants.create_tenant(session, "acme").id
        return cls(services, runtime, tenant_id, add_dataset(services, tenant_id))

    def rival(self, each: int = 10) -> "Shop":
        """Another tenant of the same service, with data of its own."""
        with self.services.database.write() as session:
            tenant_id = tenants.create_tenant(session, f"rival-{new_id('tenant')[-6:]}").id
        return Shop(self.services, self.runtime, tenant_id, add_dataset(self.services, tenant_id, each))

    def job(self, evaluate: bool = False, seed: int = 7, **hyperparameters: Any) -> str:
        """A queued job, twelve steps unless told otherwise."""
        asked = {"steps": 12, "batch_size": 4, "checkpoint_every": 4, "preview_every": None, **hyperparameters}
        with self.services.database.write() as session:
            return jobs.create_job(
                session,
                self.tenant_id,
                self.services.catalog.get(MODEL),
                dataset_id=self.dataset_id,
                hyperparameters=asked,
                seed=seed,
                evaluate=evaluate,
            ).id

    def sample(self, *adapter_ids: str, weights: Sequence[float] = (), **fields: Any) -> str:
        """Of the base, of an adapter, or of several, each with its weight."""
        with self.services.database.write() as session:
            base = self.services.catalog.get(MODEL)
            adapters = [session.get_one(Adapter, adapter_id) for adapter_id in adapter_ids]
            parts = list(zip(adapters, weights or [1.0] * len(adapters), strict=True))
            spec = sample_spec.resolve(base, parts, Asked(**{"seed": 3, "steps": 4, **fields}), max_n=8)
            return samples.create_sample(session, self.tenant_id, base, spec, 100).id

    def pump(self) -> None:
        """Work until nothing is left."""
        Pump(self.runtime).run()

    def pump_elsewhere(self, fault: str = "", before: str = "") -> int:
        """The same in a process that a fault may kill; its exit code. `before` is code that it runs first."""
        settings = self.services.settings
        environment = {
            **os.environ,
            "DIFFFIT_DATA_DIR": str(settings.data_dir),
            "DIFFFIT_BASES": ",".join(settings.bases),
            "DIFFFIT_LEASE_SECONDS": str(settings.lease_seconds),
            "DIFFFIT_SLICE_SECONDS": str(settings.slice_seconds),
            "DIFFFIT_STALL_SECONDS": str(settings.stall_seconds),
            "DIFFFIT_THREADS": str(settings.threads),
            "FAULT": fault,
        }
        pump = "from worker.pump import Pump; from worker.runtime import get_runtime; Pump(get_runtime()).run()"
        command = [sys.executable, "-c", f"{before}\n{pump}"]
        return subprocess.run(command, env=environment, check=False, timeout=120, capture_output=True).returncode

    def lose_leases(self) -> None:
        """As if the lease of whoever held anything had run out just now."""
        past = utc_now() - timedelta(seconds=1)
        with self.services.database.write() as session:
            for table in (Job, Sample, Dataset, Evaluation):
                session.execute(update(table).where(table.lease_until.is_not(None)).values(lease_until=past))
            upkeep.sweep(session, self.services.settings.max_attempts)
            samples.sweep(session, self.services.settings.max_attempts)

    def get_job(self, job_id: str) -> Job:
        with self.services.database.read() as session:
            return session.get_one(Job, job_id)

    def get_sample(self, sample_id: str) -> Sample:
        with self.services.database.read() as session:
            return session.get_one(Sample, sample_id)

    def adapters(self, job_id: str) -> list[Adapter]:
        with self.services.database.read() as session:
            return list(session.scalars(select(Adapter).where(Adapter.job_id == job_id)))

    def messages(self, job_id: str) -> list[str]:
        with self.services.database.read() as session:
            query = select(JobEvent.message).where(JobEvent.job_id == job_id).order_by(JobEvent.id)
            return list(session.scalars(query))


def add_dataset(services: Services, tenant_id: str, each: int = 12, names: Sequence[str] = ("bar", "disc")) -> str:
    """Bars and discs, stored and validated as the worker does it."""
    archive = shapes_zip(each, names=names)
    dataset_id, key = datasets.new_dataset_id(tenant_id)
    services.store.put(key, archive)
    scratch = services.settings.data_dir / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "archive").write_bytes(archive)
    report = validate(scratch / "archive", scratch / "pack.zip", Limits()).to_json()
    with services.database.write() as session:
        datasets.create_dataset(
            session,
            tenant_id,
            dataset_id,
            filename="shapes.zip",
            purpose="fine-tune",
            size=len(archive),
            sha256=hashlib.sha256(archive).hexdigest(),
        )
        plan = datasets.claim(session, "test", 60)
        assert plan is not None
        pack_key, report_key = keys.pack(tenant_id, dataset_id, 1), keys.report(tenant_id, dataset_id, 1)
        services.store.put_file(pack_key, Path(scratch / "pack.zip"))
        services.store.put(report_key, json.dumps(report).encode())
        assert datasets.finish_validation(session, plan, report, pack_key, report_key)
    return dataset_id

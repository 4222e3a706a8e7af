"""Rows and a base to build tests of `core` on, without torch: each call names only what matters to its test."""

import json
import struct
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import update
from sqlalchemy.orm import Session

from core.bases import Catalog
from core.datasets import service as datasets
from core.db.session import now
from core.diffusion.catalog import BaseSummary
from core.jobs import attempts, claims
from core.jobs import service as jobs
from core.jobs.claims import Plan
from core.models import Adapter, Dataset, Job, Sample, Tenant
from core.samples import service as samples
from core.samples.spec import SampleSpec
from core.tenants import service as tenants

WORKER = "device@test"
LEASE = 30.0

_REPORT = {
    "kernel_distance": {"value": 100.0, "error": 5.0},
    "kernel_floor": {"value": 1.0, "error": 2.0},
    "frechet_distance": 300.0,
    "coverage": 0.5,
    "counts": {"generated": 200},
}
EVALUATED = {
    "after": _REPORT,
    "before": {**_REPORT, "kernel_distance": {"value": 400.0, "error": 9.0}},
    "moved": 0.75,
    "features": {"digest": "0" * 64},
}
"""What an evaluation of an adapter comes to."""


def make_catalog(folder: Path, name: str = "tiny-dit") -> Catalog:
    """A catalog of one base: the configs of a DiTPipeline folder and a weight file of one number."""
    base = folder / name
    configs = {
        "model_index.json": {"_class_name": "DiTPipeline", "vae": [None, None], "id2label": {"0": "circle"}},
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"},
        "transformer/config.json": {
            "_class_name": "DiTTransformer2DModel",
            "attention_head_dim": 8,
            "in_channels": 3,
            "num_attention_heads": 2,
            "num_embeds_ada_norm": 4,
            "num_layers": 4,
            "patch_size": 2,
            "sample_size": 8,
        },
    }
    for path, content in configs.items():
        (base / path).parent.mkdir(parents=True, exist_ok=True)
        (base / path).write_text(json.dumps(content))
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (base / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + struct.pack("<f", 0.0)
    )
    return Catalog([str(base)])


def base_of(catalog: Catalog) -> BaseSummary:
    return catalog.all()[0]


def make_tenant(session: Session, name: str | None = None) -> Tenant:
    return tenants.create_tenant(session, name or f"tenant-{uuid4().hex[:8]}")


def make_dataset(session: Session, tenant: Tenant, status: str = "processed", code: str = "no_images") -> Dataset:
    """Uploaded, and validated through the service's own verbs where the status says so."""
    dataset_id, _ = datasets.new_dataset_id(tenant.id)
    dataset = datasets.create_dataset(
        session, tenant.id, dataset_id, filename="shapes.zip", purpose="fine-tune", size=10, sha256="0" * 64
    )
    if status == "uploaded":
        return dataset
    plan = datasets.claim(session, "datasets@test", LEASE)
    assert plan is not None
    assert plan.dataset_id == dataset_id, "another dataset was waiting: validate it first"
    settle(session, plan, status, code)
    return dataset


def settle(session: Session, plan: datasets.ValidationPlan, status: str = "processed", code: str = "no_images") -> bool:
    """The verdict on a claimed dataset."""
    classes = [{"name": "a", "count": 20}, {"name": "b", "count": 12}]
    good = {"status": "processed", "images": 32, "rejected": 0, "classes": classes, "sha256": "1" * 64}
    bad = {"status": "error", "code": code, "detail": "not what it should be"}
    report = good if status == "processed" else bad
    pack_key = "pack" if status == "processed" else None
    return datasets.finish_validation(session, plan, report, pack_key, "report")


def make_job(session: Session, tenant: Tenant, catalog: Catalog, dataset: Dataset | None = None, **given: Any) -> Job:
    dataset = dataset or make_dataset(session, tenant)
    given = {"hyperparameters": {"steps": 10}, **given}
    return jobs.create_job(session, tenant.id, base_of(catalog), dataset_id=dataset.id, **given)


def claim_job(session: Session, catalog: Catalog, worker: str = WORKER) -> Plan:
    plan = claims.claim(session, worker, LEASE, catalog)
    assert plan is not None
    return plan


def report_step(session: Session, plan: Plan, step: int, seconds: float = 1.0) -> attempts.Standing:
    return attempts.report(session, plan, step=step, progress={"step": step, "steps": 10}, device_seconds=seconds)


def make_checkpoint(session: Session, plan: Plan, step: int, key: str = "key") -> bool:
    return attempts.add_checkpoint(session, plan, step=step, key=key, sha256="2" * 64, size=5, metrics={})


def adapter_for(plan: Plan, name: str = "") -> Adapter:
    """An adapter's row as a worker publishes it; not yet in the session."""
    return Adapter(
        tenant_id=plan.tenant_id,
        job_id=plan.job_id,
        model=f"ft:{plan.model}:t:{name}:{uuid4().hex}",
        base=plan.model,
        base_fingerprint="f",
        object_key="adapter",
        sha256="3" * 64,
        bytes=100,
        parameters=20,
        base_parameters=20_000,
        image_size=8,
        layout={"kind": "difffit", "gamma_depth": "half", "gamma_places": ["attention", "mlp"]},
        classes=["a", "b"],
    )


def expire(session: Session, table: type[Job] | type[Dataset] | type[Sample], row_id: str) -> None:
    """The worker that holds the row has been silent for longer than its lease."""
    session.execute(update(table).where(table.id == row_id).values(lease_until=now(session) - timedelta(seconds=1)))


def make_sample(session: Session, tenant: Tenant, catalog: Catalog, max_queued: int = 100) -> Sample:
    spec = SampleSpec(None, None, 1, 8, 0, 4, "ddim", "none", 1.0)
    return samples.create_sample(session, tenant.id, base_of(catalog), spec, max_queued)

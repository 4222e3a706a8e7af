from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from core.clock import utc_now
from core.db.base import Base, Counter
from core.ids import new_id
from core.models.lease import Leased


class Job(Base, Leased):
    """A fine-tuning job. `status` moves only through `core.jobs.states`."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_tenant_created", "tenant_id", "created_at", "id"),
        Index("ix_jobs_status_created", "status", "created_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("ftjob"))
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    model: Mapped[str]  # the base's name
    base_fingerprint: Mapped[str]
    suffix: Mapped[str | None]
    seed: Mapped[int] = mapped_column(BigInteger)
    request: Mapped[dict[str, Any]]  # hyperparameters as asked, "auto" included
    spec: Mapped[dict[str, Any] | None] = mapped_column(default=None)  # as resolved once the dataset is known
    start: Mapped[dict[str, Any] | None] = mapped_column(default=None)  # what it continues from: core.jobs.start
    devices: Mapped[int] = mapped_column(default=1)  # it waits for a worker that has so many
    labels: Mapped[dict[str, Any]] = mapped_column(default=dict)  # the caller's `metadata`
    evaluate: Mapped[bool] = mapped_column(default=False)  # measure the adapter against what was held out, once made
    status: Mapped[str] = mapped_column(default="validating_files")
    phase: Mapped[str | None] = mapped_column(default=None)
    progress: Mapped[dict[str, Any] | None] = mapped_column(default=None)
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    pause_requested: Mapped[bool] = mapped_column(default=False)
    step: Mapped[int] = mapped_column(default=0)
    device_seconds: Mapped[float] = mapped_column(default=0.0)
    numeric_path: Mapped[dict[str, Any] | None] = mapped_column(default=None)  # fixed at the first claim
    checkpoint_id: Mapped[str | None] = mapped_column(default=None)  # where a resume starts
    adapter_id: Mapped[str | None] = mapped_column(default=None)
    error: Mapped[dict[str, Any] | None] = mapped_column(default=None)  # {"code", "message", "param"}
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    updated_at: Mapped[datetime] = mapped_column(default=utc_now, onupdate=utc_now)
    started_at: Mapped[datetime | None] = mapped_column(default=None)
    finished_at: Mapped[datetime | None] = mapped_column(default=None)


class JobEvent(Base):
    """What happened to a job, in order. `id` is what `Last-Event-ID` names."""

    __tablename__ = "job_events"
    __table_args__ = (Index("ix_job_events_job", "job_id", "id"),)

    id: Mapped[int] = mapped_column(Counter, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    level: Mapped[str] = mapped_column(default="info")  # info | warn | error
    type: Mapped[str] = mapped_column(default="message")  # message | metrics
    message: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class JobMetric(Base):
    __tablename__ = "job_metrics"
    __table_args__ = (UniqueConstraint("job_id", "step"),)

    id: Mapped[int] = mapped_column(Counter, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    step: Mapped[int]
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Checkpoint(Base):
    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("ftckpt"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    step: Mapped[int]
    object_key: Mapped[str]
    sha256: Mapped[str]
    bytes: Mapped[int]
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Preview(Base):
    """A picture grid that the job drew at a step, from seeds that stay the same."""

    __tablename__ = "previews"
    __table_args__ = (UniqueConstraint("job_id", "step"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("preview"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    step: Mapped[int]
    object_key: Mapped[str]
    sha256: Mapped[str]
    bytes: Mapped[int]
    classes: Mapped[list[Any]]  # a class name per picture of the strip, left to right
    seeds: Mapped[list[Any]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)

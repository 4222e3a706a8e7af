from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from core.clock import utc_now
from core.db.base import Base
from core.ids import new_id
from core.models.lease import Leased


class Evaluation(Base, Leased):
    """A model's pictures measured against a dataset: what was asked, how far it is, what came out."""

    __tablename__ = "evaluations"
    __table_args__ = (
        Index("ix_evaluations_tenant_created", "tenant_id", "created_at", "id"),
        Index("ix_evaluations_status_created", "status", "created_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("eval"))
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    model: Mapped[str]
    base: Mapped[str]
    base_fingerprint: Mapped[str]
    adapter_id: Mapped[str | None] = mapped_column(ForeignKey("adapters.id"), default=None)
    request: Mapped[dict[str, Any]]  # core.evaluations.spec.EvaluationSpec
    status: Mapped[str] = mapped_column(default="queued")  # queued | running | succeeded | failed | cancelled
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    drawn: Mapped[int] = mapped_column(default=0)  # pictures
    partial_key: Mapped[str | None] = mapped_column(default=None)  # features of the pictures drawn so far
    partial_sha256: Mapped[str | None] = mapped_column(default=None)
    result: Mapped[dict[str, Any] | None] = mapped_column(default=None)
    error: Mapped[dict[str, Any] | None] = mapped_column(default=None)  # {"code", "message", "param"}
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    started_at: Mapped[datetime | None] = mapped_column(default=None)
    finished_at: Mapped[datetime | None] = mapped_column(default=None)

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from core.clock import utc_now
from core.db.base import Base
from core.ids import new_id
from core.models.lease import Leased


class Sample(Base, Leased):
    """A request for images and, once drawn, where they lie."""

    __tablename__ = "samples"
    __table_args__ = (
        Index("ix_samples_tenant_created", "tenant_id", "created_at", "id"),
        Index("ix_samples_status_created", "status", "created_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("img"))
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    model: Mapped[str]
    base: Mapped[str]
    adapter_id: Mapped[str | None] = mapped_column(ForeignKey("adapters.id"), default=None)
    request: Mapped[dict[str, Any]]  # core.samples.spec.SampleSpec
    status: Mapped[str] = mapped_column(default="queued")  # queued | running | succeeded | failed | cancelled
    images: Mapped[list[Any] | None] = mapped_column(default=None)  # [{"key", "sha256", "bytes", "seed"}]
    partials: Mapped[list[Any]] = mapped_column(default=list)  # [{"key", "index", "number"}] while it is running
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    deadline: Mapped[datetime | None] = mapped_column(default=None)
    stats: Mapped[dict[str, Any] | None] = mapped_column(default=None)
    error: Mapped[dict[str, Any] | None] = mapped_column(default=None)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    finished_at: Mapped[datetime | None] = mapped_column(default=None)

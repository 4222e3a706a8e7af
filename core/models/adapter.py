from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from core.clock import utc_now
from core.db.base import Base
from core.ids import new_id


class Adapter(Base):
    """A trained or imported adapter: a row here, a safetensors object in the store."""

    __tablename__ = "adapters"
    __table_args__ = (Index("ix_adapters_tenant_created", "tenant_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("adapter"))
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), unique=True)  # at most one per job
    model: Mapped[str]  # ft:<base>:<tenant>:<suffix>:<id>
    base: Mapped[str]
    base_fingerprint: Mapped[str]
    object_key: Mapped[str]
    sha256: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    parameters: Mapped[int] = mapped_column(BigInteger)
    base_parameters: Mapped[int] = mapped_column(BigInteger)
    image_size: Mapped[int]  # side in pixels that it was trained at
    layout: Mapped[dict[str, Any]]  # kind, gamma_depth, gamma_places
    classes: Mapped[list[Any]]  # names, in label order
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)
    labels: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    updated_at: Mapped[datetime] = mapped_column(default=utc_now, onupdate=utc_now)
    deleted_at: Mapped[datetime | None] = mapped_column(default=None)

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from core.clock import utc_now
from core.db.base import Base
from core.ids import new_id
from core.models.lease import Leased


class Dataset(Base, Leased):
    """An uploaded archive (a *file* in the REST surface) and what validation made of it."""

    __tablename__ = "datasets"
    __table_args__ = (Index("ix_datasets_tenant_created", "tenant_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("file"))
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    filename: Mapped[str]
    purpose: Mapped[str] = mapped_column(default="fine-tune")
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    object_key: Mapped[str]
    status: Mapped[str] = mapped_column(default="uploaded", index=True)  # uploaded | processed | error
    status_details: Mapped[str | None] = mapped_column(default=None)
    error_code: Mapped[str | None] = mapped_column(default=None)
    images: Mapped[int | None] = mapped_column(default=None)
    rejected: Mapped[int | None] = mapped_column(default=None)
    classes: Mapped[list[Any] | None] = mapped_column(default=None)  # [{"name", "count"}]
    pack_key: Mapped[str | None] = mapped_column(default=None)  # the normalised images
    pack_sha256: Mapped[str | None] = mapped_column(default=None)
    report_key: Mapped[str | None] = mapped_column(default=None)  # the verdict per image, JSON
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    deleted_at: Mapped[datetime | None] = mapped_column(default=None)

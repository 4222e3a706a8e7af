from typing import Literal, Self

from pydantic import BaseModel

from core.clock import to_unix
from core.diffusion.catalog import BaseSummary
from core.models import Adapter


class ModelRead(BaseModel):
    """OpenAI's model. From `kind` on the fields are ours; those that do not apply are null."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    kind: Literal["base", "adapter"]
    base: str
    classes: list[str]
    image_size: int
    licence: str | None
    fingerprint: str
    parameters: int
    adapter_id: str | None
    bytes: int | None
    sha256: str | None

    @classmethod
    def of_base(cls, base: BaseSummary, created: int) -> Self:
        return cls(
            id=base.name,
            created=created,
            owned_by="system",
            kind="base",
            base=base.name,
            classes=[base.id2label[label] for label in sorted(base.id2label)],
            image_size=base.image_size,
            licence=base.licence,
            fingerprint=base.fingerprint,
            parameters=base.parameters,
            adapter_id=None,
            bytes=None,
            sha256=None,
        )

    @classmethod
    def of_adapter(cls, row: Adapter, base: BaseSummary | None) -> Self:
        """`base` is None when this installation no longer offers it."""
        return cls(
            id=row.model,
            created=to_unix(row.created_at) or 0,
            owned_by=row.tenant_id,
            kind="adapter",
            base=row.base,
            classes=[str(name) for name in row.classes],
            image_size=row.image_size,
            licence=base.licence if base else None,
            fingerprint=row.base_fingerprint,
            parameters=row.parameters,
            adapter_id=row.id,
            bytes=row.bytes,
            sha256=row.sha256,
        )

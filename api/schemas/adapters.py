from typing import Any, Literal, Self

from pydantic import BaseModel

from api.schemas.base import Body
from api.schemas.jobs import Labels
from core.clock import to_unix
from core.models import Adapter


class AdapterUpdate(Body):
    metadata: Labels


class AdapterRead(BaseModel):
    id: str
    object: Literal["adapter"] = "adapter"
    created_at: int
    model: str
    job_id: str | None
    base: str
    base_fingerprint: str
    sha256: str
    bytes: int
    parameters: int
    base_parameters: int
    image_size: int
    layout: dict[str, Any]
    classes: list[str]
    metrics: dict[str, Any]
    metadata: dict[str, str]

    @classmethod
    def of(cls, row: Adapter) -> Self:
        names = cls.model_fields.keys() - {"object", "created_at", "metadata"}
        values = {name: getattr(row, name) for name in names}
        return cls.model_validate({**values, "created_at": to_unix(row.created_at), "metadata": row.labels})

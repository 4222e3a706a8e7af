from typing import Any, Literal, Self

from pydantic import BaseModel, Field

from core.clock import to_unix
from core.diffusion.catalog import MAX_SIZE_FACTOR, BaseSummary, Prediction
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
    conditioning: Literal["class", "text"] | None = Field(description="What the base draws by.")
    prediction: Prediction | None = Field(description="What the base predicts; `euler` draws from a flow alone.")
    layers: int | None = Field(description="Of the base: a job's `gamma_depth` lies within them.")
    max_image_size: int | None = Field(description="The largest `image_size` of a job on the base.")
    image_size_step: int | None = Field(description="A patch: an `image_size` is a multiple of it.")

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
            **_fits(base),
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
            **_fits(base),
        )


def _fits(base: BaseSummary | None) -> dict[str, Any]:
    """What a job or an image on this base may ask for, so that nobody learns it from a refusal."""
    return {
        "conditioning": base and base.conditioning,
        "prediction": base and base.prediction,
        "layers": base and base.layers,
        "max_image_size": base and MAX_SIZE_FACTOR * base.image_size,
        "image_size_step": base and base.size_unit,
    }

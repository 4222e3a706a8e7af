from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from api.schemas.base import Body, ModelName, Text
from api.schemas.jobs import JobError
from core.clock import to_unix
from core.models import Sample
from core.samples.spec import Asked, Format
from core.sampling.request import (
    MAX_ADAPTER_SCALE,
    MAX_GUIDANCE_SCALE,
    MAX_PARTS,
    MAX_SEED,
    MAX_STEPS,
    MAX_TIMEOUT,
    Guidance,
    Solver,
)

MAX_IMAGES = 1_000  # the settings' own limit is lower and named in its refusal


MAX_PARTIAL_IMAGES = 3  # as OpenAI has it

Share = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[tuple[Share, Share], Field(strict=False)]  # JSON has lists alone; the shares themselves are strict


class AdapterWeight(Body):
    model: ModelName = Field(description="Your own `ft:…` of the same base.")
    weight: Annotated[float, Field(ge=-MAX_ADAPTER_SCALE, le=MAX_ADAPTER_SCALE)] = 1.0


class ImageCreate(Body):
    """OpenAI's image request, and what a diffusion model can be asked besides.

    OpenAI's other parameters are taken where they ask for what is done anyway (`background: opaque`), else refused.
    """

    model: ModelName = Field(description="A base's name or your own `ft:…`.")
    prompt: Annotated[Text, Field(max_length=1_000)] | None = Field(
        None, description="A class name of the model; empty draws without a class."
    )
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = 1
    size: Annotated[Text, Field(max_length=20)] | None = Field(None, description="`auto`, or the model's own size.")
    seed: Annotated[int, Field(ge=0, le=MAX_SEED - MAX_IMAGES)] | None = Field(
        None, description="Image i is drawn from seed + i. Left out: one is chosen."
    )
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    solver: Solver | None = None
    guidance: Guidance | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=MAX_GUIDANCE_SCALE)] | None = None
    adapters: Annotated[list[AdapterWeight], Field(min_length=1, max_length=MAX_PARTS)] | None = Field(
        None, description="Adapters to add up, each with its weight; `model` is then their base."
    )
    adapter_scale: Annotated[float, Field(ge=-MAX_ADAPTER_SCALE, le=MAX_ADAPTER_SCALE)] | None = Field(
        None, description="0 is the base, 1 the adapter."
    )
    guidance_interval: Interval | None = Field(
        None,
        description="[low, high]: the shares of noise between which guidance is computed; outside it costs nothing.",
    )
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT)] | None = Field(
        None, description="Seconds after which the request is given up."
    )
    response_format: Literal["b64_json", "url"] | None = "b64_json"

    user: Annotated[Text, Field(max_length=512)] | None = Field(None, description="Taken and not kept.")
    output_format: Format | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of jpeg and webp. Left out: 100."
    )
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto", "standard"] | None = None
    stream: bool | None = Field(None, description="Server-sent events: partial images, then the images.")
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL_IMAGES)] | None = Field(
        None, description="Of each image, with `stream`: what is expected after a part of the steps."
    )

    # Validators of fields, so that an error names its field; each may look at those above it alone.

    @field_validator("partial_images")
    @classmethod
    def _partial_images_are_streamed(cls, value: int | None, told: ValidationInfo) -> int | None:
        if value and not told.data.get("stream"):
            raise ValueError("partial_images needs stream: true")
        return value

    @field_validator("stream")
    @classmethod
    def _a_stream_has_no_links(cls, value: bool | None, told: ValidationInfo) -> bool | None:
        if value and told.data.get("response_format") == "url":
            raise ValueError("a stream carries b64_json: leave response_format out")
        return value

    @field_validator("adapter_scale")
    @classmethod
    def _a_scale_is_of_one_adapter(cls, value: float | None, told: ValidationInfo) -> float | None:
        if value is not None and told.data.get("adapters"):
            raise ValueError("adapter_scale is for one adapter: give each of adapters its weight")
        return value

    @property
    def asked(self) -> Asked:
        return Asked(
            prompt=self.prompt,
            n=self.n or 1,
            size=self.size,
            seed=self.seed,
            steps=self.steps,
            solver=self.solver,
            guidance=self.guidance,
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            timeout=self.timeout,
            output_format=self.output_format,
            output_compression=self.output_compression,
            partial_images=self.partial_images or 0,
        )


class ImageRead(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    revised_prompt: None = None
    seed: int


class ImagesRead(BaseModel):
    """OpenAI's reply. From `id` on the fields are ours."""

    created: int
    data: list[ImageRead]
    output_format: Format
    size: str
    id: str
    model: str
    stats: dict[str, Any]

    @classmethod
    def of(cls, row: Sample, data: list[ImageRead]) -> Self:
        return cls(
            created=to_unix(row.finished_at) or 0,
            data=data,
            output_format=row.request["output_format"],
            size=size_of(row),
            id=row.id,
            model=row.model,
            stats=row.stats or {},
        )


class GenerationRead(BaseModel):
    """A request for images, whatever its state; `data` names the images once they are drawn."""

    id: str
    object: Literal["image.generation"] = "image.generation"
    created_at: int
    finished_at: int | None
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    model: str
    request: dict[str, Any]
    size: str
    data: list[ImageRead] | None
    stats: dict[str, Any] | None
    error: JobError | None

    @classmethod
    def of(cls, row: Sample, data: list[ImageRead] | None) -> Self:
        return cls.model_validate(
            {
                "id": row.id,
                "created_at": to_unix(row.created_at),
                "finished_at": to_unix(row.finished_at),
                "status": row.status,
                "model": row.model,
                "request": row.request,
                "size": size_of(row),
                "data": data,
                "stats": row.stats,
                "error": row.error,
            }
        )


def size_of(row: Sample) -> str:
    """As OpenAI writes it."""
    return f"{row.request['size']}x{row.request['size']}"


def error_of(row: Sample) -> dict[str, Any]:
    """Of a request that ended without images; a cancel is nobody's fault and leaves none in the row."""
    return row.error or {"code": "cancelled", "message": "the request was cancelled", "param": None}

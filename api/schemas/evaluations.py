from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field

from api.schemas.base import Body, ModelName, Text
from api.schemas.jobs import JobError
from core.clock import to_unix
from core.evaluations.spec import MAX_IMAGES, MIN_IMAGES
from core.models import Evaluation
from core.sampling.request import MAX_GUIDANCE_SCALE, MAX_SEED, MAX_STEPS, Guidance, Solver


class EvaluationCreate(Body):
    model: ModelName = Field(description="A base's name or your own `ft:…`.")
    file: Annotated[Text, Field(min_length=1, max_length=100, description="Id of a processed file.")]
    images: Annotated[int, Field(ge=MIN_IMAGES, le=MAX_IMAGES)] | None = Field(None, description="Pictures to draw.")
    seed: Annotated[int, Field(ge=0, le=MAX_SEED - MAX_IMAGES)] | None = Field(
        None, description="Picture i is drawn from seed + i. Left out: 0, so that evaluations compare."
    )
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    solver: Solver | None = None
    guidance: Guidance | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=MAX_GUIDANCE_SCALE)] | None = None
    baseline: bool | None = Field(None, description="Measure the untrained adapter too. Left out: for tuned models.")


class EvaluationRead(BaseModel):
    PASSING: ClassVar = frozenset({"progress"})  # api.states

    id: str
    object: Literal["evaluation"] = "evaluation"
    created_at: int
    started_at: int | None
    finished_at: int | None
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    model: str
    base: str
    base_fingerprint: str
    adapter_id: str | None
    file: str
    request: dict[str, Any]
    progress: dict[str, int]
    result: dict[str, Any] | None
    error: JobError | None
    attempt: int

    @classmethod
    def of(cls, row: Evaluation) -> Self:
        total = row.request["images"] * (2 if row.request["baseline"] else 1)
        same = (
            "id",
            "status",
            "model",
            "base",
            "base_fingerprint",
            "adapter_id",
            "request",
            "result",
            "error",
            "attempt",
        )
        return cls.model_validate(
            {
                **{name: getattr(row, name) for name in same},
                "created_at": to_unix(row.created_at),
                "started_at": to_unix(row.started_at),
                "finished_at": to_unix(row.finished_at),
                "file": row.dataset_id,
                "progress": {"drawn": row.drawn, "total": total},
            }
        )

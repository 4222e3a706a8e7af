import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, WithJsonSchema, field_validator
from typing_extensions import TypeAliasType

from api.schemas.base import Body, ModelName, Text, storable
from api.schemas.hyperparameters import schema
from core.clock import to_unix
from core.jobs.states import Status
from core.models import Checkpoint, Job, JobEvent, JobMetric, Preview

MAX_SEED = 2**63 - 1

_MAX_INT = 2**63
_MAX_TEXT = 200
_MAX_ITEMS = 100


def _plain(value: Any, depth: int = 0) -> Any:
    """A JSON value that every database can hold, of a size that a hyperparameter may have."""
    if isinstance(value, str):
        if len(value) > _MAX_TEXT:
            raise ValueError(f"texts must be at most {_MAX_TEXT} characters")
        storable(value)
    elif isinstance(value, int) and abs(value) >= _MAX_INT:
        raise ValueError("numbers must lie within 64 bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("numbers must be finite")
    elif isinstance(value, (dict, list)):
        if depth > 2 or len(value) > _MAX_ITEMS:
            raise ValueError("too deep or too long for a hyperparameter")
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _plain(item, depth + 1)
    return value


# An alias of its own name is a shape of its own in OpenAPI, said once for both places.
Hyperparameters = TypeAliasType(
    "Hyperparameters", Annotated[dict[str, Any], AfterValidator(_plain), WithJsonSchema(schema())]
)
Labels = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]], Field(max_length=16)
]


class DiffFitMethod(Body):
    hyperparameters: Hyperparameters = Field(
        default_factory=dict,
        description="Whatever is left out or `auto` is chosen; docs/api.md says what each does.",
    )


class Method(Body):
    type: Literal["difffit"]
    difffit: DiffFitMethod = Field(default_factory=DiffFitMethod)


class Previews(Body):
    every: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(None, description="Steps between two previews.")
    images: Annotated[int, Field(ge=1, le=16)] | None = Field(None, description="Pictures of one preview.")
    steps: Annotated[int, Field(ge=1, le=100)] | None = Field(None, description="Denoising steps of a picture.")


def _given(method: Method | None, top: Hyperparameters | None) -> dict[str, Any]:
    """The hyperparameters, in whichever of their two places they stand."""
    return method.difffit.hyperparameters if method else top or {}


class JobCreate(Body):
    model: ModelName = Field(description="A base, or a tuned model to continue.")
    training_file: Annotated[Text, Field(min_length=1, max_length=100, description="Id of an uploaded file.")]
    checkpoint: Annotated[Text, Field(min_length=1, max_length=100)] | None = Field(
        None, description="Id of a checkpoint of yours to continue from."
    )
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = Field(
        None, description="Part of the tuned model's name."
    )
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        None, description="Left out: one is drawn, or its origin's on the same file."
    )
    metadata: Labels | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(None, description="OpenAI's older place for them.")
    previews: bool | Previews | None = Field(None, description="false draws none.")
    evaluate: bool | None = Field(None, description="Measure the adapter against what was held out, once it is made.")
    validation_file: None = Field(None, description="A part of the training file is held out instead.")
    integrations: None = Field(None, description="There are none: null or an empty list.")

    @field_validator("validation_file", mode="before")
    @classmethod
    def _no_second_file(cls, value: object) -> None:
        if value is not None:
            raise ValueError("leave it out: a part of training_file is held out instead")

    @field_validator("integrations", mode="before")
    @classmethod
    def _no_integrations(cls, value: object) -> None:
        if value not in (None, []):
            raise ValueError("leave it out: there are no integrations")

    # Of fields, so that an error names its field.
    @field_validator("hyperparameters")
    @classmethod
    def _one_place(cls, value: Hyperparameters | None, info: ValidationInfo) -> Hyperparameters | None:
        if value is not None and info.data.get("method") is not None:
            raise ValueError("they stand either in method.difffit or at the top, not in both")
        return value

    @field_validator("previews")
    @classmethod
    def _said_once(cls, value: bool | Previews | None, info: ValidationInfo) -> bool | Previews | None:
        given = _given(info.data.get("method"), info.data.get("hyperparameters"))
        clash = {f"preview_{key}" for key in ("every", "images", "steps")} & given.keys()
        if value is not None and clash:
            raise ValueError(f"the hyperparameter {min(clash)} says the same thing: leave one out")
        return value

    def _asked(self) -> dict[str, Any]:
        return _given(self.method, self.hyperparameters)

    def asked(self) -> dict[str, Any]:
        """The hyperparameters, previews among them, as `core.training.spec.resolve` reads them."""
        if self.previews is False:
            return {**self._asked(), "preview_every": None}
        if isinstance(self.previews, Previews):
            given = self.previews.model_dump(exclude_none=True)
            return {**self._asked(), **{f"preview_{key}": value for key, value in given.items()}}
        return dict(self._asked())


class JobError(BaseModel):
    code: str
    message: str
    param: str | None


class Queue(BaseModel):
    position: int = Field(description="1 is next, as things stand; tenants take turns, so it may rise.")


class ContinuedFrom(BaseModel):
    type: Literal["adapter", "checkpoint"]
    id: str


class MethodRead(BaseModel):
    type: Literal["difffit"] = "difffit"
    difffit: dict[str, Any]


class JobRead(BaseModel):
    """OpenAI's fine-tuning job. From `phase` on the fields are ours."""

    # api.states
    PASSING: ClassVar = frozenset({"queue", "progress", "estimated_finish", "device_seconds", "numeric_path"})

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: Status
    error: JobError | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    training_file: str
    validation_file: None = None
    result_files: list[str]
    seed: int
    suffix: str | None
    trained_tokens: None = None
    hyperparameters: dict[str, Any]
    method: MethodRead
    metadata: dict[str, str]
    integrations: list[Any]
    phase: str | None
    progress: dict[str, Any] | None
    queue: Queue | None
    adapter_id: str | None
    attempt: int
    started_at: int | None
    base_fingerprint: str
    continued_from: ContinuedFrom | None
    evaluate: bool
    device_seconds: float = Field(description="Of all its devices together, so far.")
    numeric_path: dict[str, Any] | None = Field(
        description="What its bits depend on, fixed as it begins: torch, device, threads, dtype, micro_batch, …"
    )

    @classmethod
    def of(cls, row: Job, tuned_model: str | None, position: int | None) -> Self:
        values = row.spec or row.request
        return cls.model_validate(
            {
                "id": row.id,
                "created_at": to_unix(row.created_at),
                "finished_at": to_unix(row.finished_at),
                "estimated_finish": _estimated_finish(row),
                "status": row.status,
                "error": row.error,
                "model": row.model,
                "fine_tuned_model": tuned_model,
                "organization_id": row.tenant_id,
                "training_file": row.dataset_id,
                "result_files": [],
                "seed": row.seed,
                "suffix": row.suffix,
                "hyperparameters": {
                    "n_epochs": row.request.get("n_epochs", "auto"),
                    "batch_size": values.get("batch_size", "auto"),
                    "learning_rate_multiplier": row.request.get("learning_rate_multiplier", "auto"),
                },
                "method": {"difffit": {"hyperparameters": {k: v for k, v in values.items() if k != "seed"}}},
                "metadata": row.labels,
                "integrations": [],
                "phase": row.phase,
                "progress": row.progress,
                "queue": None if position is None else {"position": position},
                "adapter_id": row.adapter_id,
                "attempt": row.attempt,
                "started_at": to_unix(row.started_at),
                "base_fingerprint": row.base_fingerprint,
                "continued_from": row.start and {"type": row.start["kind"], "id": row.start["id"]},
                "evaluate": row.evaluate,
                "device_seconds": row.device_seconds,
                "numeric_path": row.numeric_path,
            }
        )


class EventRead(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any]

    @classmethod
    def of(cls, row: JobEvent) -> Self:
        return cls.model_validate(
            {
                "id": f"ftevent-{row.id}",
                "created_at": to_unix(row.created_at),
                "level": row.level,
                "type": row.type,
                "message": row.message,
                "data": row.data,
            }
        )


class CheckpointRead(BaseModel):
    """OpenAI's checkpoint. `bytes` and `sha256` are ours."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, Any]
    bytes: int
    sha256: str

    @classmethod
    def of(cls, row: Checkpoint) -> Self:
        return cls.model_validate(
            {
                "id": row.id,
                "created_at": to_unix(row.created_at),
                "fine_tuning_job_id": row.job_id,
                "fine_tuned_model_checkpoint": f"{row.job_id}:ckpt-step-{row.step}",
                "step_number": row.step,
                "metrics": {"step": row.step, **row.metrics},
                "bytes": row.bytes,
                "sha256": row.sha256,
            }
        )


class MetricRead(BaseModel):
    id: str
    object: Literal["fine_tuning.job.metric"] = "fine_tuning.job.metric"
    created_at: int
    step: int
    train_loss: float | None = None
    valid_loss: float | None = None
    data: dict[str, Any] = Field(description="Everything that was measured at this step.")

    @classmethod
    def of(cls, row: JobMetric) -> Self:
        return cls.model_validate(
            {
                "id": str(row.step),
                "created_at": to_unix(row.created_at),
                "step": row.step,
                "train_loss": row.data.get("train_loss"),
                "valid_loss": row.data.get("valid_loss"),
                "data": row.data,
            }
        )


class PreviewRead(BaseModel):
    id: str
    object: Literal["fine_tuning.job.preview"] = "fine_tuning.job.preview"
    created_at: int
    fine_tuning_job_id: str
    step: int
    classes: list[str | None]
    seeds: list[int]
    bytes: int
    sha256: str
    url: str

    @classmethod
    def of(cls, row: Preview, url: str) -> Self:
        return cls.model_validate(
            {
                "id": row.id,
                "created_at": to_unix(row.created_at),
                "fine_tuning_job_id": row.job_id,
                "step": row.step,
                "classes": row.classes,
                "seeds": row.seeds,
                "bytes": row.bytes,
                "sha256": row.sha256,
                "url": url,
            }
        )


def _estimated_finish(row: Job) -> int | None:
    """While it runs: the last report plus what was left then."""
    left = (row.progress or {}).get("eta_seconds")
    if row.status != Status.running or left is None:
        return None
    return int(row.updated_at.timestamp() + left)

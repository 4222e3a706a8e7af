"""What a job continues from: a finished adapter, or a checkpoint, of its tenant's own."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy.orm import Session

from core.diffusion.catalog import BaseSummary
from core.errors import Conflict, Invalid
from core.jobs.repository import CHECKPOINT_NAME, JobRepository
from core.models import Adapter, Checkpoint, Dataset, Job
from core.training.hyperparameters import AUTO
from core.training.spec import POINTER, TrainSpec

_INHERITED = ("layout", "gamma_depth", "gamma_places", "image_size")
_FIXED = ("layout", "gamma_depth", "gamma_places")
"""What trains must be what was trained; the size may be another."""


@dataclass(frozen=True)
class Start:
    """Kept with the job: the bytes stay in the store for as long as the job may need them."""

    kind: Literal["adapter", "checkpoint"]
    id: str
    base: str
    base_fingerprint: str
    key: str
    sha256: str
    classes: tuple[str, ...]
    inherited: Mapping[str, Any]

    @property
    def pointer(self) -> str:
        """The field that asked for it."""
        return "/model" if self.kind == "adapter" else "/checkpoint"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Start":
        return cls(**{**data, "classes": tuple(data["classes"])})

    def require_base(self, base: BaseSummary) -> None:
        """Refuse another base than the one it was trained on. Raises Invalid or Conflict."""
        if self.base != base.name:
            message = f"{self.id} was trained on {self.base}: continue it on that, not on {base.name}"
            raise Invalid(message, code="wrong_base", pointer=self.pointer)
        if self.base_fingerprint != base.fingerprint:
            message = f"{self.id} was trained on another {base.name} than the one that this service has now"
            raise Conflict(message, code="base_changed", pointer=self.pointer)

    def hyperparameters(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """As asked, with its own layout and size where nothing else is said."""
        given = {name: value for name, value in asked.items() if name not in _INHERITED or value not in (None, AUTO)}
        if given.get("layout", self.inherited["layout"]) != self.inherited["layout"]:
            raise self._other_layout("layout")
        return {**self.inherited, **given}

    def require_layout(self, spec: TrainSpec) -> None:
        """Refuse a spec that trains something else. Raises Invalid."""
        wanted = spec.to_json()
        for name in _FIXED:
            if wanted[name] != self.inherited[name]:
                raise self._other_layout(name)

    def _other_layout(self, name: str) -> Invalid:
        message = f"{self.id} has {name} {self.inherited[name]}: what continues from it has the same"
        return Invalid(message, code="wrong_layout", pointer=f"{POINTER}/{name}")


def from_adapter(adapter: Adapter) -> Start:
    inherited = {"layout": adapter.layout["kind"], "image_size": adapter.image_size}
    return Start(
        kind="adapter",
        id=adapter.id,
        base=adapter.base,
        base_fingerprint=adapter.base_fingerprint,
        key=adapter.object_key,
        sha256=adapter.sha256,
        classes=tuple(str(name) for name in adapter.classes),
        inherited={**inherited, **{name: adapter.layout[name] for name in ("gamma_depth", "gamma_places")}},
    )


def seed_of_origin(session: Session, start: Start, dataset_id: str) -> int | None:
    """The seed of the job that it continues, where that trained on the same file.

    With it the same pictures are held out: with another, most of what is held out would have been trained on before.
    """
    origin = session.get(Adapter if start.kind == "adapter" else Checkpoint, start.id)
    job = session.get(Job, origin.job_id) if origin is not None and origin.job_id else None
    return job.seed if job is not None and job.dataset_id == dataset_id else None


def is_checkpoint_name(name: str) -> bool:
    """Whether it names a checkpoint as the API's `fine_tuned_model_checkpoint` does."""
    return CHECKPOINT_NAME.fullmatch(name) is not None


def from_checkpoint(session: Session, tenant_id: str, name: str, pointer: str = "/checkpoint") -> Start:
    """One of the tenant's own checkpoints, by its id or its name. Raises NotFound."""
    job, checkpoint = JobRepository(session, tenant_id).get_checkpoint(name, pointer=pointer)
    dataset = session.get_one(Dataset, job.dataset_id)
    spec = job.spec or {}
    return Start(
        kind="checkpoint",
        id=checkpoint.id,
        base=job.model,
        base_fingerprint=job.base_fingerprint,
        key=checkpoint.object_key,
        sha256=checkpoint.sha256,
        classes=tuple(item["name"] for item in dataset.classes or []),
        inherited={name: spec[name] for name in _INHERITED},
    )

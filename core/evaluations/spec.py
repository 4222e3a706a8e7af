"""What an evaluation measures, checked once and kept as it is. No torch here."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from core.errors import Conflict, Invalid
from core.models import Adapter, Dataset, Job
from core.samples.spec import SampleSpec, find_class
from core.training.held_out import held_out_counts

Part = Literal["held_out", "all"]
DEFAULT_IMAGES = 200
MIN_IMAGES = 8
MAX_IMAGES = 1_000


@dataclass(frozen=True)
class EvaluationSpec:
    """`part` of the file is measured against: what the adapter's own training held out, by `part_seed`, or all of it.

    Picture i is drawn from `seed + i`. With `baseline` the same pictures are drawn of the untrained adapter as well,
    which is the base with each class at its start: how far training moved is the difference.
    """

    part: Part
    part_seed: int
    images: int
    size: int  # pixels
    steps: int
    solver: str
    guidance: str
    guidance_scale: float
    seed: int
    baseline: bool

    @property
    def total(self) -> int:
        """Pictures to draw."""
        return self.images * (2 if self.baseline else 1)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(**data)


def resolve(
    dataset: Dataset,
    adapter: Adapter | None,
    job: Job | None,
    drawn: SampleSpec,
    *,
    images: int | None,
    baseline: bool | None,
) -> EvaluationSpec:
    """The spec of a request; `job` is the one that made the adapter, `drawn` says how pictures are drawn.

    Raises Conflict for a file that is not validated, Invalid for one that is too small.
    """
    if dataset.status != "processed":
        raise Conflict(
            f"file {dataset.id} is {dataset.status}: an evaluation needs one that is processed",
            code="file_not_usable",
            pointer="/file",
        )
    if adapter is None and baseline:
        raise Invalid("a base has no baseline: it is one; name a tuned model", pointer="/baseline")
    own = adapter is not None and job is not None and job.dataset_id == dataset.id
    counts = [int(item["count"]) for item in dataset.classes or []]
    seed = job.seed if own and job is not None else 0
    held = sum(held_out_counts(counts)) if own else sum(counts)
    if held < MIN_IMAGES:
        where = "held out of training" if own else "in the file"
        raise Invalid(
            f"{held} images {where}: at least {MIN_IMAGES} are needed", code="too_few_images", pointer="/file"
        )
    return EvaluationSpec(
        part="held_out" if own else "all",
        part_seed=seed,
        images=DEFAULT_IMAGES if images is None else images,
        size=drawn.size,
        steps=drawn.steps,
        solver=drawn.solver,
        guidance=drawn.guidance,
        guidance_scale=drawn.guidance_scale,
        seed=drawn.seed,
        baseline=adapter is not None if baseline is None else baseline,
    )


def labels_to_draw(held_out: Sequence[str], classes: Sequence[str], images: int) -> list[int]:
    """A class of the model for each picture: in the held-out pictures' proportion, or evenly where they are others'.

    `held_out` has the class name of each held-out picture.
    """
    known = {name: find_class(name, classes) for name in set(held_out)}
    order = sorted(label for name in held_out if (label := known[name]) is not None)
    if len(order) == len(held_out):
        # Evenly spaced places in the sorted list: every class has its share, whatever the number of pictures.
        return [order[(2 * place + 1) * len(order) // (2 * images)] for place in range(images)]
    return [place % len(classes) for place in range(images)]

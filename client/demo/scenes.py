"""What the demo shows, as values: the report is made of these and of nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from client.adapters import Adapter
from client.jobs import Job
from client.models import Model

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Domain:
    """A set of images to adapt to. `name` is the metadata's, `title` the report's.

    A style is there after fewer `steps` than `auto` takes, and a demo is watched; what a class is wants all of them.
    """

    name: str
    title: str
    archive: Path
    credit: str
    steps: int | Literal["auto"] = "auto"


DOMAINS = (
    Domain(
        "openmoji_lineart",
        "line art",
        EXAMPLES / "openmoji_lineart_64.zip",
        "OpenMoji line art, CC BY-SA 4.0",
        steps=520,
    ),
    Domain("mnist_digits", "digits", EXAMPLES / "mnist_digits_32.zip", "MNIST, CC BY-SA 3.0"),
)


@dataclass(frozen=True)
class PreviewStrip:
    step: int
    pictures: Sequence[Image.Image]
    classes: Sequence[str | None]


@dataclass(frozen=True)
class Trained:
    """One domain's job and what came of it. `metrics` are `{step, train_loss, valid_loss, …}` in order."""

    letter: str
    domain: Domain
    job: Job
    adapter: Adapter
    images: int
    metrics: Sequence[Mapping[str, Any]]
    previews: Sequence[PreviewStrip]
    is_reused: bool


@dataclass(frozen=True)
class Row:
    """A row of the grid: one model's pictures, or real ones, each with a caption under it."""

    title: str
    note: str
    pictures: Sequence[Image.Image]
    captions: Sequence[str]
    is_real: bool = False


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Drawn:
    """The mixed batch: figures of every request, and the seed of each column."""

    stats: Sequence[Mapping[str, Any]]
    seeds: Sequence[int]
    seconds: float

    def most(self, name: str) -> float:
        return max((float(item.get(name) or 0) for item in self.stats), default=0.0)

    @property
    def adapters_at_once(self) -> int:
        return int(self.most("distinct_adapters"))


@dataclass
class Show:
    """The whole demo. `facts` are the machine's, as (name, value)."""

    base: Model
    trained: Sequence[Trained]
    rows: Sequence[Row]
    drawn: Drawn
    facts: Sequence[tuple[str, str]]
    url: str
    exports: Sequence[str] = ()
    """Settings, `NAME=value`, without which the other commands would not find this service."""
    stages: list[Stage] = field(default_factory=list)

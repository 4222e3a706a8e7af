"""One image, asked for: everything that it depends on, and the words for it. No torch here."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from core.errors import Invalid

Solver = Literal["ddim", "dpm++", "euler"]
Guidance = Literal["none", "cfg", "domain"]

MAX_STEPS = 250
MAX_SEED = 2**63 - 1
MAX_GUIDANCE_SCALE = 20.0
MAX_ADAPTER_SCALE = 4.0
MAX_PARTS = 4
MAX_TIMEOUT = 3600.0
DEFAULT_STEPS = 20
DEFAULT_SOLVER: Solver = "dpm++"
DEFAULT_GUIDANCE: Guidance = "cfg"  # what measured best, with adapters and without (docs/evaluation.md)
DEFAULT_SCALES: dict[Guidance, float] = {"none": 1.0, "cfg": 3.0, "domain": 2.0}


@dataclass(frozen=True)
class AdapterPart:
    """An adapter, how strongly it is there (0 not at all, 1 as trained), and the class of its own that is drawn."""

    digest: str
    weight: float = 1.0
    label: int | None = None

    def __post_init__(self) -> None:
        _real(self.weight, "weight", -MAX_ADAPTER_SCALE, MAX_ADAPTER_SCALE)
        if self.label is not None:
            _whole(self.label, "label", 0, 10**6)


@dataclass(frozen=True)
class SampleRequest:
    """A seed, a class and settings give one picture, whatever shares its batch.

    Without `adapters` it is the base that draws, its class `label`; None is the null class. Several adapters are added
    up, each with its weight. The second branch of a guided request runs while the noise share lies in
    `guidance_interval`. `size` is the side in pixels; None is the base's own. A flow base has one solver and takes
    `euler` for `dpm++`. `timeout` counts in seconds from `submit`. `previews` are the steps after which the picture
    that is expected by then is shown.
    """

    id: str
    tenant: str
    seed: int
    label: int | None = None
    adapters: tuple[AdapterPart, ...] = ()
    steps: int = DEFAULT_STEPS
    solver: Solver = DEFAULT_SOLVER
    guidance: Guidance = DEFAULT_GUIDANCE
    guidance_scale: float = DEFAULT_SCALES[DEFAULT_GUIDANCE]
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    size: int | None = None
    timeout: float | None = None
    previews: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _whole(self.seed, "seed", 0, MAX_SEED)
        _whole(self.steps, "steps", 1, MAX_STEPS)
        _real(self.guidance_scale, "guidance_scale", 0.0, MAX_GUIDANCE_SCALE)
        if self.label is not None:
            _whole(self.label, "label", 0, 10**6)
        if self.timeout is not None:
            _real(self.timeout, "timeout", 0.0, MAX_TIMEOUT)
        if len(self.adapters) > MAX_PARTS:
            raise Invalid(f"at most {MAX_PARTS} adapters may be mixed", pointer="/adapters")
        if self.adapters and self.label is not None:
            raise Invalid("label is the base's: with adapters each part has its own", pointer="/label")
        if len({part.label is None for part in self.adapters}) > 1:
            raise Invalid("either every adapter draws a class or none does", pointer="/adapters")
        if self.size is not None:
            _whole(self.size, "size", 8, 4096)
        _one_of(Solver, self.solver, "solver")
        _one_of(Guidance, self.guidance, "guidance")
        low, high = self.guidance_interval
        if not 0.0 <= low <= high <= 1.0:
            raise Invalid("guidance_interval must be [low, high] within 0 to 1", pointer="/guidance_interval")

    @property
    def is_guided(self) -> bool:
        """Whether there is a second branch: at scale 1, or against the null class itself, it would change nothing."""
        if self.guidance == "none" or self.guidance_scale == 1.0:
            return False
        return self.has_class or self.guidance == "domain"

    @property
    def has_class(self) -> bool:
        return self.label is not None or any(part.label is not None for part in self.adapters)

    @property
    def rows(self) -> int:
        """Rows of a forward pass that it needs at most."""
        return 2 if self.is_guided else 1

    @property
    def work(self) -> int:
        """Rows times steps: what it costs the device, for fairness."""
        return self.rows * self.steps


def _one_of(words: object, value: object, field: str) -> None:
    if value not in get_args(words):
        raise Invalid(f"{field} must be one of {', '.join(get_args(words))}", pointer=f"/{field}")


def _whole(value: object, field: str, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise Invalid(f"{field} must be a whole number from {low} to {high}", pointer=f"/{field}")


def _real(value: object, field: str, low: float, high: float) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type]
        raise Invalid(f"{field} must be a number from {low:g} to {high:g}", pointer=f"/{field}")

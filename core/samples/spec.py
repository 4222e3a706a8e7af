"""What a request for images asks for, checked once and kept as it is."""

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from core.diffusion.catalog import BaseSummary
from core.errors import Invalid
from core.models import Adapter
from core.sampling.request import (
    DEFAULT_GUIDANCE,
    DEFAULT_SCALES,
    DEFAULT_SOLVER,
    DEFAULT_STEPS,
    MAX_PARTS,
    Guidance,
    Solver,
)

Format = Literal["png", "webp", "jpeg"]
MEDIA_TYPES: dict[Format, str] = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}


@dataclass(frozen=True)
class PartSpec:
    """One adapter of a request, by id: its bytes never change, whatever its model's name comes to mean."""

    adapter_id: str
    model: str
    weight: float
    label: int | None  # class index of the adapter


@dataclass(frozen=True)
class SampleSpec:
    """Image i of n is drawn from `seed + i`, so that each can be made again alone."""

    label: int | None  # class index of the base; None with adapters, and where no class is drawn
    class_name: str | None
    n: int
    size: int  # pixels
    seed: int
    steps: int
    solver: Solver
    guidance: Guidance
    guidance_scale: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    adapters: tuple[PartSpec, ...] = ()
    timeout: float | None = None  # seconds from the request's arrival
    output_format: Format = "png"
    output_compression: int = 100
    partial_images: int = 0

    @property
    def partial_steps(self) -> tuple[int, ...]:
        """Steps after which a partial image is shown, evenly spaced; fewer than asked for where steps are few."""
        count = self.partial_images + 1
        steps = {self.steps * number // count for number in range(1, count)}
        return tuple(sorted(steps - {0, self.steps}))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        low, high = data["guidance_interval"]
        parts = tuple(PartSpec(**part) for part in data["adapters"])
        return cls(**{**data, "guidance_interval": (low, high), "adapters": parts})

    @classmethod
    def default(cls, seed: int, size: int) -> Self:
        """One picture without a class, as drawn where nothing is asked."""
        scale = DEFAULT_SCALES[DEFAULT_GUIDANCE]
        return cls(None, None, 1, size, seed, DEFAULT_STEPS, DEFAULT_SOLVER, DEFAULT_GUIDANCE, scale)


@dataclass(frozen=True)
class Asked:
    """What a caller may leave out."""

    prompt: str | None = None
    n: int = 1
    size: str | None = None
    seed: int | None = None
    steps: int | None = None
    solver: Solver | None = None
    guidance: Guidance | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    timeout: float | None = None
    output_format: Format | None = None
    output_compression: int | None = None
    partial_images: int = 0


def resolve(base: BaseSummary, parts: Sequence[tuple[Adapter, float]], asked: Asked, max_n: int) -> SampleSpec:
    """Fill in the defaults, or say which field cannot be; `parts` are adapters and their weights. Raises Invalid."""
    if asked.n > max_n:
        raise Invalid(f"n is {asked.n}: at most {max_n} images a request", pointer="/n")
    if len(parts) > MAX_PARTS:
        raise Invalid(f"adapters has {len(parts)}: at most {MAX_PARTS} may be mixed", pointer="/adapters")
    if not parts and asked.guidance == "domain":
        raise Invalid("domain guidance needs an adapter: name a tuned model, or use cfg", pointer="/guidance")
    if asked.solver == "euler" and base.prediction != "flow":
        raise Invalid("euler draws from flow bases alone: use dpm++ or ddim", pointer="/solver")
    low, high = asked.guidance_interval or (0.0, 1.0)
    if low > high:
        raise Invalid("guidance_interval must be [low, high] with low at most high", pointer="/guidance_interval")
    output_format = asked.output_format or "png"
    if output_format == "png" and asked.output_compression not in (None, 100):
        raise Invalid("output_compression is for jpeg and webp: a png loses nothing", pointer="/output_compression")
    chosen = asked.guidance or DEFAULT_GUIDANCE
    spec = SampleSpec(
        label=None,
        class_name=_named(asked.prompt),
        n=asked.n,
        size=_size(asked.size, [adapter.image_size for adapter, _ in parts], base.image_size),
        seed=secrets.randbelow(2**31) if asked.seed is None else asked.seed,
        steps=DEFAULT_STEPS if asked.steps is None else asked.steps,
        solver=asked.solver or DEFAULT_SOLVER,
        guidance=chosen,
        guidance_scale=DEFAULT_SCALES[chosen] if asked.guidance_scale is None else asked.guidance_scale,
        guidance_interval=(low, high),
        timeout=asked.timeout,
        output_format=output_format,
        output_compression=100 if asked.output_compression is None else asked.output_compression,
        partial_images=asked.partial_images,
    )
    if not parts:
        names = list(base.id2label.values())
        return replace(spec, label=_label(asked.prompt, names, base.name, _alternatives(names)))
    return replace(spec, adapters=tuple(_part(asked.prompt, adapter, weight) for adapter, weight in parts))


def _part(prompt: str | None, adapter: Adapter, weight: float) -> PartSpec:
    label = _label(prompt, [str(name) for name in adapter.classes], adapter.model)
    return PartSpec(adapter.id, adapter.model, weight, label)


def _named(prompt: str | None) -> str | None:
    return prompt.strip() if prompt and prompt.strip() else None


def _label(
    prompt: str | None, names: Sequence[str], model: str, alternatives: Sequence[tuple[int, str]] = ()
) -> int | None:
    """A class by its name; an empty prompt draws without a class."""
    wanted = _named(prompt)
    if wanted is None:
        return None
    if not names:
        raise Invalid(f"{model} draws prompts through its adapters alone", code="unknown_class", pointer="/prompt")
    label = find_class(wanted, names, alternatives)
    if label is None:
        shown = ", ".join(names[:40]) + (", …" if len(names) > 40 else "")
        raise Invalid(f"prompt names no class of {model}; it draws: {shown}", code="unknown_class", pointer="/prompt")
    return label


def find_class(wanted: str, names: Sequence[str], alternatives: Sequence[tuple[int, str]] = ()) -> int | None:
    """The number of a class by its name, or by one of `alternatives` (number, name), whatever its case.

    The very spelling goes before another case, and a whole name before an alternative: ImageNet has a `Cardigan,
    Cardigan Welsh corgi` and a `cardigan`, and adapters may be older than the rule that names differ in more than case.
    """
    spelt = [*enumerate(names), *alternatives]
    exact = (number for number, name in spelt if name == wanted)
    folded = (number for number, name in spelt if name.casefold() == wanted.casefold())
    return next(exact, next(folded, None))


def _alternatives(names: Sequence[str]) -> list[tuple[int, str]]:
    """ImageNet's names are lists of synonyms: `tench, Tinca tinca`. (An adapter's are folders, comma or not.)"""
    return [(number, part.strip()) for number, name in enumerate(names) for part in name.split(",")]


def _size(size: str | None, adapted: list[int], native: int) -> int:
    """Left out: the first adapter's own. Nothing else was trained, so nothing else is drawn."""
    known = {f"{side}x{side}": side for side in (*adapted, native)}
    if size in (None, "auto"):
        return next(iter(known.values()))
    if size in known:
        return known[size]
    raise Invalid(f"size {size} is not drawn by this model: only {', '.join(known)}", pointer="/size")

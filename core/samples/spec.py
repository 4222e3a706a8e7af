"""What a request for images asks for, checked once and kept as it is."""

import secrets
from dataclasses import asdict, dataclass
from typing import Any, Self

from core.diffusion.catalog import BaseSummary
from core.errors import Invalid
from core.models import Adapter
from core.sampling.request import DEFAULT_SOLVER, DEFAULT_STEPS, Guidance, Solver


@dataclass(frozen=True)
class SampleSpec:
    """Image i of n is drawn from `seed + i`, so that each can be made again alone."""

    label: int | None  # class index of the adapter (or of the base); None draws without a class
    class_name: str | None
    n: int
    size: int  # pixels
    seed: int
    steps: int
    solver: Solver
    guidance: Guidance
    guidance_scale: float
    adapter_scale: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(**data)

    @classmethod
    def default(cls, guidance: Guidance, seed: int) -> Self:
        """One picture of the base's size without a class, as drawn where nothing is asked."""
        scale = _DEFAULT_SCALE[guidance]
        return cls(None, None, 1, 0, seed, DEFAULT_STEPS, DEFAULT_SOLVER, guidance, scale, 1.0)


def resolve(
    base: BaseSummary,
    adapter: Adapter | None,
    *,
    prompt: str | None,
    n: int,
    size: str | None,
    seed: int | None,
    steps: int | None,
    solver: Solver | None,
    guidance: Guidance | None,
    guidance_scale: float | None,
    adapter_scale: float | None,
    max_n: int,
) -> SampleSpec:
    """Fill in the defaults, or say which field cannot be. Raises Invalid."""
    names = [str(name) for name in adapter.classes] if adapter else list(base.id2label.values())
    if n > max_n:
        raise Invalid(f"n is {n}: at most {max_n} images a request", pointer="/n")
    if adapter is None and guidance == "domain":
        raise Invalid("domain guidance needs an adapter: name a tuned model, or use cfg", pointer="/guidance")
    if solver == "euler" and base.prediction != "flow":
        raise Invalid("euler draws from flow bases alone: use dpm++ or ddim", pointer="/solver")
    chosen = guidance or ("domain" if adapter else "cfg")
    return SampleSpec(
        label=_label(prompt, names),
        class_name=_named(prompt),
        n=n,
        size=_size(size, base.image_size),
        seed=secrets.randbelow(2**31) if seed is None else seed,
        steps=DEFAULT_STEPS if steps is None else steps,
        solver=solver or DEFAULT_SOLVER,
        guidance=chosen,
        guidance_scale=_DEFAULT_SCALE[chosen] if guidance_scale is None else guidance_scale,
        adapter_scale=1.0 if adapter_scale is None else adapter_scale,
    )


_DEFAULT_SCALE: dict[Guidance, float] = {"none": 1.0, "cfg": 3.0, "domain": 2.0}


def _named(prompt: str | None) -> str | None:
    return prompt.strip() if prompt and prompt.strip() else None


def _label(prompt: str | None, names: list[str]) -> int | None:
    """A class by its name, whatever its case; an empty prompt draws without a class."""
    wanted = _named(prompt)
    if wanted is None:
        return None
    folded = [name.casefold() for name in names]
    if wanted.casefold() in folded:
        return folded.index(wanted.casefold())
    shown = ", ".join(names[:40]) + (", …" if len(names) > 40 else "")
    raise Invalid(f"prompt names no class of this model; it draws: {shown}", code="unknown_class", pointer="/prompt")


def _size(size: str | None, native: int) -> int:
    if size in (None, "auto", f"{native}x{native}"):
        return native
    raise Invalid(f"size {size} is not drawn by this model: only {native}x{native}", pointer="/size")

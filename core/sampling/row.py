"""One image on its way: its state between two steps, what it takes part in a pass with, and how it came about."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from core.diffusion.bank import BASE_SLOT, NULL_LABEL
from core.diffusion.guidance import is_guided
from core.diffusion.solvers import Plan
from core.sampling.request import SampleRequest
from core.sampling.slots import Residency, Seat

OnPreview = Callable[[int, np.ndarray], None]

_WARMEST_FIRST: tuple[Residency, ...] = ("hot", "warm", "cold")


@dataclass(frozen=True)
class SampleStats:
    """How an image came about. `batch_size` and `distinct_adapters` are the largest that it shared a pass with."""

    adapter_residency: Residency
    adapter_load_ms: float
    queue_ms: float
    compute_ms: float
    batch_size: int
    distinct_adapters: int
    steps: int


@dataclass(frozen=True)
class Sampled:
    image: np.ndarray  # (s, s, 3) uint8
    stats: SampleStats


class Term(NamedTuple):
    """A slot's share in a row: its vector and class difference times `weight`, its start row times `share`."""

    slot: int
    label: int
    weight: float
    share: float


@dataclass(eq=False)
class Row:
    """One image, from `submit` until its future is answered; the engine moves it."""

    request: SampleRequest
    future: "Future[Sampled]"
    plan: Plan
    side: int
    submitted_at: float
    on_preview: OnPreview | None
    arrived: dict[str, Residency] = field(default_factory=dict)  # by digest, when the request came
    seats: list[Seat] = field(default_factory=list)  # of its adapters, in their order
    x: Tensor | None = None  # (C, h, w)
    previous: Tensor | None = None  # (C, h, w)
    step: int = 0
    started_at: float = 0.0
    batch_size: int = 0
    distinct_adapters: int = 0

    @property
    def digests(self) -> list[str]:
        return list(dict.fromkeys(part.digest for part in self.request.adapters))

    @property
    def is_late(self) -> bool:
        timeout = self.request.timeout
        return timeout is not None and time.perf_counter() - self.submitted_at > timeout

    @property
    def runs_twice(self) -> bool:
        """Whether this step has a second branch."""
        level = float(self.plan.levels[self.step])
        return self.request.is_guided and is_guided(level, self.request.guidance_interval)

    def branch(self, is_second: bool) -> list[Term]:
        """What is added up to this row's vector and class row, conditional or for guidance."""
        request = self.request
        if not self.seats or (is_second and request.guidance == "domain"):
            label = None if is_second else request.label
            return [Term(BASE_SLOT, NULL_LABEL if label is None else label, 1.0, 1.0)]
        total = sum(abs(part.weight) for part in request.adapters)
        return [
            Term(
                seat.slot,
                NULL_LABEL if is_second or part.label is None else part.label,
                part.weight,
                abs(part.weight) / total if total else 1 / len(self.seats),
            )
            for seat, part in zip(self.seats, request.adapters, strict=True)
        ]

    def show(self, step: int, image: np.ndarray | Exception) -> None:
        """Hand a preview to whoever asked for it. Of one that failed nothing is said: the picture itself will tell."""
        if self.on_preview is not None and not isinstance(image, Exception):
            self.on_preview(step, image)

    def stats(self) -> SampleStats:
        """What is to be said now that the image is done. The base itself is always hot."""
        residencies: list[Residency] = [seat.residency for seat in self.seats] or ["hot"]
        return SampleStats(
            adapter_residency=max(residencies, key=_WARMEST_FIRST.index),
            adapter_load_ms=max((seat.load_ms for seat in self.seats), default=0.0),
            queue_ms=1000 * (self.started_at - self.submitted_at),
            compute_ms=1000 * (time.perf_counter() - self.started_at),
            batch_size=self.batch_size,
            distinct_adapters=self.distinct_adapters,
            steps=self.step,
        )

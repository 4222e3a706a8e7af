"""Engines on tiny bases, a shelf of adapters, and requests with defaults."""

import time
from collections.abc import Callable
from threading import Event
from typing import Any

import numpy as np

from core.diffusion.adapter import Adapter
from core.diffusion.base import Base
from core.errors import NotFound, Unavailable
from core.sampling.engine import Engine
from core.sampling.request import AdapterPart, SampleRequest
from core.sampling.row import Sampled
from tests.diffusion.tiny import make_adapter


class Shelf:
    """Adapters by digest, as a store has them; counts its loads, and can be held up or away."""

    def __init__(self, adapters: dict[str, Adapter]) -> None:
        self.adapters = adapters
        self.loads: list[str] = []
        self.is_away = False
        self.open = Event()
        self.open.set()

    def __call__(self, digest: str) -> Adapter:
        assert self.open.wait(10)
        self.loads.append(digest)
        if self.is_away:
            raise Unavailable("the store does not answer")
        if digest not in self.adapters:
            raise NotFound(f"adapter {digest}")
        return self.adapters[digest]


def make_shelf(base: Base) -> Shelf:
    layouts = [base.layout(), base.layout("bitfit"), base.layout(gamma_depth="all"), base.layout()]
    return Shelf(
        {
            f"adapter-{number}": make_adapter(base, layout=layout, classes=2 + number, seed=number, strength=0.1)
            for number, layout in enumerate(layouts)
        }
    )


def make_engine(base: Base, shelf: Shelf, **options: Any) -> Engine:
    layout = base.widest_layout()
    return Engine(base, layout, **{"slots": 6, "max_rows": 16, "load_adapter": shelf, **options})


def run(engine: Engine) -> None:
    run_until(engine, lambda: not engine.has_work)


def run_until(engine: Engine, is_over: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_over():
        if not engine.step():
            engine.wait(0.05)
        assert time.monotonic() < deadline


def draw(engine: Engine, *requests: SampleRequest) -> list[Sampled]:
    futures = [engine.submit(request) for request in requests]
    run(engine)
    return [future.result(0) for future in futures]


def make_request(
    number: int = 0,
    adapter: str | None = None,
    label: int | None = 0,
    weight: float = 1.0,
    adapters: tuple[AdapterPart, ...] = (),
    **fields: Any,
) -> SampleRequest:
    """Of the base, of one adapter, or of several."""
    parts = (AdapterPart(adapter, weight, label),) if adapter else adapters
    given = {"id": f"r-{number}", "tenant": "t", "seed": number, "steps": 4, **fields}
    return SampleRequest(**given, label=None if parts else label, adapters=parts)


def largest_difference(one: list[Sampled], two: list[Sampled]) -> int:
    return max(int(np.abs(a.image.astype(int) - b.image.astype(int)).max()) for a, b in zip(one, two, strict=True))

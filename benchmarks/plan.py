"""What the tables run: the search for every method's rate, then the cells that are shown.

Every method sees the same pictures, noises and steps, and finds its learning rate by the same search: three rates on
two of the domains (one at the edge asks for the next), one seed, measured on pictures that serve nothing else. Then
three seeds on every domain against its held-out part, a seed after another.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.cells import DOMAIN, MAIN, Cell, Draw, Place, Recipe, Result, at, kernel, log_distance, run_cells

COMPARED = ("difffit", "difffit-everywhere", "full", "lora-fair", "bitfit")  # three seeds
ABLATED = ("difffit-all", "lora-qkv", "modules")  # one
GUIDED: tuple[str, ...] = ("difffit", "full")  # with more than one guidance
RATES = {
    "full": (1e-4, 3e-4, 1e-3),
    "bitfit": (3e-3, 1e-2, 3e-2),
    "difffit": (3e-3, 1e-2, 3e-2),
    "difffit-everywhere": (3e-3, 1e-2, 3e-2),
    "lora-fair": (1e-3, 3e-3, 1e-2),
}
TUNED_AS = {"difffit-all": "difffit", "lora-qkv": "lora-fair", "modules": "lora-fair"}
TUNING_DOMAINS = ("lineart", "game")  # colour and black, so that the other domains show how a choice carries over
TUNING_SEED = 100
EXTENSIONS = 2
STEP_SECONDS = {"paper": {"difffit": 0.25, "full": 0.4}, "service": {"difffit": 0.12, "full": 0.26, "lora-fair": 0.25}}
AUTO_STEPS = 880  # of 200 pictures: for the estimate alone


@dataclass(frozen=True)
class Sizes:
    """`steps` None: as many as `auto` takes."""

    recipe: Recipe
    steps: int | None
    batch_size: int = 8
    train_images: int = 200
    pictures: int = 200
    tuning_pictures: int = 100  # no more than there are to choose by
    seeds: tuple[int, ...] = (1, 2, 3)


SIZES: dict[Recipe, Sizes] = {"paper": Sizes("paper", 220), "service": Sizes("service", None, tuning_pictures=60)}


class Table:
    """The table of a recipe: rates, searched by the guidance that methods are compared by, then the figures."""

    def __init__(self, place: Place, names: Sequence[str], sizes: Sizes, workers: int) -> None:
        self.place, self.names, self.sizes, self.workers = place, list(names), sizes, workers
        self.tuned_on = [name for name in names if name in TUNING_DOMAINS] or self.names[:1]
        self.rates: dict[str, float] = {}  # of each method

    def run(self) -> list[Result]:
        print("rates:", self.tune_rates(), flush=True)
        return run_cells(self.place, self.cells(), self.workers)

    def tune_rates(self) -> dict[str, float]:
        """Of each method, the rate whose kernel distance has the least mean logarithm over the tuning domains."""
        tried = {method: list(rates) for method, rates in RATES.items()}
        for _ in range(EXTENSIONS + 1):
            asked = [(method, rate) for method, rates in tried.items() for rate in rates]
            distances = self._distances(asked, (MAIN,))
            is_settled = True
            for method, rates in tried.items():
                best = min(rates, key=lambda rate: distances[method, rate, MAIN])
                self.rates[method] = best
                if best in (min(rates), max(rates)):
                    rates.append(_next_rate(best, upward=best == max(rates)))
                    is_settled = False
            if is_settled:
                break
        return self.rates

    def _distances(
        self, asked: Sequence[tuple[str, float]], draws: tuple[Draw, ...]
    ) -> dict[tuple[str, float, Draw], float]:
        """Mean log kernel distance over the tuning domains by (method, rate, draw)."""
        tried = [(method, rate) for method, rate in asked for _ in self.tuned_on]
        cells = [self.tuning_cell(method, name, rate, draws) for method, rate in asked for name in self.tuned_on]
        logs: dict[tuple[str, float, Draw], list[float]] = defaultdict(list)
        for (method, rate), result in zip(tried, run_cells(self.place, cells, self.workers), strict=True):
            for draw in draws:
                logs[method, rate, draw].append(log_distance(kernel(at(result, draw))))
        return {key: float(np.mean(values)) for key, values in logs.items()}

    def tuning_cell(self, method: str, name: str, rate: float, draws: tuple[Draw, ...]) -> Cell:
        return Cell(
            domain=name,
            method=method,
            learning_rate=rate,
            steps=self.sizes.steps,
            batch_size=self.sizes.batch_size,
            seed=TUNING_SEED,
            train_images=self.sizes.train_images,
            against="tune",
            pictures=min(self.sizes.tuning_pictures, self.sizes.pictures),
            draws=draws,
            recipe=self.sizes.recipe,
        )

    def cells(self) -> list[Cell]:
        """What the table shows."""
        return [self.cell(m, name, seed) for seed in self.sizes.seeds for m in COMPARED for name in self.names]

    def cell(self, method: str, name: str, seed: int) -> Cell:
        return replace(
            self.tuning_cell(method, name, self.rates[TUNED_AS.get(method, method)], self.draws(method, seed)),
            seed=seed,
            against="test",
            pictures=self.sizes.pictures,
        )

    def draws(self, method: str, seed: int) -> tuple[Draw, ...]:
        return (MAIN, DOMAIN) if method == "difffit" else (MAIN,)

    def estimate(self) -> float:
        """Seconds of the whole run on idle cores, from what a step and a picture cost where this was written."""
        self.rates = {method: rates[0] for method, rates in RATES.items()}
        searched = sum(
            self._seconds(self.tuning_cell(method, name, rates[0], (MAIN,))) * (len(rates) + 0.6)
            for method, rates in RATES.items()
            for name in self.tuned_on
        )
        return (searched + sum(self._seconds(cell) for cell in self.cells())) / self.workers

    def _seconds(self, cell: Cell) -> float:
        step = STEP_SECONDS[cell.recipe].get(cell.method, STEP_SECONDS[cell.recipe]["difffit"])
        picture = sum(0.22 if guidance == "none" else 0.42 for guidance, _ in cell.draws)
        steps = 0 if cell.method == "base" else cell.steps or AUTO_STEPS
        return 12 + steps * step * cell.batch_size / 8 + cell.pictures * picture


class PaperTable(Table):
    """With ablations and the base as it is; full fine-tuning by domain guidance too, it and DiffFit by none."""

    def cells(self) -> list[Cell]:
        first = self.sizes.seeds[0]
        bare = [replace(self.cell("bitfit", name, first), method="base", learning_rate=None) for name in self.names]
        ablated = [self.cell(method, name, first) for name in self.names for method in ABLATED]
        return super().cells() + bare + ablated

    def draws(self, method: str, seed: int) -> tuple[Draw, ...]:
        if method not in GUIDED:
            return (MAIN,)
        return (DOMAIN, MAIN, ("none", 1.0)) if seed == self.sizes.seeds[0] else (DOMAIN, MAIN)


def _next_rate(rate: float, upward: bool) -> float:
    """1, 3, 10, 30, …"""
    exponent = round(2 * math.log10(rate)) + (1 if upward else -1)
    return round((1.0 if exponent % 2 == 0 else 3.0) * 10.0 ** (exponent // 2), 10)

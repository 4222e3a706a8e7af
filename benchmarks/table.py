"""`python -m benchmarks.table`: methods × domains × seeds, as the paper's tables have them, at small scale.

Every method sees the same pictures, noises and steps, and finds its learning rate by the same search: three rates a
method and domain (a rate at the edge asks for the next one), one seed, measured on pictures that serve nothing else.
Then three seeds against the held-out part. Cells are kept in `benchmarks/results/table/`: a stopped run goes on.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import domains
from benchmarks.cells import BASE, RESULTS, Cell, Place, Result, run_cells
from core.diffusion.guidance import Guidance

SEEDS = (1, 2, 3)
TUNING_SEED = 100
COMPARED = ("full", "bitfit", "difffit", "lora-fair")  # three seeds
ABLATED = ("difffit-none", "difffit-all", "lora-qkv", "modules")  # one
GUIDED = ("full", "difffit")
RATES = {
    "full": (1e-4, 3e-4, 1e-3),
    "bitfit": (3e-3, 1e-2, 3e-2),
    "difffit": (3e-3, 1e-2, 3e-2),
    "lora-qkv": (1e-3, 3e-3, 1e-2),
    "lora-fair": (1e-3, 3e-3, 1e-2),
    "modules": (1e-3, 3e-3, 1e-2),
}
TUNED_AS = {"difffit-none": "difffit", "difffit-all": "difffit"}  # the same vector but for γ
EXTENSIONS = 2
SCALES = (1.5, 2.0, 3.0)
MAIN: tuple[Guidance, float] = ("domain", 2.0)  # the service's default
# t quantiles at 97.5 % by degrees of freedom, as far as they are needed here
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23, 11: 2.20, 12: 2.18,
      13: 2.16, 14: 2.14, 15: 2.13}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    steps: int
    batch_size: int
    train_images: int
    pictures: int
    seeds: tuple[int, ...]


class Table:
    """Three stages: rates, guidance scales, the figures. Each needs the one before."""

    def __init__(self, place: Place, names: Sequence[str], sizes: Sizes, workers: int) -> None:
        self.place, self.names, self.sizes, self.workers = place, list(names), sizes, workers
        self.rates: dict[tuple[str, str], float] = {}  # (method, domain)
        self.scales: dict[tuple[str, str, str], float] = {}  # (method, domain, guidance)

    def tune(self) -> None:
        tried = {(method, name): list(RATES[method]) for method in RATES for name in self.names}
        for _ in range(EXTENSIONS + 1):
            cells = {
                (method, name, rate): self.tuning_cell(method, name, rate)
                for (method, name), rates in tried.items()
                for rate in rates
            }
            results = dict(zip(cells, run_cells(self.place, list(cells.values()), self.workers), strict=True))
            is_settled = True
            for method, name in tried:
                by_rate = {rate: _kernel(_at(results[method, name, rate], MAIN)) for rate in tried[method, name]}
                best = min(by_rate, key=lambda rate: by_rate[rate])
                self.rates[method, name] = best
                if best in (min(by_rate), max(by_rate)):
                    tried[method, name].append(_next_rate(best, upward=best == max(by_rate)))
                    is_settled = False
                if method in GUIDED:
                    for guidance in ("cfg", "domain"):
                        draws = [draw for draw in results[method, name, best]["draws"] if draw["guidance"] == guidance]
                        self.scales[method, name, guidance] = min(draws, key=_kernel)["scale"]
            if is_settled:
                return

    def tuning_cell(self, method: str, name: str, rate: float) -> Cell:
        draws: list[tuple[Guidance, float]] = [MAIN]
        if method in GUIDED:
            guidances: tuple[Guidance, ...] = ("cfg", "domain")
            draws += [(guidance, scale) for guidance in guidances for scale in SCALES if (guidance, scale) != MAIN]
        return Cell(
            domain=name,
            method=method,
            learning_rate=rate,
            steps=self.sizes.steps,
            batch_size=self.sizes.batch_size,
            seed=TUNING_SEED,
            train_images=self.sizes.train_images,
            against="tune",
            pictures=min(100, self.sizes.pictures),
            draws=tuple(draws),
        )

    def cells(self) -> list[Cell]:
        """What the table shows."""
        methods = [(method, seed) for method in COMPARED for seed in self.sizes.seeds]
        methods += [(method, self.sizes.seeds[0]) for method in ABLATED]
        cells = [self.cell(method, name, seed) for name in self.names for method, seed in methods]
        for name in self.names:
            cell = self.cell("difffit", name, self.sizes.seeds[0])
            cells.append(replace(cell, method="base", learning_rate=None, draws=(MAIN,)))
        return cells

    def cell(self, method: str, name: str, seed: int) -> Cell:
        draws: list[tuple[Guidance, float]] = [MAIN]
        if method in GUIDED:
            draws += [("none", 1.0), ("cfg", self.scales[method, name, "cfg"])]
            if (best := ("domain", self.scales[method, name, "domain"])) != MAIN:
                draws.append(("domain", best[1]))
        return replace(
            self.tuning_cell(method, name, self.rates[TUNED_AS.get(method, method), name]),
            seed=seed,
            against="test",
            pictures=self.sizes.pictures,
            draws=tuple(draws),
        )

    def run(self) -> list[Result]:
        self.tune()
        print("rates:", {f"{method}/{name}": rate for (method, name), rate in self.rates.items()})
        return run_cells(self.place, self.cells(), self.workers)

    def estimate(self) -> float:
        """Seconds of the whole run on idle cores, from what a step and a picture cost where this was written."""
        searched = sum(
            self._seconds(self.tuning_cell(method, name, rates[0])) * (len(rates) + 0.6)
            for method, rates in RATES.items()
            for name in self.names
        )
        self.rates = {(method, name): 1.0 for method in RATES for name in self.names}
        self.scales = {(m, n, g): 3.0 for m in GUIDED for n in self.names for g in ("cfg", "domain")}
        shown = sum(self._seconds(cell) for cell in self.cells())
        return (searched + shown) / self.workers

    def _seconds(self, cell: Cell) -> float:
        step = {"full": 0.34, "base": 0.0}.get(cell.method, 0.25) * self.sizes.batch_size / 8
        picture = sum(0.11 if guidance == "none" else 0.2 for guidance, _ in cell.draws)
        return 20 + self.sizes.steps * step + cell.pictures * (picture + 0.03)


def _next_rate(rate: float, upward: bool) -> float:
    """1, 3, 10, 30, …"""
    exponent = round(2 * math.log10(rate)) + (1 if upward else -1)
    return round((1.0 if exponent % 2 == 0 else 3.0) * 10.0 ** (exponent // 2), 10)


def _at(result: Result, draw: tuple[Guidance, float]) -> Result:
    return next(one for one in result["draws"] if (one["guidance"], one["scale"]) == draw)


def _kernel(draw: Result) -> float:
    return draw["kernel_distance"]["value"]


# --- reading ----------------------------------------------------------------------------------------------------------


def summarise(results: Sequence[Result]) -> Result:
    """Ratios of means over domains and seeds, with intervals of the mean logarithm over their pairs."""
    main = {(r["cell"]["method"], r["cell"]["domain"], r["cell"]["seed"]): _at(r, MAIN) for r in results}

    def versus(other: str) -> Result:
        pairs = {
            (name, seed): (_kernel(main["difffit", name, seed]), _kernel(draw))
            for (method, name, seed), draw in main.items()
            if method == other and ("difffit", name, seed) in main
        }
        return _paired(pairs)

    compared = {other: versus(other) for other in ("full", "bitfit", "lora-fair", *ABLATED, "base")}
    guided = {
        method: _paired(
            {
                (r["cell"]["domain"], r["cell"]["seed"]): (_best(r, "domain"), _best(r, "cfg"))
                for r in results
                if r["cell"]["method"] == method
            }
        )
        for method in GUIDED
    }
    return {
        "difffit_over_full": compared["full"]["ratio"],
        "difffit_over_bitfit": compared["bitfit"]["ratio"],
        "difffit_over_fair_lora": compared["lora-fair"]["ratio"],
        "domain_over_cfg": guided["difffit"]["ratio"],
        "compared": compared,
        "guidance": guided,
    }


def _best(result: Result, guidance: str) -> float:
    """At the scale that the search chose: the last drawn of that guidance."""
    return _kernel([draw for draw in result["draws"] if draw["guidance"] == guidance][-1])


def _paired(pairs: dict[tuple[str, int], tuple[float, float]]) -> Result:
    """Ratio of means; geometric mean over pairs with its 95 % interval; a domain is won where its own interval is."""
    if not pairs:
        return {"ratio": None}
    ours, theirs = np.array([*pairs.values()]).T
    by_domain: dict[str, list[float]] = defaultdict(list)
    for (name, _), (a, b) in pairs.items():
        by_domain[name].append(math.log(max(a, 1e-3) / max(b, 1e-3)))
    logs = [value for values in by_domain.values() for value in values]
    low, high = _interval(logs, len(logs) - 1, float(np.std(logs, ddof=1)) if len(logs) > 1 else 0.0)
    freedom = sum(len(values) - 1 for values in by_domain.values())
    spread = math.sqrt(sum(float(np.var(v)) * len(v) for v in by_domain.values()) / freedom) if freedom else 0.0
    verdicts: dict[str, str] = {}
    for name, values in by_domain.items():
        if not freedom:
            verdicts[name] = "one seed"
            continue
        start, end = _interval(values, freedom, spread)
        verdicts[name] = "win" if end < 0 else "loss" if start > 0 else "tie"
    return {
        "ratio": round(float(ours.mean() / theirs.mean()), 4),
        "geometric": round(math.exp(float(np.mean(logs))), 4),
        "interval": [round(math.exp(low), 4), round(math.exp(high), 4)],
        "pairs": len(pairs),
        "domains": verdicts,
    }


def _interval(values: Sequence[float], freedom: int, spread: float) -> tuple[float, float]:
    mean = float(np.mean(values))
    half = _T.get(freedom, 2.0) * spread / math.sqrt(len(values)) if freedom else math.inf
    return mean - half, mean + half


def show(results: Sequence[Result]) -> None:
    rows: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        rows[result["cell"]["domain"], result["cell"]["method"]].append(result)
    print(
        f"\n{'domain':9} {'method':13} {'guidance':11} {'rate':>7} {'KID×1000':>17} {'Fréchet':>8} {'floor':>6} "
        f"{'cover':>6} {'copies':>6} {'parameters':>10} {'file':>10} {'train':>6} {'peak':>7}"
    )
    for (name, method), group in rows.items():
        for index, first in enumerate(group[0]["draws"]):
            draws = [one["draws"][index] for one in group if index < len(one["draws"])]
            kernels = [_kernel(draw) for draw in draws]
            error = math.hypot(
                float(np.std(kernels, ddof=1)) / math.sqrt(len(kernels)) if len(kernels) > 1 else 0.0,
                float(np.mean([draw["kernel_distance"]["error"] for draw in draws])),
            )
            rate = group[0]["learning_rate"]
            cells = [
                f"{name:9} {method:13} {first['guidance'] + ' ' + format(first['scale'], 'g'):11}",
                f"{rate if method != 'base' else 0:7g} {np.mean(kernels):8.1f} ± {1.96 * error:6.1f}",
                f"{_mean(draws, 'frechet_distance'):8.2f} {_mean(draws, 'frechet_floor'):6.2f}",
                f"{_mean(draws, 'coverage'):6.2f} {np.mean([d['memorisation']['closer_share'] for d in draws]):6.2f}",
                f"{group[0]['parameters']:10,} {group[0]['file_bytes']:10,}",
                f"{np.median([one['train_seconds'] for one in group]):5.0f}s",
                f"{np.median([one['peak_bytes'] for one in group]) / 1e6:5.0f}MB",
            ]
            print(" ".join(cells))
    print("\nfloor: real against real at the same count. copies: share nearer to a training picture than 95 % of the")
    print("held-out ones are, 0.05 where nothing is copied. Intervals: 95 %, of seeds and of the pictures drawn.\n")


def _mean(draws: Sequence[Result], field: str) -> float:
    return float(np.mean([draw[field] for draw in draws]))


def show_summary(summary: Result) -> None:
    for other, row in summary["compared"].items():
        if row["ratio"] is not None:
            print(_line(f"difffit / {other}", row))
    for method, row in summary["guidance"].items():
        if row["ratio"] is not None:
            print(_line(f"{method}: domain / cfg", row))


def _line(title: str, row: Result) -> str:
    verdicts = ", ".join(f"{name} {verdict}" for name, verdict in row["domains"].items())
    low, high = row["interval"]
    pairs = f"mean of {row['pairs']} pairs {row['geometric']:.3f}, 95 % {low:.3f} to {high:.3f}"
    return f"{title:24} {row['ratio']:.3f} ({pairs}): {verdicts}"


def kept(results: Path, base_fingerprint: str) -> tuple[str, list[Result]]:
    """The table's cells of this base, else of the base with the most of them."""
    by_base: dict[str, list[Result]] = {}
    for folder in sorted(results.glob("*")):
        cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        shown = [r for r in cells if r["cell"]["against"] == "test" and r["cell"]["learning_rate"] is not None]
        shown = [r for r in shown if not r["cell"]["watch"]] + [r for r in cells if r["cell"]["method"] == "base"]
        if shown:
            by_base[folder.name] = shown
    if not by_base:
        return "", []
    own = base_fingerprint[:12]
    chosen = own if own in by_base else max(by_base, key=lambda name: len(by_base[name]))
    # One set of sizes: the one that most cells have.
    sizes = [_sizes_of(result) for result in by_base[chosen]]
    common = max(set(sizes), key=sizes.count)
    return chosen, [result for result in by_base[chosen] if _sizes_of(result) == common]


def _sizes_of(result: Result) -> tuple[object, ...]:
    return tuple(result["cell"][field] for field in ("steps", "batch_size", "train_images", "pictures"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="read the kept results, run nothing")
    parser.add_argument("--plan", action="store_true", help="say how long it will take, run nothing")
    parser.add_argument("--data", type=Path, help="folder with openclipart_64.zip, for the domain clipart")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--domains", nargs="+", choices=domains.NAMES)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--train-images", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.quick:
        base, results = kept(args.results, Place.open(args.base, None, ()).base_fingerprint)
        if not results:
            parser.error(f"no kept results in {args.results}: run without --quick first")
        print(f"kept results of base {base}")
    else:
        names = args.domains or domains.available(args.data)
        place = Place.open(args.base, args.data, names, args.results)
        sizes = Sizes(args.steps, args.batch_size, args.train_images, args.pictures, tuple(args.seeds))
        table = Table(place, names, sizes, args.workers)
        hours = table.estimate() / 3600
        print(f"{', '.join(names)}: about {hours:.1f} h on {args.workers} idle cores, less what is kept", flush=True)
        if args.plan:
            return
        results = table.run()
        base = place.base_fingerprint[:12]
    show(results)
    summary = summarise(results)
    show_summary(summary)
    print(json.dumps({**summary, "base": base, "cells": len(results)}))


if __name__ == "__main__":
    main()

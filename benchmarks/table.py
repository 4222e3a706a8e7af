"""`python -m benchmarks.table`: methods × domains × seeds, as the paper's tables have them, at small scale.

Every method sees the same pictures, noises and steps, and finds its learning rate by the same search: three rates on
two of the domains (one at the edge asks for the next), one seed, measured on pictures that serve nothing else, drawn
with domain guidance; the scale of classifier-free guidance likewise. Then three seeds on every domain against its
held-out part, a seed after another. Methods are compared by classifier-free guidance, which measured best, ablations
by domain guidance. Cells are kept in `benchmarks/results/table/`: a stopped run goes on, and `--quick` reads what is
there.
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

TUNING_SEED = 100
COMPARED = ("difffit", "full", "lora-fair", "bitfit")  # three seeds; BitFit is DiffFit with γ nowhere
ABLATED = ("difffit-all", "lora-qkv", "modules")  # one
GUIDED: tuple[str, ...] = ("difffit", "full")
RATES = {
    "full": (1e-4, 3e-4, 1e-3),
    "bitfit": (3e-3, 1e-2, 3e-2),
    "difffit": (3e-3, 1e-2, 3e-2),
    "lora-fair": (1e-3, 3e-3, 1e-2),
}
TUNED_AS = {"difffit-all": "difffit", "lora-qkv": "lora-fair", "modules": "lora-fair"}
TUNING_DOMAINS = ("lineart", "game")  # colour and black, so that the other domains show how a choice carries over
TUNING_PICTURES = 60
EXTENSIONS = 2
SCALES = (1.5, 2.0, 3.0)
Draw = tuple[Guidance, float]
MAIN: Draw = ("cfg", 3.0)  # the service's default
DOMAIN: Draw = ("domain", 2.0)  # what rates are searched by, and ablations compared by
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


SIZES = Sizes(steps=220, batch_size=8, train_images=200, pictures=200, seeds=(1, 2, 3))


class Table:
    """Three stages: rates, guidance scales, the figures. Each needs the one before."""

    def __init__(self, place: Place, names: Sequence[str], sizes: Sizes, workers: int) -> None:
        self.place, self.names, self.sizes, self.workers = place, list(names), sizes, workers
        self.tuned_on = [name for name in names if name in TUNING_DOMAINS] or self.names[:1]
        self.rates: dict[str, float] = {}  # of each method
        self.scales: dict[str, float] = {}  # of classifier-free guidance, of each method

    def tune_rates(self) -> dict[str, float]:
        """Of each method, the rate whose kernel distance has the least mean logarithm over the tuning domains."""
        tried = {method: list(rates) for method, rates in RATES.items()}
        for _ in range(EXTENSIONS + 1):
            asked = [(method, rate) for method, rates in tried.items() for rate in rates]
            distances = self._distances(asked, (DOMAIN,))
            is_settled = True
            for method, rates in tried.items():
                best = min(rates, key=lambda rate: distances[method, rate, DOMAIN])
                self.rates[method] = best
                if best in (min(rates), max(rates)):
                    rates.append(_next_rate(best, upward=best == max(rates)))
                    is_settled = False
            if is_settled:
                break
        return self.rates

    def tune_scales(self) -> None:
        """The scale of classifier-free guidance likewise, at the rate found. Domain guidance keeps the service's."""
        draws: tuple[Draw, ...] = tuple(("cfg", scale) for scale in SCALES)
        distances = self._distances([(method, self.rates[method]) for method in GUIDED], draws)
        for method in GUIDED:
            found = {draw: distances[method, self.rates[method], draw] for draw in draws}
            self.scales[method] = min(found, key=lambda draw: found[draw])[1]

    def _distances(
        self, asked: Sequence[tuple[str, float]], draws: tuple[Draw, ...]
    ) -> dict[tuple[str, float, Draw], float]:
        """Mean log kernel distance over the tuning domains by (method, rate, draw)."""
        tried = [(method, rate) for method, rate in asked for _ in self.tuned_on]
        cells = [self.tuning_cell(method, name, rate, draws) for method, rate in asked for name in self.tuned_on]
        logs: dict[tuple[str, float, Draw], list[float]] = defaultdict(list)
        for (method, rate), result in zip(tried, run_cells(self.place, cells, self.workers), strict=True):
            for draw in draws:
                logs[method, rate, draw].append(_log(kernel(at(result, draw))))
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
            pictures=min(TUNING_PICTURES, self.sizes.pictures),
            draws=draws,
        )

    def cells(self) -> list[Cell]:
        """What the table shows."""
        first = self.sizes.seeds[0]
        cells = [self.cell(m, name, seed) for seed in self.sizes.seeds for m in COMPARED for name in self.names]
        cells += [
            replace(cell, draws=(MAIN,)) for cell in cells if all(guidance != "cfg" for guidance, _ in cell.draws)
        ]
        cells += [replace(self.cell("bitfit", name, first), method="base", learning_rate=None) for name in self.names]
        return cells + [self.cell(method, name, first) for name in self.names for method in ABLATED]

    def cell(self, method: str, name: str, seed: int) -> Cell:
        draws: list[Draw] = [DOMAIN]
        is_first = seed == self.sizes.seeds[0]
        if method in GUIDED and (is_first or method == "difffit"):
            draws.append(("cfg", self.scales[method]))
        if method in GUIDED and is_first:
            draws.append(("none", 1.0))
        return replace(
            self.tuning_cell(method, name, self.rates[TUNED_AS.get(method, method)], (DOMAIN,)),
            seed=seed,
            against="test",
            pictures=self.sizes.pictures,
            draws=tuple(draws),
        )

    def run(self) -> list[Result]:
        self.tune_rates()
        print("rates:", self.rates, flush=True)
        self.tune_scales()
        print("scales:", self.scales, flush=True)
        return run_cells(self.place, self.cells(), self.workers)

    def estimate(self) -> float:
        """Seconds of the whole run on idle cores, from what a step and a picture cost where this was written."""
        self.rates = {method: rates[0] for method, rates in RATES.items()}
        self.scales = dict.fromkeys(GUIDED, 3.0)
        searched = sum(
            self._seconds(self.tuning_cell(method, name, rates[0], (DOMAIN,))) * (len(rates) + 0.6)
            for method, rates in RATES.items()
            for name in self.tuned_on
        )
        draws = (DOMAIN,) * len(SCALES)
        searched += sum(self._seconds(self.tuning_cell(m, n, 1.0, draws)) for m in GUIDED for n in self.tuned_on)
        return (searched + sum(self._seconds(cell) for cell in self.cells())) / self.workers

    def _seconds(self, cell: Cell) -> float:
        step = {"full": 0.4, "base": 0.0}.get(cell.method, 0.25) * self.sizes.batch_size / 8
        picture = sum(0.22 if guidance == "none" else 0.42 for guidance, _ in cell.draws)
        return 12 + self.sizes.steps * step + cell.pictures * picture


def _next_rate(rate: float, upward: bool) -> float:
    """1, 3, 10, 30, …"""
    exponent = round(2 * math.log10(rate)) + (1 if upward else -1)
    return round((1.0 if exponent % 2 == 0 else 3.0) * 10.0 ** (exponent // 2), 10)


def at(result: Result, draw: Draw) -> Result:
    return next(one for one in result["draws"] if (one["guidance"], one["scale"]) == draw)


def kernel(draw: Result) -> float:
    return draw["kernel_distance"]["value"]


def _log(distance: float) -> float:
    """Of an unbiased estimate, which may fall below zero."""
    return math.log(max(distance, 1e-3))


# --- reading ----------------------------------------------------------------------------------------------------------


def summarise(results: Sequence[Result]) -> Result:
    """Ratios of means over domains and seeds, with intervals of the mean logarithm over their pairs."""
    found: dict[tuple[str, str], dict[tuple[str, int], float]] = defaultdict(dict)  # by method and guidance
    for result in results:
        cell = result["cell"]
        for draw in result["draws"]:
            found[cell["method"], draw["guidance"]][cell["domain"], cell["seed"]] = kernel(draw)

    def ratio(ours: tuple[str, str], theirs: tuple[str, str]) -> Result:
        return paired({key: (found[ours][key], value) for key, value in found[theirs].items() if key in found[ours]})

    def versus(other: str, draw: Draw) -> Result:
        return {**ratio(("difffit", draw[0]), (other, draw[0])), "guidance": draw[0]}

    others = COMPARED[1:]
    compared = {other: versus(other, MAIN) for other in others}
    compared |= {other: versus(other, DOMAIN) for other in (*ABLATED, "base")}
    guided = {method: ratio((method, "domain"), (method, "cfg")) for method in GUIDED}
    return {
        "difffit_over_full": compared["full"]["ratio"],
        "difffit_over_bitfit": compared["bitfit"]["ratio"],
        "difffit_over_fair_lora": compared["lora-fair"]["ratio"],
        "domain_over_cfg": guided["difffit"]["ratio"],
        "compared": compared,
        "compared_by_domain_guidance": {other: versus(other, DOMAIN) for other in others},
        "guidance": guided,
    }


def paired(pairs: dict[tuple[str, int], tuple[float, float]]) -> Result:
    """Ratio of means; geometric mean over pairs with its 95 % interval; a domain is won where its own interval is."""
    if not pairs:
        return {"ratio": None}
    ours, theirs = np.array([*pairs.values()]).T
    by_domain: dict[str, list[float]] = defaultdict(list)
    for (name, _), (a, b) in pairs.items():
        by_domain[name].append(_log(a) - _log(b))
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
    rows: dict[tuple[str, str, str], list[tuple[Result, Result]]] = defaultdict(list)
    for result in results:
        for draw in result["draws"]:
            title = f"{draw['guidance']} {draw['scale']:g}"
            rows[result["cell"]["domain"], result["cell"]["method"], title].append((result, draw))
    print(
        f"\n{'domain':9} {'method':13} {'guidance':11} {'rate':>7} {'KID×1000':>17} {'Fréchet':>8} {'floor':>6} "
        f"{'cover':>6} {'copies':>6} {'parameters':>10} {'file':>10} {'train':>6} {'peak':>7}"
    )
    for (name, method, title), pairs in sorted(rows.items()):
        group, draws = [result for result, _ in pairs], [draw for _, draw in pairs]
        kernels = [kernel(draw) for draw in draws]
        error = math.hypot(
            float(np.std(kernels, ddof=1)) / math.sqrt(len(kernels)) if len(kernels) > 1 else 0.0,
            float(np.mean([draw["kernel_distance"]["error"] for draw in draws])),
        )
        rate = group[0]["learning_rate"]
        cells = [
            f"{name:9} {method:13} {title:11}",
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
            print(_line(f"difffit / {other}, {row['guidance']}", row))
    for method, row in summary["guidance"].items():
        if row["ratio"] is not None:
            print(_line(f"{method}: domain / cfg", row))


def _line(title: str, row: Result) -> str:
    verdicts = ", ".join(f"{name} {verdict}" for name, verdict in row["domains"].items())
    low, high = row["interval"]
    pairs = f"mean of {row['pairs']} pairs {row['geometric']:.3f}, 95 % {low:.3f} to {high:.3f}"
    return f"{title:28} {row['ratio']:.3f} ({pairs}): {verdicts}"


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
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--domains", nargs="+", choices=domains.NAMES, default=list(domains.MEASURED))
    parser.add_argument("--steps", type=int, default=SIZES.steps)
    parser.add_argument("--batch-size", type=int, default=SIZES.batch_size)
    parser.add_argument("--train-images", type=int, default=SIZES.train_images)
    parser.add_argument("--pictures", type=int, default=SIZES.pictures)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SIZES.seeds))
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.quick:
        base, results = kept(args.results, Place.open(args.base, ()).base_fingerprint)
        if not results:
            parser.error(f"no kept results in {args.results}: run without --quick first")
        print(f"kept results of base {base}")
    else:
        place = Place.open(args.base, args.domains, args.results)
        sizes = Sizes(args.steps, args.batch_size, args.train_images, args.pictures, tuple(args.seeds))
        table = Table(place, args.domains, sizes, args.workers)
        hours = table.estimate() / 3600
        print(
            f"{', '.join(args.domains)}: about {hours:.1f} h on {args.workers} idle cores, less what is kept",
            flush=True,
        )
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

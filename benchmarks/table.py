"""`python -m benchmarks.table`: methods × domains × seeds, as the paper's tables have them, at small scale.

Twice: with the paper's recipe (a constant rate, uniform times, 220 steps; ablations and other guidance as well), and
with the one that the service's jobs train by (`--recipe service`: the rate falls, times are shifted, `auto`'s steps).
`benchmarks.plan` says how rates are searched and cells chosen. Methods are compared by classifier-free guidance, the
service's default, and their rates are searched by it. Cells are kept in `benchmarks/results/table/`: a stopped run
goes on, and `--quick` reads what is there of both.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import domains
from benchmarks.cells import BASE, DOMAIN, MAIN, RESULTS, Draw, Place, Recipe, Result, kernel, log_distance
from benchmarks.plan import ABLATED, COMPARED, GUIDED, SIZES, PaperTable, Table

# t quantiles at 97.5 % by degrees of freedom, as far as they are needed here
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23, 11: 2.20, 12: 2.18,
      13: 2.16, 14: 2.14, 15: 2.13}  # fmt: skip


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

    compared = {other: versus(other, MAIN) for other in (*COMPARED[1:], *ABLATED, "base")}
    guided = {method: ratio((method, "domain"), (method, "cfg")) for method in GUIDED}
    return {
        "difffit_over_full": compared["full"]["ratio"],
        "difffit_over_bitfit": compared["bitfit"]["ratio"],
        "difffit_over_fair_lora": compared["lora-fair"]["ratio"],
        "domain_over_cfg": guided["difffit"]["ratio"],
        "compared": compared,
        "full_by_domain_guidance": versus("full", DOMAIN),
        "guidance": guided,
    }


def paired(pairs: dict[tuple[str, int], tuple[float, float]]) -> Result:
    """Ratio of means; geometric mean over pairs with its 95 % interval; a domain is won where its own interval is."""
    if not pairs:
        return {"ratio": None}
    ours, theirs = np.array([*pairs.values()]).T
    by_domain: dict[str, list[float]] = defaultdict(list)
    for (name, _), (a, b) in pairs.items():
        by_domain[name].append(log_distance(a) - log_distance(b))
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
            print(line(f"difffit / {other}, {row['guidance']}", row))
    for method, row in summary["guidance"].items():
        if row["ratio"] is not None:
            print(line(f"{method}: domain / cfg", row))


def line(title: str, row: Result) -> str:
    verdicts = ", ".join(f"{name} {verdict}" for name, verdict in row["domains"].items())
    low, high = row["interval"]
    pairs = f"mean of {row['pairs']} pairs {row['geometric']:.3f}, 95 % {low:.3f} to {high:.3f}"
    return f"{title:28} {row['ratio']:.3f} ({pairs}): {verdicts}"


def kept(results: Path, base_fingerprint: str, recipe: Recipe = "paper") -> tuple[str, list[Result]]:
    """The table's cells of this base, else of the base with the most of them."""
    by_base: dict[str, list[Result]] = {}
    for folder in sorted(results.glob("*")):
        cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        shown = [result for result in cells if _is_shown(result["cell"], recipe)]
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


def _is_shown(cell: Result, recipe: Recipe) -> bool:
    """Not what rates were searched by, what `auto` chose, or a course over time."""
    is_given = cell["learning_rate"] is not None or cell["method"] == "base"
    is_final = cell["against"] == "test" and not cell["watch"]
    return is_given and is_final and cell.get("recipe", "paper") == recipe


def _sizes_of(result: Result) -> tuple[object, ...]:
    return tuple(result["cell"][field] for field in ("steps", "batch_size", "train_images", "pictures"))


def show_kept(results: Path, base_fingerprint: str) -> Result:
    """Print both tables; the summary of the paper's recipe, the service's beside it."""
    summaries: dict[Recipe, Result] = {}
    for recipe in SIZES:
        base, cells = kept(results, base_fingerprint, recipe)
        if cells:
            print(f"\nthe {recipe}'s recipe, {len(cells)} kept cells of base {base}")
            summaries[recipe] = {**present(cells), "base": base, "cells": len(cells)}
    if not summaries:
        raise FileNotFoundError(f"no kept results in {results}: run without --quick first")
    return {**summaries.pop("paper", {}), **summaries}


def present(results: Sequence[Result]) -> Result:
    show(results)
    summary = summarise(results)
    show_summary(summary)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="read the kept results, run nothing")
    parser.add_argument("--plan", action="store_true", help="say how long it will take, run nothing")
    parser.add_argument("--recipe", choices=list(SIZES), default="paper")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--domains", nargs="+", choices=domains.NAMES, default=list(domains.MEASURED))
    parser.add_argument("--steps", type=int, help="of every method (default: the recipe's)")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--train-images", type=int)
    parser.add_argument("--pictures", type=int)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.quick:
        print(json.dumps(show_kept(args.results, Place.open(args.base, ()).base_fingerprint)))
        return
    given = {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "train_images": args.train_images,
        "pictures": args.pictures,
        "seeds": args.seeds and tuple(args.seeds),
    }
    sizes = replace(SIZES[args.recipe], **{name: value for name, value in given.items() if value is not None})
    place = Place.open(args.base, args.domains, args.results)
    kind = PaperTable if args.recipe == "paper" else Table
    table = kind(place, args.domains, sizes, args.workers)
    hours = table.estimate() / 3600
    print(
        f"{', '.join(args.domains)}: about {hours:.1f} h on {args.workers} idle cores, less what is kept",
        flush=True,
    )
    if args.plan:
        return
    results = table.run()
    print(json.dumps({**present(results), "base": place.base_fingerprint[:12], "cells": len(results)}))


if __name__ == "__main__":
    main()

"""`python -m benchmarks.auto`: the service's `auto` hyperparameters against those that the table's search found.

The same domains, pictures, noises and seeds; what `auto` may choose is the rate and its course, the times and the
number of steps. Ratios of means over four seeds, with 95 % intervals of the mean logarithm over the pairs.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from benchmarks import domains, measure
from benchmarks.cells import BASE, MAIN, RESULTS, Cell, Place, at, kernel, run_cells
from benchmarks.plan import SIZES, PaperTable
from benchmarks.table import paired

SEEDS = (1, 2, 3, 4)  # one more than the table has: a domain's mean of three is worth some 8 %


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="read the kept results, run nothing")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args()
    names = domains.MEASURED
    place = Place.open(args.base, names, args.results)
    table = PaperTable(place, names, SIZES["paper"], 0 if args.quick else args.workers)
    table.tune_rates()
    wanted = [(name, seed) for name in names for seed in SEEDS]
    tuned = [_tuned(table, name, seed) for name, seed in wanted]
    chosen = [replace(cell, learning_rate=None, steps=None, draws=(MAIN,)) for cell in tuned]
    pairs: dict[tuple[str, int], tuple[float, float]] = {}
    both = zip(run_cells(place, chosen, table.workers), run_cells(place, tuned, table.workers), strict=True)
    for key, (auto, best) in zip(wanted, both, strict=True):
        pairs[key] = ours, theirs = kernel(at(auto, MAIN)), kernel(at(best, MAIN))
        print(
            f"{key[0]:9} seed {key[1]}: rate {auto['learning_rate']:g}, {auto['steps']} steps {ours:.1f}; "
            f"tuned {best['learning_rate']:g}, {best['steps']} steps {theirs:.1f}"
        )
    found = {name: paired({key: pair for key, pair in pairs.items() if key[0] == name}) for name in names}
    result = {
        "auto_over_tuned": round(statistics.mean(one["ratio"] for one in found.values()), 4),
        "domains": {name: one["ratio"] for name, one in found.items()},
        "intervals": {name: one["interval"] for name, one in found.items()},
        "seeds": SEEDS,
        "base": place.base_fingerprint[:12],
    }
    measure.record("auto", result, SEEDS[0], keep=not args.quick)


def _tuned(table: PaperTable, name: str, seed: int) -> Cell:
    """The table's own cell; of seeds that it does not have, one with our guidance alone."""
    cell = table.cell("difffit", name, seed)
    return cell if seed in table.sizes.seeds else replace(cell, draws=(MAIN,))


if __name__ == "__main__":
    main()

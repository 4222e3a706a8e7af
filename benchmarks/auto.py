"""`python -m benchmarks.auto`: the service's `auto` hyperparameters against those that the table's search found.

The same domains, pictures, noises and seeds; what `auto` may choose is the rate and the number of steps.
"""

import argparse
import json
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from benchmarks import domains
from benchmarks.cells import BASE, RESULTS, Place, run_cells
from benchmarks.table import MAIN, SIZES, Table, at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="read the kept results, run nothing")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args()
    names = domains.MEASURED
    place = Place.open(args.base, names, args.results)
    table = Table(place, names, SIZES, 0 if args.quick else args.workers)
    table.tune_rates()
    table.tune_scales()
    ratios: dict[str, float] = {}
    wanted = [(name, seed) for name in names for seed in SIZES.seeds]
    tuned = [table.cell("difffit", name, seed) for name, seed in wanted]
    chosen = [replace(cell, learning_rate=None, steps=None, draws=(MAIN,)) for cell in tuned]
    found: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)  # auto's and tuned, by domain
    pairs = zip(run_cells(place, chosen, table.workers), run_cells(place, tuned, table.workers), strict=True)
    for (name, seed), (auto, best) in zip(wanted, pairs, strict=True):
        ours, theirs = (at(result, MAIN)["kernel_distance"]["value"] for result in (auto, best))
        found[name].append((ours, theirs))
        print(
            f"{name:9} seed {seed}: rate {auto['learning_rate']:g}, {auto['steps']} steps {ours:.1f}; "
            f"tuned {best['learning_rate']:g}, {best['steps']} steps {theirs:.1f}"
        )
    for name, values in found.items():
        ours, theirs = (statistics.mean(column) for column in zip(*values, strict=True))
        ratios[name] = round(ours / theirs, 4)
    mean = round(sum(ratios.values()) / len(ratios), 4)
    print(
        json.dumps(
            {"auto_over_tuned": mean, "domains": ratios, "seeds": SIZES.seeds, "base": place.base_fingerprint[:12]}
        )
    )


if __name__ == "__main__":
    main()

"""`python -m benchmarks.auto`: the service's `auto` hyperparameters against those that the table's search found.

The same domains, pictures, noises and seed; what `auto` may choose is the rate and the number of steps.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from benchmarks import domains
from benchmarks.cells import BASE, RESULTS, Place, run_cells
from benchmarks.table import MAIN, SIZES, Table, at

SEED = SIZES.seeds[0]


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
    tuned = [table.cell("difffit", name, SEED) for name in names]
    chosen = [replace(cell, learning_rate=None, steps=None, draws=(MAIN,)) for cell in tuned]
    pairs = zip(run_cells(place, tuned, table.workers), run_cells(place, chosen, table.workers), strict=True)
    ratios: dict[str, float] = {}
    for name, (best, auto) in zip(names, pairs, strict=True):
        ours, theirs = (at(result, MAIN)["kernel_distance"] for result in (auto, best))
        ratios[name] = round(ours["value"] / theirs["value"], 4)
        for title, result, kernel in (("auto", auto, ours), ("tuned", best, theirs)):
            print(
                f"{name:9} {title:5} rate {result['learning_rate']:g}, {result['steps']} steps: "
                f"{kernel['value']:.1f} ± {kernel['error'] * 1.96:.1f}"
            )
    mean = round(sum(ratios.values()) / len(ratios), 4)
    print(json.dumps({"auto_over_tuned": mean, "domains": ratios, "base": place.base_fingerprint[:12]}))


if __name__ == "__main__":
    main()

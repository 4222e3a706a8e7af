"""`python -m benchmarks.data_efficiency`: kernel distance by training pictures and by steps, DiffFit and full.

The fewest pictures also go on for long, to see which method overfits. Each at the rate that the table's first search,
by domain guidance, found for it (`docs/log.md`). `closer` is the share of drawn pictures that lie nearer to a training
picture than 95 % of the held-out ones do: 0.05 where nothing is copied, above it where a method overfits.
"""

import argparse
import json
from pathlib import Path

from benchmarks.cells import BASE, MAIN, RESULTS, Cell, Place, Result, run_cells
from benchmarks.plan import SIZES

RATES = {"difffit": 3e-3, "full": 3e-4}
COUNTS = (20, 50, 100, 300)
WATCH = (100,)
STEPS = 400
LONG_WATCH, LONG_STEPS = (500, 1000), 2000  # with the fewest pictures
DOMAIN = "lineart"
PICTURES = 100
SEED = 1


def cells() -> list[Cell]:
    wanted = [(count, STEPS, WATCH) for count in COUNTS] + [(COUNTS[0], LONG_STEPS, LONG_WATCH)]
    return [
        Cell(
            domain=DOMAIN,
            method=method,
            learning_rate=rate,
            steps=steps,
            batch_size=SIZES["paper"].batch_size,
            seed=SEED,
            train_images=count,
            against="test",
            pictures=PICTURES,
            draws=(MAIN,),
            watch=watch,
        )
        for count, steps, watch in wanted
        for method, rate in RATES.items()
    ]


def show(results: list[Result]) -> dict[str, dict[str, dict[str, float]]]:
    """Print by pictures and steps; the kernel distances by method, pictures and steps."""
    print(f"\n{'pictures':>8} {'method':8} {'step':>5} {'KID×1000':>15} {'coverage':>8} {'closer':>6}")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for result in results:
        cell = result["cell"]
        for draw in result["draws"]:
            kernel, by_count = draw["kernel_distance"], found.setdefault(cell["method"], {})
            by_count.setdefault(str(cell["train_images"]), {})[str(draw["step"])] = kernel["value"]
            print(
                f"{cell['train_images']:8} {cell['method']:8} {draw['step']:5} "
                f"{kernel['value']:7.1f} ± {kernel['error'] * 1.96:5.1f} "
                f"{draw['coverage']:8.2f} {draw['memorisation']['closer_share']:6.2f}"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="read the kept results, run nothing")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args()
    place = Place.open(args.base, (DOMAIN,), args.results)
    workers = 0 if args.quick else args.workers
    found = show(run_cells(place, cells(), workers))
    last = str(STEPS)
    ratios = {count: round(found["difffit"][count][last] / found["full"][count][last], 4) for count in found["full"]}
    summary = {
        "difffit_over_full": ratios,
        "kernel_distance": found,
        "rates": RATES,
        "domain": DOMAIN,
        "base": place.base_fingerprint[:12],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

"""`python -m benchmarks.adaptation`: 200 pictures of a new domain, `auto` hyperparameters, previews as time goes by.

A strip for each domain under `benchmarks/results/adaptation/`: a row for each moment, the base's own pictures first,
the domain's own last. Trained in the service's own type (docs/decisions/0014); seconds are those of encoding and
training, without the previews.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import domains, measure
from benchmarks.bases import training_dtype
from benchmarks.cells import BASE, MAIN
from benchmarks.drawing import draw
from benchmarks.methods import Asked, Predict, adapt, null_of, training_data
from core.diffusion.families import load_base

PICTURES = 200
COLUMNS = 12
WATCH = (20, 40, 80, 160, 300)
GUIDANCE, SCALE = MAIN
SEED = 1


def strip(name: str, folder: Path) -> tuple[np.ndarray, list[float]]:
    """(rows, COLUMNS, s, s, 3) uint8, and the seconds of all rows but the last."""
    dtype = training_dtype()
    base = load_base(folder, dtype=dtype)
    domain = domains.load(name)
    labels = np.resize(np.arange(len(domain.classes)), COLUMNS)
    null = null_of(base)
    rows: list[np.ndarray] = []
    seconds: list[float] = []
    drawing = 0.0
    began = time.perf_counter()
    data = training_data(base, domain, domain.train.head(PICTURES))

    def watch(step: int, predict: Predict) -> None:
        nonlocal drawing
        if step and step not in WATCH:
            return
        paused = time.perf_counter()
        seconds.append(round(paused - began - drawing, 1))
        rows.append(draw(base, predict, null, labels.tolist(), len(domain.classes), GUIDANCE, SCALE, SEED))
        drawing += time.perf_counter() - paused

    asked = Asked("difffit", None, 8, None, SEED)
    watch(0, adapt(folder, base, data, Asked("base", None, 8, None, SEED)).predict)
    adapted = adapt(folder, base, data, asked, watch, 20)
    watch(0, adapted.predict)
    shown = [domain.train.pixels[np.flatnonzero(domain.train.labels == label)[0]] for label in labels]
    return np.stack([*rows, np.stack(shown)]), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one domain, keep nothing")
    parser.add_argument("--keep", action="store_true", help="with --quick: keep the strip nevertheless")
    parser.add_argument("--base", type=Path, default=BASE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep = args.keep or not args.quick
    folder = measure.RESULTS / "adaptation"
    taken: dict[str, list[float]] = {}
    for name in ("lineart",) if args.quick else domains.NAMES:
        pictures, taken[name] = strip(name, args.base)
        print(
            f"{name}: rows at {', '.join(f'{value:g} s' for value in taken[name])}, then the domain's own", flush=True
        )
        if keep:
            folder.mkdir(parents=True, exist_ok=True)
            measure.save_grid(pictures, folder / f"{name}.png")
    slowest = max(values[-1] for values in taken.values())
    measure.record("adaptation", {"seconds": slowest, "rows": taken, "pictures": PICTURES}, SEED, keep)


if __name__ == "__main__":
    main()

"""`python -m benchmarks.metric`: does the kernel distance order what a person orders?

Against each reference: other pictures of the same domain < its subjects in another style < other subjects < noise, each
step clear of the error bars. Real pictures alone: emoji that pretraining held out, OpenMoji, digits, icons, clip art.
"""

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from benchmarks import domains
from core.evaluation.distances import NEIGHBOURS, Estimate, coverage, frechet_distance, kernel_distance
from core.evaluation.features import load_features
from pretraining import data as emoji

RESULT = Path(__file__).parent / "results" / "metric.json"
COUNT = 200  # pictures of each set


def sets() -> dict[str, np.ndarray]:
    """Pictures by name; of a domain in two parts that share no subject."""
    shuffled = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for name in domains.NAMES:
        domain = domains.load(name)
        found[name], found[f"{name} again"] = domain.test.pixels, (domain.train + domain.tune).pixels
    images = emoji.load()
    subjects = sorted(set(images.subjects[images.held_out].tolist()))
    first = images.held_out & np.isin(images.subjects, subjects[::2])
    second = images.held_out & ~np.isin(images.subjects, subjects[::2])
    found["emoji"], found["emoji again"] = images.pixels[first], images.pixels[second]
    found["noise"] = shuffled.integers(0, 256, (COUNT, 64, 64, 3), dtype=np.uint8)
    return {name: pixels[shuffled.permutation(len(pixels))[:COUNT]] for name, pixels in found.items()}


CHAINS: tuple[tuple[str, ...], ...] = (
    # reference, same domain, its subjects in another style, other subjects in another style, noise
    ("emoji", "emoji again", "lineart", "game", "noise"),
    ("lineart", "lineart again", "glyphs", "game", "noise"),
    ("clipart", "clipart again", "lineart", "game", "noise"),
)
BESIDE = ("digits",)
"""Shown, not ordered. Ten shapes alone are as far from many as noise is: a set without variety has a large distance."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same; it takes a minute")
    parser.add_argument("--keep", action="store_true", help="with --quick: write the result nevertheless")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    network = load_features()
    features = {name: network(pixels) for name, pixels in sets().items()}
    rows: list[dict[str, object]] = []
    is_ordered = True
    print(f"{'reference':10} {'against':14} {'KID×1000':>18} {'Fréchet':>8} {'coverage':>8}")
    for reference, *others in CHAINS:
        real, before = features[reference], None
        for name in (*others, *BESIDE):
            other = features[name]
            kernel = kernel_distance(other, real)
            count = min(len(other), len(real))
            is_above = before is None or name in BESIDE or _is_above(kernel, before)
            is_ordered &= is_above
            row = {
                "reference": reference,
                "against": name,
                "kernel_distance": kernel.to_json(),
                "frechet_distance": round(frechet_distance(other, real, count), 2),
                "coverage": round(coverage(other, real), 3),
                "count": count,
                "above_the_one_before": is_above,
            }
            rows.append(row)
            print(
                f"{reference:10} {name:14} {kernel.value:9.1f} ± {kernel.error:6.1f} {row['frechet_distance']:8} "
                f"{row['coverage']:8}{'' if is_above else '  not above the one before'}"
            )
            before = kernel
    body = {
        "ordered": is_ordered,
        "rows": rows,
        "features": network.digest,
        "neighbours": NEIGHBOURS,
        "seed": 0,
        "command": "python -m benchmarks.metric",
        "device": "cpu",
        "threads": 1,
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if args.keep or not args.quick:
        RESULT.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(body))


def _is_above(later: Estimate, earlier: Estimate) -> bool:
    """Clear of the two standard errors, twice."""
    return later.value - earlier.value > 2 * float(np.hypot(later.error, earlier.error))


if __name__ == "__main__":
    main()

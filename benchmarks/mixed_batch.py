"""`python -m benchmarks.mixed_batch`: denoising steps of 32 rows with 1, 2, 8 and 32 adapters among them.

Against 32 rows of one base that an adapter is folded into, in the same engine. All sides take turns; each is set
against the mean of two folded ones of the same round, whose own ratios say how much is noise.
"""

import argparse
import statistics

import torch

from benchmarks import measure
from benchmarks.bases import SHIPPED, make_base
from core.diffusion.adapter import Adapter
from core.diffusion.base import Base
from core.diffusion.fold import fold
from core.sampling.engine import Engine
from core.sampling.request import AdapterPart, SampleRequest

SEED = 0
ROWS = 32
MIXES = (1, 2, 8, 32)
FOLDED = ("folded", "folded again")
STEPS = 250  # more than are timed: no row ends


def make_adapter(base: Base, number: int) -> Adapter:
    layout, chance = base.layout(), torch.Generator().manual_seed(SEED + number)
    theta = 0.02 * torch.randn(layout.size, generator=chance)
    delta = 0.02 * torch.randn(5, layout.hidden, generator=chance)
    return Adapter(layout, base.fingerprint, theta, delta, tuple("abcd"), (None,) * 4)


def make_engine(base: Base, digests: list[str | None]) -> Engine:
    """With one row of each digest under way."""
    engine = Engine(
        base,
        base.layout(),
        slots=ROWS + 1,
        max_rows=ROWS,
        load_adapter=lambda digest: make_adapter(base, int(digest)),
    )
    for number, digest in enumerate(digests):
        parts = (AdapterPart(digest, 1.0, number % 4),) if digest is not None else ()
        label = None if parts else number % 4
        request = SampleRequest(str(number), "t", number, label, parts, steps=STEPS, guidance="none")
        engine.submit(request)
    while engine.step() < len(digests):
        engine.wait(0.1)
    return engine


def measured(name: str, repeats: int) -> dict[str, dict[str, float]]:
    """Rows a second of each side, and its speed over the folded ones' of the same round: the median over rounds."""
    base, own = make_base(name), make_base(name)
    fold(own, make_adapter(base, 0))
    sides = {f"mixed {count}": make_engine(base, [str(row % count) for row in range(ROWS)]) for count in MIXES}
    sides |= {title: make_engine(own, [None] * ROWS) for title in FOLDED}
    seconds = measure.rounds({title: engine.step for title, engine in sides.items()}, repeats)
    for engine in sides.values():
        engine.close()
    folded = [statistics.mean(pair) for pair in zip(*(seconds[title] for title in FOLDED), strict=True)]
    found: dict[str, dict[str, float]] = {}
    for title, values in seconds.items():
        rate = ROWS / statistics.median(values)
        ratio = statistics.median(other / own for own, other in zip(values, folded, strict=True))
        found[title] = {"rows_per_second": round(rate, 2), "over_folded": round(ratio, 4)}
        print(f"{name:8} {title:13} {rate:8.2f} rows/s, {ratio:.3f} of folded", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the shipped base alone; keep nothing")
    parser.add_argument("--keep", action="store_true", help="with --quick: keep the result nevertheless")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, help="default: 30 for the shipped base, 3 for B/2")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    repeats = {SHIPPED: args.repeats or 30} | ({} if args.quick else {"B/2": args.repeats or 3})
    found = {name: measured(name, count) for name, count in repeats.items()}
    worst = min(side["over_folded"] for sides in found.values() for title, side in sides.items() if title not in FOLDED)
    result = {"mixed_over_folded": worst, "sides": found, "rows": ROWS, "repeats": repeats}
    measure.record("mixed_batch", result, SEED, args.keep or not args.quick)


if __name__ == "__main__":
    main()

"""`python -m benchmarks.high_resolution`: loss by step at twice the base's size, with and without spread positions.

Spread: token i of the larger grid stands at i / 2 (arXiv 2304.06648, the 512 trick; what the service does). Continued:
at i, beyond the grid that the base knows. All else is one job: seed, data, noise, times, rate, steps. The pictures are
drawn from SVG at 128 x 128; a tenth of each class is held out and its loss is the one compared. `steps_ratio` is steps
to the same held-out loss, spread over continued, the worst domain's; that loss is the higher of the two runs' lowest
ones. `by_step` has the ratio at each loss that the continued run had on its way. The base is held in bfloat16 and a
batch is 4, so that the run takes minutes.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import domains, measure
from benchmarks.cells import BASE
from core.diffusion.base import Base
from core.diffusion.families import load_base
from core.training.data import prepare
from core.training.loop import fit, start, validation_loss
from core.training.spec import resolve

Positions = Literal["spread", "continued"]
SCALE = 2
PICTURES = 200
BATCH = 4
SEED = 1
Curve = list[tuple[int, float]]


@contextmanager
def positions(base: Base, kind: Positions) -> Iterator[None]:
    """What diffusers' patch embedding divides a token's place by: the base's own grid, or the larger one itself."""
    embed: Any = base.network.get_submodule("pos_embed")
    own = embed.base_size
    embed.base_size = own if kind == "spread" else SCALE * own
    try:
        yield
    finally:
        embed.base_size = own


def curve(base: Base, name: str, kind: Positions, steps: int, every: int) -> Curve:
    """Held-out loss by step, of the averaged weights."""
    side = SCALE * base.image_size
    domain = domains.load(name, side)
    pictures = domain.train.head(PICTURES)
    data = prepare(base, pictures.pixels, pictures.labels.tolist(), domain.classes, SEED, flip=False)
    asked = {"image_size": side, "steps": steps, "batch_size": BATCH, "validation_every": every}
    spec = resolve(asked, images=PICTURES, classes=len(domain.classes), base=base.summary, seed=SEED)
    with positions(base, kind):
        state = start(base, data, spec)
        losses = [(0, validation_loss(base, data, spec, state))]
        losses += [(item.step, item.val_loss) for item in fit(base, data, spec, state)]
    return [(step, round(loss, 5)) for step, loss in losses if loss is not None]


def steps_to(losses: Curve, wanted: float) -> float:
    """When the loss first came down to `wanted`, on straight lines between what was measured."""
    for (before, high), (after, low) in pairwise(losses):
        if low <= wanted:
            return after if high <= low else before + (after - before) * max(0.0, high - wanted) / (high - low)
    raise ValueError(f"the loss never came down to {wanted}")


def compared(base: Base, name: str, steps: int, every: int) -> dict[str, Any]:
    curves = {kind: curve(base, name, kind, steps, every) for kind in ("spread", "continued")}
    wanted = max(min(loss for _, loss in losses) for losses in curves.values())
    taken = {kind: steps_to(losses, wanted) for kind, losses in curves.items()}
    return {
        "steps_ratio": round(taken["spread"] / taken["continued"], 4),
        "loss": wanted,
        "by_step": {
            step: round(steps_to(curves["spread"], loss) / step, 4)
            for step, loss in curves["continued"][1:]
            if loss >= wanted
        },
        "steps": {kind: round(value, 1) for kind, value in taken.items()},
        "first": {kind: losses[0][1] for kind, losses in curves.items()},
        "last": {kind: losses[-1][1] for kind, losses in curves.items()},
        "curves": curves,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one domain, fewer steps, keep nothing")
    parser.add_argument("--keep", action="store_true", help="with --quick: keep the result nevertheless")
    parser.add_argument("--base", type=Path, default=BASE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = load_base(args.base, dtype=torch.bfloat16)
    names, steps = (("game",), 60) if args.quick else (("game", "glyphs"), 120)
    found: dict[str, Any] = {}
    for name in names:
        found[name] = compared(base, name, steps, every=15)
        shown = found[name]
        print(f"{name}: {shown}", flush=True)
    result = {
        "steps_ratio": max(item["steps_ratio"] for item in found.values()),
        "image_size": SCALE * base.image_size,
        "pictures": PICTURES,
        "dtype": "bfloat16",
        "batch_size": BATCH,
        "domains": found,
    }
    measure.record("high_resolution", result, SEED, args.keep or not args.quick)


if __name__ == "__main__":
    main()

"""Pictures from any predictor: the service's solver and guidance, for methods that the engine does not hold.

And two ways that the service does not have: guidance whose change of x̂_0 is taken across x̂_0 alone, so that nothing
that is there already is made stronger (`-across`; adaptive projected guidance, Sadat et al., arXiv 2410.02416, η = 0).
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cells import Way
from benchmarks.methods import Predict
from core.diffusion.base import Base
from core.diffusion.guidance import guide
from core.diffusion.products import is_quick_at_bfloat16
from core.diffusion.solvers import Update, make_plan

STEPS = 20
_BATCH = 50


@torch.no_grad()
def draw(
    base: Base,
    predict: Predict,
    null: Predict,
    labels: Sequence[int],
    null_label: int,
    guidance: Way,
    scale: float,
    seed: int,
    steps: int = STEPS,
) -> np.ndarray:
    """(N, s, s, 3) uint8, one picture a label; the noise of picture i comes from `seed + i`, whatever the method."""
    pictures = [
        _batch(base, predict, null, labels[first : first + _BATCH], null_label, guidance, scale, seed + first, steps)
        for first in range(0, len(labels), _BATCH)
    ]
    return np.concatenate(pictures)


def _batch(
    base: Base,
    predict: Predict,
    null: Predict,
    labels: Sequence[int],
    null_label: int,
    guidance: Way,
    scale: float,
    seed: int,
    steps: int,
) -> np.ndarray:
    shape = (base.channels, base.sample_size, base.sample_size)
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + row)) for row in range(len(labels))]
    x = torch.stack(noises)
    previous = torch.zeros_like(x)
    wanted, nulls = torch.tensor(list(labels)), torch.full((len(labels),), null_label)
    plan = make_plan(base.schedule, "dpm++", steps, "trailing")
    scales = torch.full((len(labels),), scale)
    is_quick = is_quick_at_bfloat16(x.device)  # half the time there; the same for every method
    for step in range(steps):
        t = torch.full((len(labels),), float(plan.times[step]))
        update = Update.of([plan] * len(labels), [step] * len(labels))
        with torch.autocast("cpu", torch.bfloat16, enabled=is_quick):
            out = predict(x, t, wanted)
            if guidance != "none":
                other = (predict if guidance.startswith("cfg") else null)(x, t, nulls)
                if guidance.endswith("-across"):
                    other = out - across(out - other, update(x, out, previous)[1])
                out = guide(out, other, scales)
        x, previous = update(x, out, previous)
    return base.decode(x)


def across(change: Tensor, x0: Tensor) -> Tensor:
    """The part of a change (B, C, h, w) that is orthogonal to x̂_0, row by row.

    x̂_0 is linear in the model's output at a step, so what is orthogonal in one is so in the other.
    """
    ray = F.normalize(x0.flatten(1), dim=1)
    along = (change.flatten(1) * ray).sum(1, keepdim=True) * ray
    return change - along.view_as(change)

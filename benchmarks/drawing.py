"""Pictures from any predictor: the service's solver and guidance, for methods that the engine does not hold."""

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.methods import Predict
from core.diffusion.base import Base
from core.diffusion.guidance import guide
from core.diffusion.solvers import Update, make_plan
from core.sampling.request import Guidance

STEPS = 20
_BATCH = 50


@torch.no_grad()
def draw(
    base: Base,
    predict: Predict,
    null: Predict,
    labels: Sequence[int],
    null_label: int,
    guidance: Guidance,
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
    guidance: Guidance,
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
    for step in range(steps):
        t = torch.full((len(labels),), float(plan.times[step]))
        with torch.autocast("cpu", torch.bfloat16):  # half the time; the same for every method
            out = predict(x, t, wanted)
            if guidance != "none":
                other = predict if guidance == "cfg" else null
                out = guide(out, other(x, t, nulls), scales)
        x, previous = Update.of([plan] * len(labels), [step] * len(labels))(x, out, previous)
    return base.decode(x)

"""Everything that is said of one set of generated pictures, from features alone."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import Invalid
from core.evaluation.distances import (
    NEIGHBOURS,
    Estimate,
    Memorisation,
    coverage,
    frechet_distance,
    kernel_distance,
    memorisation,
)

MIN_PICTURES = NEIGHBOURS + 3
"""Of held-out and of generated pictures: with fewer there is no coverage, and no error worth its name."""


@dataclass(frozen=True)
class Report:
    """Distances to the held-out pictures; the floors are what real pictures have, so nothing is expected below them.

    `kernel_floor` and `memorisation` are None where no training pictures were given.
    """

    kernel: Estimate
    kernel_floor: Estimate | None
    frechet: float
    frechet_floor: float
    frechet_count: int
    coverage: float
    memorisation: Memorisation | None
    generated: int
    held_out: int
    training: int

    def to_json(self) -> dict[str, Any]:
        copied = self.memorisation
        return {
            "kernel_distance": self.kernel.to_json(),
            "kernel_floor": None if self.kernel_floor is None else self.kernel_floor.to_json(),
            "frechet_distance": round(self.frechet, 4),
            "frechet_floor": round(self.frechet_floor, 4),
            "frechet_count": self.frechet_count,
            "coverage": round(self.coverage, 4),
            "memorisation": None
            if copied is None
            else {
                "generated_to_training": round(copied.generated, 4),
                "held_out_to_training": round(copied.held_out, 4),
                "closer_share": round(copied.closer_share, 4),
            },
            "counts": {"generated": self.generated, "held_out": self.held_out, "training": self.training},
        }


def compare(generated: np.ndarray, held_out: np.ndarray, training: np.ndarray | None = None, seed: int = 0) -> Report:
    """Compare features (N, D). The Fréchet count is the largest at which the floor can be had as well."""
    least = min(len(generated), len(held_out))
    if least < MIN_PICTURES:
        raise Invalid(
            f"{len(generated)} generated and {len(held_out)} held-out pictures: {MIN_PICTURES} of each are the least",
            code="too_few_images",
        )
    if training is not None and len(training) >= MIN_PICTURES:
        others, real = training, held_out
        kernel_floor = kernel_distance(training, held_out)
    else:  # halves of the held-out pictures stand in, at half the count
        order = np.random.default_rng(seed).permutation(len(held_out))
        others, real = held_out[order[::2]], held_out[order[1::2]]
        training, kernel_floor = None, None
    count = min(len(generated), len(others), len(real))
    return Report(
        kernel=kernel_distance(generated, held_out),
        kernel_floor=kernel_floor,
        frechet=frechet_distance(generated, held_out, count, seed),
        frechet_floor=frechet_distance(others, real, count, seed),
        frechet_count=count,
        coverage=coverage(generated, held_out),
        memorisation=None if training is None else memorisation(generated, training, held_out),
        generated=len(generated),
        held_out=len(held_out),
        training=0 if training is None else len(training),
    )

"""How far two sets of features lie apart, with what is needed to read the figure. NumPy alone; rows are pictures."""

from dataclasses import dataclass

import numpy as np

from core.errors import Invalid

NEIGHBOURS = 5
KERNEL_SCALE = 1000.0
"""Kernel distances are shown times this, as papers do."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error."""

    value: float
    error: float

    def to_json(self) -> dict[str, float]:
        return {"value": round(self.value, 4), "error": round(self.error, 4)}


@dataclass(frozen=True)
class Memorisation:
    """Distances of generated pictures to their nearest training picture against those of pictures held out.

    `closer_share` is the share of generated pictures nearer to a training picture than 95 % of the held-out ones are:
    about 0.05 where nothing is copied, 1.0 where all of it is.
    """

    generated: float  # median distance
    held_out: float  # median distance
    closer_share: float


def kernel_distance(generated: np.ndarray, real: np.ndarray) -> Estimate:
    """Unbiased squared MMD with the kernel (x·y / d + 1)³, times 1,000 (Bińkowski et al., arXiv 1801.01401, eq. 4).

    All pairs are used, which is what a mean over random subsets estimates; the error is the jackknife's over both sets.
    Below zero means: not told apart at these counts.
    """
    _check(generated, real, least=3)
    x, y = np.asarray(generated, np.float64), np.asarray(real, np.float64)
    m, n = len(x), len(y)
    within_x, within_y, between = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    np.fill_diagonal(within_x, 0.0)
    np.fill_diagonal(within_y, 0.0)
    sum_x, sum_y, sum_between = within_x.sum(), within_y.sum(), between.sum()

    def distance(sx: np.ndarray, sy: np.ndarray, sb: np.ndarray, m: int, n: int) -> np.ndarray:
        return sx / (m * (m - 1)) + sy / (n * (n - 1)) - 2 * sb / (m * n)

    value = distance(sum_x, sum_y, sum_between, m, n)
    without_x = distance(sum_x - 2 * within_x.sum(1), sum_y, sum_between - between.sum(1), m - 1, n)  # (m,)
    without_y = distance(sum_x, sum_y - 2 * within_y.sum(1), sum_between - between.sum(0), m, n - 1)  # (n,)
    variance = (m - 1) * without_x.var() + (n - 1) * without_y.var()
    return Estimate(KERNEL_SCALE * float(value), KERNEL_SCALE * float(np.sqrt(variance)))


def frechet_distance(a: np.ndarray, b: np.ndarray, count: int, seed: int = 0) -> float:
    """Fréchet distance of the Gaussians of `count` rows of each (Heusel et al., arXiv 1706.08500, eq. 6).

    It falls with the count: only figures of one count compare, and the least that one can reach is what two halves of
    the real pictures have.
    """
    _check(a, b, least=2)
    if count > min(len(a), len(b)):
        raise Invalid(f"a Fréchet distance at {count} needs as many rows; there are {len(a)} and {len(b)}")
    chance = np.random.default_rng(seed)
    x, y = (np.asarray(rows, np.float64)[chance.permutation(len(rows))[:count]] for rows in (a, b))
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = (x - mean_x) / np.sqrt(count - 1), (y - mean_y) / np.sqrt(count - 1)  # Σ = xᵀx
    # tr (Σ_x Σ_y)^½ is the sum of the singular values of x yᵀ: count × count instead of d × d, and exact.
    overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(np.square(mean_x - mean_y).sum() + np.square(x).sum() + np.square(y).sum() - 2 * overlap)


def coverage(generated: np.ndarray, real: np.ndarray, neighbours: int = NEIGHBOURS) -> float:
    """Share of real pictures with a generated one nearer than their k-th real neighbour.

    Naeem et al., arXiv 2002.09797, eq. 4. It falls when classes or kinds are missing, whatever the pictures' quality.
    """
    _check(generated, real, least=1)
    if len(real) <= neighbours:
        raise Invalid(f"coverage with {neighbours} neighbours needs more than {neighbours} real pictures")
    among = _distances(real, real)
    np.fill_diagonal(among, np.inf)
    radius = np.partition(among, neighbours - 1, axis=1)[:, neighbours - 1]
    return float((_distances(real, generated).min(1) <= radius).mean())


def memorisation(generated: np.ndarray, training: np.ndarray, held_out: np.ndarray) -> Memorisation:
    """Whether generated pictures are copies: held-out ones say how near an honest picture comes to the training set."""
    _check(generated, training, least=1)
    _check(held_out, training, least=1)
    ours, honest = _distances(generated, training).min(1), _distances(held_out, training).min(1)
    near = np.quantile(honest, 0.05)
    return Memorisation(float(np.median(ours)), float(np.median(honest)), float((ours < near).mean()))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean, (len(a), len(b))."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None, :] - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0.0))


def _check(a: np.ndarray, b: np.ndarray, least: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise Invalid(f"features must be two matrices of one width, not {a.shape} and {b.shape}")
    if min(len(a), len(b)) < least:
        raise Invalid(f"{len(a)} and {len(b)} pictures: at least {least} of each are needed")

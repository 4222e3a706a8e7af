"""How a conditional and an unconditional prediction become one.

`cfg` (Ho & Salimans, arXiv 2207.12598) takes the adapter's own null class as the unconditional branch; `domain`
(Domain Guidance, ICLR 2025) the frozen base with its null class, which here is only a row with slot 0.
"""

from torch import Tensor

from core.diffusion.schedule import wide


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """unconditional + scale (conditional − unconditional) for rows (B, C, h, w) and scales (B,)."""
    return unconditional + wide(scale, conditional) * (conditional - unconditional)


def is_guided(level: float, interval: tuple[float, float]) -> bool:
    """Whether a state of this noise share lies in the interval in which the second branch runs."""
    low, high = interval
    return low <= level <= high

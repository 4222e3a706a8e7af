"""All chance of a job: a generator for each (seed, purpose, number), so that any step can be drawn again on its own."""

import hashlib

import torch
from torch import Tensor


def generator(seed: int, purpose: str, number: int = 0) -> torch.Generator:
    """A CPU generator that depends on nothing but its three arguments."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def stratified_times(rows: int, count: int, chance: torch.Generator, shift: float = 1.0) -> Tensor:
    """Ascending timestep indices (rows,) below `count`: one from each of so many equal parts of [0, 1).

    Each u is shifted to s u / (1 + (s - 1) u) (Esser et al., arXiv 2403.03206, equation 23).
    """
    u = (torch.arange(rows) + torch.rand(rows, generator=chance)) / rows
    times = (shift * u / (1 + (shift - 1) * u) * count).long()
    return times.clamp(max=count - 1)  # in float32 the last u may be rounded up to 1

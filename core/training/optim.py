"""AdamW without weight decay and an exponential average, on one flat vector."""

import math

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8


@torch.no_grad()
def adam_step(vector: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, rate: float) -> None:
    """One update in place (Kingma & Ba, arXiv 1412.6980, algorithm 1); `step` counts from 1."""
    first.lerp_(gradient, 1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    denominator = second.sqrt().div_(math.sqrt(1 - BETAS[1] ** step)).add_(EPSILON)
    vector.addcdiv_(first, denominator, value=-rate / (1 - BETAS[0] ** step))


def rate_at(step: int, steps: int, rate: float, warmup_steps: int, decay: float) -> float:
    """The rate of a step (from 1): a line up, level, and a line down to zero over the last `decay` of all steps."""
    up, down = step / (warmup_steps + 1), (steps - step + 1) / max(1.0, decay * steps)
    return rate * min(1.0, up, down)


@torch.no_grad()
def average_step(average: Tensor, vector: Tensor, decay: float, step: int) -> None:
    """Exponential average in place; its decay warms up as min(d, (1 + k) / (10 + k))."""
    average.lerp_(vector, 1 - min(decay, (1 + step) / (10 + step)))

"""Solvers as tables: one update formula for every row of a batch, whatever its solver, its step and its step count.

    x̂_0 = clip(a_x x + a_o out)          x' = b_x x + b_o out + b_0 x̂_0 + b_1 x̂_0(previous step)

DDIM (Song et al., arXiv 2010.02502, eq. 12), DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2) and Euler on
a flow are rows of coefficients in it, with the timesteps that diffusers' scheduler of the same config takes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from core.diffusion.schedule import Schedule
from core.errors import Invalid
from core.sampling.request import Solver

Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True)
class Plan:
    """All steps of one trajectory: the times that the model is told and the update's coefficients."""

    solver: Solver
    times: Tensor  # (n,) float32
    coefficients: Tensor  # (n, 6) float32: a_x, a_o, b_x, b_o, b_0, b_1
    levels: Tensor  # (n,) float32: noise share of the state before each step, 1 is pure noise
    clip: float

    def __len__(self) -> int:
        return len(self.times)


def make_plan(schedule: Schedule, solver: Solver, steps: int, spacing: Spacing | None = None) -> Plan:
    """The trajectory of `steps` steps; `spacing` None takes the scheduler's own."""
    if not 1 <= steps <= len(schedule):
        raise Invalid(f"steps must lie between 1 and {len(schedule)}", pointer="/steps")
    if (solver == "euler") != (schedule.prediction == "flow"):
        fits = "euler" if schedule.prediction == "flow" else "ddim or dpm++"
        raise Invalid(
            f"solver {solver} does not fit a base that predicts {schedule.prediction}: {fits}", pointer="/solver"
        )
    if solver == "ddim":
        return _ddim(schedule, steps, spacing or schedule.spacing)
    if solver == "dpm++":
        return _dpm(schedule, steps, spacing or schedule.spacing)
    if solver == "euler":
        return _euler(schedule, steps)
    raise Invalid(f"solver {solver!r} is unknown; one of {', '.join(get_args(Solver))}", pointer="/solver")


@dataclass(frozen=True)
class Update:
    """One step of a batch of rows: the coefficients of each row's plan at each row's step."""

    coefficients: Tensor  # (B, 6, 1, 1, 1)
    clip: Tensor  # (B, 1, 1, 1)

    @classmethod
    def of(cls, plans: Sequence[Plan], steps: Sequence[int], device: torch.device | str = "cpu") -> "Update":
        rows = torch.stack([plan.coefficients[step] for plan, step in zip(plans, steps, strict=True)])
        clip = torch.tensor([plan.clip for plan in plans])
        return cls(rows.to(device)[:, :, None, None, None], clip.to(device)[:, None, None, None])

    def __call__(self, x: Tensor, out: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """x' and x̂_0, both (B, C, h, w), from the state, the model's output and the last step's x̂_0."""
        a_x, a_o, b_x, b_o, b_0, b_1 = self.coefficients.unbind(1)
        x0 = a_x * x + a_o * out
        x0 = torch.minimum(torch.maximum(x0, -self.clip), self.clip)
        return b_x * x + b_o * out + b_0 * x0 + b_1 * previous, x0


def _plan(
    solver: Solver, times: np.ndarray, coefficients: Sequence[Sequence[float]], levels: np.ndarray, clip: float | None
) -> Plan:
    return Plan(
        solver,
        torch.as_tensor(np.asarray(times, dtype=np.float32)),
        torch.tensor(coefficients, dtype=torch.float64).float(),
        torch.as_tensor(np.asarray(levels, dtype=np.float32)),
        math.inf if clip is None else clip,
    )


def _from_output(schedule: Schedule, signal: float, noise: float) -> tuple[float, float, float, float]:
    """(a_x, a_o, e_x, e_o): x̂_0 and ε̂ as combinations of the state and the model's output."""
    if schedule.prediction == "epsilon":
        return 1 / signal, -noise / signal, 0.0, 1.0
    return signal, -noise, noise, signal


def _ddim(schedule: Schedule, steps: int, spacing: str) -> Plan:
    count = len(schedule)
    match spacing:
        case "leading":
            times = (np.arange(steps) * (count // steps))[::-1] + schedule.steps_offset
        case "trailing":
            times = np.round(np.arange(count, 0, -count / steps)).astype(np.int64) - 1
        case "linspace":
            times = np.linspace(0, count - 1, steps).round()[::-1].astype(np.int64)
        case _:
            raise Invalid(f"timestep_spacing {spacing!r} is unknown; leading, trailing or linspace")
    alphas = schedule.alphas_cumprod.double().cpu().numpy()
    rows: list[tuple[float, ...]] = []
    for t in times:
        before = int(t) - count // steps
        alpha, alpha_next = alphas[t], alphas[before] if before >= 0 else schedule.final_alpha
        a_x, a_o, e_x, e_o = _from_output(schedule, math.sqrt(alpha), math.sqrt(1 - alpha))
        direction = math.sqrt(1 - alpha_next)
        rows.append((a_x, a_o, direction * e_x, direction * e_o, math.sqrt(alpha_next), 0.0))
    return _plan("ddim", times, rows, np.sqrt(1 - alphas[times]), schedule.clip)


def _dpm(schedule: Schedule, steps: int, spacing: str) -> Plan:
    count = len(schedule)
    match spacing:
        case "linspace":
            times = np.linspace(0, count - 1, steps + 1).round()[::-1][:-1].astype(np.int64)
        case "leading":
            times = (np.arange(steps + 1) * (count // (steps + 1)))[::-1][:-1] + schedule.steps_offset
        case "trailing":
            times = np.arange(count, 0, -count / steps).round().astype(np.int64) - 1
        case _:
            raise Invalid(f"timestep_spacing {spacing!r} is unknown; leading, trailing or linspace")
    alphas = schedule.alphas_cumprod.double().cpu().numpy().copy()
    if alphas[-1] == 0:  # a schedule rescaled to end without signal: diffusers' own floor
        alphas[-1] = 2.0**-24
    signal = np.append(np.sqrt(alphas[times]), 1.0)
    noise = np.append(np.sqrt(1 - alphas[times]), 0.0)
    lambdas = np.append(np.log(signal[:-1]) - np.log(noise[:-1]), np.inf)
    rows: list[tuple[float, ...]] = []
    for i in range(len(times)):
        a_x, a_o, _, _ = _from_output(schedule, signal[i], noise[i])
        h = lambdas[i + 1] - lambdas[i]
        gain = -signal[i + 1] * math.expm1(-h)
        older = 0.0 if i in (0, len(times) - 1) else 0.5 * gain * h / (lambdas[i] - lambdas[i - 1])
        rows.append((a_x, a_o, noise[i + 1] / noise[i], 0.0, gain + older, -older))
    return _plan("dpm++", times, rows, noise[:-1], None)


def _euler(schedule: Schedule, steps: int) -> Plan:
    count, shift = len(schedule), schedule.shift
    sigmas = np.linspace(float(schedule.noise.max()), float(schedule.noise.min()), steps)
    sigmas = np.append(shift * sigmas / (1 + (shift - 1) * sigmas), 0.0)
    rows = [(1.0, -sigma, 1.0, after - sigma, 0.0, 0.0) for sigma, after in pairwise(sigmas)]
    return _plan("euler", sigmas[:-1] * count, rows, sigmas[:-1], None)

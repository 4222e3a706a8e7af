"""The noise schedule of a base: how much of x_0 is left at each timestep, from its scheduler's config."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.diffusion.catalog import Prediction, prediction_of
from core.errors import Invalid


@dataclass(frozen=True)
class Schedule:
    """x_t = signal[t] x_0 + noise[t] ε on T timesteps, as diffusers' scheduler of the same config has it."""

    prediction: Prediction
    signal: Tensor  # (T,) float32
    noise: Tensor  # (T,) float32
    times: Tensor  # (T,) float32: what the model is told
    final_alpha: float = 1.0
    spacing: str = "leading"
    steps_offset: int = 0
    clip: float | None = None
    shift: float = 1.0

    def __len__(self) -> int:
        return len(self.signal)

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) ᾱ, the squared signal; of a flow base the share that it would be."""
        return self.signal**2

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """From a `scheduler_config.json`; anything that would be silently wrong is refused by its field."""
        prediction = prediction_of(dict(config))
        steps = int(config.get("num_train_timesteps", 1000))
        if prediction == "flow":
            return cls._flow(config, steps)
        if config.get("thresholding"):
            raise Invalid("scheduler_config.json: thresholding is not supported")
        alphas_cumprod = torch.cumprod(1.0 - _betas(config, steps), dim=0)
        # Others than these never clip, and do not say so.
        clips = config.get("_class_name", "DDIMScheduler") in ("DDIMScheduler", "DDPMScheduler")
        final = 1.0 if config.get("set_alpha_to_one", True) else float(alphas_cumprod[0])
        return cls(
            prediction=prediction,
            signal=alphas_cumprod.sqrt(),
            noise=(1 - alphas_cumprod).sqrt(),
            times=torch.arange(steps, dtype=torch.float32),
            final_alpha=final,
            spacing=str(config.get("timestep_spacing", "leading")),
            steps_offset=int(config.get("steps_offset", 0)),
            clip=float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", clips) else None,
        )

    @classmethod
    def _flow(cls, config: Mapping[str, Any], steps: int) -> "Schedule":
        for field in ("use_dynamic_shifting", "shift_terminal", "invert_sigmas", "stochastic_sampling"):
            if config.get(field):
                raise Invalid(f"scheduler_config.json: {field} is not supported")
        shift = float(config.get("shift", 1.0))
        sigmas = torch.arange(1, steps + 1, dtype=torch.float32) / steps
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        return cls("flow", 1 - sigmas, sigmas, sigmas * steps, shift=shift)

    def to(self, device: torch.device | str) -> "Schedule":
        moved = {name: getattr(self, name).to(device) for name in ("signal", "noise", "times")}
        return Schedule(**{**self.__dict__, **moved})

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t (B, C, h, w) at timestep indices t (B,)."""
        return wide(self.signal[t], x0) * x0 + wide(self.noise[t], x0) * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the base is to predict: ε, v = √ᾱ ε − √(1−ᾱ) x_0, or the flow ε − x_0."""
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "flow":
            return eps - x0
        return wide(self.signal[t], x0) * eps - wide(self.noise[t], x0) * x0

    def snr(self, t: Tensor) -> Tensor:
        """Signal to noise (B,)."""
        return (self.signal[t] / self.noise[t]) ** 2


def wide(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,) of rows as (B, 1, …), to be multiplied with `like` (B, …)."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def _betas(config: Mapping[str, Any], steps: int) -> Tensor:
    """diffusers' own formulas in its own precision, so that ᾱ is equal bit for bit."""
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    elif kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    elif kind == "squaredcos_cap_v2":
        betas = torch.tensor([min(1 - _cosine(i + 1, steps) / _cosine(i, steps), 0.999) for i in range(steps)])
    else:
        raise Invalid(f"scheduler_config.json: beta_schedule {kind!r}; linear, scaled_linear or squaredcos_cap_v2")
    return _zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas


def _cosine(step: int, steps: int) -> float:
    return math.cos((step / steps + 0.008) / 1.008 * math.pi / 2) ** 2


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """Lin et al., arXiv 2305.08891, algorithm 1."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    bar = root**2
    alphas = torch.cat([bar[0:1], bar[1:] / bar[:-1]])
    return 1 - alphas

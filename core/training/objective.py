"""What a row is trained on: the base's own target, and L_vlb where it learns its variance."""

import math

import torch
from torch import Tensor

from core.diffusion.schedule import Schedule, wide

VLB_WEIGHT = 0.001


def row_losses(
    schedule: Schedule,
    out: Tensor,
    x0: Tensor,
    eps: Tensor,
    x_t: Tensor,
    t: Tensor,
    learned_sigma: bool,
    min_snr_gamma: Tensor | None = None,
) -> Tensor:
    """(B,) losses of predictions (B, C or 2C, h, w): squared error per value, plus the weighted variational term.

    `min_snr_gamma` (B,) weighs each row's error; infinite leaves it as it is.
    """
    channels = x0.shape[1]
    prediction = out[:, :channels]
    losses = (prediction - schedule.target(x0, eps, t)).square().flatten(1).mean(1)
    if min_snr_gamma is not None:
        losses = losses * _min_snr_weight(schedule, t, min_snr_gamma)
    if learned_sigma:
        vlb = variational_bits(schedule, prediction.detach(), out[:, channels:], x0, x_t, t)
        losses = losses + VLB_WEIGHT * len(schedule) * vlb
    return losses


def _min_snr_weight(schedule: Schedule, t: Tensor, gamma: Tensor) -> Tensor:
    """Hang et al., arXiv 2303.09556: min(SNR, γ) / SNR for ε, over SNR + 1 for v; a flow is left as it is."""
    if schedule.prediction == "flow":
        return torch.ones_like(gamma)
    snr = schedule.snr(t)
    weight = torch.minimum(snr, gamma) / (snr if schedule.prediction == "epsilon" else snr + 1)
    return torch.where(gamma.isinf(), 1.0, weight)


def variational_bits(
    schedule: Schedule, prediction: Tensor, variance: Tensor, x0: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """(B,) bits per value of one term of the bound (Nichol & Dhariwal, arXiv 2102.09672, eq. 4 to 7 and 15).

    `variance` in [-1, 1] interpolates between the logarithms of the posterior's variance and of β.
    """
    terms = _Posterior(schedule, x0)
    true_mean, true_log = terms.mean(x0, x_t, t), terms.log_variance(t)
    signal, noise = wide(schedule.signal[t], x0), wide(schedule.noise[t], x0)
    if schedule.prediction == "epsilon":
        predicted_x0 = (x_t - noise * prediction) / signal
    else:
        predicted_x0 = signal * x_t - noise * prediction
    mean = terms.mean(predicted_x0, x_t, t)
    share = (variance + 1) / 2
    log_variance = share * terms.log_beta(t) + (1 - share) * true_log
    kl = 0.5 * (
        -1
        + log_variance
        - true_log
        + torch.exp(true_log - log_variance)
        + (true_mean - mean).square() * torch.exp(-log_variance)
    )
    likelihood = -_discretised_log_likelihood(x0, mean, 0.5 * log_variance)
    nats = torch.where(wide(t == 0, x0), likelihood, kl)
    return nats.flatten(1).mean(1) / math.log(2)


class _Posterior:
    """q(x_{t-1} | x_t, x_0) of a schedule (Ho et al., arXiv 2006.11239, eq. 6 and 7)."""

    def __init__(self, schedule: Schedule, like: Tensor) -> None:
        bar = schedule.alphas_cumprod.double()
        before = torch.cat([bar.new_ones(1), bar[:-1]])
        beta = 1 - bar / before
        variance = beta * (1 - before) / (1 - bar)
        variance[0] = variance[1]
        self._of_x0 = (beta * before.sqrt() / (1 - bar)).to(like)
        self._of_xt = ((1 - before) * (bar / before).sqrt() / (1 - bar)).to(like)
        self._log_variance = variance.log().to(like)
        self._log_beta = beta.log().to(like)

    def mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return wide(self._of_x0[t], x0) * x0 + wide(self._of_xt[t], x0) * x_t

    def log_variance(self, t: Tensor) -> Tensor:
        return self._log_variance[t].view(-1, 1, 1, 1)

    def log_beta(self, t: Tensor) -> Tensor:
        return self._log_beta[t].view(-1, 1, 1, 1)


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P of x under a Gaussian binned to 256 levels of [-1, 1]; the outer bins reach to infinity."""
    centred = x - mean
    inverse = torch.exp(-log_scale)
    upper = torch.special.ndtr(inverse * (centred + 1 / 255))
    lower = torch.special.ndtr(inverse * (centred - 1 / 255))
    inner = (upper - lower).clamp(min=1e-12).log()
    log_upper, log_lower = upper.clamp(min=1e-12).log(), (1 - lower).clamp(min=1e-12).log()
    return torch.where(x < -0.999, log_upper, torch.where(x > 0.999, log_lower, inner))

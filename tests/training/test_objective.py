"""The variational term against an independent computation, and the sampling of the minimum-SNR weight."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from core.diffusion.schedule import Schedule
from core.training.objective import row_losses, variational_bits


def posterior(schedule: Schedule, x0: torch.Tensor, x_t: torch.Tensor, t: int) -> tuple[torch.Tensor, float]:
    bar = schedule.alphas_cumprod.double()
    alpha = bar[t] / bar[t - 1]
    beta = 1 - alpha
    mean = (bar[t - 1].sqrt() * beta * x0 + alpha.sqrt() * (1 - bar[t - 1]) * x_t) / (1 - bar[t])
    return mean, float(beta * (1 - bar[t - 1]) / (1 - bar[t]))


def setup() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(3, 2, 4, 4, generator=generator) * 1.8 - 0.9
    eps, guess = torch.randn(2, 3, 2, 4, 4, generator=generator)
    variance = torch.rand(3, 2, 4, 4, generator=generator) * 2 - 1
    return x0, eps, guess, variance


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_term_is_the_kl_between_posterior_and_model(prediction_type: str):
    schedule = Schedule.from_config({"prediction_type": prediction_type})
    x0, eps, guess, variance = setup()
    t = torch.tensor([5, 400, 900])
    x_t = schedule.add_noise(x0, eps, t)
    prediction = schedule.target(x0, guess, t)
    bits = variational_bits(schedule, prediction, variance, x0, x_t, t)
    bar = schedule.alphas_cumprod.double()
    for i, step in enumerate(t.tolist()):
        signal, noise = bar[step].sqrt(), (1 - bar[step]).sqrt()
        if prediction_type == "epsilon":
            guessed = (x_t[i] - noise * prediction[i]) / signal
        else:
            guessed = signal * x_t[i] - noise * prediction[i]
        true_mean, true_variance = posterior(schedule, x0[i], x_t[i], step)
        mean, _ = posterior(schedule, guessed, x_t[i], step)
        share = (variance[i].double() + 1) / 2
        log_beta = torch.log(1 - bar[step] / bar[step - 1])
        deviation = torch.exp(0.5 * (share * log_beta + (1 - share) * math.log(true_variance)))
        kl = kl_divergence(Normal(true_mean, math.sqrt(true_variance)), Normal(mean, deviation)).mean() / math.log(2)
        assert bits[i] == pytest.approx(float(kl), rel=1e-2)


def test_the_first_term_is_a_likelihood_over_256_levels():
    schedule = Schedule.from_config({})
    x0 = torch.tensor([-1.0, -0.5, 0.25, 1.0]).view(1, 1, 2, 2)
    t = torch.tensor([0])
    perfect = torch.zeros_like(x0)
    x_t = schedule.signal[0] * x0
    sure = variational_bits(schedule, perfect, torch.full_like(x0, -1), x0, x_t, t)
    assert 0 <= float(sure) < 3
    off = variational_bits(schedule, perfect + 5, torch.full_like(x0, -1), x0, x_t, t)
    assert float(off) > float(sure)


def test_the_bound_trains_the_variance_and_not_the_mean():
    schedule = Schedule.from_config({})
    x0, eps, guess, variance = setup()
    t = torch.tensor([5, 400, 900])
    x_t = schedule.add_noise(x0, eps, t)
    out = torch.cat([guess, variance], dim=1).requires_grad_()
    plain = torch.cat([guess, variance], dim=1).requires_grad_()
    row_losses(schedule, out, x0, eps, x_t, t, learned_sigma=True).sum().backward()
    row_losses(schedule, plain, x0, eps, x_t, t, learned_sigma=False).sum().backward()
    assert out.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(out.grad[:, :2], plain.grad[:, :2])
    assert out.grad[:, 2:].abs().min() > 0


def test_min_snr_weighs_each_row_by_its_own_gamma():
    schedule = Schedule.from_config({})
    x0, eps, guess, _ = setup()
    t = torch.tensor([1, 1, 900])
    x_t = schedule.add_noise(x0, eps, t)
    plain = row_losses(schedule, guess, x0, eps, x_t, t, False)
    gammas = torch.tensor([5.0, math.inf, 5.0])
    weighed = row_losses(schedule, guess, x0, eps, x_t, t, False, gammas)
    assert weighed[0] == pytest.approx(float(plain[0] * 5 / schedule.snr(t)[0]), rel=1e-5)
    assert weighed[1] == plain[1]
    assert weighed[2] == pytest.approx(float(plain[2]), rel=1e-6)

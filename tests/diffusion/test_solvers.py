"""Each solver against diffusers' scheduler, and rows of different plans in one batch against each alone."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from core.diffusion.guidance import guide, is_guided
from core.diffusion.schedule import Schedule
from core.diffusion.solvers import Plan, Update, make_plan
from core.errors import Invalid

CONFIGS: list[dict[str, Any]] = [
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 1.5},
    {"clip_sample": False, "prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
    {"clip_sample": False, "beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1},
    {"clip_sample": False, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
]


def model(x: torch.Tensor, t: float) -> torch.Tensor:
    """A smooth stand-in for a network: the solvers see the same function."""
    return torch.tanh(0.7 * x + 0.001 * t) + 0.1


def ours(plan: Plan, x: torch.Tensor) -> torch.Tensor:
    previous = torch.zeros_like(x)
    for step, t in enumerate(plan.times.tolist()):
        update = Update.of([plan] * len(x), [step] * len(x))
        x, previous = update(x, model(x, t), previous)
    return x


def theirs(scheduler: Any, steps: int, x: torch.Tensor) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, float(t)), t, x).prev_sample
    return x


def noise(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_ddim_equals_diffusers(config: dict[str, Any], spacing: str, steps: int):
    scheduler = DDIMScheduler(**config, timestep_spacing=spacing)
    plan = make_plan(Schedule.from_config(scheduler.config), "ddim", steps)
    scheduler.set_timesteps(steps)
    assert plan.times.tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(ours(plan, noise()), theirs(scheduler, steps, noise()), rtol=2e-4, atol=2e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own, with numpy 2
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
def test_dpm_solver_equals_diffusers(config: dict[str, Any], spacing: str, steps: int):
    trained = DDIMScheduler(**config, timestep_spacing=spacing)
    scheduler = DPMSolverMultistepScheduler.from_config(trained.config)
    plan = make_plan(Schedule.from_config(trained.config), "dpm++", steps)
    scheduler.set_timesteps(steps)
    assert plan.times.tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(ours(plan, noise()), theirs(scheduler, steps, noise()), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 8, 30])
def test_euler_equals_diffusers_on_a_flow(shift: float, steps: int):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    plan = make_plan(
        Schedule.from_config({**scheduler.config, "_class_name": type(scheduler).__name__}), "euler", steps
    )
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(plan.times, scheduler.timesteps, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(ours(plan, noise()), theirs(scheduler, steps, noise()), rtol=1e-5, atol=1e-5)


def test_rows_of_different_plans_share_a_batch():
    schedule = Schedule.from_config({"clip_sample": True})
    plans = [
        make_plan(schedule, "ddim", 5),
        make_plan(schedule, "dpm++", 8),
        make_plan(schedule, "ddim", 12, "trailing"),
    ]
    start = noise(3)
    alone = torch.cat([ours(plan, start[i : i + 1]) for i, plan in enumerate(plans)])
    x, previous, steps = start.clone(), torch.zeros_like(start), [0, 0, 0]
    while active := [i for i in range(3) if steps[i] < len(plans[i])]:
        chosen = [plans[i] for i in active]
        at = [steps[i] for i in active]
        out = torch.cat([model(x[i : i + 1], float(plans[i].times[steps[i]])) for i in active])
        x[active], previous[active] = Update.of(chosen, at)(x[active], out, previous[active])
        for i in active:
            steps[i] += 1
    torch.testing.assert_close(x, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_noise_and_targets_equal_diffusers(config: dict[str, Any]):
    scheduler = DDIMScheduler(**config)
    schedule = Schedule.from_config(scheduler.config)
    x0, eps, t = noise(3), noise(3).flip(0), torch.tensor([0, 500, 998])
    torch.testing.assert_close(schedule.add_noise(x0, eps, t), scheduler.add_noise(x0, eps, t))
    if schedule.prediction == "v_prediction":
        torch.testing.assert_close(schedule.target(x0, eps, t), scheduler.get_velocity(x0, eps, t))
    else:
        assert torch.equal(schedule.target(x0, eps, t), eps)


def test_a_flow_is_a_straight_line():
    schedule = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    x0, eps, t = noise(), noise().flip(0), torch.tensor([100, 900])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert torch.allclose(schedule.noise.flip(0), scheduler.sigmas)
    sigma = schedule.noise[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(schedule.add_noise(x0, eps, t) - sigma * schedule.target(x0, eps, t), x0)


@pytest.mark.parametrize(
    ("solver", "steps", "pointer"), [("ddim", 0, "/steps"), ("ddim", 1001, "/steps"), ("euler", 5, "/solver")]
)
def test_a_plan_that_cannot_be_names_its_field(solver: Any, steps: int, pointer: str):
    with pytest.raises(Invalid) as caught:
        make_plan(Schedule.from_config({}), solver, steps)
    assert caught.value.pointer == pointer


@pytest.mark.parametrize(
    "config", [{"beta_schedule": "sigmoid"}, {"thresholding": True}, {"prediction_type": "sample"}], ids=str
)
def test_a_schedule_that_we_would_get_wrong_is_refused_by_its_field(config: dict[str, Any]):
    with pytest.raises(Invalid, match=next(iter(config))):
        Schedule.from_config(config)


def test_guidance_of_one_is_the_conditional_branch():
    a, b = noise(), noise().flip(0)
    torch.testing.assert_close(guide(a, b, torch.ones(2)), a)
    torch.testing.assert_close(guide(a, b, torch.tensor([0.0, 3.0]))[1], b[1] + 3 * (a[1] - b[1]))
    assert is_guided(0.5, (0.0, 1.0))
    assert not is_guided(0.95, (0.2, 0.9))

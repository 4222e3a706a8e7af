import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from core.diffusion.base import Base
from core.errors import Invalid
from core.training.spec import POINTER, TrainSpec, resolve


def ask(base: Base, images: int = 300, classes: int = 10, **hyperparameters: Any) -> TrainSpec:
    return resolve(hyperparameters, images=images, classes=classes, base=base.summary, seed=7)


def test_auto_and_absent_and_null_are_the_same(base: Base):
    fields = ("steps", "batch_size", "learning_rate", "flip", "layout", "gamma_depth", "ema_decay")
    assert ask(base) == ask(base, **dict.fromkeys(fields, "auto")) == ask(base, **dict.fromkeys(fields))


def test_the_rate_is_ten_times_the_bases_own(base: Base):
    wide = replace(base.summary, hidden=1152)
    for summary, multiplier, rate in (
        (wide, None, 1e-3),
        (wide, 3, 3e-4),
        (replace(wide, hidden=256), None, 4.5e-3),
        (replace(wide, hidden=16), None, 1e-2),
        (replace(wide, learning_rate=2e-4), None, 2e-3),
    ):
        asked = {"learning_rate_multiplier": multiplier}
        assert resolve(asked, images=9, classes=1, base=summary, seed=0).learning_rate == pytest.approx(rate)


def test_times_are_shifted_but_for_bases_that_predict_noise(base: Base):
    for prediction, shift in (("v_prediction", 3.0), ("flow", 3.0), ("epsilon", 1.0)):
        summary = replace(base.summary, prediction=prediction)
        assert resolve({}, images=9, classes=1, base=summary, seed=0).time_shift == shift
        assert resolve({"time_shift": 2}, images=9, classes=1, base=summary, seed=0).time_shift == 2.0


@pytest.mark.parametrize("images", [2, 50, 500, 5000])
def test_auto_stays_within_bounds_for_any_dataset(base: Base, images: int):
    spec = ask(base, images=images)
    assert 800 <= spec.steps <= 2000
    assert spec.warmup_steps < spec.steps
    assert spec.validation_every <= spec.steps


def test_a_spec_survives_json(base: Base):
    for spec in (ask(base), ask(base, gamma_depth=[1, 3], gamma_places=["qkv", "mlp"]), ask(base, layout="bitfit")):
        assert TrainSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
        assert TrainSpec.from_json(spec.to_json()).digest == spec.digest
    assert ask(base).digest != ask(base, steps=5).digest


def test_epochs_become_steps(base: Base):
    assert ask(base, images=300, n_epochs=2, batch_size=32).steps == 19


def test_an_explicit_null_switches_previews_off(base: Base):
    assert ask(base, preview_every=None).preview_every is None
    assert ask(base).preview_every is not None


@pytest.mark.parametrize(
    ("hyperparameters", "field"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2**31}, "steps"),
        ({"steps": True}, "steps"),
        ({"steps": 10.0}, "steps"),
        ({"steps": "10"}, "steps"),
        ({"batch_size": 257}, "batch_size"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": 0.1, "learning_rate_multiplier": 2}, "learning_rate"),
        ({"learning_rate_multiplier": -1}, "learning_rate_multiplier"),
        ({"n_epochs": 2, "steps": 5}, "n_epochs"),
        ({"n_epochs": 1e6}, "n_epochs"),
        ({"layout": "lora"}, "layout"),
        ({"gamma_depth": "deep"}, "gamma_depth"),
        ({"gamma_depth": [0, 99]}, "gamma_depth"),
        ({"gamma_places": ["nose"]}, "gamma_places"),
        ({"layout": "bitfit", "gamma_depth": "all"}, "gamma_depth"),
        ({"flip": 1}, "flip"),
        ({"label_dropout": 1.0}, "label_dropout"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"class_start": "worst"}, "class_start"),
        ({"class_start": ["mean"]}, "class_start"),
        ({"time_shift": 0}, "time_shift"),
        ({"rank": 8}, "rank"),
    ],
    ids=str,
)
def test_a_field_out_of_bounds_is_named(base: Base, hyperparameters: dict[str, Any], field: str):
    with pytest.raises(Invalid) as caught:
        ask(base, **hyperparameters)
    assert caught.value.pointer == f"{POINTER}/{field}"


@pytest.mark.parametrize("seed", [-1, 2**63, True, 1.5])
def test_a_seed_out_of_bounds_is_named(base: Base, seed: Any):
    with pytest.raises(Invalid) as caught:
        resolve({}, images=10, classes=1, base=base.summary, seed=seed)
    assert caught.value.pointer == "/seed"


def test_resolving_needs_no_torch():
    code = "import sys, core.training.spec; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_image_size_is_the_bases_own_up_to_twice_that_in_whole_patches(base: Base):
    assert ask(base).image_size == base.image_size == 8
    assert [ask(base, image_size=size).image_size for size in (8, 10, 16)] == [8, 10, 16]
    for wrong in (6, 11, 18, 16.0, True, "16"):
        with pytest.raises(Invalid) as caught:
            ask(base, image_size=wrong)
        assert caught.value.pointer == f"{POINTER}/image_size"


def test_devices_are_refused_where_there_are_fewer_or_no_row_for_each(base: Base):
    assert ask(base).devices == 1
    assert ask(base, devices=2).devices == 2
    for asked, most, message in (
        ({"devices": 3}, 2, "this service trains a job on at most 2"),
        ({"devices": 4, "batch_size": 3}, 8, "a batch of 3 has no row for each"),
        ({"devices": 0}, 8, "must be a whole number from 1 to"),
        ({"devices": True}, 8, "must be a whole number from 1 to"),
    ):
        with pytest.raises(Invalid, match=message) as caught:
            resolve(asked, images=9, classes=1, base=base.summary, seed=0, max_devices=most)
        assert caught.value.pointer == f"{POINTER}/devices"

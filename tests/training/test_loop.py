"""Training: it learns, it touches nothing but its vector, and it goes on from any step bit for bit."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core.adapters import format as adapter_format
from core.diffusion.base import Base
from core.diffusion.families import load_base
from core.errors import Invalid
from core.settings import PACKAGED_BASE
from core.training import checkpoint
from core.training.checkpoint import CheckpointMismatch, CorruptCheckpoint
from core.training.class_start import choose_class_start
from core.training.data import TrainingData
from core.training.loop import advance, finish, fit, start, validation_loss
from core.training.machine import numeric_path
from core.training.spec import TrainSpec
from core.training.trainee import Diverged, Trainee, TrainState
from tests.diffusion.tiny import make_pipeline
from tests.training.jobs import make_data, make_spec


@pytest.fixture(scope="module")
def data(base: Base) -> TrainingData:
    return make_data(base)


def sha(state: TrainState, base: Base, spec: TrainSpec, data: TrainingData) -> str:
    return hashlib.sha256(adapter_format.save(finish(state, base, spec, data))).hexdigest()


def run(base: Base, data: TrainingData, spec: TrainSpec, state: TrainState | None = None, **options: Any) -> TrainState:
    *_, last = fit(base, data, spec, state, **options)
    return last.state


@pytest.mark.parametrize("which", ["base", "latent_base"])
@pytest.mark.parametrize("rows", ["row", "fused"])
def test_it_learns(which: str, rows: Any, request: pytest.FixtureRequest):
    base = request.getfixturevalue(which)
    data = make_data(base)
    spec = make_spec(base, steps=120, batch_size=8, learning_rate=0.01, validation_every=60)
    before = validation_loss(base, data, spec, start(base, data, spec))
    progress = list(fit(base, data, spec, path=numeric_path(base, spec, rows)))
    assert [item.step for item in progress] == list(range(1, 121))
    assert [item.step for item in progress if item.val_loss is not None] == [60, 120]
    assert before is not None
    assert progress[-1].val_loss < 0.8 * before
    assert progress[-1].val_loss == validation_loss(base, data, spec, progress[-1].state)


def test_a_base_in_bfloat16_trains_a_vector_in_float32(latent_folder: Path):
    base = load_base(latent_folder, dtype=torch.bfloat16)
    data = make_data(base)
    spec = make_spec(base, steps=60, batch_size=8, learning_rate=0.01)
    before = validation_loss(base, data, spec, start(base, data, spec))
    *_, last = fit(base, data, spec)
    assert {parameter.dtype for parameter in base.network.parameters()} == {torch.bfloat16}
    assert last.state.vector.dtype == torch.float32
    assert numeric_path(base, spec).dtype == "bfloat16"
    assert before is not None
    assert last.val_loss < before


def test_a_flow_with_twice_the_channels_is_trained_on_its_velocity_alone(tmp_path: Path):
    base = load_base(make_pipeline(tmp_path / "flow", vae=False, learned_sigma=True, flow=True))
    data, spec = make_data(base), make_spec(base, steps=1)
    state = start(base, data, spec)
    trainee = Trainee(base, data, spec, state)
    draw, schedule = trainee.draw(), base.schedule
    _, table = trainee.pieces(state.vector)
    x_t = schedule.add_noise(draw.x0, draw.eps, draw.t)
    with torch.no_grad():
        out = base.forward(x_t, schedule.times[draw.t], None, trainee.class_rows(table, draw.labels))
    [progress] = fit(base, data, spec, state)
    error = (out[:, :3] - (draw.eps - draw.x0)).square().mean()
    assert progress.loss == pytest.approx(float(error), rel=1e-5)


def test_nothing_of_the_base_is_written(base: Base, data: TrainingData):
    weights = {name: value.clone() for name, value in base.network.state_dict().items()}
    table = base.class_table.clone()
    run(base, data, make_spec(base))
    assert all(torch.equal(value, weights[name]) for name, value in base.network.state_dict().items())
    assert torch.equal(base.class_table, table)
    assert all(parameter.grad is None for parameter in base.network.parameters())


def test_every_value_of_the_vector_gets_a_gradient(base: Base, data: TrainingData):
    spec = make_spec(base, steps=1, batch_size=24, label_dropout=0.5, warmup_steps=0, clip_norm=1e6)
    state = run(base, data, spec)
    layout = base.layout()
    for name, piece in layout.split(state.vector[: layout.size]).items():
        if not name.endswith("to_k.bias"):  # a shift of all keys cancels in the softmax
            assert piece.abs().min() > 0, name
    assert (state.vector[layout.size :].view(4, -1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("rows", ["row", "fused"])
def test_a_job_left_at_any_step_ends_in_the_same_bytes(base: Base, data: TrainingData, rows: Any):
    spec = make_spec(base, batch_size=5, validation_every=5)
    path = numeric_path(base, spec, rows)
    wanted = sha(run(base, data, spec, path=path), base, spec, data)
    for left_at in (1, 4, 5, 11, 12):
        [*_, last] = islice(fit(base, data, spec, path=path), left_at)
        saved = checkpoint.dump(last.state, spec.digest, data.digest, path)
        state = checkpoint.load(saved, spec.digest, data.digest, path)
        assert checkpoint.dump(state, spec.digest, data.digest, path) == saved
        if left_at < spec.steps:
            state = run(base, data, spec, state, path=path)
        assert sha(state, base, spec, data) == wanted, left_at


@pytest.mark.parametrize("lost", ["first", "second", "average", "step"])
def test_a_state_that_loses_anything_ends_in_other_bytes(base: Base, data: TrainingData, lost: str):
    spec = make_spec(base)
    wanted = sha(run(base, data, spec), base, spec, data)
    [*_, last] = islice(fit(base, data, spec), 5)
    state = last.state
    if lost == "step":
        state.step -= 1
    else:
        getattr(state, lost).zero_()
    assert sha(run(base, data, spec, state), base, spec, data) != wanted


def test_the_seed_is_the_only_chance(base: Base, data: TrainingData):
    spec = make_spec(base)
    torch.manual_seed(1)
    one = run(base, data, spec)
    torch.manual_seed(2)
    two = run(base, data, spec)
    assert torch.equal(one.vector, two.vector)
    assert not torch.equal(one.vector, run(base, data, replace(spec, seed=1)).vector)


def test_a_checkpoint_of_something_else_is_refused_by_what_differs(base: Base, data: TrainingData):
    spec = make_spec(base)
    path = numeric_path(base, spec)
    saved = checkpoint.dump(start(base, data, spec), spec.digest, data.digest, path)
    with pytest.raises(CheckpointMismatch, match="another spec"):
        checkpoint.load(saved, "0", data.digest, path)
    with pytest.raises(CheckpointMismatch, match="another data"):
        checkpoint.load(saved, spec.digest, "0", path)
    with pytest.raises(CheckpointMismatch, match="threads 1, this run 2"):
        checkpoint.load(saved, spec.digest, data.digest, replace(path, threads=2))
    for length in (0, 7, 100, len(saved) - 1):
        with pytest.raises(CorruptCheckpoint):
            checkpoint.load(saved[:length], spec.digest, data.digest, path)
    adapter = adapter_format.save(finish(start(base, data, spec), base, spec, data))
    with pytest.raises(CorruptCheckpoint, match="no checkpoint"):
        checkpoint.load(adapter, spec.digest, data.digest, path)


def test_a_checkpoint_from_before_a_part_of_the_path_is_gone_on_from(base: Base, data: TrainingData):
    """Parts that came later have the value that all jobs had before; a part that comes after us we cannot keep."""
    spec = make_spec(base)
    state, path = start(base, data, spec), numeric_path(base, spec)
    saved = checkpoint.dump(state, spec.digest, data.digest, path)
    metadata, _ = adapter_format.read_header(saved)
    tensors = {name: getattr(state, name) for name in TrainState.TENSORS}

    def with_path(parts: dict[str, Any]) -> bytes:
        return adapter_format.write_safetensors(tensors, {**metadata, "numeric_path": json.dumps(parts)})

    older = {key: value for key, value in path.to_json().items() if key != "compiled"}
    assert checkpoint.load(with_path(older), spec.digest, data.digest, path).step == 0
    with pytest.raises(CheckpointMismatch, match="compiled False, this run True"):
        checkpoint.load(with_path(older), spec.digest, data.digest, replace(path, compiled=True))
    with pytest.raises(CheckpointMismatch, match="another version's"):
        checkpoint.load(with_path({**path.to_json(), "order": "new"}), spec.digest, data.digest, path)


def test_a_state_of_another_size_is_refused(base: Base, data: TrainingData):
    state = start(base, data, make_spec(base, layout="bitfit"))
    with pytest.raises(Invalid, match="values"):
        next(fit(base, data, make_spec(base), state))


def test_nan_stops_the_job_and_leaves_the_last_good_state(base: Base, data: TrainingData):
    spec = make_spec(base)
    [*_, last] = islice(fit(base, data, spec), 3)
    before = last.state.vector.clone()
    poisoned = replace(data, mean=torch.full_like(data.mean, torch.nan))
    with pytest.raises(Diverged, match="step 4") as caught:
        next(fit(base, poisoned, spec, last.state))
    assert caught.value.code == "diverged"
    assert last.state.step == 3
    assert torch.equal(last.state.vector, before)


def test_an_absurd_rate_diverges_and_is_caught(base: Base, data: TrainingData):
    spec = replace(make_spec(base, steps=60), learning_rate=1e30)
    with pytest.raises(Diverged):
        run(base, data, spec)


def test_the_adapter_is_the_average_and_says_where_it_comes_from(base: Base, data: TrainingData):
    spec = make_spec(base)
    state = run(base, data, spec)
    adapter = finish(state, base, spec, data, {"val_loss": 0.5})
    layout = base.layout()
    assert torch.equal(adapter.theta, state.average[: layout.size])
    assert torch.equal(adapter.class_delta.flatten(), state.average[layout.size :])
    assert (adapter.classes, adapter.base_fingerprint) == (data.classes, base.fingerprint)
    assert adapter.meta["training"] == spec.to_json()
    assert (adapter.meta["step"], adapter.meta["licence"]) == (12, "cc0-1.0")
    assert not torch.equal(state.average, state.vector)


def test_validation_is_comparable_over_steps(base: Base, data: TrainingData):
    spec = make_spec(base)
    state = start(base, data, spec)
    first = validation_loss(base, data, spec, state)
    state.step = 9
    assert validation_loss(base, data, spec, state) == first
    nothing_held = replace(data, held_out=torch.zeros(0, dtype=torch.long))
    assert validation_loss(base, nothing_held, spec, state) is None


@pytest.mark.parametrize(
    "options",
    [{"flip": True}, {"min_snr_gamma": 5.0}, {"time_shift": 2.0}, {"layout": "bitfit"}, {"class_start": "best"}],
)
def test_options_change_the_result(base: Base, options: dict[str, Any]):
    specs = make_spec(base), make_spec(base, **options)
    vectors = [run(base, make_data(base, flip=spec.flip), spec).average for spec in specs]
    assert len(vectors[0]) != len(vectors[1]) or not torch.equal(*vectors)


def co_train(
    base: Base, jobs: list[tuple[TrainingData, TrainSpec]], steps: int, compiled: bool = False
) -> list[TrainState | None]:
    """All jobs in one pass a step; a job that diverges leaves."""
    trainees = [
        Trainee(base, data, spec, start(base, data, spec), numeric_path(base, spec, compiled=compiled))
        for data, spec in jobs
    ]
    ended: dict[int, TrainState | None] = {}
    active = dict(enumerate(trainees))
    for _ in range(steps):
        results = advance(base, list(active.values()))
        for number, result in zip(list(active), results, strict=True):
            if isinstance(result, Diverged):
                ended[number] = None
                del active[number]
    return [ended.get(number, trainee.state) for number, trainee in enumerate(trainees)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_job_is_bit_equal_whoever_shares_its_passes(latent_folder: Path, dtype: torch.dtype):
    base = load_base(latent_folder, dtype=dtype)
    data = make_data(base)
    jobs = [
        (data, make_spec(base, batch_size=4)),
        (make_data(base, per_class=5, seed=9), make_spec(base, batch_size=6, seed=5, learning_rate=0.003)),
        (data, make_spec(base, batch_size=3, seed=6, min_snr_gamma=5.0)),
    ]
    for state, (own, spec) in zip(co_train(base, jobs, 12), jobs, strict=True):
        assert state is not None
        assert torch.equal(state.vector, run(base, own, spec).vector)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_it_is_on_the_shipped_base_for_jobs_of_one_row_and_of_many(dtype: torch.dtype, compiled: bool):
    """Its feed-forward's products are of those whose kernel, in bfloat16, follows the number of rows."""
    base = load_base(PACKAGED_BASE, dtype=dtype)
    data = make_data(base)
    jobs = [(data, make_spec(base, batch_size=rows, seed=rows)) for rows in (1, 2, 5, 8)]
    for state, (own, spec) in zip(co_train(base, jobs, 3, compiled), jobs, strict=True):
        assert state is not None
        [*_, alone] = islice(fit(base, own, spec, path=numeric_path(base, spec, compiled=compiled)), 3)
        assert torch.equal(state.vector, alone.state.vector)


def test_a_compiled_job_of_as_many_rows_as_tokens_has_its_bits_in_company(base: Base, data: TrainingData):
    """torch would take two sizes that happen to be equal for one, and compile another function for them."""
    rows = (base.sample_size // base.config["patch_size"]) ** 2
    jobs = [(data, make_spec(base, batch_size=size, seed=size)) for size in (rows, 3)]
    for state, (own, spec) in zip(co_train(base, jobs, 2, compiled=True), jobs, strict=True):
        assert state is not None
        [*_, alone] = islice(fit(base, own, spec, path=numeric_path(base, spec, compiled=True)), 2)
        assert torch.equal(state.vector, alone.state.vector)


def test_a_compiled_job_has_the_same_bits_whatever_was_compiled_before(tmp_path: Path):
    """torch would take what it compiled for another base, with other sizes in mind, and sum in another order."""
    tiny = load_base(make_pipeline(tmp_path / "tiny-dit", classes=4), dtype=torch.bfloat16)
    _compiled_digest(tiny)
    script = f"from {__name__} import _compiled_digest as d; print(d())"
    afresh = {**os.environ, "TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    elsewhere = subprocess.run([sys.executable, "-c", script], env=afresh, check=True, capture_output=True, text=True)
    assert elsewhere.stdout.split()[-1] == _compiled_digest()


def _compiled_digest(base: Base | None = None) -> str:
    """Of a compiled job in bfloat16, of the shipped base where none is given, after two steps."""
    torch.set_num_threads(1)
    base = base or load_base(PACKAGED_BASE, dtype=torch.bfloat16)
    spec = make_spec(base, batch_size=2)
    [*_, last] = islice(fit(base, make_data(base), spec, path=numeric_path(base, spec, compiled=True)), 2)
    return hashlib.sha256(last.state.vector.numpy().tobytes()).hexdigest()


def test_jobs_that_are_compiled_and_jobs_that_are_not_do_not_share_a_pass(base: Base, data: TrainingData):
    spec = make_spec(base)
    first, second, third = (
        Trainee(base, data, spec, start(base, data, spec), numeric_path(base, spec, compiled=compiled))
        for compiled in (True, True, False)
    )
    assert first.may_share(second)
    assert not first.may_share(third)


def test_a_shift_draws_noisy_times_more_often(base: Base, data: TrainingData):
    def times(shift: float) -> Tensor:
        spec = make_spec(base, batch_size=100, time_shift=shift)
        return Trainee(base, data, spec, start(base, data, spec)).draw().t / len(base.schedule)

    uniform, shifted = times(1.0), times(3.0)
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    assert float((shifted > 0.5).double().mean()) == pytest.approx(0.75, abs=0.02)  # u > 1/4
    torch.testing.assert_close(shifted, 3 * uniform / (1 + 2 * uniform), rtol=0, atol=3 / len(base.schedule))


def test_micro_batches_give_the_gradient_of_the_whole_batch(base: Base, data: TrainingData):
    spec = make_spec(base, batch_size=10)
    [whole] = islice(fit(base, data, spec), 1)
    [cut] = islice(fit(base, data, spec, path=replace(numeric_path(base, spec), micro_batch=4)), 1)
    torch.testing.assert_close(cut.state.first, whole.state.first, rtol=1e-4, atol=1e-6)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)


def test_the_fused_path_is_for_one_job(base: Base, data: TrainingData):
    spec = make_spec(base)
    path = numeric_path(base, spec, "fused")
    trainees = [Trainee(base, data, spec, start(base, data, spec), path) for _ in range(2)]
    with pytest.raises(Invalid, match="fused"):
        advance(base, trainees)


def test_jobs_of_two_image_sizes_do_not_share_a_pass(base: Base, data: TrainingData):
    jobs = [(data, make_spec(base)), (make_data(base, side=16), make_spec(base, image_size=16))]
    with pytest.raises(Invalid, match="one image size"):
        co_train(base, jobs, 1)


def test_it_learns_above_the_bases_size_and_says_so(base: Base):
    data, spec = make_data(base, side=16), make_spec(base, steps=60, batch_size=8, learning_rate=0.01, image_size=16)
    assert data.mean.shape == (24, 1, 3, 16, 16)
    before = validation_loss(base, data, spec, start(base, data, spec))
    state = run(base, data, spec)
    after = validation_loss(base, data, spec, state)
    assert before is not None
    assert after is not None
    assert after < 0.9 * before
    kept = adapter_format.load(adapter_format.save(finish(state, base, spec, data)))
    assert kept.meta["image_size"] == kept.meta["training"]["image_size"] == 16
    assert kept.layout == base.layout()  # no new parameters


def test_a_poisoned_job_fails_alone(base: Base, data: TrainingData):
    poisoned = replace(data, mean=torch.full_like(data.mean, torch.nan))
    spec = make_spec(base)
    clean, failed = co_train(base, [(data, spec), (poisoned, replace(spec, seed=3))], 12)
    assert failed is None
    assert clean is not None
    assert torch.isfinite(clean.vector).all()
    assert torch.equal(clean.vector, run(base, data, spec).vector)


def test_a_class_of_the_base_is_found_again(base: Base):
    """Latents that the base's own class 2 predicts best start from class 2."""
    x0 = torch.zeros(16, 3, 8, 8)
    labels = torch.zeros(16, dtype=torch.long)

    class Loud(type(base)):
        def forward(self, x: Any, t: Any, rows: Any, c_rows: Any, layout: Any = None) -> Any:
            right = (c_rows == self.class_table[2]).all(1).view(-1, 1, 1, 1)
            noise = self.schedule.noise[t.long()].view(-1, 1, 1, 1)
            return torch.where(right, x / noise, torch.zeros_like(x))

    loud = object.__new__(Loud)
    loud.__dict__.update(base.__dict__)
    assert choose_class_start(loud, x0, labels, 2) == (2, None)


def test_images_reach_the_trainer_as_they_are(base: Base, data: TrainingData):
    draw = Trainee(base, data, make_spec(base), start(base, data, make_spec(base))).draw()
    assert np.isin(draw.x0.numpy(), data.mean.numpy()).all()
    assert draw.t.tolist() == sorted(draw.t.tolist())

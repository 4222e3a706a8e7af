"""What rows cost, and micro-batches that fit: by measure, by trial, and where an allocation really fails."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from core.diffusion.base import Base
from core.training import checkpoint
from core.training.data import TrainingData
from core.training.loop import fit
from core.training.machine import numeric_path
from core.training.memory import OutOfMemory, fit_micro_batch, free_bytes, row_bytes
from tests.diffusion.tiny import make_pipeline
from tests.training.jobs import make_data, make_spec

ROOM = 2**60


@pytest.fixture(scope="module")
def data(base: Base) -> TrainingData:
    return make_data(base)


@pytest.fixture
def limit(base: Base, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """At most so many rows go through the base at a time; more raise what torch raises."""
    allowed = [10_000]
    real = base.forward

    def forward(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if len(x) > allowed[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(x, *args, **options)

    monkeypatch.setattr(base, "forward", forward)
    return allowed


def test_a_row_costs_what_it_keeps_and_more_tokens_cost_more(base: Base, data: TrainingData, tmp_path: Any) -> None:
    from core.diffusion.families import load_base

    cost = row_bytes(base, data, make_spec(base))
    hidden, tokens, layers = base.hidden, (base.sample_size // 2) ** 2, base.summary.layers
    assert 8 * tokens * hidden * 4 * layers < cost < 100 * tokens * hidden * 4 * layers
    deep = load_base(make_pipeline(tmp_path / "deep", vae=False, layers=8))
    ratio = row_bytes(deep, make_data(deep), make_spec(deep)) / cost
    assert 1.8 < ratio < 2.1
    assert row_bytes(base, data, make_spec(base, batch_size=64)) == cost


def test_a_batch_is_halved_until_it_fits(base: Base, data: TrainingData, limit: list[int]) -> None:
    spec = make_spec(base, batch_size=100)
    assert fit_micro_batch(base, data, spec, cost=1, room=ROOM) == 100
    assert fit_micro_batch(base, data, spec, cost=10, room=300) == 25
    assert fit_micro_batch(base, data, spec, cost=1000, room=1) == 1
    limit[0] = 30
    assert fit_micro_batch(base, data, spec, cost=1, room=ROOM) == 25
    assert fit_micro_batch(base, data, spec, cost=10, room=70) == 7
    limit[0] = 0
    with pytest.raises(OutOfMemory, match="one row"):
        fit_micro_batch(base, data, spec, cost=1, room=ROOM)


def test_trying_leaves_nothing_behind(base: Base, data: TrainingData) -> None:
    spec = make_spec(base)
    [wanted] = islice(fit(base, data, spec), 1)
    fit_micro_batch(base, data, spec, cost=1, room=ROOM)
    [after] = islice(fit(base, data, spec), 1)
    assert torch.equal(after.state.vector, wanted.state.vector)


def test_a_checkpoint_serves_a_smaller_micro_batch_and_no_larger_one(base: Base, data: TrainingData) -> None:
    spec = make_spec(base, batch_size=8)
    path = replace(numeric_path(base, spec), micro_batch=4)
    [progress] = islice(fit(base, data, spec, path=path), 1)
    saved = checkpoint.dump(progress.state, spec.digest, data.digest, path)
    assert checkpoint.load(saved, spec.digest, data.digest, replace(path, micro_batch=2)).step == 1
    with pytest.raises(checkpoint.CheckpointMismatch, match="micro_batch 4, this run 8"):
        checkpoint.load(saved, spec.digest, data.digest, replace(path, micro_batch=8))


def test_free_memory_is_some_of_the_machines() -> None:
    assert 0 < free_bytes(torch.device("cpu")) < 2**50


_LIMITED = """
import json, resource, sys, torch
from core.diffusion.families import load_base
from core.training.memory import fit_micro_batch, free_bytes, row_bytes, trial
from core.training.loop import advance
from tests.training.jobs import make_data, make_spec

torch.set_num_threads(1)
base = load_base(sys.argv[1])
data = make_data(base)
spec = make_spec(base, batch_size=256)
cost = row_bytes(base, data, spec)
advance(base, [trial(base, data, spec, 4)])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
room = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
free = free_bytes(base.device)
rows = fit_micro_batch(base, data, spec, cost=1, room=2**60)  # nothing is estimated: allocations fail
sys.stdout.write(json.dumps({"rows": rows, "cost": cost, "free": free}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process")
def test_where_allocations_really_fail_smaller_batches_are_found(tmp_path: Any) -> None:
    folder = make_pipeline(tmp_path / "wide", vae=False, sample_size=32, heads=4, head_dim=16, layers=6)
    room = 400 * 1024**2
    command = [sys.executable, "-c", _LIMITED, str(folder), str(room)]
    ended = subprocess.run(command, capture_output=True, check=False, timeout=200, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["free"] <= room
    assert 256 * found["cost"] > 2 * room  # the whole batch cannot fit
    assert 1 <= found["rows"] < 256

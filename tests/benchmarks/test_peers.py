"""The sides of `benchmarks.serving` do the same work: without its adapter, diffusers' pipeline draws our pictures."""

import numpy as np
import pytest
import torch

from benchmarks.bases import SHIPPED, make_base, make_transformer
from benchmarks.peers import LoraPipeline
from core.diffusion.catalog import read_json
from core.sampling.engine import Engine
from core.sampling.request import SampleRequest
from core.settings import PACKAGED_BASE

LABELS, SEEDS, STEPS, SCALE = [1, 7], [3, 4], 4, 3.0


@pytest.fixture
def own() -> np.ndarray:
    """By the engine, from the bare base."""
    torch.set_num_threads(1)
    base = make_base(SHIPPED)
    engine = Engine(base, base.layout(), slots=2, max_rows=4, load_adapter=lambda _: pytest.fail("no adapter"))
    wanted = zip(SEEDS, LABELS, strict=True)
    futures = [
        engine.submit(SampleRequest(str(seed), "t", seed, label, steps=STEPS, guidance="cfg", guidance_scale=SCALE))
        for seed, label in wanted
    ]
    while engine.has_work:
        engine.step()
        engine.wait(0.01)
    return np.stack([future.result(0).image for future in futures])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own, with numpy 2
def test_diffusers_draws_what_the_engine_draws_until_a_lora_is_swapped_in(own: np.ndarray) -> None:
    scheduler = read_json(PACKAGED_BASE / "scheduler" / "scheduler_config.json")

    def draw(strength: float, adapter: int) -> np.ndarray:
        pipeline = LoraPipeline(make_base(SHIPPED), make_transformer(SHIPPED), scheduler, 2, strength)
        first = pipeline.draw(1 - adapter, LABELS, SEEDS, STEPS, SCALE)
        second = pipeline.draw(adapter, LABELS, SEEDS, STEPS, SCALE)
        assert (strength == 0) == np.array_equal(first, second)  # the swap is seen
        return second

    assert np.abs(draw(0.0, 0).astype(int) - own.astype(int)).max() <= 1
    changed = draw(0.1, 0)
    assert np.abs(changed.astype(int) - own.astype(int)).max() > 20
    assert np.array_equal(draw(0.1, 0), changed)

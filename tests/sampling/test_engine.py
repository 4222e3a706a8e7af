"""The engine: an image depends on its request alone, and everything that goes wrong goes wrong for its own request."""

import time
from concurrent.futures import Future
from dataclasses import replace
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from core.diffusion.adapter import Adapter
from core.diffusion.base import Base
from core.diffusion.guidance import guide
from core.diffusion.solvers import Update, make_plan
from core.errors import Conflict, Invalid, NotFound
from core.sampling.engine import Cancelled, Engine, NotFinite, QueueFull, Sampled
from core.sampling.request import SampleRequest
from tests.diffusion.tiny import make_adapter


class Shelf:
    """Adapters by digest, as a store has them; counts its loads and can be held up."""

    def __init__(self, adapters: dict[str, Adapter]) -> None:
        self.adapters = adapters
        self.loads: list[str] = []
        self.open = Event()
        self.open.set()

    def __call__(self, digest: str) -> Adapter:
        assert self.open.wait(10)
        self.loads.append(digest)
        if digest not in self.adapters:
            raise NotFound(f"adapter {digest}")
        return self.adapters[digest]


def make_shelf(base: Base) -> Shelf:
    layouts = [base.layout(), base.layout("bitfit"), base.layout(gamma_depth="all"), base.layout()]
    return Shelf(
        {
            f"adapter-{number}": make_adapter(base, layout=layout, classes=2 + number, seed=number, strength=0.1)
            for number, layout in enumerate(layouts)
        }
    )


def make_engine(base: Base, shelf: Shelf, **options: Any) -> Engine:
    layout = base.layout(gamma_depth="all", gamma_places=["attention", "mlp", "qkv", "projection"])
    return Engine(base, layout, **{"slots": 6, "max_rows": 16, "load_adapter": shelf, **options})


def run(engine: Engine) -> None:
    deadline = time.monotonic() + 30
    while engine.has_work:
        if not engine.step():
            engine.wait(0.05)
        assert time.monotonic() < deadline


def draw(engine: Engine, *requests: SampleRequest) -> list[Sampled]:
    futures = [engine.submit(request) for request in requests]
    run(engine)
    return [future.result(0) for future in futures]


def make_request(number: int = 0, **fields: Any) -> SampleRequest:
    return SampleRequest(
        **{"id": f"r-{number}", "tenant": "t", "adapter_digest": None, "label": 0, "seed": number, "steps": 4, **fields}
    )


def random_requests(count: int, seed: int = 0, sizes: tuple[int | None, ...] = (None,)) -> list[SampleRequest]:
    random = np.random.default_rng(seed)
    requests = []
    for number in range(count):
        which = int(random.integers(-1, 4))
        classes = 4 if which < 0 else 2 + which
        label = int(random.integers(-1, classes))
        requests.append(
            make_request(
                number,
                tenant=f"t{random.integers(3)}",
                adapter_digest=None if which < 0 else f"adapter-{which}",
                label=None if label < 0 else label,
                steps=int(random.integers(1, 9)),
                solver=["ddim", "dpm++"][random.integers(2)],
                guidance=["none", "cfg", "domain"][random.integers(3)],
                guidance_scale=float(random.uniform(1, 4)),
                guidance_interval=[(0.0, 1.0), (0.3, 0.9)][random.integers(2)],
                adapter_scale=float(random.uniform(0.2, 1.5)),
                size=sizes[random.integers(len(sizes))],
            )
        )
    return requests


def largest_difference(one: list[Sampled], two: list[Sampled]) -> int:
    return max(int(np.abs(a.image.astype(int) - b.image.astype(int)).max()) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("which", ["base", "latent_base"])
def test_a_mixed_batch_equals_each_request_alone(which: str, request: pytest.FixtureRequest):
    base = request.getfixturevalue(which)
    requests = random_requests(24, sizes=(None, 2 * base.image_size) if which == "base" else (None,))
    shelf = make_shelf(base)
    engine = make_engine(base, shelf)
    futures: list[Future[Sampled]] = []
    for item in requests:  # they join while others are under way
        futures.append(engine.submit(item))
        engine.step()
    run(engine)
    mixed = [future.result(0) for future in futures]
    assert max(item.stats.distinct_adapters for item in mixed) > 1
    assert max(item.stats.batch_size for item in mixed) > 4
    alone_engine = make_engine(base, shelf)
    alone = [draw(alone_engine, item)[0] for item in requests]
    assert largest_difference(mixed, alone) <= 1
    others = [draw(alone_engine, replace(item, seed=item.seed + 1000))[0] for item in requests]
    assert largest_difference(mixed, others) > 20  # the negative control: the measure sees a difference


@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
@pytest.mark.parametrize("guidance", ["none", "cfg", "domain"])
def test_an_image_is_what_the_plain_loop_draws(base: Base, solver: Any, guidance: Any):
    shelf = make_shelf(base)
    adapter = shelf.adapters["adapter-0"]
    item = make_request(
        3, adapter_digest="adapter-0", label=1, solver=solver, guidance=guidance, guidance_scale=2.5, steps=6
    )
    [drawn] = draw(make_engine(base, shelf), item)
    layout = base.layout()
    starts = base.class_starts(adapter.start_indices(base.num_classes)) + adapter.class_delta
    x = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(3))[None]
    previous = torch.zeros_like(x)
    plan = make_plan(base.schedule, solver, 6, "trailing")
    with torch.no_grad():
        for step in range(6):
            t = plan.times[step : step + 1]
            out = base.forward(x, t, adapter.theta[None], starts[1:2], layout)
            if guidance != "none":
                null = (adapter.theta[None], starts[-1:]) if guidance == "cfg" else (None, base.class_table[-1:])
                out = guide(out, base.forward(x, t, *null, layout), torch.tensor([2.5]))
            x, previous = Update.of([plan], [step])(x, out, previous)
    assert np.abs(drawn.image.astype(int) - base.decode(x)[0].astype(int)).max() <= 1
    assert drawn.stats.steps == 6
    assert drawn.stats.batch_size == (1 if guidance == "none" else 2)


def test_strength_zero_from_a_base_class_is_the_base(base: Base):
    adapter = make_adapter(base, classes=1, class_start=(2,))
    engine = make_engine(base, Shelf({"a": adapter}))
    tuned, plain = draw(
        engine,
        make_request(1, adapter_digest="a", label=0, adapter_scale=0.0, seed=5, guidance="domain"),
        make_request(2, label=2, seed=5),
    )
    assert np.abs(tuned.image.astype(int) - plain.image.astype(int)).max() <= 1


def test_a_flow_base_draws_with_euler(flow_base: Base):
    engine = make_engine(flow_base, make_shelf(flow_base))
    drawn = draw(engine, make_request(1), make_request(2, adapter_digest="adapter-1", solver="euler"))
    assert drawn[0].image.shape == (8, 8, 3)
    with pytest.raises(Invalid, match="solver ddim"):
        engine.submit(make_request(3, solver="ddim"))


def test_residency_is_told(base: Base):
    shelf = make_shelf(base)
    engine = make_engine(base, shelf, slots=2)  # room for one adapter
    ask = [make_request(number, adapter_digest=f"adapter-{which}") for number, which in enumerate((0, 0, 1, 0))]
    residencies = [draw(engine, item)[0].stats for item in ask]
    assert [stats.adapter_residency for stats in residencies] == ["cold", "hot", "cold", "warm"]
    assert [stats.adapter_load_ms > 0 for stats in residencies] == [True, False, True, True]
    assert shelf.loads == ["adapter-0", "adapter-1"]


def test_host_memory_is_bounded(base: Base):
    shelf = make_shelf(base)
    engine = make_engine(base, shelf, slots=2, host_bytes=1)
    for number, which in enumerate((0, 1, 0, 1)):
        draw(engine, make_request(number, adapter_digest=f"adapter-{which}"))
    assert shelf.loads == ["adapter-0", "adapter-1", "adapter-0", "adapter-1"]


def test_more_adapters_than_slots_all_get_their_turn_and_their_own_pictures(base: Base):
    shelf = make_shelf(base)
    requests = [make_request(n, adapter_digest=f"adapter-{n % 4}", label=n % 2, seed=n % 3) for n in range(24)]
    few, many = make_engine(base, shelf, slots=3, host_bytes=1), make_engine(base, shelf)
    assert largest_difference(draw(few, *requests), draw(many, *requests)) <= 1


def test_a_slot_in_use_is_never_given_away(base: Base):
    shelf = make_shelf(base)
    engine = make_engine(base, shelf, slots=2)
    long = engine.submit(make_request(1, adapter_digest="adapter-0", steps=12))
    other = engine.submit(make_request(2, adapter_digest="adapter-1", steps=2))
    while not long.done():
        if not engine.step():
            engine.wait(0.05)
        assert not other.done()
    run(engine)
    [alone] = draw(make_engine(base, shelf), make_request(1, adapter_digest="adapter-0", steps=12))
    assert largest_difference([long.result(0)], [alone]) <= 1
    assert other.result(0).stats.distinct_adapters == 1


def test_a_failed_load_fails_its_own_requests_alone(base: Base):
    shelf = make_shelf(base)
    engine = make_engine(base, shelf)
    lost = [engine.submit(make_request(n, adapter_digest="lost")) for n in range(2)]
    good = engine.submit(make_request(5, adapter_digest="adapter-0"))
    run(engine)
    for future in lost:
        with pytest.raises(NotFound, match="adapter lost"):
            future.result(0)
    assert good.result(0).image.shape == (8, 8, 3)
    shelf.adapters["lost"] = shelf.adapters["adapter-1"]
    assert draw(engine, make_request(6, adapter_digest="lost"))[0].stats.adapter_residency == "cold"


def test_an_adapter_of_another_base_fails_its_own_requests_alone(base: Base, latent_base: Base):
    shelf = Shelf({"foreign": make_adapter(latent_base), "own": make_adapter(base)})
    engine = make_engine(base, shelf)
    foreign = engine.submit(make_request(1, adapter_digest="foreign"))
    own = engine.submit(make_request(2, adapter_digest="own"))
    run(engine)
    with pytest.raises(Conflict, match="another base"):
        foreign.result(0)
    assert own.result(0).stats.distinct_adapters == 1


def test_a_class_that_the_adapter_lacks_is_refused_and_never_another_adapters_row(base: Base):
    engine = make_engine(base, make_shelf(base))
    wide = engine.submit(make_request(1, adapter_digest="adapter-3", label=4))
    narrow = engine.submit(make_request(2, adapter_digest="adapter-0", label=4))
    run(engine)
    assert wide.result(0)
    with pytest.raises(Invalid) as caught:
        narrow.result(0)
    assert (caught.value.code, caught.value.pointer) == ("unknown_class", "/label")
    with pytest.raises(Invalid, match="the base has 4 classes"):
        engine.submit(make_request(3, label=4))


def test_a_slow_load_holds_nobody_up(base: Base):
    shelf = make_shelf(base)
    engine = make_engine(base, shelf)
    shelf.open.clear()
    slow = engine.submit(make_request(1, adapter_digest="adapter-0"))
    quick = engine.submit(make_request(2))
    while not quick.done():
        assert engine.step() == 1
    assert not slow.done()
    assert engine.step() == 0
    shelf.open.set()
    run(engine)
    assert slow.result(0).stats.queue_ms > quick.result(0).stats.queue_ms


def test_a_cancelled_request_frees_its_rows_at_the_next_step(base: Base):
    shelf = make_shelf(base)
    engine = make_engine(base, shelf, max_rows=2)
    running = engine.submit(make_request(1, steps=50, adapter_digest="adapter-0", guidance_scale=3.0))
    waiting = engine.submit(make_request(2, guidance_scale=3.0))
    dropped = engine.submit(make_request(3, guidance_scale=3.0))
    while not engine.step():
        engine.wait(0.05)
    assert engine.cancel("r-1")
    assert dropped.cancel()
    run(engine)
    with pytest.raises(Cancelled):
        running.result(0)
    assert waiting.result(0).stats.steps == 4
    assert not engine.cancel("r-1")
    assert not engine.has_work


def test_an_image_that_is_not_finite_is_an_error(base: Base):
    adapter = make_adapter(base)
    adapter.theta.fill_(1e30)
    engine = make_engine(base, Shelf({"wild": adapter}))
    wild, calm = (engine.submit(make_request(n, adapter_digest=digest)) for n, digest in enumerate(("wild", None)))
    run(engine)
    with pytest.raises(NotFinite):
        wild.result(0)
    [alone] = draw(make_engine(base, make_shelf(base)), make_request(1))
    assert largest_difference([calm.result(0)], [alone]) <= 1


def test_the_queue_is_bounded_and_ids_are_unique(base: Base):
    engine = make_engine(base, make_shelf(base), max_waiting=2)
    engine.submit(make_request(1))
    with pytest.raises(Conflict, match="under way"):
        engine.submit(make_request(1))
    engine.submit(make_request(2))
    with pytest.raises(QueueFull):
        engine.submit(make_request(3))
    run(engine)
    assert draw(engine, make_request(3))[0].stats.steps == 4


def test_closing_answers_everyone(base: Base):
    engine = make_engine(base, make_shelf(base))
    futures = [engine.submit(make_request(n, steps=50)) for n in range(3)]
    engine.step()
    futures.append(engine.submit(make_request(9)))
    engine.close()
    for future in futures:
        with pytest.raises(Cancelled):
            future.result(0)
    with pytest.raises(QueueFull, match="closed"):
        engine.submit(make_request(10))
    assert engine.step() == 0


def test_sizes_that_the_base_cannot_take_are_refused(base: Base):
    engine = make_engine(base, make_shelf(base))
    assert draw(engine, make_request(1, size=16))[0].image.shape == (16, 16, 3)
    for size in (9, 18):
        with pytest.raises(Invalid, match="multiple of 2 up to 16"):
            engine.submit(make_request(2, size=size))


def test_the_base_is_untouched_by_churn(base: Base):
    shelf = make_shelf(base)
    engine = make_engine(base, shelf, slots=3)
    weights = {name: value.clone() for name, value in base.network.state_dict().items()}
    reference = draw(engine, make_request(0))
    draw(engine, *random_requests(20, seed=3))
    assert largest_difference(draw(engine, make_request(0)), reference) == 0
    assert all(torch.equal(value, weights[name]) for name, value in base.network.state_dict().items())

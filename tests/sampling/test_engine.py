"""The engine: an image depends on its request alone, and everything that goes wrong goes wrong for its own request."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from core.diffusion.base import Base
from core.diffusion.guidance import guide
from core.diffusion.solvers import Plan, Update, make_plan
from core.errors import Conflict, Invalid
from core.sampling.engine import Cancelled, DeadlineExceeded, NotFinite, QueueFull
from core.sampling.request import AdapterPart, SampleRequest
from core.sampling.row import Sampled
from tests.diffusion.tiny import make_adapter
from tests.sampling.engines import Shelf, draw, largest_difference, make_engine, make_request, make_shelf, run

Branch = tuple[torch.Tensor | None, torch.Tensor]
"""A vector (P,), None for the base, and a class row (H,)."""


def plain_picture(
    base: Base, plan: Plan, seed: int, branches: Sequence[Branch], scale: float | None = None
) -> np.ndarray:
    """(s, s, 3) int, by one pass after the other; a second branch is what the first is guided away from."""
    side = base.sample_size
    x = torch.randn(base.channels, side, side, generator=torch.Generator().manual_seed(seed))[None]
    previous = torch.zeros_like(x)
    with torch.no_grad():
        for step in range(len(plan)):
            t = plan.times[step : step + 1]
            outs = [
                base.forward(x, t, None if theta is None else theta[None], c_row[None]) for theta, c_row in branches
            ]
            out = outs[0] if len(outs) == 1 else guide(*outs, torch.tensor([scale]))
            x, previous = Update.of([plan], [step])(x, out, previous)
    return base.decode(x)[0].astype(int)


def random_requests(count: int, seed: int = 0, sizes: tuple[int | None, ...] = (None,)) -> list[SampleRequest]:
    """Of the base, of adapters and of mixes of them, with and without a class, everything else at random."""
    random = np.random.default_rng(seed)
    requests = []
    for number in range(count):
        chosen = random.choice(4, size=random.integers(4), replace=False).tolist()
        classes = min((2 + which for which in chosen), default=4)
        label = int(random.integers(-1, classes))
        wanted = None if label < 0 else label
        parts = tuple(AdapterPart(f"adapter-{which}", float(random.uniform(-0.5, 1.5)), wanted) for which in chosen)
        requests.append(
            make_request(
                number,
                adapters=parts,
                label=wanted,
                tenant=f"t{random.integers(3)}",
                steps=int(random.integers(1, 9)),
                solver=["ddim", "dpm++"][random.integers(2)],
                guidance=["none", "cfg", "domain"][random.integers(3)],
                guidance_scale=float(random.uniform(1, 4)),
                guidance_interval=[(0.0, 1.0), (0.3, 0.9)][random.integers(2)],
                size=sizes[random.integers(len(sizes))],
            )
        )
    return requests


@pytest.mark.parametrize(
    ("which", "count", "buckets"),
    [
        ("base", 200, ()),
        ("base", 200, (4, 8, 16)),
        ("latent_base", 24, ()),
        ("latent_base", 24, (4, 8, 16)),
        ("shipped_base", 40, ()),
    ],
)
def test_a_mixed_batch_equals_each_request_alone(
    which: str, count: int, buckets: tuple[int, ...], request: pytest.FixtureRequest
):
    base = request.getfixturevalue(which)
    requests = random_requests(count, sizes=(None, 2 * base.image_size) if which == "base" else (None,))
    shelf = make_shelf(base)
    engine = make_engine(base, shelf, buckets=buckets)
    arrivals = np.random.default_rng(1).integers(0, 3, count)
    futures: list[Future[Sampled]] = []
    for item, steps in zip(requests, arrivals, strict=True):  # they join while others are under way
        futures.append(engine.submit(item))
        for _ in range(steps):
            engine.step()
    run(engine)
    mixed = [future.result(0) for future in futures]
    assert max(item.stats.distinct_adapters for item in mixed) > 2
    assert max(item.stats.batch_size for item in mixed) >= 8
    alone_engine = make_engine(base, shelf)
    alone = [draw(alone_engine, item)[0] for item in requests]
    assert largest_difference(mixed, alone) <= 1
    others = [draw(alone_engine, replace(item, seed=item.seed + 1000))[0] for item in requests]
    assert largest_difference(mixed, others) > 20  # the negative control: the measure sees a difference
    if buckets:
        return
    # And another: a row that takes its neighbour's adapters is seen.
    neighbours = [requests[number - 1] for number in range(count)]
    swapped = [replace(a, adapters=b.adapters, label=b.label) for a, b in zip(requests, neighbours, strict=True)]
    assert largest_difference(mixed, [draw(alone_engine, item)[0] for item in swapped]) > 20


def test_a_mix_is_the_sum_of_its_weighted_adapters(base: Base):
    """Vectors and class differences add up; the start row is the adapters' mean by weight."""
    one = make_adapter(base, classes=2, class_start=(1, 3), seed=1, strength=0.1)
    two = make_adapter(base, classes=3, class_start=(0, 2, None), seed=2, strength=0.1)
    parts = (AdapterPart("one", 0.5, 1), AdapterPart("two", 1.5, 0))
    [mixed] = draw(make_engine(base, Shelf({"one": one, "two": two})), make_request(3, adapters=parts, guidance="none"))
    theta = 0.5 * one.theta + 1.5 * two.theta
    starts = base.class_starts(torch.tensor([3, 0]))
    c_row = 0.25 * starts[0] + 0.75 * starts[1] + 0.5 * one.class_delta[1] + 1.5 * two.class_delta[0]
    plain = plain_picture(base, make_plan(base.schedule, "dpm++", 4, "trailing"), 3, [(theta, c_row)])
    assert np.abs(mixed.image.astype(int) - plain).max() <= 1
    assert mixed.stats.distinct_adapters == 2


def test_a_mix_of_one_adapter_twice_is_that_adapter(base: Base):
    shelf = make_shelf(base)
    halves = make_request(1, adapters=(AdapterPart("adapter-0", 0.5, 1), AdapterPart("adapter-0", 0.5, 1)))
    twice, once = draw(make_engine(base, shelf), halves, make_request(2, adapter="adapter-0", label=1, seed=1))
    assert largest_difference([twice], [once]) <= 1


def test_a_request_that_is_late_frees_its_rows_and_says_so(base: Base):
    shelf = make_shelf(base)
    engine = make_engine(base, shelf, max_rows=2)
    running = engine.submit(make_request(1, steps=200, guidance_scale=3.0, timeout=0.05))
    waiting = engine.submit(make_request(2, steps=200, guidance_scale=3.0, timeout=0.05))
    patient = engine.submit(make_request(3, guidance_scale=3.0, timeout=60.0))
    run(engine)
    for future in (running, waiting):
        with pytest.raises(DeadlineExceeded, match=r"not done within 0\.05 s"):
            future.result(0)
    assert patient.result(0).stats.steps == 4


def test_who_sends_little_waits_little_beside_a_flood(base: Base):
    """One tenant sends 500 at once, nine send 5 each: in steps, the nine wait at most twice what they wait alone."""

    def waits(flood: int) -> np.ndarray:
        """Of each of the nine, on average over what it sends."""
        engine = make_engine(base, make_shelf(base), max_rows=8)
        done: dict[str, int] = {}
        steps = 0

        def submit(tenant: str, count: int) -> None:
            for number in range(count):
                item = make_request(0, id=f"{tenant}/{number}", tenant=tenant, guidance="none")
                engine.submit(item).add_done_callback(lambda _, name=item.id: done.setdefault(name, steps))

        submit("flood", flood)
        for tenant in range(9):
            submit(f"small-{tenant}", 5)
        while any(f"small-{tenant}/4" not in done for tenant in range(9)):
            assert engine.step()
            engine._decoder._pool.submit(int).result(10)  # what this step finished is answered
            steps += 1
        engine.close()
        return np.array([[done[f"small-{tenant}/{number}"] for number in range(5)] for tenant in range(9)]).mean(1)

    alone, beside = waits(0), waits(500)
    assert beside.mean() <= 2 * alone.mean()
    assert (beside <= 2 * alone + 4).all()  # the flood came first, and pictures under way (4 steps) go on


@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
@pytest.mark.parametrize("guidance", ["none", "cfg", "domain"])
def test_an_image_is_what_the_plain_loop_draws(base: Base, solver: Any, guidance: Any):
    shelf = make_shelf(base)
    adapter = shelf.adapters["adapter-0"]
    item = make_request(3, adapter="adapter-0", label=1, solver=solver, guidance=guidance, guidance_scale=2.5, steps=6)
    [drawn] = draw(make_engine(base, shelf), item)
    starts = base.class_starts(base.start_indices(adapter.classes, adapter.class_start)) + adapter.class_delta
    branches: list[Branch] = [(adapter.theta, starts[1])]
    if guidance != "none":
        branches.append((adapter.theta, starts[-1]) if guidance == "cfg" else (None, base.class_table[-1]))
    plain = plain_picture(base, make_plan(base.schedule, solver, 6, "trailing"), 3, branches, scale=2.5)
    assert np.abs(drawn.image.astype(int) - plain).max() <= 1
    assert drawn.stats.steps == 6
    assert drawn.stats.batch_size == (1 if guidance == "none" else 2)


def test_strength_zero_from_a_base_class_is_the_base(base: Base):
    adapter = make_adapter(base, classes=1, class_start=(2,))
    engine = make_engine(base, Shelf({"a": adapter}))
    tuned, plain = draw(
        engine,
        make_request(1, adapter="a", label=0, weight=0.0, seed=5, guidance="domain"),
        make_request(2, label=2, seed=5),
    )
    assert np.abs(tuned.image.astype(int) - plain.image.astype(int)).max() <= 1


def test_a_flow_base_draws_with_euler(flow_base: Base):
    engine = make_engine(flow_base, make_shelf(flow_base))
    drawn = draw(engine, make_request(1), make_request(2, adapter="adapter-1", solver="euler"))
    assert drawn[0].image.shape == (8, 8, 3)
    with pytest.raises(Invalid, match="solver ddim"):
        engine.submit(make_request(3, solver="ddim"))


def test_a_class_that_the_adapter_lacks_is_refused_and_never_another_adapters_row(base: Base):
    engine = make_engine(base, make_shelf(base))
    wide = engine.submit(make_request(1, adapter="adapter-3", label=4))
    narrow = engine.submit(make_request(2, adapter="adapter-0", label=4))
    run(engine)
    assert wide.result(0)
    with pytest.raises(Invalid) as caught:
        narrow.result(0)
    assert (caught.value.code, caught.value.pointer) == ("unknown_class", "/label")
    with pytest.raises(Invalid, match="the base has 4 classes"):
        engine.submit(make_request(3, label=4))


def test_a_start_that_fails_holds_no_slot(base: Base, monkeypatch: pytest.MonkeyPatch):
    engine = make_engine(base, make_shelf(base), slots=2)  # room for one adapter
    failed = engine.submit(make_request(1, adapter="adapter-0"))

    def full(_: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros_like", full)
        run(engine)
    with pytest.raises(MemoryError):
        failed.result(0)
    assert draw(engine, make_request(2, adapter="adapter-1"))[0].stats.steps == 4


def test_a_cancelled_request_frees_its_rows_at_the_next_step(base: Base):
    shelf = make_shelf(base)
    engine = make_engine(base, shelf, max_rows=2)
    running = engine.submit(make_request(1, steps=50, adapter="adapter-0", guidance_scale=3.0))
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
    wild, calm = (engine.submit(make_request(n, adapter=digest)) for n, digest in enumerate(("wild", None)))
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
    engine = make_engine(base, shelf, slots=4)
    weights = {name: value.clone() for name, value in base.network.state_dict().items()}
    reference = draw(engine, make_request(0))
    draw(engine, *random_requests(20, seed=3))
    assert largest_difference(draw(engine, make_request(0)), reference) == 0
    assert all(torch.equal(value, weights[name]) for name, value in base.network.state_dict().items())


@pytest.mark.parametrize(("images", "rows"), [(1, 2), (3, 4), (4, 4), (8, 8), (20, 16)])
def test_few_rows_grow_with_the_queue(base: Base, images: int, rows: int):
    """Guided images take two rows each; half of what there is to do runs, within [few_rows, max_rows]."""
    engine = make_engine(base, make_shelf(base), max_rows=16, few_rows=4)
    futures = [
        engine.submit(make_request(number, adapter="adapter-0", label=0, guidance="cfg")) for number in range(images)
    ]
    run(engine)
    assert max(future.result().stats.batch_size for future in futures) == rows
    engine.close()


def test_a_pass_that_memory_has_no_room_for_is_halved_and_fails_nobody(base: Base, monkeypatch: pytest.MonkeyPatch):
    requests = [make_request(number, adapter="adapter-0", steps=4) for number in range(8)]
    engine = make_engine(base, make_shelf(base))
    wanted = draw(engine, *requests)
    real, rows = type(base).draw, []

    def draw_few(base: Base, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(x))
        if len(x) > 4:
            raise MemoryError
        return real(base, x, *rest)

    monkeypatch.setattr(type(base), "draw", draw_few)
    assert largest_difference(draw(engine, *requests), wanted) <= 1
    assert rows == [16, 8] + [4] * 16  # guided images take two rows each
    assert largest_difference(draw(engine, *requests), wanted) <= 1
    assert rows.count(16) == 2, "who was idle meanwhile tries anew"
    engine.close()


def test_an_image_that_memory_has_no_room_for_fails_and_the_next_is_drawn(base: Base, monkeypatch: pytest.MonkeyPatch):
    engine = make_engine(base, make_shelf(base))
    with monkeypatch.context() as patched:
        patched.setattr(type(base), "draw", lambda *_: (_ for _ in ()).throw(MemoryError()))
        futures = [engine.submit(make_request(number)) for number in range(2)]
        run(engine)
    assert [type(future.exception()) for future in futures] == [MemoryError] * 2
    assert len(draw(engine, make_request(2))) == 1
    engine.close()

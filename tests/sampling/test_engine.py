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
from core.sampling.engine import Cancelled, DeadlineExceeded, Engine, NotFinite, QueueFull, Sampled
from core.sampling.request import AdapterPart, SampleRequest
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


def make_request(
    number: int = 0,
    adapter: str | None = None,
    label: int | None = 0,
    weight: float = 1.0,
    adapters: tuple[AdapterPart, ...] = (),
    **fields: Any,
) -> SampleRequest:
    """Of the base, of one adapter, or of several."""
    parts = (AdapterPart(adapter, weight, label),) if adapter else adapters
    given = {"id": f"r-{number}", "tenant": "t", "seed": number, "steps": 4, **fields}
    return SampleRequest(**given, label=None if parts else label, adapters=parts)


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


def largest_difference(one: list[Sampled], two: list[Sampled]) -> int:
    return max(int(np.abs(a.image.astype(int) - b.image.astype(int)).max()) for a, b in zip(one, two, strict=True))


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
    layout = base.layout()
    theta = 0.5 * one.theta + 1.5 * two.theta
    starts = base.class_starts(torch.tensor([3, 0]))
    c_row = 0.25 * starts[0] + 0.75 * starts[1] + 0.5 * one.class_delta[1] + 1.5 * two.class_delta[0]
    x = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(3))[None]
    previous = torch.zeros_like(x)
    plan = make_plan(base.schedule, "dpm++", 4, "trailing")
    with torch.no_grad():
        for step in range(4):
            out = base.forward(x, plan.times[step : step + 1], theta[None], c_row[None], layout)
            x, previous = Update.of([plan], [step])(x, out, previous)
    assert np.abs(mixed.image.astype(int) - base.decode(x)[0].astype(int)).max() <= 1
    assert mixed.stats.distinct_adapters == 2


def test_a_mix_of_one_adapter_twice_is_that_adapter(base: Base):
    shelf = make_shelf(base)
    halves = make_request(1, adapters=(AdapterPart("adapter-0", 0.5, 1), AdapterPart("adapter-0", 0.5, 1)))
    twice, once = draw(make_engine(base, shelf), halves, make_request(2, adapter="adapter-0", label=1, seed=1))
    assert largest_difference([twice], [once]) <= 1


def test_mixes_take_turns_where_slots_are_few(base: Base):
    """Each needs two of three slots at once: nobody holds one and waits for another."""
    shelf = make_shelf(base)
    parts = [tuple(AdapterPart(f"adapter-{(n + k) % 4}", 0.7, 0) for k in range(2)) for n in range(8)]
    requests = [make_request(number, adapters=mix) for number, mix in enumerate(parts)]
    few, many = make_engine(base, shelf, slots=4, host_bytes=1), make_engine(base, shelf)
    assert largest_difference(draw(few, *requests), draw(many, *requests)) <= 1
    with pytest.raises(Invalid, match="holds 1 adapters at once"):
        make_engine(base, shelf, slots=2).submit(requests[0])


def test_one_adapter_of_a_mix_that_cannot_be_had_fails_the_mix_alone(base: Base, latent_base: Base):
    shelf = make_shelf(base)
    shelf.adapters["foreign"] = make_adapter(latent_base)
    engine = make_engine(base, shelf, slots=3)
    for bad, error in (("lost", NotFound), ("foreign", Conflict)):
        mix = engine.submit(make_request(1, adapters=(AdapterPart("adapter-0"), AdapterPart(bad)), label=None))
        good = engine.submit(make_request(2, adapter="adapter-0"))
        run(engine)
        with pytest.raises(error):
            mix.result(0)
        assert good.result(0).stats.distinct_adapters == 1
    # Every slot is free again: two others fit at once.
    drawn = draw(engine, make_request(3, adapters=(AdapterPart("adapter-1"), AdapterPart("adapter-2")), label=None))
    assert drawn[0].stats.distinct_adapters == 2


def test_a_slot_keeps_nothing_of_who_was_there_before(base: Base):
    """Fewer classes and a smaller layout after more and a larger one, in the only slot."""
    wide = base.layout(gamma_depth="all", gamma_places=["attention", "mlp", "qkv", "projection"])
    shelf = Shelf(
        {
            "large": make_adapter(base, layout=wide, classes=12, seed=1, strength=0.5),
            "small": make_adapter(base, layout=base.layout("bitfit"), classes=2, seed=2, strength=0.1),
        }
    )
    used, fresh = make_engine(base, shelf, slots=2), make_engine(base, shelf, slots=2)
    draw(used, *(make_request(number, adapter="large", label=number % 12) for number in range(4)))
    asked = [make_request(10 + number, adapter="small", label=number % 2, guidance_scale=3.0) for number in range(4)]
    after, clean = draw(used, *asked), draw(fresh, *asked)
    assert largest_difference(after, clean) == 0
    left = used.bank.theta[1].clone()
    assert torch.equal(left, fresh.bank.theta[1])
    used.bank.theta[1] = wide.embed(wide, shelf.adapters["large"].theta)  # the control: what was left would be seen
    used.bank.version += 1
    assert largest_difference(draw(used, *asked), clean) > 5
    with pytest.raises(Invalid, match="the adapter has 2 classes"):
        draw(used, make_request(20, adapter="small", label=7))


def test_previews_show_what_is_expected_and_come_before_the_picture(base: Base):
    engine = make_engine(base, make_shelf(base))
    shown: list[tuple[int, np.ndarray]] = []
    item = make_request(1, adapter="adapter-0", steps=8, previews=(2, 7, 8))
    future = engine.submit(item, lambda step, image: shown.append((step, image)))
    run(engine)
    final = future.result(0).image.astype(int)
    assert [step for step, _ in shown] == [2, 7]  # the picture itself is the eighth
    early, late = (np.abs(image.astype(int) - final).mean() for _, image in shown)
    assert late < early
    [plain] = draw(engine, replace(item, id="r-2", previews=()))
    assert largest_difference([plain], [future.result(0)]) == 0


def test_a_preview_that_its_caller_cannot_take_harms_nobody(base: Base):
    engine = make_engine(base, make_shelf(base))

    def broken(step: int, image: np.ndarray) -> None:
        raise OSError("gone")

    future = engine.submit(make_request(1, previews=(1, 2)), broken)
    other = engine.submit(make_request(2))
    run(engine)
    assert future.result(0).stats.steps == other.result(0).stats.steps == 4


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


def test_decoding_holds_no_step_up(base: Base):
    """While a picture is being decoded the others go on."""
    engine = make_engine(base, make_shelf(base))
    held, begun = Event(), Event()
    decode = base.decode

    def slow(latents: torch.Tensor) -> np.ndarray:
        begun.set()
        assert held.wait(10)
        return decode(latents)

    engine._decoder._decode = slow
    first, second = engine.submit(make_request(1, steps=1)), engine.submit(make_request(2, steps=30))
    assert engine.step() == 2
    assert begun.wait(10)
    assert [engine.step() for _ in range(20)] == [1] * 20
    assert not first.done()
    held.set()
    run(engine)
    assert first.result(0).image.shape == second.result(0).image.shape


def test_a_pinned_adapter_is_there_before_it_is_asked_for_and_stays(base: Base):
    shelf = make_shelf(base)
    engine = make_engine(base, shelf, slots=6, host_bytes=1, pinned=["adapter-3"])
    while "adapter-3" not in engine.resident:
        engine.step()
        engine.wait(0.05)
    shelf.adapters |= {f"extra-{n}": make_adapter(base, classes=2, seed=n) for n in range(8)}
    draw(engine, *(make_request(n, adapter=f"extra-{n}") for n in range(8)))
    [drawn] = draw(engine, make_request(9, adapter="adapter-3"))
    assert drawn.stats.adapter_residency == "hot"
    assert shelf.loads.count("adapter-3") == 1
    with pytest.raises(Invalid, match="6 slots leave 1 for pinned adapters, not 2"):
        make_engine(base, shelf, slots=6, pinned=["adapter-0", "adapter-1"])


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
    layout = base.layout()
    starts = base.class_starts(base.start_indices(adapter.classes, adapter.class_start)) + adapter.class_delta
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


def test_residency_is_told(base: Base):
    shelf = make_shelf(base)
    engine = make_engine(base, shelf, slots=2)  # room for one adapter
    ask = [make_request(number, adapter=f"adapter-{which}") for number, which in enumerate((0, 0, 1, 0))]
    residencies = [draw(engine, item)[0].stats for item in ask]
    assert [stats.adapter_residency for stats in residencies] == ["cold", "hot", "cold", "warm"]
    assert [stats.adapter_load_ms > 0 for stats in residencies] == [True, False, True, True]
    assert shelf.loads == ["adapter-0", "adapter-1"]


def test_host_memory_is_bounded(base: Base):
    shelf = make_shelf(base)
    engine = make_engine(base, shelf, slots=2, host_bytes=1)
    for number, which in enumerate((0, 1, 0, 1)):
        draw(engine, make_request(number, adapter=f"adapter-{which}"))
    assert shelf.loads == ["adapter-0", "adapter-1", "adapter-0", "adapter-1"]


def test_more_adapters_than_slots_all_get_their_turn_and_their_own_pictures(base: Base):
    shelf = make_shelf(base)
    requests = [make_request(n, adapter=f"adapter-{n % 4}", label=n % 2, seed=n % 3) for n in range(24)]
    few, many = make_engine(base, shelf, slots=3, host_bytes=1), make_engine(base, shelf)
    assert largest_difference(draw(few, *requests), draw(many, *requests)) <= 1


def test_a_slot_in_use_is_never_given_away(base: Base):
    shelf = make_shelf(base)
    engine = make_engine(base, shelf, slots=2)
    long = engine.submit(make_request(1, adapter="adapter-0", steps=12))
    other = engine.submit(make_request(2, adapter="adapter-1", steps=2))
    while not long.done():
        if not engine.step():
            engine.wait(0.05)
        is_over = other.done()  # asked first: the two may be decoded between one look and the next
        assert long.done() or not is_over
    run(engine)
    [alone] = draw(make_engine(base, shelf), make_request(1, adapter="adapter-0", steps=12))
    assert largest_difference([long.result(0)], [alone]) <= 1
    assert other.result(0).stats.distinct_adapters == 1


def test_a_failed_load_fails_its_own_requests_alone(base: Base):
    shelf = make_shelf(base)
    engine = make_engine(base, shelf)
    lost = [engine.submit(make_request(n, adapter="lost")) for n in range(2)]
    good = engine.submit(make_request(5, adapter="adapter-0"))
    run(engine)
    for future in lost:
        with pytest.raises(NotFound, match="adapter lost"):
            future.result(0)
    assert good.result(0).image.shape == (8, 8, 3)
    shelf.adapters["lost"] = shelf.adapters["adapter-1"]
    assert draw(engine, make_request(6, adapter="lost"))[0].stats.adapter_residency == "cold"


def test_an_adapter_of_another_base_fails_its_own_requests_alone(base: Base, latent_base: Base):
    shelf = Shelf({"foreign": make_adapter(latent_base), "own": make_adapter(base)})
    engine = make_engine(base, shelf)
    foreign = engine.submit(make_request(1, adapter="foreign"))
    own = engine.submit(make_request(2, adapter="own"))
    run(engine)
    with pytest.raises(Conflict, match="another base"):
        foreign.result(0)
    assert own.result(0).stats.distinct_adapters == 1


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


def test_a_slow_load_holds_nobody_up(base: Base):
    shelf = make_shelf(base)
    engine = make_engine(base, shelf)
    shelf.open.clear()
    slow = engine.submit(make_request(1, adapter="adapter-0"))
    quick = engine.submit(make_request(2))
    while engine.step():
        pass
    assert quick.result(10)
    assert not slow.done()
    assert engine.step() == 0
    shelf.open.set()
    run(engine)
    assert slow.result(0).stats.queue_ms > quick.result(0).stats.queue_ms


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
    while not all(future.done() for future in futures):
        engine.step() or engine.wait(0.1)
    assert max(future.result().stats.batch_size for future in futures) == rows
    engine.close()

"""Adapters come and go: every request gets its own, in its turn, and nobody waits for another's load."""

from concurrent.futures import Future
from itertools import count
from threading import Event

import pytest
import torch
from structlog.testing import capture_logs

from core.diffusion.bank import AdapterBank
from core.diffusion.base import Base
from core.errors import Conflict, Invalid, NotFound
from core.sampling import slots
from core.sampling.batcher import PATIENCE
from core.sampling.request import AdapterPart
from core.sampling.row import Sampled
from core.sampling.slots import AdapterSlots
from tests.diffusion.tiny import make_adapter
from tests.sampling.engines import (
    Shelf,
    draw,
    largest_difference,
    make_engine,
    make_request,
    make_shelf,
    run,
    run_until,
)


def test_mixes_take_turns_where_slots_are_few(base: Base):
    """Each needs two of three slots at once: nobody holds one and waits for another."""
    shelf = make_shelf(base)
    parts = [tuple(AdapterPart(f"adapter-{(n + k) % 4}", 0.7, 0) for k in range(2)) for n in range(8)]
    requests = [make_request(number, adapters=mix) for number, mix in enumerate(parts)]
    few, many = make_engine(base, shelf, slots=4, host_bytes=1), make_engine(base, shelf)
    assert largest_difference(draw(few, *requests), draw(many, *requests)) <= 1
    with pytest.raises(Invalid, match="holds 1 adapters at once"):
        make_engine(base, shelf, slots=2).submit(requests[0])


@pytest.mark.parametrize(("room", "stream", "waiting"), [(1, [0], [1]), (2, [0, 1], [2]), (2, [0], [2, 3])])
def test_an_endless_stream_on_other_adapters_makes_nobody_wait_for_ever(
    base: Base, room: int, stream: list[int], waiting: list[int]
):
    """Of the stream the next comes before the last has left: no slot that it uses falls free of itself."""
    engine = make_engine(base, make_shelf(base), slots=1 + room)
    numbers = count()

    def send(*which: int) -> "Future[Sampled]":
        mix = tuple(AdapterPart(f"adapter-{number}", 1.0, 0) for number in which)
        return engine.submit(make_request(next(numbers), adapters=mix, guidance="none", steps=2))

    def flow() -> None:
        for which in stream:
            send(which)
        engine.step()

    first = send(*stream)
    run_until(engine, first.done)
    flow()
    late = send(*waiting)
    for _ in range(PATIENCE):
        flow()
    assert not late.done()
    for _ in range(20):
        flow()
    assert late.result(10).stats.distinct_adapters >= len(waiting)
    engine.close()


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
    wide = base.widest_layout()
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


def test_a_pinned_adapter_is_there_before_it_is_asked_for_and_stays(base: Base):
    shelf = make_shelf(base)
    engine = make_engine(base, shelf, slots=6, host_bytes=1, pinned=["adapter-3"])
    run_until(engine, lambda: "adapter-3" in engine.resident)
    shelf.adapters |= {f"extra-{n}": make_adapter(base, classes=2, seed=n) for n in range(8)}
    draw(engine, *(make_request(n, adapter=f"extra-{n}") for n in range(8)))
    [drawn] = draw(engine, make_request(9, adapter="adapter-3"))
    assert drawn.stats.adapter_residency == "hot"
    assert shelf.loads.count("adapter-3") == 1
    with pytest.raises(Invalid, match="6 slots leave 1 for pinned adapters, not 2"):
        make_engine(base, shelf, slots=6, pinned=["adapter-0", "adapter-1"])


def test_a_pinned_adapter_that_cannot_be_had_now_is_tried_again(base: Base, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slots, "PIN_AGAIN_SECONDS", 0.01)
    shelf = make_shelf(base)
    shelf.is_away = True
    engine = make_engine(base, shelf, host_bytes=1, pinned=["adapter-3"])
    with capture_logs() as logs:
        run_until(engine, lambda: len(logs) > 1)
    assert {(line["event"], line["log_level"]) for line in logs} == {("adapter.not_pinned", "warning")}
    shelf.is_away = False
    run_until(engine, lambda: "adapter-3" in engine.resident)
    shelf.adapters |= {f"extra-{n}": make_adapter(base, classes=2, seed=n) for n in range(8)}
    draw(engine, *(make_request(n, adapter=f"extra-{n}") for n in range(8)))
    assert "adapter-3" in engine.resident


def test_a_pinned_adapter_that_will_never_be_had_is_said_once_and_harms_nobody(base: Base, latent_base: Base):
    shelf = make_shelf(base)
    shelf.adapters["foreign"] = make_adapter(latent_base)
    engine = make_engine(base, shelf, slots=7, pinned=["lost", "foreign"])
    with capture_logs() as logs:
        run_until(engine, lambda: len(logs) == 2)
        mix = tuple(AdapterPart(f"adapter-{number}", 1.0, 0) for number in range(4))
        assert draw(engine, make_request(1, adapters=mix))[0].stats.distinct_adapters == 4
    assert {(line["sha256"], line["log_level"], type(line["exc_info"])) for line in logs} == {
        ("lost", "error", NotFound),
        ("foreign", "error", Conflict),
    }


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


def test_what_is_evicted_while_a_request_waits_for_it_is_loaded_again(base: Base):
    """It was hot when the request came, so nothing was loaded for it; and host memory had no room to keep it."""
    shelf, loaded = make_shelf(base), Event()
    held = AdapterSlots(AdapterBank(base.layout(gamma_depth="all"), base, 2), shelf, host_bytes=1, wake=loaded)

    def bring(digest: str) -> None:
        while not held.is_loaded([digest]):
            assert loaded.wait(10)
            loaded.clear()
            held.poll()

    held.want("adapter-0")
    bring("adapter-0")
    held.seat("adapter-0", "cold")
    held.leave("adapter-0")
    held.poll()
    assert [held.want("adapter-0"), held.want("adapter-1")] == ["hot", "cold"]
    bring("adapter-1")
    held.seat("adapter-1", "cold")
    assert not held.is_loaded(["adapter-0"])
    bring("adapter-0")
    assert not held.is_ready(["adapter-0"])  # loaded, but the slot is in use
    held.leave("adapter-1")
    assert held.is_ready(["adapter-0"])
    assert shelf.loads == ["adapter-0", "adapter-1", "adapter-0"]
    held.close()


def test_an_adapter_that_breaks_off_on_its_way_into_a_slot_leaves_the_slot_to_others(
    base: Base, monkeypatch: pytest.MonkeyPatch
):
    """What was there before is written over in part: it is not hot any more."""
    shelf = make_shelf(base)
    shelf.adapters["large"] = make_adapter(base, classes=100)
    engine = make_engine(base, shelf, slots=2)
    [before] = draw(engine, make_request(1, adapter="adapter-0"))
    large = engine.submit(make_request(2, adapter="large"))

    def full(*_: object, **__: object) -> torch.Tensor:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", full)  # what a larger table of class rows is made of
        run(engine)
    assert isinstance(large.exception(0), MemoryError)
    [after] = draw(engine, make_request(1, adapter="adapter-0"))
    assert largest_difference([before], [after]) == 0
    assert after.stats.adapter_residency == "warm"

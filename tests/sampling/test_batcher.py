"""The policy, without torch and without a clock."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.sampling.batcher import Batcher


def always(_: str) -> bool:
    return True


def drain(batcher: Batcher, room: int = 1) -> list[str]:
    taken: list[str] = []
    while (request := batcher.next(room, always, always)) is not None:
        taken.append(request)
    return taken


def test_a_flood_does_not_delay_the_others():
    batcher = Batcher(quantum=20)
    for number in range(500):
        batcher.add(f"flood-{number}", "flood", 1, 20)
    for tenant in range(9):
        for number in range(5):
            batcher.add(f"{tenant}-{number}", f"tenant-{tenant}", 1, 20)
    order = drain(batcher)
    assert len(order) == 545
    last = max(place for place, request in enumerate(order) if not request.startswith("flood"))
    assert last < 2 * 45
    assert [r for r in order if r.startswith("3-")] == [f"3-{number}" for number in range(5)]


def test_shares_are_of_work_and_not_of_requests():
    batcher = Batcher(quantum=10)
    for number in range(100):
        batcher.add(f"long-{number}", "long", 2, 100)
        batcher.add(f"short-{number}", "short", 1, 10)
    order = [batcher.next(8, always, always) for _ in range(55)]
    counts = Counter(request.split("-")[0] for request in order if request)
    assert 8 <= counts["short"] / counts["long"] <= 12


def test_a_request_that_does_not_fit_lets_others_pass_until_its_patience_ends():
    batcher = Batcher(patience=3)
    batcher.add("wide", "a", 2, 40)
    for number in range(9):
        batcher.add(f"narrow-{number}", "b", 1, 20)
    taken: list[str | None] = []
    for _ in range(5):
        taken.append(batcher.next(1, always, always))
        batcher.tick()
    assert taken == ["narrow-0", "narrow-1", "narrow-2", None, None]
    assert batcher.next(2, always, always) == "wide"


def test_a_request_that_is_not_ready_blocks_nobody():
    batcher = Batcher()
    batcher.add("cold", "a", 1, 20)
    batcher.add("hot", "a", 1, 20)

    def is_hot(request: str) -> bool:
        return request != "cold"

    assert batcher.next(1, is_hot, always) == "hot"
    assert batcher.next(1, is_hot, always) is None
    assert batcher.next(1, always, always) == "cold"


def test_others_pass_a_request_without_slots_until_its_patience_ends():
    """From then on none starts until it has them; one that is still being loaded they pass for ever."""
    batcher = Batcher(patience=3)
    batcher.add("unloaded", "a", 1, 20)
    batcher.add("slotless", "a", 1, 20)
    ready: set[str] = set()
    taken: list[str | None] = []
    for number in range(8):
        batcher.add(f"hot-{number}", "b", 1, 20)
        ready.add("slotless" if number == 5 else f"hot-{number}")
        taken.append(batcher.next(1, ready.__contains__, lambda request: request != "unloaded"))
        batcher.tick()
    assert taken == ["hot-0", "hot-1", "hot-2", None, None, "slotless", "hot-3", "hot-4"]


def test_a_removed_request_never_starts():
    batcher = Batcher()
    batcher.add("one", "a", 1, 20)
    assert batcher.remove("one")
    assert not batcher.remove("one")
    assert batcher.next(1, always, always) is None
    batcher.add("one", "a", 1, 20)
    with pytest.raises(KeyError):
        batcher.add("one", "b", 1, 20)


requests = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 2), st.integers(1, 250)), min_size=1, max_size=40)


@given(requests=requests, rooms=st.lists(st.integers(0, 4), max_size=30), patience=st.integers(0, 20))
def test_every_request_starts_exactly_once_and_only_where_it_fits(
    requests: list[tuple[str, int, int]], rooms: list[int], patience: int
):
    batcher = Batcher(quantum=16, patience=patience)
    for number, (tenant, rows, steps) in enumerate(requests):
        batcher.add(str(number), tenant, rows, rows * steps)
    taken: list[str] = []
    for room in [*rooms, *[2] * len(requests)]:
        request = batcher.next(room, always, always)
        batcher.tick()
        if request is not None:
            assert requests[int(request)][1] <= room
            taken.append(request)
    assert sorted(taken, key=int) == [str(number) for number in range(len(requests))]
    assert len(batcher) == 0
    of_one_shape = [r for r in taken if requests[int(r)][:2] == requests[0][:2]]
    assert of_one_shape == sorted(of_one_shape, key=int)


def test_the_policy_and_the_request_need_no_torch():
    code = "import sys, core.sampling.batcher, core.sampling.request; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

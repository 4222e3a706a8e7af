"""Requests for images through the device worker: files, mixes, partial images, cancels and deadlines."""

import io
import json
import time
from threading import Event
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import select

from api.schemas.images import ImageCreate
from core.adapters.repository import AdapterRepository
from core.models import Sample
from core.samples import service as samples
from core.samples import spec as sample_spec
from tests.worker.shop import MODEL, Shop
from worker.pump import Pump


@pytest.fixture
def adapters(shop: Shop) -> list[str]:
    """Two, of one dataset and two lengths of training."""
    jobs = [shop.job(steps=12), shop.job(steps=6)]
    shop.pump()
    return [shop.adapters(job_id)[0].id for job_id in jobs]


def files(shop: Shop, sample_id: str) -> list[bytes]:
    shop.pump()
    found = shop.get_sample(sample_id)
    assert found.status == "succeeded", found.error
    return [shop.services.store.get(image["key"]) for image in found.images or []]


def redrawn(shop: Shop, png: bytes) -> bytes:
    """Ask for what a PNG says that it is."""
    body = ImageCreate.model_validate_json(Image.open(io.BytesIO(png)).text["request"])  # pyright: ignore[reportAttributeAccessIssue]
    named = [(part.model, part.weight) for part in body.adapters or []]
    if body.model.startswith("ft:"):
        assert body.adapter_scale is not None
        named = [(body.model, body.adapter_scale)]
    with shop.services.database.write() as session:
        repository = AdapterRepository(session, shop.tenant_id)
        parts = [(adapter, weight) for model, weight in named if (adapter := repository.find_model(model))]
        assert len(parts) == len(named)
        spec = sample_spec.resolve(shop.services.catalog.get(MODEL), parts, body.asked, max_n=1)
        sample_id = samples.create_sample(session, shop.tenant_id, shop.services.catalog.get(MODEL), spec, 100).id
    return files(shop, sample_id)[0]


def difference(one: bytes, two: bytes) -> int:
    """The largest of any pixel, of 255."""
    pixels = [np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (one, two)]
    return int(np.abs(pixels[0] - pixels[1]).max())


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_picture_can_be_drawn_again_from_what_its_file_says(shop: Shop, adapters: list[str], count: int) -> None:
    asked = {"n": 2, "seed": 11, "solver": "ddim", "steps": 5, "guidance_scale": 2.5, "guidance_interval": (0.2, 0.9)}
    weights = [0.8, -0.3][:count]
    prompt = "disc" if count else None
    first, second = files(shop, shop.sample(*adapters[:count], weights=weights, prompt=prompt, **asked))
    again = redrawn(shop, second)
    assert difference(again, second) <= 1 < difference(first, second)  # it was drawn beside another
    image = Image.open(io.BytesIO(second))
    assert Image.open(io.BytesIO(again)).info == image.info
    assert not image.getexif()
    assert len(json.loads(image.text["adapters"])) == count  # pyright: ignore[reportAttributeAccessIssue]


def test_a_mix_is_neither_of_its_adapters(shop: Shop, adapters: list[str]) -> None:
    asked = {"prompt": "disc", "seed": 2}
    mixed = files(shop, shop.sample(*adapters, weights=[1.0, 1.0], **asked))
    alone = [files(shop, shop.sample(adapter, **asked)) for adapter in adapters]
    pixels = [Image.open(io.BytesIO(data[0])).tobytes() for data in (mixed, *alone)]
    assert len(set(pixels)) == 3


@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_a_file_is_of_the_format_that_was_asked_for(shop: Shop, kind: sample_spec.Format, magic: bytes) -> None:
    [data] = files(shop, shop.sample(output_format=kind))
    assert data.startswith(magic)
    if kind == "png":
        return
    small, large = (files(shop, shop.sample(output_format=kind, output_compression=q))[0] for q in (1, 100))
    assert len(small) < len(large)


def test_partial_images_are_there_before_the_picture(shop: Shop) -> None:
    sample_id = shop.sample(n=2, steps=9, partial_images=2)
    shop.pump()
    found = shop.get_sample(sample_id)
    assert found.status == "succeeded"
    assert sorted((partial["index"], partial["number"]) for partial in found.partials) == [
        (0, 0), (0, 1), (1, 0), (1, 1),
    ]  # fmt: skip
    final = Image.open(io.BytesIO(shop.services.store.get((found.images or [])[0]["key"])))
    for partial in found.partials:
        picture = Image.open(io.BytesIO(shop.services.store.get(partial["key"])))
        assert picture.size == final.size
    assert len({partial["sha256"] for partial in found.partials}) == 4


def test_a_cancelled_request_stops_between_two_steps_and_harms_nobody(shop: Shop) -> None:
    doomed, other = shop.sample(steps=200, n=4), shop.sample(steps=4)
    pump = Pump(shop.runtime)
    pump._claim(may_train=False, may_sample=True)
    for _ in range(3):
        pump._work()
    with shop.services.database.write() as session:
        assert samples.cancel(session, session.get_one(Sample, doomed)).status == "running"
    pump.run()
    assert shop.get_sample(doomed).status == "cancelled"
    assert shop.get_sample(doomed).images is None
    assert shop.get_sample(other).status == "succeeded"
    assert not shop.runtime.device(MODEL).engine.has_work


def test_a_request_that_takes_longer_than_its_timeout_is_given_up(shop: Shop) -> None:
    slow, queued = shop.sample(steps=200, timeout=0.3), shop.sample(timeout=0.01)
    time.sleep(0.05)
    shop.pump()
    for sample_id in (slow, queued):
        found = shop.get_sample(sample_id)
        assert (found.status, (found.error or {})["code"]) == ("failed", "deadline_exceeded")


def test_a_pinned_adapter_is_on_the_device_before_anyone_asks(shop: Shop, adapters: list[str]) -> None:
    shop.runtime.close()
    shop.services.settings.pinned_adapters = [adapters[0], "adapter-unknown"]
    runtime = type(shop.runtime)(shop.services)
    engine = runtime.device(MODEL).engine
    deadline = time.monotonic() + 10
    while not engine.resident:
        engine.step()
        assert time.monotonic() < deadline
    with shop.services.database.read() as session:
        [digest] = session.scalars(select(sample_spec.Adapter.sha256).where(sample_spec.Adapter.id == adapters[0]))
    assert engine.resident == [digest]
    runtime.close()


def test_a_request_is_delivered_while_the_pump_waits(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads that encode and store need the interpreter: a pump that looped without a wait would keep it."""
    put, held, begun, loops = shop.services.store.put, Event(), Event(), 0
    pump = Pump(shop.runtime)
    work = pump._work

    def slow(*args: Any) -> None:
        begun.set()
        held.wait(0.5)
        held.set()
        put(*args)

    def counted() -> bool:
        nonlocal loops
        loops += begun.is_set() and not held.is_set()
        return work()

    monkeypatch.setattr(shop.services.store, "put", slow)
    monkeypatch.setattr(pump, "_work", counted)
    sample_id = shop.sample(steps=2)
    pump.run()
    assert shop.get_sample(sample_id).status == "succeeded"
    assert 0 < loops < 1000  # some 100 with a wait of 5 ms, hundreds of thousands without


def test_a_request_whose_base_does_not_load_fails_alone(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    real, errors = shop.runtime.device, [MemoryError(), RuntimeError("no header")]

    def device(model: str) -> Any:
        if errors:
            raise errors.pop()
        return real(model)

    monkeypatch.setattr(shop.runtime, "device", device)
    asked = [shop.sample() for _ in range(3)]
    shop.pump()
    rows = [shop.get_sample(sample_id) for sample_id in asked]
    assert [(row.status, (row.error or {}).get("code")) for row in rows] == [
        ("failed", "internal_error"), ("failed", "internal_error"), ("succeeded", None),
    ]  # fmt: skip


def test_a_request_that_the_engine_takes_in_part_leaves_nothing_in_it(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = shop.runtime.device(MODEL).engine
    submit, taken = engine.submit, []

    def submit_one(request: Any, *rest: Any) -> Any:
        if taken:
            raise MemoryError
        taken.append(submit(request, *rest))
        return taken[0]

    monkeypatch.setattr(engine, "submit", submit_one)
    sample_id = shop.sample(n=2, steps=200)
    shop.pump()
    assert shop.get_sample(sample_id).status == "failed"
    assert taken[0].cancelled()
    assert not engine.has_work

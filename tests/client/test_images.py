"""Images drawn as they come, against the real API."""

import time

import pytest

from client.api import DiffFit
from client.errors import ApiError, ClientError
from client.images import CompletedImage, PartialImage
from tests.client.conftest import Service, png


def test_partial_images_come_before_the_images(
    service: Service, client: DiffFit, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[PartialImage | CompletedImage] = []
    monkeypatch.setattr(service.worker, "finishes", lambda: len(seen) == 4)
    for event in client.images.stream("tiny-dit", "circle", partial_images=2, n=2, seed=5, output_format="webp"):
        seen.append(event)
    partial = [event for event in seen if isinstance(event, PartialImage)]
    assert [(event.number, event.index) for event in partial] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert partial[3].data == png((1, 1, 99), kind="webp")
    completed = [event for event in seen[4:] if isinstance(event, CompletedImage)]
    assert [(event.index, event.image.seed) for event in completed] == [(0, 5), (1, 6)]
    assert completed[1].image.data == png((1, 5, 9), kind="webp")
    assert completed[0].stats["compute_ms"] == 5.0


def test_a_stream_raises_what_went_wrong(
    service: Service, client: DiffFit, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.worker, "draws", False)
    with pytest.raises(ApiError, match=r"\[deadline_exceeded\]") as caught:
        list(client.images.stream("tiny-dit", timeout=0.2))
    assert caught.value.code == "deadline_exceeded"


def test_a_refused_stream_is_refused_as_any_request(client: DiffFit) -> None:
    with pytest.raises(ApiError, match="422 unknown_class"):
        next(client.images.stream("tiny-dit", "unicorn"))


def test_a_stream_that_is_closed_has_cancelled(
    service: Service, client: DiffFit, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.worker, "finishes", lambda: False)
    stream = client.images.stream("tiny-dit", partial_images=1)
    assert isinstance(next(stream), PartialImage)
    stream.close()
    place = f"/v1/images/generations/{service.worker.claimed[-1].sample_id}"
    late = time.monotonic() + 8  # the worker gives up waiting after ten
    while (status := client.transport.get(place)["status"]) == "running" and time.monotonic() < late:
        time.sleep(0.02)
    assert status == "cancelled"


@pytest.mark.parametrize("field", ["guidance_scale", "timeout"])
def test_what_json_cannot_carry_is_refused_by_name(client: DiffFit, field: str) -> None:
    with pytest.raises(ClientError, match=f"{field} is nan: it must be a finite number"):
        client.images.generate("tiny-dit", **{field: float("nan")})  # pyright: ignore[reportArgumentType]

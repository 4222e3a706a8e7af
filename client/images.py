"""Images: drawn by a base, by an adapted model or by a mix of several."""

import base64
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack
from urllib.parse import urlsplit

from client.errors import ApiError, Unreachable
from client.jobs import ENDED
from client.patience import wait
from client.transport import Transport

_GENERATIONS = "/v1/images/generations"
_WAIT_SECONDS = 300.0  # a busy service may take a while; it answers 503 itself when it gives up


class Asked(TypedDict, total=False):
    """How to draw; the service chooses what is left out or None, and says what each may be (`docs/api.md`)."""

    n: int | None
    seed: int | None
    """Image i is drawn from `seed + i`."""
    steps: int | None
    solver: str | None
    guidance: str | None
    guidance_scale: float | None
    guidance_interval: tuple[float, float] | None
    adapter_scale: float | None
    adapters: Sequence[tuple[str, float]] | None
    """Models that are added up, each with its weight; the model that is asked is then their base."""
    size: str | None
    timeout: float | None
    """Seconds after which the service gives up, with `deadline_exceeded`."""
    output_format: str | None
    output_compression: int | None


@dataclass(frozen=True)
class Image:
    """The file's bytes, in the format that was asked for: PNG unless said otherwise."""

    data: bytes = field(repr=False)
    seed: int | None


@dataclass(frozen=True)
class Generation:
    """What was drawn, and the service's figures of how: `batch_size`, `distinct_adapters`, `queue_ms`, …"""

    id: str | None
    model: str
    images: Sequence[Image]
    stats: Mapping[str, Any]


@dataclass(frozen=True)
class PartialImage:
    """What image `index` is expected to be, after a part of its steps; `number` counts from 0."""

    data: bytes = field(repr=False)
    index: int
    number: int


@dataclass(frozen=True)
class CompletedImage:
    """Image `index` of a generation, and the generation's figures."""

    image: Image
    index: int
    id: str | None
    stats: Mapping[str, Any]


class Images:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def generate(self, model: str, prompt: str | None = None, **asked: Unpack[Asked]) -> Generation:
        """Draw images of the class that `prompt` names (without one: of no class).

        Raises ApiError for what went wrong with the drawing too, StillUnderWay where it takes longer than we wait.
        """
        try:
            reply = self._transport.post(_GENERATIONS, _body(model, prompt, asked), timeout=_WAIT_SECONDS)
        except ApiError as error:
            if error.status == 503 and error.location:
                return self._wait(urlsplit(error.location).path, _WAIT_SECONDS + (asked.get("timeout") or 0))
            raise
        images = [_image(item) for item in reply["data"]]
        return Generation(reply.get("id"), reply.get("model", model), images, reply.get("stats") or {})

    def stream(
        self, model: str, prompt: str | None = None, *, partial_images: int = 0, **asked: Unpack[Asked]
    ) -> Generator[PartialImage | CompletedImage, None, None]:
        """Draw images and see up to `partial_images` of each on the way. Closed before its end, it has cancelled.

        Raises ApiError for what went wrong with the drawing, Unreachable where the stream ends before the last image.
        """
        body = _body(model, prompt, asked) | {"stream": True, "partial_images": partial_images}
        total, done = asked.get("n") or 1, 0
        for _, event in self._transport.events("POST", _GENERATIONS, json=body):
            match event.get("type"):
                case "error":
                    raise ApiError.from_error(event.get("error") or {})
                case "image_generation.partial_image":
                    yield PartialImage(_bytes(event), event.get("image_index", 0), event["partial_image_index"])
                case "image_generation.completed":
                    done += 1
                    index = event.get("image_index", 0)
                    yield CompletedImage(_image(event), index, event.get("id"), event.get("stats") or {})
        if done < total:
            raise Unreachable(self._transport.base_url, f"the stream ended early, after {done} of {total} images")

    def _wait(self, path: str, seconds: float) -> Generation:
        """The service answered that it still draws: its own place for the result is asked until it is there."""
        state = wait(
            lambda: self._transport.get(path),
            lambda state: state["status"] in ENDED,
            lambda state: f"images {state['id']} are still {state['status']}",
            seconds,
        )
        if state["status"] != "succeeded":
            cancelled = {"code": "cancelled", "message": f"the request {state['id']} was cancelled"}
            raise ApiError.from_error(state["error"] or cancelled)
        images = [
            Image(self._transport.read(f"{path}/images/{number}"), item.get("seed"))
            for number, item in enumerate(state["data"])
        ]
        return Generation(state["id"], state["model"], images, state.get("stats") or {})


def _body(model: str, prompt: str | None, asked: Asked) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "prompt": prompt or "", "response_format": "b64_json"}
    body |= {key: value for key, value in asked.items() if value is not None}
    if "adapters" in body:
        body["adapters"] = [{"model": name, "weight": weight} for name, weight in body["adapters"]]
    return body


def _image(item: Mapping[str, Any]) -> Image:
    return Image(_bytes(item), item.get("seed"))


def _bytes(item: Mapping[str, Any]) -> bytes:
    return base64.b64decode(item["b64_json"])

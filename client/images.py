"""Images: drawn by a base or by an adapted model."""

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from client.errors import ApiError, ClientError
from client.transport import Transport

_GENERATIONS = "/v1/images/generations"
_WAIT_SECONDS = 300.0  # a busy service may take a while; it answers 503 itself when it gives up


@dataclass(frozen=True)
class Image:
    png: bytes = field(repr=False)
    seed: int | None


@dataclass(frozen=True)
class Generation:
    """What was drawn, and the service's figures of how: `batch_size`, `distinct_adapters`, `queue_ms`, …"""

    id: str | None
    model: str
    images: Sequence[Image]
    stats: Mapping[str, Any]


class Images:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def generate(
        self,
        model: str,
        prompt: str | None = None,
        *,
        n: int = 1,
        seed: int | None = None,
        steps: int | None = None,
        solver: str | None = None,
        guidance: str | None = None,
        guidance_scale: float | None = None,
        adapter_scale: float | None = None,
        size: str | None = None,
    ) -> Generation:
        """Draw `n` images of the class that `prompt` names (without one: of no class); image i has seed `seed + i`."""
        asked = {
            "seed": seed,
            "steps": steps,
            "solver": solver,
            "guidance": guidance,
            "guidance_scale": guidance_scale,
            "adapter_scale": adapter_scale,
            "size": size,
        }
        body: dict[str, Any] = {"model": model, "prompt": prompt or "", "n": n, "response_format": "b64_json"}
        body |= {key: value for key, value in asked.items() if value is not None}
        try:
            reply = self._transport.post(_GENERATIONS, body, timeout=_WAIT_SECONDS)
        except ApiError as error:
            if error.status == 503 and error.location:
                return self._wait(urlsplit(error.location).path)
            raise
        images = [Image(base64.b64decode(item["b64_json"]), item.get("seed")) for item in reply["data"]]
        return Generation(reply.get("id"), reply.get("model", model), images, reply.get("stats") or {})

    def _wait(self, path: str) -> Generation:
        """The service answered that it still draws: its own place for the result is asked until it is there."""
        end = time.monotonic() + _WAIT_SECONDS
        while (state := self._transport.get(path))["status"] in ("queued", "running"):
            if time.monotonic() > end:
                raise ClientError(f"images {state['id']} are {state['status']} still, after {_WAIT_SECONDS:.0f} s more")
            time.sleep(0.5)
        if state["status"] != "succeeded":
            error = state.get("error") or {}
            raise ClientError(f"images {state['id']} {state['status']}: {error.get('message')} [{error.get('code')}]")
        images = [
            Image(self._transport.read(f"{path}/images/{number}"), item.get("seed"))
            for number, item in enumerate(state["data"])
        ]
        return Generation(state["id"], state["model"], images, state.get("stats") or {})

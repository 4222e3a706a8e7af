"""Images: drawn by a base or by an adapted model."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from client.transport import Transport

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
        reply = self._transport.post("/v1/images/generations", body, timeout=_WAIT_SECONDS)
        images = [Image(base64.b64decode(item["b64_json"]), item.get("seed")) for item in reply["data"]]
        return Generation(reply.get("id"), reply.get("model", model), images, reply.get("stats") or {})

"""Evaluations: how far a model's pictures lie from a file's."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from client.errors import trouble_of
from client.jobs import ENDED
from client.patience import wait
from client.transport import Transport

_EVALUATIONS = "/v1/evaluations"


@dataclass(frozen=True)
class Evaluation:
    """`result` has `after`, `before` and `moved` once it has succeeded: `docs/evaluation.md` says how to read them."""

    id: str
    status: str  # queued | running | succeeded | failed | cancelled
    model: str
    file: str
    drawn: int
    total: int
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    created_at: int
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def trouble(self) -> str | None:
        """Why it failed, in a line."""
        return trouble_of(self.error)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Evaluation":
        names = ("id", "status", "model", "file")
        progress = data["progress"]
        return cls(
            **{name: data[name] for name in names},
            drawn=progress["drawn"],
            total=progress["total"],
            result=data.get("result"),
            error=data.get("error"),
            created_at=data["created_at"],
            raw=data,
        )


class Evaluations:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        model: str,
        file: str,
        *,
        images: int | None = None,
        seed: int | None = None,
        steps: int | None = None,
        solver: str | None = None,
        guidance: str | None = None,
        guidance_scale: float | None = None,
        baseline: bool | None = None,
    ) -> Evaluation:
        """Queue it: draw `images` pictures of `model` and measure them against those of `file`.

        With `baseline` the untrained adapter is measured too: what is chosen for a tuned model. Without it there is
        half as much to draw, and neither `before` nor `moved`.
        """
        how = {"steps": steps, "solver": solver, "guidance": guidance, "guidance_scale": guidance_scale}
        asked = {"images": images, "seed": seed, **how, "baseline": baseline}
        body = {"model": model, "file": file} | {name: value for name, value in asked.items() if value is not None}
        return Evaluation.from_json(self._transport.post(_EVALUATIONS, body))

    def get(self, evaluation_id: str) -> Evaluation:
        return Evaluation.from_json(self._transport.get(f"{_EVALUATIONS}/{evaluation_id}"))

    def list(self, limit: int | None = None) -> Iterator[Evaluation]:
        """Newest first."""
        return (Evaluation.from_json(item) for item in self._transport.page(_EVALUATIONS, limit=limit))

    def cancel(self, evaluation_id: str) -> Evaluation:
        return Evaluation.from_json(self._transport.post(f"{_EVALUATIONS}/{evaluation_id}/cancel"))

    def wait(self, evaluation_id: str, timeout: float = 3600.0) -> Evaluation:
        """Until it has ended, well or not. Raises StillUnderWay after `timeout` seconds."""
        return wait(
            lambda: self.get(evaluation_id),
            lambda found: found.has_ended,
            lambda found: f"evaluation {evaluation_id} is {found.status}",
            timeout,
        )

"""Adapters: the small files that training makes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from client.transport import Transport


@dataclass(frozen=True)
class Adapter:
    """`parameters` are the adapter's own, `base_parameters` the frozen base's; `sha256` is the file's."""

    id: str
    model: str
    base: str
    job_id: str | None
    bytes: int
    sha256: str
    parameters: int
    base_parameters: int
    classes: Sequence[str]
    metrics: Mapping[str, Any]
    metadata: Mapping[str, str]
    created_at: int
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def share_of_base(self) -> float:
        return self.parameters / self.base_parameters if self.base_parameters else 0.0

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Adapter":
        return cls(
            id=data["id"],
            model=data["model"],
            base=data["base"],
            job_id=data["job_id"],
            bytes=data["bytes"],
            sha256=data["sha256"],
            parameters=data["parameters"],
            base_parameters=data["base_parameters"],
            classes=data["classes"],
            metrics=data["metrics"],
            metadata=data["metadata"],
            created_at=data["created_at"],
            raw=data,
        )


class Adapters:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self, limit: int | None = None) -> Iterator[Adapter]:
        """Newest first."""
        return (Adapter.from_json(item) for item in self._transport.page("/v1/adapters", limit=limit))

    def get(self, adapter_id: str) -> Adapter:
        return Adapter.from_json(self._transport.get(f"/v1/adapters/{adapter_id}"))

    def pull(self, adapter_id: str) -> bytes:
        """The safetensors file."""
        return self._transport.read(f"/v1/adapters/{adapter_id}/content")

    def update(self, adapter_id: str, *, metadata: Mapping[str, str]) -> Adapter:
        """`metadata` replaces what was there."""
        return Adapter.from_json(self._transport.patch(f"/v1/adapters/{adapter_id}", {"metadata": dict(metadata)}))

    def delete(self, adapter_id: str) -> None:
        self._transport.delete(f"/v1/adapters/{adapter_id}")

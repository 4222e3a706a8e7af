"""Models: the bases that the service offers, and one's own adapted ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from client.errors import ClientError
from client.transport import Transport


@dataclass(frozen=True)
class Model:
    """`classes` are the prompts that it draws, in label order."""

    id: str
    classes: Sequence[str]
    image_size: int
    parameters: int
    fingerprint: str  # of the base
    licence: str | None
    adapter_id: str | None  # an adapted model's
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def is_base(self) -> bool:
        return not self.id.startswith("ft:")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Model":
        named = ("id", "classes", "image_size", "parameters", "fingerprint", "licence", "adapter_id")
        return cls(*(data[name] for name in named), raw=data)


class Models:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> list[Model]:
        return [Model.from_json(item) for item in self._transport.get("/v1/models")["data"]]

    def get(self, model_id: str) -> Model:
        return Model.from_json(self._transport.get(f"/v1/models/{quote(model_id, safe='/:')}"))

    def default_base(self) -> Model:
        """The first base that the service offers."""
        for model in self.list():
            if model.is_base:
                return model
        raise ClientError("the service offers no base model: set DIFFFIT_BASES where it runs")

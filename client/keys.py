"""API keys of one's own tenant."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from client.transport import Transport

_KEYS = "/v1/api_keys"


@dataclass(frozen=True)
class Key:
    """`secret` is there once, in the reply that made the key."""

    id: str
    name: str
    prefix: str
    created_at: int
    revoked_at: int | None
    secret: str | None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Key":
        named = ("id", "name", "prefix", "created_at", "revoked_at")
        return cls(*(data[name] for name in named), secret=data.get("secret"))


class Keys:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, name: str) -> Key:
        return Key.from_json(self._transport.post(_KEYS, {"name": name}))

    def list(self, limit: int | None = None) -> Iterator[Key]:
        """Newest first, the revoked ones too."""
        return (Key.from_json(item) for item in self._transport.page(_KEYS, limit=limit))

    def revoke(self, key_id: str) -> None:
        self._transport.delete(f"{_KEYS}/{key_id}")

"""A store that lies once about an object, as a connection that breaks may."""

import pytest

from core.storage.local import LocalStore


def lie_once(monkeypatch: pytest.MonkeyPatch, part: str) -> list[str]:
    """The first read of each key with this part gives other bytes; the keys of which it did."""
    lied: list[str] = []
    real = LocalStore.get

    def get(store: LocalStore, key: str) -> bytes:
        data = real(store, key)
        if part not in key or key in lied:
            return data
        lied.append(key)
        return data[:-1] + bytes([data[-1] ^ 1])

    monkeypatch.setattr(LocalStore, "get", get)
    return lied

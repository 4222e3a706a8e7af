"""Requests for images that are answered while their caller waits."""

import threading
from typing import Any

from fastapi.testclient import TestClient
from sqlalchemy import select

from core.models import Sample
from tests.api.conftest import Service

BODY = {"model": "tiny-dit", "prompt": "circle", "n": 2, "seed": 5}


def drawn(service: Service, client: TestClient, body: dict[str, Any]) -> Any:
    return during(client, body, service.draw)


def during(client: TestClient, body: dict[str, Any], act: Any) -> Any:
    """The reply to a request that `act` answers while it waits."""
    replies: list[Any] = []
    asking = threading.Thread(target=lambda: replies.append(client.post("/v1/images/generations", json=body)))
    asking.start()
    database = client.app.state.database  # pyright: ignore[reportAttributeAccessIssue]
    while asking.is_alive():
        with database.read() as session:
            if session.scalar(select(Sample.id).where(Sample.status == "queued")):
                break
    act()
    asking.join(20)
    return replies[0]

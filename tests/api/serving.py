"""The API behind a real server, for what no test client does."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.protocol import DeadlineProtocol
from tests.api.conftest import Service


@contextmanager
def running(service: Service, app: FastAPI | None = None) -> Iterator[int]:
    """Another API process's app on the same data, behind the server that it has in `python -m api`, on a free port."""
    config = uvicorn.Config(app or create_app(service.settings), port=0, log_config=None, http=DeadlineProtocol)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


def wait_until(is_so: object) -> None:
    deadline = time.monotonic() + 20
    while not is_so():  # pyright: ignore[reportCallIssue]
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)

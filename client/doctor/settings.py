"""The settings that a service started here would have, as the service itself reads them: environment and `.env`."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.errors import ClientError

_QUESTION = """
import json, sys
from core.errors import DomainError
from core.settings import get_settings
try:
    found = get_settings()
except DomainError as error:
    sys.exit(str(error))
print(json.dumps([str(found.data_dir), found.host, found.port, found.bases, found.threads]))
"""


@dataclass(frozen=True)
class Settings:
    data_dir: Path
    host: str
    port: int
    bases: Sequence[str]
    threads: int


def find_settings() -> Settings:
    """Asked in a process of its own: the client imports nothing of the service. Raises ClientError."""
    try:
        done = subprocess.run([sys.executable, "-c", _QUESTION], capture_output=True, text=True, timeout=60, check=True)  # noqa: S603 - our own words
        data_dir, *others = json.loads(done.stdout)
    except subprocess.CalledProcessError as error:
        raise ClientError(error.stderr.strip().rpartition("\n")[2] or f"ended with {error.returncode}") from error
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ClientError(f"cannot be read: {error}") from error
    return Settings(Path(data_dir), *others)

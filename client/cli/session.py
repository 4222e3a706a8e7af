"""A client for the length of a command."""

from collections.abc import Iterator
from contextlib import contextmanager

from client.api import DiffFit
from client.config import find_config


@contextmanager
def connected() -> Iterator[DiffFit]:
    """The configured service. Raises ClientError where no key is found."""
    config = find_config()
    with DiffFit(config.url, config.required_key()) as client:
        yield client

"""Real servers and a running service for the benchmarks that need them; they end with the block that opened them."""

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import SecretStr

from core.settings import Settings
from core.storage import open_store
from core.storage.base import ObjectStore
from tests.servers import SeaweedFS


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A local S3 server's bucket."""
    with SeaweedFS.running() as server:
        yield open_store(
            Settings(
                objects=f"s3://{server.bucket}",
                s3_endpoint_url=server.endpoint,
                s3_access_key_id=server.access_key,
                s3_secret_access_key=SecretStr(server.secret_key),
            )
        )

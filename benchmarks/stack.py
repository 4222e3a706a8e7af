"""Real servers and a running service for the benchmarks that need them; they end with the block that opened them."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from core.settings import PACKAGED_BASE, Settings
from core.storage import open_store
from core.storage.base import ObjectStore
from tests.e2e.service import RunningService, running
from tests.servers import Postgres, SeaweedFS, Valkey

Kind = Literal["embedded", "stack"]


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A local S3 server's bucket."""
    with SeaweedFS.running() as server:
        yield open_store(
            Settings(
                object_store=f"s3://{server.bucket}",
                s3_endpoint_url=server.endpoint,
                s3_access_key_id=server.access_key,
                s3_secret_access_key=SecretStr(server.secret_key),
            )
        )


@contextmanager
def service(kind: Kind, base: Path = PACKAGED_BASE) -> Iterator[RunningService]:
    """The whole service as processes: with what it embeds, or on PostgreSQL, Valkey and SeaweedFS."""
    with ExitStack() as servers, tempfile.TemporaryDirectory() as folder:
        settings: dict[str, str] = {}
        if kind == "stack":
            postgres, valkey, store = (servers.enter_context(it.running()) for it in (Postgres, Valkey, SeaweedFS))
            settings = {
                "database_url": postgres.create_database(),
                "broker_url": valkey.url,
                "object_store": f"s3://{store.bucket}",
                "s3_endpoint_url": store.endpoint,
                "s3_access_key_id": store.access_key,
                "s3_secret_access_key": store.secret_key,
            }
        yield servers.enter_context(running(Path(folder) / "data", base, **settings))

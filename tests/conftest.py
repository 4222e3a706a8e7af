"""Fixtures for every folder: settings in a temporary folder, databases at the newest schema, and the real stack.

Servers start when a test first asks for them and live as long as the run.
"""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from core.bases import Catalog
from core.db import migrate
from core.db.session import Database
from core.settings import Settings
from tests.rows import make_catalog
from tests.servers import Postgres, SeaweedFS, Valkey

# The developer's own service must not reach into the tests, nor into the processes that they start.
for _name in [name for name in os.environ if name.startswith("DIFFFIT_")]:
    del os.environ[_name]
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")

_connect = socket.socket.connect


def _connect_to_loopback(self: socket.socket, address: Any) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
        raise RuntimeError(f"a test tried to reach {address[0]}: tests use loopback alone")
    _connect(self, address)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


socket.socket.connect = _connect_to_loopback


def make_settings(folder: Path, **values: Any) -> Settings:
    """The embedded default under `folder`, whatever `.env` lies in the working directory."""
    return Settings(_env_file=None, data_dir=folder, **values)  # pyright: ignore[reportCallIssue]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The embedded default: SQLite and a folder."""
    return make_settings(tmp_path / "data")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with Postgres.running() as server:
        yield server


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    with Valkey.running() as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[SeaweedFS]:
    with SeaweedFS.running() as server:
        yield server


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file at the newest schema, to copy."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    migrate.upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres_template(postgres: Postgres) -> str:
    """The name of a database at the newest schema, to copy."""
    url = postgres.create_database()
    migrate.upgrade(url)
    return url.rsplit("/", 1)[1]


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """A fresh SQLite database at the newest schema."""
    path = tmp_path / "fresh.db"
    shutil.copyfile(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture
def postgres_url(postgres: Postgres, postgres_template: str) -> Iterator[str]:
    """A fresh PostgreSQL database at the newest schema."""
    url = postgres.create_database(postgres_template)
    yield url
    postgres.drop_database(url)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.stack)])
def database_url(request: pytest.FixtureRequest) -> str:
    """A fresh database at the newest schema: once SQLite, once PostgreSQL."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """Once SQLite, once PostgreSQL."""
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture(scope="session")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """One base, known by its configs alone: for tests that never load it."""
    return make_catalog(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def s3_settings(seaweedfs: SeaweedFS, tmp_path: Path) -> Settings:
    """Settings whose object store is a fresh prefix of the S3 server."""
    return make_settings(tmp_path / "data", **_s3(seaweedfs))


@pytest.fixture(scope="session")
def new_stack(postgres: Postgres, valkey: Valkey, seaweedfs: SeaweedFS) -> Callable[[], dict[str, str]]:
    """The real stack as settings by name, for a service to start on: each time a database without tables, an empty
    prefix and a broker without messages. The last one's service has ended by then."""

    def make() -> dict[str, str]:
        valkey.flush()
        return {"database_url": postgres.create_database(), "broker_url": valkey.url, **_s3(seaweedfs)}

    return make


def _s3(seaweedfs: SeaweedFS) -> dict[str, str]:
    return {
        "object_store": f"s3://{seaweedfs.bucket}/{uuid4().hex}",
        "s3_endpoint_url": seaweedfs.endpoint,
        "s3_access_key_id": seaweedfs.access_key,
        "s3_secret_access_key": seaweedfs.secret_key,
    }

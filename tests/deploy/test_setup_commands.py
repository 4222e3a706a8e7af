"""The one-shot commands of an operator, as processes with nothing but their environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import select

from core.db.session import Database
from core.models import Tenant
from core.settings import Settings
from core.storage import open_store
from core.tenants import service as tenants
from tests.conftest import make_settings
from tests.servers import SeaweedFS


def run(module: str, *arguments: str, cwd: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    given = {f"DIFFFIT_{name.upper()}": value for name, value in settings.items()}
    environment = {**os.environ, **given, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_a_tenant_is_made_and_its_key_is_shown_once(sqlite_url: str, tmp_path: Path) -> None:
    made = run("core.tenants", "acme", cwd=tmp_path, database_url=sqlite_url)
    assert (made.returncode, made.stderr) == (0, "")
    database = Database(sqlite_url)
    with database.read() as session:
        assert tenants.authenticate(session, made.stdout.strip()).name == "acme"
    again = run("core.tenants", "acme", cwd=tmp_path, database_url=sqlite_url)
    assert (again.returncode, again.stdout) == (1, "")
    assert "exists already" in again.stderr
    with database.read() as session:
        assert session.scalars(select(Tenant.name)).all() == ["acme"]
    database.close()


def test_an_operator_lists_suspends_and_gives_another_key(sqlite_url: str, tmp_path: Path) -> None:
    def tell(*arguments: str) -> str:
        done = run("core.tenants", *arguments, cwd=tmp_path, database_url=sqlite_url)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    first = tell("acme").strip()
    second = tell("acme", "--new-key").strip()
    name, _, status, keys, seconds = tell("--list").strip().split("\t")
    assert (name, status, keys, seconds) == ("acme", "active", "2", "0")
    database = Database(sqlite_url)
    assert tell("acme", "--suspend") == "acme is suspended\n"
    with database.read() as session, pytest.raises(tenants.Suspended):
        tenants.authenticate(session, second)
    assert tell("acme", "--resume") == "acme is active\n"
    with database.read() as session:
        assert {tenants.authenticate(session, secret).name for secret in (first, second)} == {"acme"}
    database.close()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("nobody", "--suspend"), 1, "no tenant is named 'nobody'"),
        (("nobody", "--new-key"), 1, "no tenant is named 'nobody'"),
        ((), 2, "a tenant's name, or --list"),
        (("acme", "--list"), 2, "a tenant's name, or --list"),
    ],
)
def test_an_operator_is_told_what_was_wrong(
    sqlite_url: str, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = run("core.tenants", *arguments, cwd=tmp_path, database_url=sqlite_url)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr


@pytest.mark.stack
def test_the_bucket_is_made_where_there_is_none(seaweedfs: SeaweedFS, tmp_path: Path) -> None:
    values = {
        "object_store": "s3://a-new-bucket/objects",
        "s3_endpoint_url": seaweedfs.endpoint,
        "s3_access_key_id": seaweedfs.access_key,
        "s3_secret_access_key": seaweedfs.secret_key,
    }
    for _ in range(2):
        done = run("core.storage", cwd=tmp_path, **values)
        assert (done.returncode, done.stderr) == (0, "")
    settings: Settings = make_settings(tmp_path, **values)
    open_store(settings).put("key", b"x")
    assert open_store(settings).get("key") == b"x"

"""`difffit up` on a machine that is not ready: one clear line, nothing left running. Its life is in tests/e2e."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from core.db.session import Database
from core.local.bootstrap import bootstrap, key_file
from core.local.checks import CannotStart, lock_folder
from core.local.up import url_of
from core.settings import PACKAGED_BASE
from core.tenants import service as tenants


def start(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DIFFFIT_DATA_DIR": str(folder), "DIFFFIT_BASES": str(PACKAGED_BASE)}
    environment |= {f"DIFFFIT_{name.upper()}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "core.local.up"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def said(ended: subprocess.CompletedProcess[str]) -> str:
    """The one line that a start which cannot be says."""
    assert (ended.returncode, ended.stdout) == (1, "")
    [line] = ended.stderr.splitlines()
    return line


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = said(start(tmp_path / "data", port=str(port)))
    assert line == f"difffit: port {port} on 127.0.0.1 is taken; choose another --port"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    line = said(start(tmp_path / "file" / "data"))
    assert f"cannot write to the data folder {tmp_path / 'file' / 'data'}" in line
    assert "choose another --data-dir" in line


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    line = said(start(tmp_path / "data", bases=str(tmp_path / "no-such-base"), port="8399"))
    assert "a base model of DIFFFIT_BASES cannot be used" in line
    assert "no-such-base" in line


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        line = said(start(tmp_path))
    assert f"{tmp_path} is in use by a service that runs already (process {os.getpid()})" in line


def test_a_bad_setting_is_named_and_its_value_is_not(tmp_path: Path) -> None:
    line = said(start(tmp_path / "data", port="s3cret-in-the-wrong-place"))
    assert "DIFFFIT_PORT" in line
    assert "s3cret" not in line


def test_the_first_start_makes_a_tenant_and_a_key_that_opens(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    made = bootstrap(database, tmp_path)
    assert made == key_file(tmp_path)
    assert made.stat().st_mode & 0o777 == 0o600
    with database.read() as session:
        assert tenants.authenticate(session, made.read_text().strip()).name == "default"
    assert bootstrap(database, tmp_path) is None
    database.close()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8321"),
        ("0.0.0.0", "http://127.0.0.1:8321"),
        ("::1", "http://[::1]:8321"),
        ("::", "http://[::1]:8321"),
        ("box.local", "http://box.local:8321"),
    ],
)
def test_the_address_that_is_written_down_leads_here_from_this_machine(host: str, url: str) -> None:
    assert url_of(host, 8321) == url


def test_two_services_cannot_hold_one_folder(tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(CannotStart):
        lock_folder(tmp_path)

"""`difffit doctor` against the real API."""

import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from client.machine import Torch
from tests.client.conftest import Run, Service


@pytest.fixture(autouse=True)
def _no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import costs seconds."""
    monkeypatch.setattr("client.machine.find_torch", lambda: None)


def findings(out: str) -> set[tuple[str, ...]]:
    return {tuple(line.split()[:2]) for line in out.splitlines()}


def test_a_running_service_is_found_well(difffit: Run, monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> None:
    monkeypatch.setenv("DIFFFIT_BASES", str(tiny_base))
    found = findings(difffit("doctor").out)
    assert {("ok", "service"), ("ok", "database"), ("ok", "object_store"), ("ok", "key"), ("ok", "base")} <= found
    assert ("warn", "broker") in found  # none runs here, and jobs are accepted without one
    assert ("fail", "torch") in found


def test_what_fails_comes_with_advice(difffit: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFFIT_API_KEY", "dfk_wrong")
    monkeypatch.setenv("DIFFFIT_BASES", str(tmp_path / "no-base"))
    run = difffit("doctor")
    assert run.code == 1
    assert re.search(r"fail  key .*401 invalid_api_key.*; have .*python -m core.tenants NAME --new-key", run.out)
    assert re.search(r"fail  base .*set DIFFFIT_BASES to a DiTPipeline folder", run.out)


def test_the_settings_are_those_that_up_would_find(
    difffit: Run, monkeypatch: pytest.MonkeyPatch, tiny_base: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("client.machine.find_torch", lambda: Torch("2.13.0", 1, "cpu"))
    settings = {"BASES": tiny_base, "THREADS": 3, "DATA_DIR": "elsewhere", "PORT": ""}
    (tmp_path / ".env").write_text("".join(f"DIFFFIT_{name}={value}\n" for name, value in settings.items()))
    out = difffit("doctor").out
    assert "ok    base         tiny-dit, " in out
    assert "threads of a worker: 3" in out
    assert f"ok    data folder  {tmp_path / 'elsewhere'} will be made" in out
    assert re.search(rf"warn  data folder  other commands look .*export DIFFFIT_DATA_DIR={tmp_path / 'elsewhere'}", out)


def test_a_setting_that_up_would_refuse_is_named(difffit: Run, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DIFFFIT_THREADS=many\n")
    run = difffit("doctor")
    assert run.code == 1
    assert re.search(r"fail  settings     DIFFFIT_THREADS: .*; mend it in .env", run.out)
    assert ("ok", "key") in findings(run.out)


def test_the_port_that_up_would_take_is_looked_at(
    difffit: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DIFFFIT_URL")
    (tmp_path / ".difffit").mkdir()
    (tmp_path / ".difffit" / "url").write_text("http://127.0.0.1:9\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (tmp_path / ".env").write_text(f"DIFFFIT_PORT={port}\n")
        assert f"fail  port         {port} cannot be had" in difffit("doctor").out
    assert f"no answer from http://127.0.0.1:9; port {port} is free; start it: difffit up" in difffit("doctor").out


def test_another_program_at_the_address_is_said_to_be_one(difffit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/healthz" else 404)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("DIFFFIT_URL", f"http://127.0.0.1:{listening.server_port}")
        run = difffit("doctor")
        listening.shutdown()
        thread.join()
    assert run.code == 1
    assert ("fail", "ready") in findings(run.out)
    assert "Traceback" not in run.err


def test_a_service_elsewhere_needs_no_torch_here(
    difffit: Run, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFFIT_URL", service.url.replace("127.0.0.1", "127.1"))  # an address that looks like no other
    run = difffit("doctor")
    assert run.code == 0, run.out
    assert {("ok", "python"), ("ok", "packages"), ("ok", "service"), ("ok", "key")} <= findings(run.out)
    assert not {"torch", "base", "memory", "disk"} & {subject for _, subject in findings(run.out)}

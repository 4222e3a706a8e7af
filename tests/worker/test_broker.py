"""A broker that drops what is queued is refused at the start, by whoever rests on its queues."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.nudges import connect, refuse_eviction
from core.settings import BadSettings
from tests.processes import free_port
from tests.servers import Valkey

PROGRAMS = {
    "upkeep": ["-m", "worker.upkeep"],
    "worker": ["-m", "celery", "-A", "worker.app", "worker", "-Q", "datasets", "--pool", "solo"],
}


@pytest.fixture
def broker() -> Iterator[str]:
    with Valkey.running() as server:
        yield server.url


def set_policy(url: str, policy: str) -> None:
    with connect(url) as client:
        client.config_set("maxmemory-policy", policy)


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
def test_one_that_may_drop_queued_work_is_refused(broker: str, policy: str) -> None:
    set_policy(broker, policy)
    with pytest.raises(BadSettings, match=f"{policy}.*noeviction"):
        refuse_eviction(broker)


@pytest.mark.parametrize("policy", ["noeviction", "volatile-lru"])
def test_one_that_drops_nothing_or_what_has_an_end_is_taken(broker: str, policy: str) -> None:
    set_policy(broker, policy)
    refuse_eviction(broker)


def test_one_that_is_away_is_not_judged() -> None:
    refuse_eviction(f"redis://127.0.0.1:{free_port()}/0")


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_rests_on_it_does_not_start(broker: str, program: str, tmp_path: Path) -> None:
    set_policy(broker, "allkeys-lru")
    environment = {**os.environ, "DIFFFIT_BROKER_URL": broker, "DIFFFIT_DATA_DIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, *PROGRAMS[program]], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "set its maxmemory-policy to noeviction" in ended.stderr
    assert "Traceback" not in ended.stderr

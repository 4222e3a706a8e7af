"""A device worker's insides, driven in this process: no Celery, a tiny base, SQLite and a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from core.bases import Catalog
from core.db import migrate
from core.db.session import Database
from core.fresh import FreshObjects
from core.nudges import Nudges
from core.settings import Settings
from core.storage import open_store
from core.training.loop import Trainee
from tests.conftest import make_settings
from tests.diffusion.tiny import make_pipeline
from tests.worker.shop import Shop
from worker.runtime import Runtime
from worker.services import Services


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worker-bases") / "tiny-dit"
    make_pipeline(folder, classes=4)
    return folder


@pytest.fixture
def shop_settings(tmp_path: Path, tiny_base: Path) -> Settings:
    """A lease that ends at once when nobody extends it, and slices that never do."""
    return make_settings(tmp_path / "data", bases=[str(tiny_base)], lease_seconds=2, slice_seconds=600, threads=1)


@pytest.fixture
def shop(shop_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.setattr("worker.pump._LINGER_SECONDS", 0.2)  # nobody else makes work here
    with opened_shop(shop_settings) as shop:
        yield shop


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], Any]:
    """What is to happen before a job of this seed takes this step."""
    due: dict[tuple[int, int], Any] = {}
    real = Trainee.draw

    def draw(trainee: Trainee) -> Any:
        due.pop((trainee.spec.seed, trainee.state.step), lambda: None)()
        return real(trainee)

    monkeypatch.setattr(Trainee, "draw", draw)
    return due


@contextmanager
def opened_shop(shop_settings: Settings) -> Iterator[Shop]:
    """One tenant with one validated dataset, and a runtime to work on its jobs."""
    migrate.upgrade(shop_settings.database)
    store = open_store(shop_settings)
    services = Services(
        settings=shop_settings,
        database=Database(shop_settings.database),
        store=store,
        nudges=Nudges(shop_settings.broker),
        fresh=FreshObjects(shop_settings.broker, store),
        catalog=Catalog(shop_settings.bases),
        worker="this process",
    )
    runtime = Runtime(services)
    yield Shop.opened(services, runtime)
    runtime.close()
    services.nudges.close()
    services.fresh.close()
    services.database.close()

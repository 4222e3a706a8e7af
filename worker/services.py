"""What every worker process holds: settings, database, store, the words to say. Built on first use, never at import."""

import functools
import os
import platform
from dataclasses import dataclass

from core.bases import Catalog
from core.db.session import Database
from core.fresh import FreshObjects
from core.nudges import Nudges
from core.settings import Settings, get_settings
from core.storage import open_store
from core.storage.base import ObjectStore


@dataclass(frozen=True)
class Services:
    settings: Settings
    database: Database
    store: ObjectStore
    nudges: Nudges
    fresh: FreshObjects
    catalog: Catalog
    worker: str  # who holds a lease: host and process


@functools.cache
def get_services() -> Services:
    settings = get_settings()
    store = open_store(settings)
    return Services(
        settings=settings,
        database=Database(settings.database),
        store=store,
        nudges=Nudges(settings.broker),
        fresh=FreshObjects(settings.broker, store),
        catalog=Catalog(settings.bases),
        worker=f"{platform.node()}:{os.getpid()}",
    )

"""The API as an ASGI application; `python -m api` serves it. No torch here."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline

from api.errors import add_error_handlers
from api.gate import Gate
from api.metrics import Metrics
from api.middleware import DOCS_ASSETS, Authentication, Limits, Surroundings
from api.openapi import document
from api.rates import Buckets
from api.routes import ROUTERS
from api.services import Rouser, Services
from api.upload import MAX_UPLOADS
from api.watch import Watch
from core.bases import Catalog
from core.db.session import Database
from core.fresh import FreshObjects
from core.logs import configure_logs
from core.nudges import Nudges
from core.settings import Settings, get_settings
from core.storage import open_store

log = structlog.get_logger()

_DATABASE_WAIT_SECONDS = 1.5  # for a connection or a lock; then 503, which is there within 2 s

_ABOUT = """Adapt one frozen diffusion transformer to your images, then draw from many adapters in one batch.

Shapes are OpenAI's for files, fine-tuning and images, so that their clients work against this base URL.
Every error is `application/problem+json`. Every POST takes an `Idempotency-Key`.
"""


def create_app(settings: Settings | None = None) -> FastAPI:
    settings = settings or get_settings()
    configure_logs(settings.log_level)
    app = FastAPIOffline(  # /docs without a CDN: browsers in closed networks have none
        title="DiffFit",
        version="1",
        description=_ABOUT,
        lifespan=_lifespan,
        redoc_url=None,
        static_url=DOCS_ASSETS,
        generate_unique_id_function=_operation_id,
        redirect_slashes=False,
    )
    database = Database(settings.database, wait_seconds=_DATABASE_WAIT_SECONDS)
    nudges = Nudges(settings.broker)
    app.state.settings = settings
    app.state.database = database
    app.state.nudges = nudges
    app.state.catalog = Catalog(settings.bases)
    app.state.metrics = Metrics(database)
    app.state.buckets = Buckets(settings.requests_per_minute)
    app.state.uploads = Gate(MAX_UPLOADS, "uploads", code="too_many_uploads")
    app.state.streams = Gate(settings.max_streams, "event streams", code="too_many_streams")
    app.state.routes = [route for router in ROUTERS for route in router.routes]
    for router in ROUTERS:
        app.include_router(router)
    add_error_handlers(app)
    app.add_middleware(Limits, settings=settings)  # innermost: added first
    app.add_middleware(Authentication, api=app)
    app.add_middleware(Surroundings, api=app)
    app.openapi = lambda: document(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state = app.state
    state.rouser = Rouser(state.nudges)
    state.watch = Watch(state.database, state.settings.broker)
    await state.watch.start()
    store = open_store(state.settings)
    state.services = Services(
        settings=state.settings,
        database=state.database,
        store=store,
        catalog=state.catalog,
        nudges=state.nudges,
        fresh=FreshObjects(state.settings.broker, store),
        rouser=state.rouser,
        watch=state.watch,
        metrics=state.metrics,
    )
    threading.Thread(target=_warm, args=(state.catalog,), name="warm", daemon=True).start()
    try:
        yield
    finally:
        await state.watch.close()
        state.rouser.close()
        state.nudges.close()
        state.services.fresh.close()
        state.database.close()


def _warm(catalog: Catalog) -> None:
    """Read the bases' fingerprints before somebody waits for them."""
    try:
        log.info("bases.read", names=catalog.names())
    except Exception as error:
        log.warning("bases.unreadable", error=str(error))


def _operation_id(route: APIRoute) -> str:
    return route.name

"""For those who run the service. Open to all, so nothing here names a tenant."""

from collections.abc import Callable
from typing import Literal

from alembic.migration import MigrationContext
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from api.deps import ServicesDep
from api.metrics import release
from api.services import Services
from core.db import migrate
from core.errors import Unavailable

router = APIRouter(tags=["operations"])


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    version: str


class Check(BaseModel):
    status: Literal["ok", "failed"]
    detail: str | None = None


class Readiness(BaseModel):
    status: Literal["ready", "degraded", "unready"]
    checks: dict[str, Check]


@router.get("/healthz", summary="Whether the process lives")
def get_health() -> Health:
    return Health(version=release())


@router.get(
    "/readyz",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "Database, schema or object store fail."}},
    summary="Whether requests can be served",
)
def get_readiness(services: ServicesDep) -> JSONResponse:
    """Degraded still takes requests: jobs are accepted without a broker, and without a base everything but new work."""
    needed = {"database": _database, "schema": _schema, "object_store": _store}
    helpful = {"broker": _broker, "bases": _bases}
    checks = {name: _checked(check, services) for name, check in (needed | helpful).items()}
    failed = {name for name, check in checks.items() if check.status == "failed"}
    status = "unready" if failed & needed.keys() else "degraded" if failed else "ready"
    return JSONResponse(
        Readiness(status=status, checks=checks).model_dump(mode="json"), 503 if status == "unready" else 200
    )


@router.get("/metrics", response_class=Response, summary="For Prometheus")
def get_metrics(request: Request) -> Response:
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _checked(check: Callable[[Services], None], services: Services) -> Check:
    """What went wrong in our own words: a driver's message may hold addresses."""
    try:
        check(services)
    except Unavailable as error:
        return Check(status="failed", detail=str(error))
    except Exception as error:
        return Check(status="failed", detail=type(error).__name__)
    return Check(status="ok")


def _database(services: Services) -> None:
    services.database.ping()


def _schema(services: Services) -> None:
    with services.database.read() as session:
        version = MigrationContext.configure(session.connection()).get_current_revision()
    if migrate.is_behind(version):
        raise Unavailable(f"the schema is at version {version}, this code needs {migrate.head()}: run the migrations")


def _store(services: Services) -> None:
    services.store.ping()


def _broker(services: Services) -> None:
    if not services.nudges.ping():
        raise Unavailable("the broker does not answer; work is taken and starts when workers look for it")


def _bases(services: Services) -> None:
    services.catalog.names()

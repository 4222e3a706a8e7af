"""What Prometheus scrapes. No label carries a tenant's name or id."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from core.db.session import Database
from core.jobs.states import Status
from core.models import Dataset, Evaluation, Job, OutboxMessage, Sample

_METHODS = frozenset({"GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS"})


class Metrics:
    def __init__(self, database: Database) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self._requests = Counter("difffit_http_requests", "Requests answered.", labels, registry=self.registry)
        self._seconds = Histogram(
            "difffit_http_request_seconds", "Time to the end of the reply.", ("method", "route"), registry=self.registry
        )
        self.registry.register(_Rows(database))

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """`route` is the template, never the path: ids would make a series each."""
        method = method if method in _METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)


class _Rows(Collector):
    """Counts that the database knows, taken when somebody looks."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def describe(self) -> list[GaugeMetricFamily]:
        return []  # else registering would ask the database

    def collect(self) -> Iterator[GaugeMetricFamily]:
        try:
            with self._database.read() as session:
                found = list(_gauges(session))
        except SQLAlchemyError:
            found = []
        yield GaugeMetricFamily("difffit_database_up", "Whether the database answers.", value=float(bool(found)))
        yield from found


def _gauges(session: Session) -> Iterator[GaugeMetricFamily]:
    jobs = GaugeMetricFamily("difffit_jobs", "Fine-tuning jobs by status.", labels=["status"])
    by_status = select(Job.status, func.count()).group_by(Job.status)
    counts = {row[0]: row[1] for row in session.execute(by_status)}
    for status in Status:
        jobs.add_metric([status], counts.get(status, 0))
    yield jobs
    depth = GaugeMetricFamily("difffit_queue_depth", "Rows that wait for a worker.", labels=["queue"])
    waiting = {
        "datasets": select(func.count()).where(Dataset.status == "uploaded", Dataset.deleted_at.is_(None)),
        "train": select(func.count()).where(Job.status == Status.queued),
        "sample": select(func.count()).where(Sample.status == "queued"),
        "evaluate": select(func.count()).where(Evaluation.status == "queued"),
    }
    for queue, query in waiting.items():
        depth.add_metric([queue], session.scalar(query) or 0)
    yield depth
    unsent = session.scalar(select(func.count()).where(OutboxMessage.sent_at.is_(None))) or 0
    yield GaugeMetricFamily("difffit_outbox_unsent", "Nudges that have not gone out.", value=unsent)

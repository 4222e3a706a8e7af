"""What Prometheus scrapes. No label carries a tenant's name or id."""

import functools
import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, Info
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import ColumnElement, and_, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from core.db.session import Database, now
from core.jobs.states import Status
from core.models import Dataset, Evaluation, Job, OutboxMessage, Sample

_METHODS = frozenset({"GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS"})
_IMAGE_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@functools.cache
def release() -> str:
    """Of the installed package; a checkout that nobody has installed knows none."""
    try:
        return importlib.metadata.version("difffit-service")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


class Metrics:
    def __init__(self, database: Database) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self._requests = Counter("difffit_http_requests", "Requests answered.", labels, registry=self.registry)
        self._seconds = Histogram(
            "difffit_http_request_seconds", "Time to the end of the reply.", ("method", "route"), registry=self.registry
        )
        self._image_queue, self._image_compute = (
            Histogram(f"difffit_image_{part}_seconds", told, buckets=_IMAGE_SECONDS, registry=self.registry)
            for part, told in (("queue", "Wait of images for a place in a batch."), ("compute", "Their drawing."))
        )
        Info("difffit_build", "What runs here.", registry=self.registry).info({"version": release()})
        self.registry.register(_Rows(database))

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """`route` is the template, never the path: ids would make a series each."""
        method = method if method in _METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def drawn(self, stats: Mapping[str, Any] | None) -> None:
        """Of a reply that has images; `stats` are the row's."""
        for part, histogram in (("queue_ms", self._image_queue), ("compute_ms", self._image_compute)):
            if stats and part in stats:
                histogram.observe(stats[part] / 1000)


@dataclass(frozen=True)
class _Queue:
    """One kind of row that workers claim; `since` is when it came to wait, as well as its columns tell."""

    table: type[Dataset | Job | Sample | Evaluation]
    since: Any
    waits: ColumnElement[bool]
    is_held: ColumnElement[bool]


_QUEUES = {
    "datasets": _Queue(
        Dataset,
        Dataset.created_at,
        and_(Dataset.status == "uploaded", Dataset.deleted_at.is_(None), Dataset.lease_until.is_(None)),
        Dataset.status == "uploaded",
    ),
    # Its last change is the end of its last slice.
    "train": _Queue(Job, Job.updated_at, Job.status == Status.queued, Job.status == Status.running),
    "sample": _Queue(Sample, Sample.created_at, Sample.status == "queued", Sample.status == "running"),
    "evaluate": _Queue(
        Evaluation, Evaluation.created_at, Evaluation.status == "queued", Evaluation.status == "running"
    ),
}


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
    yield from _queues(session)
    unsent = session.scalar(select(func.count()).where(OutboxMessage.sent_at.is_(None))) or 0
    yield GaugeMetricFamily("difffit_outbox_unsent", "Nudges that have not gone out.", value=unsent)


def _queues(session: Session) -> Iterator[GaugeMetricFamily]:
    depth = GaugeMetricFamily("difffit_queue_depth", "Rows that wait for a worker.", labels=["queue"])
    oldest = GaugeMetricFamily("difffit_queue_oldest_seconds", "Wait of the oldest of them.", labels=["queue"])
    workers = GaugeMetricFamily("difffit_workers", "Workers that hold rows under a live lease.", labels=["queue"])
    moment = now(session)
    for name, queue in _QUEUES.items():
        count, first = session.execute(select(func.count(), func.min(queue.since)).where(queue.waits)).one()
        depth.add_metric([name], count)
        oldest.add_metric([name], max(0.0, (moment - first).total_seconds()) if first else 0.0)
        held = (queue.is_held, queue.table.lease_until >= moment)
        workers.add_metric([name], session.scalar(select(func.count(queue.table.worker.distinct())).where(*held)) or 0)
    yield from (depth, oldest, workers)

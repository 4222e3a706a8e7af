"""Edge of dataset validation: claim, check in a child process, write down the verdict."""

import json
import tempfile
from pathlib import Path

import structlog

from core import faults
from core.datasets import service as datasets
from core.datasets.service import ValidationPlan
from core.datasets.validation import Limits, validate
from core.errors import Unavailable
from core.storage import keys
from core.storage.base import ObjectMissing
from worker.app import app
from worker.heartbeat import Heartbeat
from worker.services import Services, get_services

log = structlog.get_logger()


@app.task(name="dataset.validate")
def validate_datasets() -> None:
    """Validate all that wait: a nudge means that there is something, not what."""
    services = get_services()
    settings = services.settings
    while True:
        with services.database.write() as session:
            plan = datasets.claim(session, services.worker, settings.lease_seconds)
        if plan is None:
            return
        faults.point("claimed")
        _validate(services, plan)


def _validate(services: Services, plan: ValidationPlan) -> None:
    """One dataset, under a lease that a thread keeps alive."""

    def extend() -> None:
        with services.database.write() as session:
            datasets.extend(session, plan, services.settings.lease_seconds)

    with structlog.contextvars.bound_contextvars(
        tenant_id=plan.tenant_id, dataset_id=plan.dataset_id, attempt=plan.attempt
    ):
        try:
            with Heartbeat(extend, services.settings.lease_seconds / 3), tempfile.TemporaryDirectory() as scratch:
                _check(services, plan, Path(scratch))
        except ObjectMissing:
            with services.database.write() as session:
                datasets.give_up(session, plan, code="file_lost", detail="the uploaded bytes are gone from the store")
        except Unavailable as error:
            log.warning("dataset.postponed", error=str(error))
            with services.database.write() as session:
                datasets.release(session, plan)
            raise


def _check(services: Services, plan: ValidationPlan, scratch: Path) -> None:
    archive, pack = scratch / "archive", scratch / "pack.zip"
    services.store.get_file(plan.object_key, archive)
    limits = Limits(max_archive_bytes=services.settings.max_upload_bytes, max_images=services.settings.max_images)
    report = validate(archive, pack, limits)

    pack_key = None
    if report.status == "processed":
        pack_key = keys.pack(plan.tenant_id, plan.dataset_id, plan.attempt)
        services.store.put_file(pack_key, pack, "application/zip")
    report_key = keys.report(plan.tenant_id, plan.dataset_id, plan.attempt)
    body = report.to_json()
    services.store.put(report_key, json.dumps(body).encode(), "application/json")
    faults.point("object_put")
    with services.database.write() as session:
        known = datasets.finish_validation(session, plan, body, pack_key, report_key)
    services.nudges.rouse()  # jobs may have waited for this
    log.info("dataset.validated", status=report.status, code=report.code, images=report.images, held=known)

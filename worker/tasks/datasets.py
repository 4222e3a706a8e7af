"""Edge of dataset validation: claim, check in a child process, write down the verdict."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
from sqlalchemy.orm import Session

from core import faults, leftovers
from core.datasets import service as datasets
from core.datasets.service import ValidationPlan
from core.datasets.validation import Limits, ScratchUnavailable, ValidationInterrupted, validate
from core.errors import Unavailable
from core.storage import keys, verified
from core.storage.base import CorruptObject, ObjectMissing
from worker.app import app, is_stopping
from worker.heartbeat import Heartbeat
from worker.outages import Transactions
from worker.services import Services, get_services

log = structlog.get_logger()


class _Stopping(Exception):
    """The worker shuts down."""


@app.task(name="dataset.validate")
def validate_datasets() -> None:
    """Validate all that wait: a nudge means that there is something, not what."""
    faults.point("received")
    validate_waiting(get_services())


def validate_waiting(services: Services) -> None:
    """Until none waits or the worker shuts down. What goes wrong ends the round, and upkeep nudges for the next."""
    settings = services.settings
    leftovers.clear(_scratch_folder(services))
    while not is_stopping():
        plan = _transactions(services).write(
            lambda session: datasets.claim(session, services.worker, settings.lease_seconds)
        )
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
            with Heartbeat(extend, services.settings.lease_seconds / 3), _scratch(services, plan) as scratch:
                _check(services, plan, scratch)
        except ObjectMissing:
            _give_up(services, plan, "file_lost", "the uploaded bytes are gone from the store")
        except CorruptObject as error:
            _give_up(services, plan, error.code, str(error))
        except _Stopping:
            log.info("dataset.given_back")
            _give_back(services, plan)
        except Unavailable as error:
            log.warning("dataset.postponed", error=str(error))
            _give_back(services, plan, counted=isinstance(error, ValidationInterrupted) and not is_stopping())
            raise


def _give_up(services: Services, plan: ValidationPlan, code: str, detail: str) -> None:
    _transactions(services).write_last(lambda session: datasets.give_up(session, plan, code=code, detail=detail))


def _give_back(services: Services, plan: ValidationPlan, *, counted: bool = False) -> None:
    def give_back(session: Session) -> None:
        if counted:
            datasets.interrupt(session, plan, services.settings.max_attempts)
        else:
            datasets.release(session, plan)

    _transactions(services).write_last(give_back)


def _transactions(services: Services) -> Transactions:
    """Nothing watches this worker for moves: its lease alone says that it lives."""
    return Transactions(services.database, services.settings.lease_seconds, moved=lambda: None)


def _scratch_folder(services: Services) -> Path:
    """On the data folder's disk: /tmp may be memory, and a dataset comes to gigabytes."""
    return services.settings.data_dir.absolute() / "scratch"


@contextmanager
def _scratch(services: Services, plan: ValidationPlan) -> Iterator[Path]:
    """A folder of this attempt's own; what a killed earlier one left goes first. Raises ScratchUnavailable."""
    folder = _scratch_folder(services) / f"{plan.dataset_id}-{plan.attempt}"
    for earlier in folder.parent.glob(f"{plan.dataset_id}-*"):
        shutil.rmtree(earlier, ignore_errors=True)
    try:
        folder.mkdir(parents=True, mode=0o700)
        yield folder
    except OSError as error:
        raise ScratchUnavailable(f"cannot work in the scratch folder: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(services: Services, plan: ValidationPlan, scratch: Path) -> None:
    archive, pack = scratch / "archive", scratch / "pack.zip"
    _fetch(services, plan, archive)
    limits = Limits(max_archive_bytes=services.settings.max_upload_bytes, max_images=services.settings.max_images)
    report = validate(archive, pack, limits, on_tick=_stop_if_told)

    pack_key = None
    if report.status == "processed":
        pack_key = keys.pack(plan.tenant_id, plan.dataset_id, plan.attempt)
        services.store.put_file(pack_key, pack, "application/zip")
    report_key = keys.report(plan.tenant_id, plan.dataset_id, plan.attempt)
    body = report.to_json()
    services.store.put(report_key, json.dumps(body).encode(), "application/json")
    faults.point("object_put")
    known = _transactions(services).write(
        lambda session: datasets.finish_validation(session, plan, body, pack_key, report_key)
    )
    services.nudges.rouse()  # jobs may have waited for this
    log.info("dataset.validated", status=report.status, code=report.code, images=report.images, held=known)


def _fetch(services: Services, plan: ValidationPlan, archive: Path) -> None:
    """The bytes that were uploaded and no others. Raises CorruptObject where the store keeps giving others."""
    try:
        verified.get_file(services.store, plan.object_key, plan.sha256, archive)
    except CorruptObject as error:
        message = "the stored bytes differ from what was uploaded; upload it again"
        raise CorruptObject(message, code="dataset_corrupt") from error


def _stop_if_told() -> None:
    if is_stopping():
        raise _Stopping

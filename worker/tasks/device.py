"""Edges of training, sampling and evaluation: all wake the same pump, which takes whatever waits."""

import structlog

from core import faults
from worker.app import app, is_stopping

log = structlog.get_logger()


@app.task(name="job.train")
def train_jobs() -> None:
    _pump()


@app.task(name="sample.draw")
def draw_samples() -> None:
    _pump()


@app.task(name="evaluation.measure")
def measure_evaluations() -> None:
    _pump()


def _pump() -> None:
    faults.point("received")
    # Here and not above: torch takes seconds and 400 MB, and Celery's parent imports this file too.
    from worker.pump import Pump  # noqa: PLC0415
    from worker.runtime import get_runtime  # noqa: PLC0415

    runtime = get_runtime()
    Pump(runtime).run()
    # With the broker away nobody could wake another pump: this one stays, or nothing would be drawn until it is back.
    has_said = False
    while not is_stopping() and not runtime.services.nudges.ping():
        if not has_said:
            log.warning("pump.stays", reason="the broker does not answer")
        has_said = True
        Pump(runtime).run()

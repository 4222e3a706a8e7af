"""Edges of training, sampling and evaluation: all wake the same pump, which takes whatever waits."""

from core import faults
from worker.app import app


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

    Pump(get_runtime()).run()

"""Edges of training and sampling: both wake the same pump, which takes whatever waits."""

from worker.app import app
from worker.pump import Pump
from worker.runtime import get_runtime


@app.task(name="job.train")
def train_jobs() -> None:
    Pump(get_runtime()).run()


@app.task(name="sample.draw")
def draw_samples() -> None:
    Pump(get_runtime()).run()

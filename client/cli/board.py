"""Jobs under way: bars on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from client.api import DiffFit
from client.cli.output import console, duration, say
from client.errors import ApiError, Unreachable
from client.follow import follow
from client.jobs import Job

_PLAIN_SECONDS = 10.0


class Board:
    """`with Board(names) as board: board.seen(jobs)`. `names` maps a job's id to what it is called here."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names
        self._valid: dict[str, float] = {}  # a validation loss comes every now and then: the last one stays
        self._said: dict[str, tuple[str, float]] = {}
        self._bars: dict[str, TaskID] = {}
        self._away = False
        self._live = Progress(
            TextColumn("{task.fields[name]}", markup=True),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[figures]}"),
            console=console,
            refresh_per_second=8,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def seen(self, jobs: Sequence[Job]) -> None:
        self._away = False
        for job in jobs:
            if job.progress.valid_loss is not None:
                self._valid[job.id] = job.progress.valid_loss
            if console.is_terminal:
                self._draw(job)
            else:
                self._tell(job)

    def away(self, error: Unreachable | ApiError) -> None:
        if not self._away:
            trouble = f"{error.base_url} does not answer" if isinstance(error, Unreachable) else str(error)
            say(f"{trouble}; jobs go on when it is back. Waiting …")
        self._away = True

    def _draw(self, job: Job) -> None:
        name = f"[bold]{escape(self._names.get(job.id, job.id))}"
        total = job.progress.total_steps
        if job.id not in self._bars:
            self._bars[job.id] = self._live.add_task("", total=total, name=name, figures="")
        done = total if job.status == "succeeded" and total else job.progress.step
        self._live.update(self._bars[job.id], completed=done, total=total, figures=escape(self._figures(job)))

    def _tell(self, job: Job) -> None:
        status, at = self._said.get(job.id, ("", 0.0))
        if status != job.status or (job.status == "running" and time.monotonic() - at >= _PLAIN_SECONDS):
            self._said[job.id] = (job.status, time.monotonic())
            say(f"{self._names.get(job.id, job.id)}: {self._figures(job)}")

    def _figures(self, job: Job) -> str:
        progress = job.progress
        if job.status == "failed":
            return f"failed: {job.trouble}"
        words = [job.status]
        if job.status == "queued" and job.queue_position:
            words.append(f"place {job.queue_position} in the queue")
        if job.status == "running" and job.phase and job.phase != "training":
            words.append(job.phase)
        if progress.step:
            words.append(f"step {progress.step}/{progress.total_steps or '?'}")
        if progress.train_loss is not None:
            words.append(f"loss {progress.train_loss:.4f}")
        if job.id in self._valid:
            words.append(f"validation {self._valid[job.id]:.4f}")
        if job.status == "running" and progress.steps_per_second:
            words.append(f"{progress.steps_per_second:.1f} steps/s")
        if job.status == "running" and progress.eta_seconds is not None:
            words.append(f"{duration(progress.eta_seconds)} left")
        return "  ".join(words)


def watch(client: DiffFit, names: Mapping[str, str]) -> list[Job]:
    """Show jobs until all have ended. Ctrl-C (KeyboardInterrupt) leaves them running."""
    with Board(names) as board:
        return follow(client, list(names), board.seen, away=board.away)

"""The device worker's loop: claim, denoise, train, deliver; sampling steps first.

A Celery task starts it and it returns after a slice or when nothing is left: messages stay short, and what a lost or
doubled one changes is nothing.
"""

import threading
import time

import structlog

from core import nudges
from core.evaluations import service as evaluations
from core.jobs import service as jobs
from core.samples import service as samples
from worker.app import is_stopping
from worker.drawing import Drawing
from worker.evaluating import Evaluating
from worker.heartbeat import Heartbeat
from worker.runtime import Runtime
from worker.slice import Slice

log = structlog.get_logger()

_DENOISE_PER_TRAIN = 8  # sampling goes first, but a training job moves on under any load
_LINGER_SECONDS = 1.0  # an idle pump waits so long for more before it returns


class Pump:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._services = runtime.services
        self._drawing = Drawing(runtime)
        self._slice: Slice | Evaluating | None = None
        self._trained_last = False
        self._roused = threading.Event()
        self._moved_at = time.monotonic()
        self._polled_at = 0.0

    def run(self) -> None:
        """Returns when there is nothing left to do, the slice is over, or the worker shuts down."""
        settings = self._services.settings
        listener = nudges.Listener(settings.broker, nudges.WORK, lambda _: self._roused.set())
        until = time.monotonic() + settings.slice_seconds
        idle_since = time.monotonic()
        try:
            with Heartbeat(self._beat, settings.lease_seconds / 3):
                while True:
                    over = time.monotonic() > until
                    if is_stopping():
                        self._wind_up()
                        return
                    # A slice may outlast the claiming time; requests for images are served for as long as it does.
                    self._claim(may_train=not over, may_sample=not over or self._slice is not None)
                    has_moved = self._work()
                    if has_moved or self._drawing.is_busy:
                        idle_since = self._moved_at = time.monotonic()
                    elif over or time.monotonic() - idle_since > _LINGER_SECONDS:
                        return
                    # Never without a wait where nothing moves: the threads that deliver need the interpreter.
                    if not has_moved and self._roused.wait(0.005 if self._drawing.is_busy else settings.poll_seconds):
                        self._roused.clear()
                        self._polled_at = 0.0
        finally:
            listener.close()

    def _claim(self, may_train: bool, may_sample: bool) -> None:
        """Look for work at most every poll, or at once when told that there is some."""
        settings = self._services.settings
        if time.monotonic() - self._polled_at < settings.poll_seconds and not self._roused.is_set():
            return
        self._roused.clear()
        self._polled_at = time.monotonic()
        if may_sample and settings.role != "train":
            self._drawing.claim()
        if may_train and settings.role != "sample" and self._slice is None:
            self._slice = self._claim_next()

    def _claim_next(self) -> Slice | Evaluating | None:
        """A job, unless the last slice was one and an evaluation waits: neither can starve the other."""
        claims = (
            (self._claim_evaluation, self._claim_job)
            if self._trained_last
            else (self._claim_job, self._claim_evaluation)
        )
        found = claims[0]() or claims[1]()
        if found is not None:
            self._trained_last = isinstance(found, Slice)
        return found

    def _claim_evaluation(self) -> Evaluating | None:
        with self._services.database.read() as session:
            if not evaluations.is_waiting(session, self._services.catalog):
                return None
        with self._services.database.write() as session:
            plan = evaluations.claim(
                session, self._services.worker, self._services.settings.lease_seconds, self._services.catalog
            )
        if plan is None:
            return None
        log.info("evaluation.claimed", evaluation_id=plan.evaluation_id, attempt=plan.attempt)
        return Evaluating(self._runtime, plan)

    def _claim_job(self) -> Slice | None:
        with self._services.database.read() as session:
            if not jobs.is_waiting(session, self._services.catalog):
                return None
        with self._services.database.write() as session:
            plan = jobs.claim(
                session, self._services.worker, self._services.settings.lease_seconds, self._services.catalog
            )
        if plan is None:
            return None
        log.info("job.claimed", job_id=plan.job_id, attempt=plan.attempt)
        return Slice(self._runtime, plan)

    def _work(self) -> bool:
        """A few denoising steps, then one training step. False when the device had nothing to do."""
        denoised = 0
        while denoised < _DENOISE_PER_TRAIN and self._drawing.step():
            denoised += 1
            self._drawing.harvest()
            if self._slice is None:
                break  # nothing waits for the device: look for new requests after every step
        self._drawing.harvest()
        if self._slice is None:
            return denoised > 0
        self._slice.advance()
        if self._slice.is_over:
            self._slice = None
            self._polled_at = 0.0
        return True

    def _wind_up(self) -> None:
        """The worker shuts down: checkpoint the job, finish the pictures that are under way."""
        if self._slice is not None:
            self._slice.hand_back()
            self._slice = None
        while self._drawing.is_busy:
            if not self._drawing.step():
                time.sleep(0.005)
            self._drawing.harvest()

    def _beat(self) -> None:
        """From the heartbeat's thread: what does not move is let go, for another worker to take."""
        settings = self._services.settings
        if time.monotonic() - self._moved_at > settings.stall_seconds:
            log.error("pump.stalled", seconds=settings.stall_seconds)
            return
        current = self._slice
        with self._services.database.write() as session:
            if current is not None:
                current.extend(session, settings.lease_seconds)
            samples.extend(session, self._drawing.plans(), settings.lease_seconds)

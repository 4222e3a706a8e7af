"""The device worker's loop: claim, denoise, train, deliver; sampling steps first.

A Celery task starts it and it returns after a slice or when nothing is left: messages stay short, and what a lost or
doubled one changes is nothing.
"""

import faulthandler
import os
import signal
import threading
import time

import structlog

from core import faults, nudges
from core.db.session import DATABASE_AWAY
from core.evaluations import service as evaluations
from core.samples import service as samples
from worker.app import is_stopping
from worker.cotraining import CoTraining
from worker.drawing import Drawing
from worker.evaluating import Evaluating
from worker.heartbeat import Heartbeat
from worker.runtime import Runtime

log = structlog.get_logger()

_DENOISE_PER_TRAIN = 8  # sampling goes first, but a training job moves on under any load
_SUSPECT_SECONDS = 0.5
_LINGER_SECONDS = 1.0  # an idle pump waits so long for more before it returns


class Pump:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._services = runtime.services
        self._drawing = Drawing(runtime)
        self._training = CoTraining(runtime)
        self._evaluating: Evaluating | None = None
        self._roused = threading.Event()
        self._polled_at = 0.0
        self._suspects_at = 0.0

    def run(self) -> None:
        """Returns when there is nothing left to do, the slice is over, or the worker shuts down."""
        settings = self._services.settings
        self._runtime.moved()
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
                    self._claim(may_train=not over, may_sample=not over or self._has_slice)
                    has_moved = self._work()
                    if has_moved or self._drawing.is_busy:
                        idle_since = time.monotonic()
                        self._runtime.moved()
                    elif over or time.monotonic() - idle_since > _LINGER_SECONDS:
                        return
                    # Never without a wait where nothing moves: the threads that deliver need the interpreter.
                    if not has_moved:
                        self._roused.wait(0.005 if self._drawing.is_busy else settings.poll_seconds)
        finally:
            listener.close()

    def _claim(self, may_train: bool, may_sample: bool) -> None:
        """Look for work at most every poll, or at once when told that there is some.

        Who waits for a picture waits for nothing else: with new ones here, jobs are looked for at the next poll.
        """
        settings = self._services.settings
        is_told = self._roused.is_set()
        is_due = time.monotonic() - self._polled_at >= settings.poll_seconds
        if not (is_told or is_due):
            return
        self._roused.clear()
        try:
            self._take(may_train, may_sample, is_told, is_due)
        except DATABASE_AWAY as error:
            log.warning("pump.claim_postponed", error=type(error).__name__)
            self._polled_at = time.monotonic() + _LINGER_SECONDS

    def _take(self, may_train: bool, may_sample: bool, is_told: bool, is_due: bool) -> None:
        settings = self._services.settings
        may_sample = may_sample and settings.role != "train"
        claimed = self._drawing.claim(is_told, self._may_take_suspect()) if may_sample else 0
        if claimed and not is_due:
            return
        self._polled_at = time.monotonic()
        if may_train and settings.role != "sample" and self._evaluating is None:
            self._claim_training()

    @property
    def _has_slice(self) -> bool:
        return self._evaluating is not None or not self._training.is_empty

    def _may_take_suspect(self) -> bool:
        """Of the requests for images, now and then: looking costs a statement, and others wait for their pictures."""
        moment = time.monotonic()
        if self._holds_suspect or moment - self._suspects_at < _SUSPECT_SECONDS:
            return False
        self._suspects_at = moment
        return True

    @property
    def _holds_suspect(self) -> bool:
        """Whether something is here that a worker died with. There is never a second: what kills workers then takes
        nobody's last try with it."""
        evaluating = self._evaluating is not None and self._evaluating.plan.crashes > 0
        return evaluating or self._training.holds_suspect or self._drawing.holds_suspect

    def _claim_training(self) -> None:
        """Jobs beside those that are here; else first an evaluation, where the last slice was of jobs.

        So neither can starve the other.
        """
        if self._runtime.rest.is_on:
            return
        if self._training.is_empty and self._runtime.trained_last and self._claim_evaluation():
            return
        while self._training.claim(suspects=not self._holds_suspect):
            self._runtime.trained_last = True
        if self._training.is_empty:
            self._claim_evaluation()

    def _claim_evaluation(self) -> bool:
        with self._services.database.read() as session:
            if not evaluations.is_waiting(session, self._services.catalog):
                return False
        with self._services.database.write() as session:
            plan = evaluations.claim(
                session,
                self._services.worker,
                self._services.settings.lease_seconds,
                self._services.catalog,
                suspects=not self._holds_suspect,
            )
        if plan is None:
            return False
        faults.point("claimed")
        log.info("evaluation.claimed", evaluation_id=plan.evaluation_id, attempt=plan.attempt)
        self._evaluating = Evaluating(self._runtime, plan)
        self._runtime.trained_last = False
        return True

    def _work(self) -> bool:
        """A few denoising steps, then one training step. False when the device had nothing to do."""
        denoised = 0
        while denoised < _DENOISE_PER_TRAIN and self._drawing.step():
            denoised += 1
            self._drawing.harvest()
            if not self._has_slice:
                break  # nothing waits for the device: look for new requests after every step
        self._drawing.harvest()
        if not self._has_slice:
            return denoised > 0
        self._training.advance(hasty=self._drawing.is_drawing)
        if self._evaluating is not None:
            self._evaluating.advance()
            if self._evaluating.is_over:
                self._evaluating = None
        if not self._has_slice:
            self._polled_at = 0.0
        return True

    def _wind_up(self) -> None:
        """The worker shuts down: checkpoint the jobs, finish the pictures that are under way."""
        self._training.hand_back()
        if self._evaluating is not None:
            self._evaluating.hand_back()
            self._evaluating = None
        while self._drawing.is_busy:
            self._runtime.moved()
            if not self._drawing.step():
                time.sleep(0.005)
            self._drawing.harvest()

    def _beat(self) -> None:
        """From the heartbeat's thread. A worker that hangs ends, for nobody else would end it.

        Celery starts another child in its place; what this one held is taken by whoever comes first after the lease.
        """
        settings = self._services.settings
        if time.monotonic() - self._runtime.moved_at > settings.stall_seconds:
            log.critical("pump.stalled", seconds=settings.stall_seconds)
            _die()
            return
        evaluating = self._evaluating
        with self._services.database.write() as session:
            self._training.extend(session, settings.lease_seconds)
            if evaluating is not None:
                evaluating.extend(session, settings.lease_seconds)
            samples.extend(session, self._drawing.plans(), settings.lease_seconds)


def _die() -> None:
    """At once, for what hangs would not let go; but say first where every thread is."""
    faulthandler.dump_traceback()
    os.kill(os.getpid(), signal.SIGKILL)

"""Where a job's training state comes from, and where it is kept."""

import hashlib
from typing import Any

import structlog
from sqlalchemy.orm import Session

from core import faults
from core.diffusion.base import Base
from core.errors import DomainError, Unavailable
from core.jobs import attempts
from core.jobs.claims import Plan, Saved
from core.storage import keys, verified
from core.storage.base import CorruptObject, ObjectMissing
from core.training import checkpoint
from core.training.continuing import continued, read_adapter, read_checkpoint
from core.training.data import TrainingData
from core.training.loop import start
from core.training.path import NumericPath
from core.training.trainee import Trainee, TrainState
from worker.runtime import Runtime

log = structlog.get_logger()


class StartUnreadable(DomainError):
    """What the job continues from is not there any more, or not as it was."""

    code = "start_unreadable"


def first_state(runtime: Runtime, base: Base, data: TrainingData, plan: Plan) -> TrainState:
    """At step 0: the base, or what the job continues from. Raises StartUnreadable."""
    origin = plan.start
    if origin is None:
        return start(base, data, plan.spec, runtime.moved)
    try:
        content = verified.get(runtime.services.store, origin.key, origin.sha256)
    except ObjectMissing as error:
        raise StartUnreadable(f"the bytes of {origin.id} are gone") from error
    except CorruptObject as error:
        raise StartUnreadable(f"the bytes of {origin.id} are not those that were stored") from error
    if origin.kind == "adapter":
        source = read_adapter(content, base, plan.spec)
    else:
        source = read_checkpoint(content, base, plan.spec, origin.classes)
    return continued(base, data, plan.spec, source, runtime.moved)


class Checkpoints:
    """Those of one attempt of a job."""

    def __init__(self, runtime: Runtime, plan: Plan) -> None:
        self._store, self._transactions, self._plan = runtime.services.store, runtime.transactions, plan
        self.latest = plan.checkpoint
        self.step = -1  # the latest's, once it has been read or written

    @property
    def resumes_at(self) -> int:
        """The step from which an attempt that loses its state goes on."""
        return 0 if self.latest is None else max(self.step, 0)

    def load(self, base: Base, training: TrainingData, path: NumericPath) -> tuple[TrainState, Saved] | None:
        """The newest that can be read; an unreadable one is dropped for the one before."""
        while self.latest is not None:
            try:
                data = verified.get(self._store, self.latest.key, self.latest.sha256)
                state = checkpoint.load(data, self._plan.spec.digest, training.digest, path, base.device)
                self.step = state.step
                return state, self.latest
            except DomainError as error:
                if isinstance(error, Unavailable):
                    raise
                log.warning("job.checkpoint_unreadable", key=self.latest.key, error=str(error))
            self.latest = self._transactions.write(lambda session: attempts.drop_checkpoint(session, self._plan))
        return None

    def save(self, trainee: Trainee, path: NumericPath, metrics: dict[str, Any]) -> None:
        """Object first, pointer second: a death between the two leaves an orphan, never a dangling pointer."""
        plan, step = self._plan, trainee.state.step
        data = checkpoint.dump(trainee.state, plan.spec.digest, trainee.data.digest, path)
        key = keys.checkpoint(plan.tenant_id, plan.job_id, plan.attempt, step)
        self._store.put(key, data)
        faults.point("object_put")
        digest = hashlib.sha256(data).hexdigest()

        def point(session: Session) -> None:
            faults.point("before_pointer_commit")
            attempts.add_checkpoint(session, plan, step=step, key=key, sha256=digest, size=len(data), metrics=metrics)

        self._transactions.write(point)
        faults.point("after_pointer_commit")
        self.latest, self.step = Saved(key, digest, metrics), step

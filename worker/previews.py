"""Pictures of a job's present state, drawn among the engine's other rows while the job trains on."""

import hashlib
import time
from concurrent.futures import Future

import structlog

from core.jobs import attempts
from core.jobs.claims import Plan
from core.sampling.request import AdapterPart, SampleRequest
from core.sampling.row import Sampled
from core.storage import keys
from core.training.loop import finish
from core.training.trainee import Trainee
from worker.pictures import encode_png, strip
from worker.runtime import Runtime

log = structlog.get_logger()

_SEED = 1000  # previews of every step and of every job start from the same noises


class Previews:
    """Those of one attempt of a job. A preview that fails costs a preview, not the job."""

    def __init__(self, runtime: Runtime, plan: Plan) -> None:
        self._runtime, self._plan = runtime, plan
        self._engine = runtime.device(plan.model).engine
        self._drawn: list[tuple[int, list[Future[Sampled]]]] = []

    def draw(self, trainee: Trainee) -> None:
        """Put the state's pictures among the engine's rows."""
        spec, step = self._plan.spec, trainee.state.step
        adapter = finish(trainee.state, trainee.base, spec, trainee.data)
        digest = self._digest(step)
        self._runtime.hold(digest, adapter)
        futures = [
            self._engine.submit(
                SampleRequest(
                    id=f"{digest}/{label}",
                    tenant=self._plan.tenant_id,
                    adapters=(AdapterPart(digest, 1.0, label),),
                    seed=_SEED + label,
                    steps=spec.preview_steps,
                    size=spec.image_size,
                )
            )
            for label in range(min(len(adapter.classes), spec.preview_images))
        ]
        self._drawn.append((step, futures))

    def harvest(self, classes: tuple[str, ...], wait_seconds: float = 0.0) -> None:
        """Store what is drawn, or is within so many seconds."""
        until = time.monotonic() + wait_seconds
        while time.monotonic() < until and any(not future.done() for _, futures in self._drawn for future in futures):
            if self._engine.step():
                self._runtime.moved()
            else:
                self._engine.wait(0.01)
        done = [item for item in self._drawn if all(future.done() for future in item[1])]
        self._drawn = [item for item in self._drawn if item not in done]
        for step, futures in done:
            self._runtime.let_go(self._digest(step))
            try:
                self._store(classes, step, [future.result() for future in futures])
            except Exception:
                log.exception("job.preview_failed", step=step)

    def drop(self) -> None:
        """Those that are not drawn yet will not be."""
        for step, futures in self._drawn:
            self._runtime.let_go(self._digest(step))
            for future in futures:
                future.cancel()
        self._drawn = []

    def _digest(self, step: int) -> str:
        return f"preview:{self._plan.job_id}:{self._plan.attempt}:{step}"

    def _store(self, classes: tuple[str, ...], step: int, sampled: list[Sampled]) -> None:
        plan = self._plan
        data = encode_png(strip([result.image for result in sampled]))
        key = keys.preview(plan.tenant_id, plan.job_id, plan.attempt, step)
        self._runtime.services.store.put(key, data, "image/png")
        labels = range(len(sampled))
        self._runtime.transactions.write(
            lambda session: attempts.add_preview(
                session,
                plan,
                step=step,
                key=key,
                sha256=hashlib.sha256(data).hexdigest(),
                size=len(data),
                classes=[classes[label] for label in labels],
                seeds=[_SEED + label for label in labels],
            )
        )

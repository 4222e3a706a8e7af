"""Fine-tuning jobs: what one asks for, and how it goes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from client.errors import ApiError, Unreachable, trouble_of
from client.patience import wait
from client.transport import Transport

_JOBS = "/v1/fine_tuning/jobs"
ENDED = frozenset({"succeeded", "failed", "cancelled"})
_LONGEST_PAUSE = 4  # as the transport counts: some 4 s, so that 20 of them outlast the restart of a service


@dataclass(frozen=True)
class Progress:
    """Where a running job is. Losses are means per element; `eta_seconds` counts this job's own work alone."""

    step: int = 0
    total_steps: int | None = None
    train_loss: float | None = None
    valid_loss: float | None = None
    steps_per_second: float | None = None
    eta_seconds: float | None = None


@dataclass(frozen=True)
class Job:
    id: str
    status: str  # validating_files | queued | running | paused | succeeded | failed | cancelled
    phase: str | None
    model: str
    training_file: str
    fine_tuned_model: str | None
    adapter_id: str | None
    progress: Progress
    queue_position: int | None
    error: Mapping[str, Any] | None
    metadata: Mapping[str, str]
    hyperparameters: Mapping[str, Any]  # as resolved, "auto" filled in
    seed: int | None
    created_at: int
    finished_at: int | None
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def trouble(self) -> str | None:
        """Why it failed, in a line."""
        return trouble_of(self.error)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Job":
        hyperparameters = data["method"]["difffit"]["hyperparameters"]
        return cls(
            id=data["id"],
            status=data["status"],
            phase=data.get("phase"),
            model=data["model"],
            training_file=data["training_file"],
            fine_tuned_model=data.get("fine_tuned_model"),
            adapter_id=data.get("adapter_id"),
            progress=_progress(data.get("progress") or {}, hyperparameters.get("steps")),
            queue_position=(data.get("queue") or {}).get("position"),
            error=data.get("error") or None,
            metadata=data.get("metadata") or {},
            hyperparameters=hyperparameters,
            seed=data.get("seed"),
            created_at=data["created_at"],
            finished_at=data.get("finished_at"),
            raw=data,
        )


@dataclass(frozen=True)
class Event:
    id: str
    created_at: int
    level: str
    type: str
    message: str
    data: Mapping[str, Any]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Event":
        words = {name: str(data.get(name)) for name in ("level", "type", "message")}
        return cls(str(data["id"]), data["created_at"], **words, data=data.get("data") or {})


@dataclass(frozen=True)
class Preview:
    """A strip of pictures that the job drew at `step`: one a class, left to right, from seeds that stay the same."""

    id: str
    step: int
    classes: Sequence[str | None]
    seeds: Sequence[int]


class Jobs:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        training_file: str,
        *,
        model: str,
        hyperparameters: Mapping[str, Any] | None = None,
        suffix: str | None = None,
        seed: int | None = None,
        metadata: Mapping[str, str] | None = None,
        evaluate: bool = False,
        checkpoint: str | None = None,
        previews: bool | Mapping[str, int] | None = None,
    ) -> Job:
        """Queue a fine-tune of `model` on a file; what `hyperparameters` leaves out is chosen by the service.

        A tuned `model` (`ft:…`), or the id of a `checkpoint` beside a base, is continued from.

        With `evaluate` the adapter is measured against the pictures that training held out, once it is there.
        `previews` says how often (`every`, in steps), how many (`images`) and how finely (`steps`) the job draws on the
        way; False draws none.
        """
        body: dict[str, Any] = {"model": model, "training_file": training_file}
        optional: dict[str, Any] = {"checkpoint": checkpoint, "suffix": suffix, "seed": seed}
        optional["metadata"] = dict(metadata) if metadata else None
        optional["previews"] = dict(previews) if isinstance(previews, Mapping) else previews
        body |= {key: value for key, value in optional.items() if value is not None}
        if evaluate:
            body["evaluate"] = True
        if hyperparameters:
            body["method"] = {"type": "difffit", "difffit": {"hyperparameters": dict(hyperparameters)}}
        return Job.from_json(self._transport.post(_JOBS, body))

    def get(self, job_id: str) -> Job:
        return Job.from_json(self._transport.get(f"{_JOBS}/{job_id}"))

    def list(self, limit: int | None = None, metadata: Mapping[str, str] | None = None) -> Iterator[Job]:
        """Newest first; with `metadata` those that have every one of these labels."""
        asked = {f"metadata[{name}]": value for name, value in (metadata or {}).items()}
        return (Job.from_json(item) for item in self._transport.page(_JOBS, limit=limit, **asked))

    def cancel(self, job_id: str) -> Job:
        return Job.from_json(self._transport.post(f"{_JOBS}/{job_id}/cancel"))

    def pause(self, job_id: str) -> Job:
        return Job.from_json(self._transport.post(f"{_JOBS}/{job_id}/pause"))

    def resume(self, job_id: str) -> Job:
        return Job.from_json(self._transport.post(f"{_JOBS}/{job_id}/resume"))

    def events(self, job_id: str, *, after: str | None = None, retries: int = 20) -> Iterator[Event]:
        """Every event in order, as it happens, until the job has ended; a broken stream is taken up where it broke.

        Raises Unreachable or ApiError where it breaks more than `retries` times with nothing new between.
        """
        last, broken = after, 0
        while True:
            headers = {"Last-Event-ID": last} if last else {}
            try:
                for number, data in self._transport.events("GET", f"{_JOBS}/{job_id}/events", headers=headers):
                    last, broken = number or last, 0
                    yield Event.from_json({"id": number, **data})
                if self.get(job_id).has_ended:
                    return
                broken = 0
                self._transport.pause(1)
            except (Unreachable, ApiError) as error:
                if broken == retries or not error.is_passing:
                    raise
                self._transport.pause(min(broken, _LONGEST_PAUSE), error.retry_after)
                broken += 1

    def metrics(self, job_id: str) -> Sequence[dict[str, Any]]:
        """`{step, train_loss, valid_loss, …}` in order of steps."""
        found = self._transport.page(f"{_JOBS}/{job_id}/metrics")
        return [{**item, **item["data"]} for item in found]

    def checkpoints(self, job_id: str) -> Sequence[dict[str, Any]]:
        return list(self._transport.page(f"{_JOBS}/{job_id}/checkpoints"))

    def previews(self, job_id: str) -> Sequence[Preview]:
        """In order of steps."""
        found = [
            Preview(item["id"], item["step"], item.get("classes") or [], item.get("seeds") or [])
            for item in self._transport.page(f"{_JOBS}/{job_id}/previews")
        ]
        return sorted(found, key=lambda preview: preview.step)

    def preview(self, job_id: str, preview_id: str) -> bytes:
        """The PNG."""
        return self._transport.read(f"{_JOBS}/{job_id}/previews/{preview_id}/content")

    def wait(self, job_id: str, timeout: float = 3600.0) -> Job:
        """Until the job has ended, well or not. Raises StillUnderWay after `timeout` seconds."""
        return wait(
            lambda: self.get(job_id), lambda job: job.has_ended, lambda job: f"job {job_id} is {job.status}", timeout
        )


def _progress(data: dict[str, Any], steps: Any) -> Progress:
    total = data.get("total_steps") or (steps if isinstance(steps, int) else None)
    return Progress(
        step=data.get("step") or 0,
        total_steps=total,
        train_loss=data.get("train_loss"),
        valid_loss=data.get("valid_loss"),
        steps_per_second=data.get("steps_per_second"),
        eta_seconds=data.get("eta_seconds"),
    )

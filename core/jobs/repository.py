import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from core.db.labels import having
from core.db.page import Page, newest_first
from core.errors import NotFound
from core.jobs.states import Status
from core.models import Checkpoint, Job, JobEvent, JobMetric, Preview

CHECKPOINT_NAME = re.compile(r"(?P<job>ftjob-[0-9a-z]+):ckpt-step-(?P<step>[0-9]{1,9})")


class JobRepository:
    """One tenant's jobs and what belongs to them. There is no way to ask it about another tenant's."""

    def __init__(self, session: Session, tenant_id: str) -> None:
        self._session = session
        self._tenant_id = tenant_id

    def get(self, job_id: str, pointer: str | None = None, *, lock: bool = False) -> Job:
        """`lock` keeps the row as it is until the transaction ends; SQLite has no need, its writers are alone."""
        query = self._own().where(Job.id == job_id)
        if lock:
            query = query.with_for_update(key_share=True).execution_options(populate_existing=True)
        found = self._session.scalar(query)
        if found is None:
            raise NotFound(f"no fine-tuning job {job_id}", pointer=pointer)
        return found

    def list_newest(
        self, after: str | None, limit: int, labels: Mapping[str, str] | None = None, status: Status | None = None
    ) -> Page[Job]:
        """All, or those with these labels and in this state: an empty mapping asks for those that have no label."""
        last = self.get(after, pointer="/after") if after else None
        query = self._own() if labels is None else self._own().where(*having(self._session, Job.labels, labels))
        query = query if status is None else query.where(Job.status == status)
        return newest_first(self._session, query, Job, last, limit)

    def list_events(self, job_id: str, before: int | None, limit: int) -> Page[JobEvent]:
        """Newest first; `before` is the id of the last one that the caller has."""
        query = self._of(JobEvent, job_id)
        if before is not None:
            query = query.where(JobEvent.id < before)
        rows = list(self._session.scalars(query.order_by(JobEvent.id.desc()).limit(limit + 1)))
        return Page(rows[:limit], len(rows) > limit)

    def list_events_since(self, job_id: str, since: int, limit: int = 200) -> list[JobEvent]:
        """Oldest first, after id `since`: what a stream sends next."""
        query = self._of(JobEvent, job_id).where(JobEvent.id > since)
        return list(self._session.scalars(query.order_by(JobEvent.id).limit(limit)))

    def list_metrics(self, job_id: str, since_step: int, limit: int) -> list[JobMetric]:
        """In order of steps, after `since_step`."""
        query = self._of(JobMetric, job_id).where(JobMetric.step > since_step)
        return list(self._session.scalars(query.order_by(JobMetric.step).limit(limit)))

    def list_checkpoints(self, job_id: str) -> list[Checkpoint]:
        return list(self._session.scalars(self._of(Checkpoint, job_id).order_by(Checkpoint.step.desc())))

    def get_checkpoint(self, name: str, pointer: str | None = None) -> tuple[Job, Checkpoint]:
        """By its id or by `<job>:ckpt-step-<step>`, with the job that it belongs to."""
        if parts := CHECKPOINT_NAME.fullmatch(name):
            named = (Checkpoint.job_id == parts["job"], Checkpoint.step == int(parts["step"]))
        else:
            named = (Checkpoint.id == name,)
        found = self._session.scalar(select(Checkpoint).where(Checkpoint.tenant_id == self._tenant_id, *named))
        if found is None:
            raise NotFound(f"no checkpoint {name}", pointer=pointer)
        return self.get(found.job_id), found

    def list_previews(self, job_id: str) -> list[Preview]:
        return list(self._session.scalars(self._of(Preview, job_id).order_by(Preview.step)))

    def get_preview(self, job_id: str, preview_id: str) -> Preview:
        found = self._session.scalar(self._of(Preview, job_id).where(Preview.id == preview_id))
        if found is None:
            raise NotFound(f"no preview {preview_id} of job {job_id}")
        return found

    def _own(self) -> Select[Job]:
        return select(Job).where(Job.tenant_id == self._tenant_id)

    def _of(self, table: Any, job_id: str) -> Select[Any]:
        self.get(job_id)  # someone else's job is not found, and so is what belongs to it
        return select(table).where(table.job_id == job_id, table.tenant_id == self._tenant_id)

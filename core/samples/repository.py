from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from core.db.page import Page, newest_first
from core.errors import NotFound
from core.models import Sample


class SampleRepository:
    """One tenant's image requests. There is no way to ask it about another tenant's."""

    def __init__(self, session: Session, tenant_id: str) -> None:
        self._session = session
        self._tenant_id = tenant_id

    def get(self, sample_id: str, pointer: str | None = None) -> Sample:
        found = self._session.scalar(self._own().where(Sample.id == sample_id))
        if found is None:
            raise NotFound(f"no image generation {sample_id}", pointer=pointer)
        return found

    def list_newest(self, after: str | None, limit: int) -> Page[Sample]:
        last = self.get(after, pointer="/after") if after else None
        return newest_first(self._session, self._own(), Sample, last, limit)

    def _own(self) -> Select[Sample]:
        return select(Sample).where(Sample.tenant_id == self._tenant_id)

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from core.db.page import Page, newest_first
from core.errors import NotFound
from core.models import Dataset


class DatasetRepository:
    """One tenant's datasets. There is no way to ask it about another tenant's."""

    def __init__(self, session: Session, tenant_id: str) -> None:
        self._session = session
        self._tenant_id = tenant_id

    def get(self, dataset_id: str, pointer: str | None = None, *, lock: bool = False) -> Dataset:
        """`lock` keeps the row as it is until the transaction ends; SQLite has no need, its writers are alone."""
        query = self._own().where(Dataset.id == dataset_id)
        if lock:
            query = query.with_for_update(key_share=True).execution_options(populate_existing=True)
        found = self._session.scalar(query)
        if found is None:
            raise NotFound(f"no file {dataset_id}", pointer=pointer)
        return found

    def list_newest(self, after: str | None, limit: int) -> Page[Dataset]:
        last = self.get(after, pointer="/after") if after else None
        return newest_first(self._session, self._own(), Dataset, last, limit)

    def _own(self) -> Select[Dataset]:
        return select(Dataset).where(Dataset.tenant_id == self._tenant_id, Dataset.deleted_at.is_(None))

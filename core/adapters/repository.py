from collections.abc import Mapping

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from core.db.labels import having
from core.db.page import Page, newest_first
from core.errors import NotFound
from core.models import Adapter


class AdapterRepository:
    """One tenant's adapters. There is no way to ask it about another tenant's."""

    def __init__(self, session: Session, tenant_id: str) -> None:
        self._session = session
        self._tenant_id = tenant_id

    def get(self, adapter_id: str, pointer: str | None = None) -> Adapter:
        found = self._session.scalar(self._own().where(Adapter.id == adapter_id))
        if found is None:
            raise NotFound(f"no adapter {adapter_id}", pointer=pointer)
        return found

    def lock(self, adapter_id: str) -> Adapter:
        """As `get`, and nobody else changes it before this transaction ends."""
        query = self._own().where(Adapter.id == adapter_id).with_for_update()
        found = self._session.scalar(query.execution_options(populate_existing=True))
        if found is None:
            raise NotFound(f"no adapter {adapter_id}")
        return found

    def find_model(self, model: str) -> Adapter | None:
        """By its model name `ft:…`."""
        return self._session.scalar(self._own().where(Adapter.model == model))

    def list_newest(self, after: str | None, limit: int, labels: Mapping[str, str] | None = None) -> Page[Adapter]:
        """All, or those with these labels: an empty mapping asks for those that have none."""
        last = self.get(after, pointer="/after") if after else None
        query = self._own() if labels is None else self._own().where(*having(self._session, Adapter.labels, labels))
        return newest_first(self._session, query, Adapter, last, limit)

    def list_all(self) -> list[Adapter]:
        return list(self._session.scalars(self._own().order_by(Adapter.created_at, Adapter.id)))

    def names_of(self, adapter_ids: list[str]) -> dict[str, str]:
        """Model names by id, of deleted adapters too: a job goes on naming what it made."""
        mine = (Adapter.tenant_id == self._tenant_id, Adapter.id.in_(adapter_ids))
        return {row[0]: row[1] for row in self._session.execute(select(Adapter.id, Adapter.model).where(*mine))}

    def _own(self) -> Select[Adapter]:
        return select(Adapter).where(Adapter.tenant_id == self._tenant_id, Adapter.deleted_at.is_(None))

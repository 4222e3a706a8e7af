from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from core.db.page import Page, newest_first
from core.errors import NotFound
from core.models import Evaluation


class EvaluationRepository:
    """One tenant's evaluations. There is no way to ask it about another tenant's."""

    def __init__(self, session: Session, tenant_id: str) -> None:
        self._session = session
        self._tenant_id = tenant_id

    def get(self, evaluation_id: str, pointer: str | None = None) -> Evaluation:
        found = self._session.scalar(self._own().where(Evaluation.id == evaluation_id))
        if found is None:
            raise NotFound(f"no evaluation {evaluation_id}", pointer=pointer)
        return found

    def list_newest(self, after: str | None, limit: int) -> Page[Evaluation]:
        last = self.get(after, pointer="/after") if after else None
        return newest_first(self._session, self._own(), Evaluation, last, limit)

    def _own(self) -> Select[Evaluation]:
        return select(Evaluation).where(Evaluation.tenant_id == self._tenant_id)

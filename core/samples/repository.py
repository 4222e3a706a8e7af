from sqlalchemy import select
from sqlalchemy.orm import Session

from core.errors import NotFound
from core.models import Sample


class SampleRepository:
    """One tenant's image requests. There is no way to ask it about another tenant's."""

    def __init__(self, session: Session, tenant_id: str) -> None:
        self._session = session
        self._tenant_id = tenant_id

    def get(self, sample_id: str) -> Sample:
        own = select(Sample).where(Sample.tenant_id == self._tenant_id, Sample.id == sample_id)
        found = self._session.scalar(own)
        if found is None:
            raise NotFound(f"no image generation {sample_id}")
        return found

"""The verbs of an adapter: named after its job, deleted softly so that running samples end on their digest."""

from sqlalchemy.orm import Session

from core import faults
from core.adapters.repository import AdapterRepository
from core.db.session import now
from core.models import Adapter, Tenant


def model_name(tenant: Tenant, base: str, suffix: str | None, adapter_id: str) -> str:
    """`ft:<base>:<tenant>:<suffix>:<id>`, as OpenAI names its tuned models."""
    return f"ft:{base}:{tenant.name}:{suffix or ''}:{adapter_id.removeprefix('adapter-')}"


def update_adapter(session: Session, tenant_id: str, adapter_id: str, labels: dict[str, str]) -> Adapter:
    adapter = AdapterRepository(session, tenant_id).get(adapter_id)
    adapter.labels = labels
    session.flush()
    return adapter


def delete_adapter(session: Session, tenant_id: str, adapter_id: str) -> Adapter:
    """Hide it now; upkeep removes its bytes once requests that were under way have ended."""
    adapter = AdapterRepository(session, tenant_id).get(adapter_id)
    adapter.deleted_at = now(session)
    faults.point("tombstoned")
    return adapter

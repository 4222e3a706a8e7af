"""Whether a tenant may add something now. Its key was looked at before its request was read, which may be long ago."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.models import Tenant
from core.tenants.service import Suspended


def admit(session: Session, tenant_id: str) -> None:
    """Lock the tenant until this transaction ends. Raises Suspended.

    So two requests at once cannot both be the last that fits, and nothing is added behind the back of whoever suspends
    or deletes the tenant.
    """
    own = select(Tenant.status).where(Tenant.id == tenant_id).with_for_update(key_share=True)
    if session.scalar(own) != "active":
        raise Suspended

"""Tenants and their keys. A key's secret is shown once; the database holds its digest."""

import hashlib
import re
import secrets
from dataclasses import dataclass

from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session

from core.db.page import Page, newest_first
from core.db.session import now
from core.errors import Conflict, DomainError, Invalid, NotFound
from core.models import ApiKey, Tenant

_PREFIX = "dfk_"


class Unauthenticated(DomainError):
    """No key, or one that opens nothing."""

    code = "invalid_api_key"


class Suspended(DomainError):
    code = "tenant_suspended"

    def __init__(self) -> None:
        super().__init__("this tenant is suspended: ask the operator")


@dataclass(frozen=True)
class NewKey:
    key: ApiKey
    secret: str  # never stored, never logged


_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def create_tenant(session: Session, name: str) -> Tenant:
    """Raises Invalid for a name that could not stand in a model's name, Conflict for one that is taken."""
    if not _NAME.fullmatch(name):
        message = f"a tenant's name is 1 to 63 of a-z, 0-9 and '-', not {name!r}"
        raise Invalid(message, code="bad_tenant_name", pointer="/name")
    if session.scalar(select(Tenant.id).where(Tenant.name == name)) is not None:
        raise Conflict(f"a tenant named {name!r} exists already", code="tenant_exists", pointer="/name")
    tenant = Tenant(name=name)
    session.add(tenant)
    session.flush()
    return tenant


def find_tenant(session: Session, name: str) -> Tenant:
    """Raises NotFound."""
    tenant = session.scalar(select(Tenant).where(Tenant.name == name))
    if tenant is None:
        raise NotFound(f"no tenant is named {name!r}")
    return tenant


def list_tenants(session: Session) -> list[tuple[Tenant, int]]:
    """All of them by name, each with the number of its live keys."""
    live = and_(ApiKey.tenant_id == Tenant.id, ApiKey.revoked_at.is_(None))
    query = select(Tenant, func.count(ApiKey.id)).outerjoin(ApiKey, live).group_by(Tenant.id).order_by(Tenant.name)
    return [(tenant, count) for tenant, count in session.execute(query)]


def create_key(session: Session, tenant_id: str, name: str) -> NewKey:
    secret = _PREFIX + secrets.token_urlsafe(32)
    key = ApiKey(tenant_id=tenant_id, name=name, prefix=secret[: len(_PREFIX) + 4], digest=_digest(secret))
    session.add(key)
    session.flush()
    return NewKey(key, secret)


def authenticate(session: Session, secret: str) -> Tenant:
    """The tenant whose key this is. Raises Unauthenticated or Suspended."""
    found = session.execute(
        select(Tenant)
        .join(ApiKey, ApiKey.tenant_id == Tenant.id)
        .where(ApiKey.digest == _digest(secret), ApiKey.revoked_at.is_(None))
    ).scalar_one_or_none()
    if found is None:
        raise Unauthenticated("the API key is unknown or revoked: send 'Authorization: Bearer dfk_…' with a live key")
    if found.status != "active":
        raise Suspended
    return found


def list_keys(session: Session, tenant_id: str, after: str | None, limit: int) -> Page[ApiKey]:
    """Newest first, the revoked ones too."""
    last = _get_key(session, tenant_id, after, pointer="/after") if after else None
    own = select(ApiKey).where(ApiKey.tenant_id == tenant_id)
    return newest_first(session, own, ApiKey, last, limit)


def revoke_key(session: Session, tenant_id: str, key_id: str) -> ApiKey:
    """Dead at once. The last live key stays: without one nobody could make another. Raises NotFound or Conflict."""
    # Two keys that revoke each other meet here: the second waits, and finds itself the last.
    session.execute(select(Tenant.id).where(Tenant.id == tenant_id).with_for_update())
    key = _get_key(session, tenant_id, key_id)
    if key.revoked_at is not None:
        return key
    others = select(ApiKey.id).where(ApiKey.tenant_id == tenant_id, ApiKey.revoked_at.is_(None), ApiKey.id != key_id)
    if session.scalar(others.limit(1)) is None:
        raise Conflict("this is the last live key of its tenant: create another one first", code="last_api_key")
    key.revoked_at = now(session)
    return key


def _get_key(session: Session, tenant_id: str, key_id: str, pointer: str | None = None) -> ApiKey:
    found = session.scalar(select(ApiKey).where(ApiKey.tenant_id == tenant_id, ApiKey.id == key_id))
    if found is None:
        raise NotFound(f"no API key {key_id}", pointer=pointer)
    return found


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()

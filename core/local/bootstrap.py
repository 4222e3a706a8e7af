"""First start: the schema, a tenant, and a key that the command line finds."""

import os
from pathlib import Path

from sqlalchemy import select

from core.db.session import Database
from core.models import Tenant
from core.tenants import service as tenants

FIRST_TENANT = "default"


def key_file(data_dir: Path) -> Path:
    return data_dir / "api_key"


def bootstrap(database: Database, data_dir: Path) -> Path | None:
    """Make the first tenant and its key where there is none. Returns the key's file when it was made now."""
    path = key_file(data_dir)
    with database.write() as session:
        if session.scalar(select(Tenant.id).limit(1)) is not None:
            return None
        tenant = tenants.create_tenant(session, FIRST_TENANT)
        new = tenants.create_key(session, tenant.id, "first key")
        # Inside the transaction: a key that could not be written down must not exist.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(new.secret + "\n")
    return path

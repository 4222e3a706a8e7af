"""`python -m core.tenants [NAME]`: tenants and their keys, for operators. A key is shown this once."""

import argparse
import sys

from sqlalchemy.orm import Session

from core.db.session import Database
from core.errors import DomainError
from core.settings import get_settings
from core.tenants import leaving
from core.tenants import service as tenants


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m core.tenants", description="Make a tenant and its first API key.")
    parser.add_argument("name", nargs="?", help="what the tenant is called; it stands in the names of its models")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--new-key", action="store_true", help="another key for a tenant that has lost its own")
    instead.add_argument("--suspend", action="store_true", help="refuse its requests, cancel its work; its data stays")
    instead.add_argument("--resume", action="store_true", help="answer them again")
    instead.add_argument("--delete", action="store_true", help="suspend it, take its keys and remove all its bytes")
    instead.add_argument("--list", action="store_true", help="all tenants: name, id, status, live keys, device seconds")
    asked = parser.parse_args(arguments)
    if asked.list == (asked.name is not None):
        parser.error("give a tenant's name, or --list alone")
    database = Database(get_settings().database)
    try:
        if asked.suspend or asked.delete:  # by itself: it stands, whatever is still in the way of the rest
            with database.read() as session:
                tenant_id = tenants.find_tenant(session, asked.name).id
            leaving.suspend(database, tenant_id)
        with database.write() as session:
            printed = _do(session, asked)
    except DomainError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    finally:
        database.close()
    sys.stdout.write(printed)
    return 0


def _do(session: Session, asked: argparse.Namespace) -> str:
    if asked.list:
        return "".join(
            f"{tenant.name}\t{tenant.id}\t{tenant.status}\t{live}\t{tenant.device_seconds:.0f}\n"
            for tenant, live in tenants.list_tenants(session)
        )
    is_new = not (asked.new_key or asked.suspend or asked.resume or asked.delete)
    tenant = tenants.create_tenant(session, asked.name) if is_new else tenants.find_tenant(session, asked.name)
    if asked.suspend:
        return f"{tenant.name} is suspended\n"
    if asked.resume:
        tenant.status = "active"
        return f"{tenant.name} is active\n"
    if asked.delete:
        leaving.remove(session, tenant)
        return f"{tenant.name} is deleted; upkeep removes its bytes in about an hour\n"
    return tenants.create_key(session, tenant.id, "first key" if is_new else "operator's key").secret + "\n"


if __name__ == "__main__":
    sys.exit(main())

"""`python -m core.tenants [NAME]`: tenants and their keys, for operators. A key is shown this once."""

import argparse
import sys

from sqlalchemy.orm import Session

from core.db.session import Database
from core.errors import DomainError
from core.settings import get_settings
from core.tenants import service as tenants


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m core.tenants", description="Make a tenant and its first API key.")
    parser.add_argument("name", nargs="?", help="what the tenant is called; it stands in the names of its models")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--new-key", action="store_true", help="another key for a tenant that has lost its own")
    instead.add_argument("--suspend", action="store_true", help="refuse its requests with 403; its data stays")
    instead.add_argument("--resume", action="store_true", help="answer them again")
    instead.add_argument("--list", action="store_true", help="all tenants: name, id, status, live keys, device seconds")
    asked = parser.parse_args(arguments)
    if asked.list == (asked.name is not None):
        parser.error("give a tenant's name, or --list alone")
    database = Database(get_settings().database)
    try:
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
    if asked.suspend or asked.resume:
        tenant = tenants.find_tenant(session, asked.name)
        tenant.status = "suspended" if asked.suspend else "active"
        return f"{tenant.name} is {tenant.status}\n"
    if asked.new_key:
        return tenants.create_key(session, tenants.find_tenant(session, asked.name).id, "operator's key").secret + "\n"
    return tenants.create_key(session, tenants.create_tenant(session, asked.name).id, "first key").secret + "\n"


if __name__ == "__main__":
    sys.exit(main())

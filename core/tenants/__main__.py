"""`python -m core.tenants NAME`: make a tenant and its first key, for operators. The key is shown this once."""

import argparse
import sys

from core.db.session import Database
from core.errors import DomainError
from core.settings import get_settings
from core.tenants import service as tenants


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m core.tenants", description="Make a tenant and its first API key.")
    parser.add_argument("name", help="what the tenant is called; it stands in the names of its models")
    name = parser.parse_args(arguments).name
    database = Database(get_settings().database)
    try:
        with database.write() as session:
            tenant = tenants.create_tenant(session, name)
            secret = tenants.create_key(session, tenant.id, "first key").secret
    except DomainError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    finally:
        database.close()
    sys.stdout.write(f"{secret}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

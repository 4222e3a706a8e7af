"""A migration gives up rather than block the tables that old code is serving from."""

from sqlalchemy import Connection, text


def set_timeouts(bind: Connection, *, lock_seconds: float, statement_seconds: float) -> None:
    """For the rest of the migration's transaction. SQLite has one lock, which we hold already."""
    if bind.dialect.name != "postgresql":
        return
    for name, seconds in (("lock_timeout", lock_seconds), ("statement_timeout", statement_seconds)):
        bind.execute(
            text("SELECT set_config(:name, :value, true)"), {"name": name, "value": f"{int(seconds * 1000)}ms"}
        )

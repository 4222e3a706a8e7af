"""Aware UTC everywhere. Leases never use this clock on a server database: see `core.db.session.now`."""

from datetime import UTC, datetime


def utc_now() -> datetime:
    return datetime.now(UTC)


def to_unix(moment: datetime | None) -> int | None:
    """Whole seconds since 1970, as OpenAI's objects carry them."""
    return None if moment is None else int(moment.timestamp())

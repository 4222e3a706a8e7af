from core.bases import Catalog
from core.db.session import Database
from core.jobs.repository import JobRepository
from tests.rows import (
    make_job,
    make_tenant,
)


def test_pages_hold_a_tenants_jobs_newest_first(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        made = [make_job(session, tenant, catalog).id for _ in range(5)]
    with database.read() as session:
        repository = JobRepository(session, tenant.id)
        seen: list[str] = []
        after: str | None = None
        while True:
            page = repository.list_newest(after, 2)
            seen += [row.id for row in page.rows]
            if not page.has_more:
                break
            after = seen[-1]
    assert seen == made[::-1]

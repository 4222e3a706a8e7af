"""What the lists of jobs hold, on both databases."""

import pytest

from core.bases import Catalog
from core.db.session import Database
from core.jobs.repository import JobRepository
from tests.rows import make_dataset, make_job, make_tenant

HOSTILE = ["team", "", "a.b", 'say "x"', "it's", "$", "[0]", "a]b", "\\", "%", "Grüße 💣", "\n"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_label_is_found_by_its_very_name_and_value(database: Database, catalog: Catalog, name: str) -> None:
    with database.write() as session:
        tenant, other = make_tenant(session), make_tenant(session)
        dataset = make_dataset(session, tenant)
        given = ({name: name}, {name: f"{name}x"}, {f"{name}x": name}, {name: name, "more": "1"}, {"more": "1"}, None)
        made = [make_job(session, tenant, catalog, dataset, labels=labels).id for labels in given]
        make_job(session, other, catalog, labels={name: name})
    with database.read() as session:
        jobs = JobRepository(session, tenant.id)

        def listed(after: str | None = None, limit: int = 10, **labels: str) -> list[str]:
            return [row.id for row in jobs.list_newest(after, limit, labels).rows]

        assert listed(**{name: name}) == [made[3], made[0]]
        assert listed(**{name: name}, limit=1) == [made[3]]
        assert listed(after=made[3], **{name: name}) == [made[0]]
        assert listed(**{name: name, "more": "1"}) == [made[3]]
        assert listed(**{name: name, "more": "2"}) == []
        assert listed() == [made[5]]

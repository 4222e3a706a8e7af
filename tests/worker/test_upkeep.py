"""Upkeep's chores: one that fails holds up no other."""

from pathlib import Path

import pytest

from core.bases import Catalog
from core.db.session import Database
from core.models import Job
from core.samples import service as samples
from tests.conftest import make_settings
from tests.rows import claim_job, expire, make_job, make_tenant
from worker.upkeep import Upkeep


def test_a_sweep_that_fails_takes_none_of_the_others_with_it(
    database: Database, catalog: Catalog, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database.write() as session:
        job = make_job(session, make_tenant(session), catalog)
        claim_job(session, catalog)
        expire(session, Job, job.id)

    def fail(*_: object) -> bool:
        raise ValueError("a row that nobody can read")

    monkeypatch.setattr(samples, "sweep", fail)
    upkeep = Upkeep(make_settings(tmp_path, database_url=database_url))
    upkeep.sweep()
    upkeep.relay()  # no broker is there: that costs a try
    upkeep.close()
    with database.read() as session:
        assert session.get_one(Job, job.id).status == "queued"

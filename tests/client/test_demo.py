"""The demo against the real API, its training and drawing done by the worker that `conftest.py` plays."""

import re
from pathlib import Path

import pytest
from PIL import Image

from client.api import DiffFit
from client.demo import service as demo_service
from client.demo.scenes import DOMAINS
from tests.client.conftest import Run, Service


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report's line about torch costs seconds of import."""
    monkeypatch.setattr("client.machine.find_torch", lambda: None)


def jobs_of(client: DiffFit) -> dict[str, list[str]]:
    """Ids of the demo's jobs by domain, oldest first."""
    found: dict[str, list[str]] = {domain.name: [] for domain in DOMAINS}
    for job in client.jobs.list():
        if name := job.metadata.get("demo"):
            found[name].insert(0, job.id)
    return found


def test_a_first_run_trains_and_a_second_one_reuses(difffit: Run, client: DiffFit, tmp_path: Path) -> None:
    first = difffit("demo", "--out", "one")
    assert first.code == 0, first.err
    made = jobs_of(client)
    assert [len(ids) for ids in made.values()] == [1, 1]
    files = {job.training_file for job in client.jobs.list() if job.metadata.get("demo")}
    assert {client.files.get(file_id).filename for file_id in files} == {domain.archive.name for domain in DOMAINS}

    second = difffit("demo", "--out", "two")
    assert jobs_of(client) == made
    assert "2 of 2 were there already" in second.out
    assert "2 of 2 reused from an earlier run" in second.out
    colours = Image.open(tmp_path / "one" / "grid.png").convert("RGB").getcolors(maxcolors=1_000_000) or []
    assert {(0, 7, 9), (0, 8, 9)} <= {colour for _, colour in colours}  # the played worker paints each column's seed
    for folder in ("one", "two"):
        page = (tmp_path / folder / "report.html").read_text()
        assert page.count("data:image/png") >= 5 * 2
        assert "one forward pass held 2 different adapters" in page
        assert Image.open(tmp_path / folder / "grid.png").width > 200


def test_fresh_trains_anew_and_a_deleted_adapter_is_made_again(difffit: Run, client: DiffFit) -> None:
    difffit("demo")
    before = jobs_of(client)
    difffit("demo", "--fresh")
    fresh = jobs_of(client)
    assert all(len(fresh[name]) == len(before[name]) + 1 for name in before)

    for name in fresh:
        for job_id in fresh[name]:
            adapter_id = client.jobs.get(job_id).adapter_id
            if name == "mnist_digits" and adapter_id:
                client.adapters.delete(adapter_id)
    assert difffit("demo").code == 0
    after = jobs_of(client)
    assert after["openmoji_lineart"] == fresh["openmoji_lineart"]
    assert len(after["mnist_digits"]) == len(fresh["mnist_digits"]) + 1


def test_an_interrupted_run_is_taken_up_by_the_next(
    service: Service, difffit: Run, client: DiffFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.worker.trains = False
    try:
        with monkeypatch.context() as patch:
            patch.setattr("client.follow.time.sleep", _interrupt)
            interrupted = difffit("demo", "--fresh")
        assert interrupted.code == 130
        assert "the next run goes on from there" in interrupted.out
        before = jobs_of(client)
        newest = [client.jobs.get(ids[-1]).status for ids in before.values()]
        assert newest == ["queued", "queued"]
        client.jobs.pause(before["mnist_digits"][-1])
    finally:
        service.worker.trains = True
    assert difffit("demo").code == 0
    assert jobs_of(client) == before
    assert {client.jobs.get(ids[-1]).status for ids in before.values()} == {"succeeded"}


def _interrupt(_seconds: float) -> None:
    raise KeyboardInterrupt


def test_a_service_that_cannot_start_is_quoted(difffit: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DIFFFIT_URL")
    monkeypatch.delenv("DIFFFIT_API_KEY")
    monkeypatch.setenv("DIFFFIT_BASES", str(tmp_path / "nowhere"))
    monkeypatch.setenv("DIFFFIT_PORT", str(demo_service._free_port(0)))
    run = difffit("demo", "--data-dir", str(tmp_path / "data"))
    assert run.code == 1
    assert re.fullmatch(r"difffit: a base model of DIFFFIT_BASES cannot be used: .*nowhere.*\n", run.err)


def test_a_set_url_where_nobody_answers_is_not_started_behind_the_users_back(
    difffit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFFIT_URL", "http://127.0.0.1:9")
    run = difffit("demo")
    assert run.code == 1
    assert "no service opens at http://127.0.0.1:9 (DIFFFIT_URL)" in run.err

"""Every instant at which a process of the service may die: nothing accepted is lost, and nothing is done twice.

Workers die by a file that the running service looks for at each point; API processes are ones of their own beside it.
"""

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import ColumnElement, func, select

from core import faults, retention
from core.db.session import Database
from core.models import Adapter, Dataset, Job, OutboxMessage, Sample
from core.storage import open_store
from tests.conftest import make_settings
from tests.e2e.service import (
    ENDED,
    READY_SECONDS,
    RunningService,
    adapter_of,
    ended,
    job,
    push,
    reaches,
    running,
    train,
    wait_for,
)
from tests.e2e.shapes import shapes_zip
from tests.processes import free_port

pytestmark = pytest.mark.e2e

MODEL = "tiny-dit"
STEPS = {"steps": 24, "batch_size": 4, "checkpoint_every": 5}

UPLOADING = (
    "body_staged",
    "upload_part",
    "object_staged",
    "before_commit",
    "after_commit_before_publish",
    "after_commit_before_reply",
)
VALIDATING = ("received", "claimed", "object_put", "upload_part", "object_staged:2")
TRAINING = (
    "claimed",
    "dataset_loaded",
    "mid_step:7",
    "after_step:1",
    "after_step:24",
    "object_staged:2",
    "object_put:2",
    "before_pointer_commit:2",
    "after_pointer_commit:2",
    "final_put",
    "before_succeeded",
    "after_succeeded_before_ack",
)
DRAWING = ("adapter_applied", "claimed", "mid_sample:2", "object_staged")
ONCE = ("heartbeat", "flag_set", "tombstoned", "after_publish_before_mark", "mid_object_delete")
# What needs other settings or another base has its test where those are.
ELSEWHERE = {"rank_step": "worker/test_devices.py", "evaluation_chunk": "worker/test_evaluating.py"}


@dataclass
class Faulty:
    """A running service whose next process to pass a point can be told to go wrong there."""

    service: RunningService
    file: Path

    @contextlib.contextmanager
    def going_wrong(self, fault: str) -> Iterator[None]:
        """The fault has struck once when the block is left."""
        taken = Path(f"{self.file}.taken")
        taken.unlink(missing_ok=True)
        staged = self.file.with_suffix(".new")
        staged.write_text(fault)
        staged.rename(self.file)
        yield
        wait_for(taken.exists, bool)
        assert taken.read_text() == fault

    @contextlib.contextmanager
    def database(self) -> Iterator[Database]:
        database = Database(make_settings(self.service.folder).database)
        yield database
        database.close()

    def count(self, where: ColumnElement[bool]) -> int:
        with self.database() as database, database.read() as session:
            return session.scalar(select(func.count()).where(where)) or 0

    @contextlib.contextmanager
    def other_process(self, module: str, *words: str, fault: str = "") -> Iterator[subprocess.Popen[bytes]]:
        """One more process of the same service."""
        with (self.service.folder / "logs" / "other.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                env={**self.service.environment, "FAULT": fault, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @contextlib.contextmanager
    def other_api(self, fault: str) -> Iterator[httpx.Client]:
        """A client of an API process that dies at the first passing of a point."""
        port = free_port()
        words = ("api", "--port", str(port))
        with self.other_process(*words, fault=f"{fault}:kill") as process, self.service.client() as client:
            client.base_url = f"http://127.0.0.1:{port}"
            wait_for(lambda: process.poll() is not None or _is_up(client), bool, READY_SECONDS)
            yield client
            assert process.wait(60) == -signal.SIGKILL, f"{fault} was not passed"


def _is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").is_success
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Faulty]:
    folder = tmp_path_factory.mktemp("faulty")
    file = folder / "fault"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULT", f"@{file}")
        with running(folder / "data", tiny_base, lease_seconds="3", keep_checkpoints="1") as service:
            yield Faulty(service, file)


@pytest.fixture(scope="module")
def file_id(faulty: Faulty) -> str:
    with faulty.service.client() as client:
        return push(client, shapes_zip())["id"]


@pytest.fixture(scope="module")
def reference(faulty: Faulty, file_id: str) -> str:
    """The digest of the adapter that an undisturbed job ends in."""
    with faulty.service.client() as client:
        return adapter_of(client, ended(client, train(client, MODEL, file_id, **STEPS)["id"]))["sha256"]


def test_every_point_is_passed_by_a_test() -> None:
    struck = {fault.split(":")[0] for fault in (*UPLOADING, *VALIDATING, *TRAINING, *DRAWING, *ONCE, *ELSEWHERE)}
    assert struck == faults.POINTS
    for point, path in ELSEWHERE.items():
        assert f'"{point}:' in (Path(__file__).parents[1] / path).read_text()


def test_every_point_stands_in_the_code_and_no_other() -> None:
    top = Path(__file__).parents[2]
    code = "".join(path.read_text() for name in ("api", "core", "worker") for path in (top / name).rglob("*.py"))
    assert set(re.findall(r'faults\.point\("(\w+)"\)', code)) == faults.POINTS


@pytest.mark.parametrize("point", UPLOADING)
def test_an_upload_whose_api_dies_is_there_once_after_a_retry(faulty: Faulty, point: str) -> None:
    request = {**_upload(point), "headers": {"Idempotency-Key": point}}
    with faulty.other_api(point) as doomed, pytest.raises(httpx.TransportError):
        doomed.post("/v1/files", **request)
    with faulty.service.client() as client:
        reply = client.post("/v1/files", **request)
        assert reply.status_code == 200, reply.text
        listed = client.get("/v1/files", params={"limit": 100}).json()["data"]
        assert [file["id"] for file in listed if file["filename"] == f"{point}.zip"] == [reply.json()["id"]]
        assert _processed(client, reply.json()["id"])["status"] == "processed"


@pytest.mark.parametrize("point", ["before_commit", "after_commit_before_publish", "after_commit_before_reply"])
def test_a_job_whose_api_dies_is_there_once_after_a_retry(
    faulty: Faulty, file_id: str, reference: str, point: str
) -> None:
    body = {
        "model": MODEL,
        "training_file": file_id,
        "seed": 7,
        "metadata": {"point": point},
        "method": {"type": "difffit", "difffit": {"hyperparameters": STEPS}},
    }
    headers = {"Idempotency-Key": f"job {point}"}
    with faulty.other_api(point) as doomed, pytest.raises(httpx.TransportError):
        doomed.post("/v1/fine_tuning/jobs", json=body, headers=headers)
    with faulty.service.client() as client:
        reply = client.post("/v1/fine_tuning/jobs", json=body, headers=headers)
        assert reply.status_code == 200, reply.text
        listed = client.get("/v1/fine_tuning/jobs", params={"metadata[point]": point}).json()["data"]
        assert [found["id"] for found in listed] == [reply.json()["id"]]
        done = ended(client, reply.json()["id"])
        assert (done["status"], done["attempt"]) == ("succeeded", 1)
        assert adapter_of(client, done)["sha256"] == reference


@pytest.mark.parametrize("fault", VALIDATING)
def test_a_dataset_whose_worker_dies_is_validated(faulty: Faulty, fault: str) -> None:
    """The upload comes by an API that dies after its commit: so the worker alone passes the points of the store."""
    with faulty.going_wrong(f"{fault}:kill"), faulty.other_api("after_commit_before_publish") as doomed:
        with pytest.raises(httpx.TransportError):
            doomed.post("/v1/files", **_upload(fault))
    with faulty.service.client() as client:
        [file, *_] = client.get("/v1/files").json()["data"]
        found = _processed(client, file["id"])
    assert (found["filename"], found["status"], found["dataset"]["images"]) == (f"{fault}.zip", "processed", 24)


@pytest.mark.parametrize("fault", TRAINING)
def test_a_job_whose_worker_dies_ends_in_the_same_bytes(
    faulty: Faulty, file_id: str, reference: str, fault: str
) -> None:
    with faulty.service.client() as client:
        with faulty.going_wrong(f"{fault}:kill"):
            created = train(client, MODEL, file_id, **STEPS)
        done = ended(client, created["id"])
        assert (done["status"], adapter_of(client, done)["sha256"]) == ("succeeded", reference), done
    assert done["attempt"] == (1 if fault == "after_succeeded_before_ack" else 2)
    assert faulty.count(Adapter.job_id == created["id"]) == 1


def test_a_job_whose_worker_dies_after_a_heartbeat_ends_in_the_same_bytes(faulty: Faulty, file_id: str) -> None:
    with faulty.service.client() as client:
        asked = {**STEPS, "steps": 400}
        created = train(client, MODEL, file_id, **asked)
        reaches(client, created["id"], 1)
        with faulty.going_wrong("heartbeat:kill"):
            pass
        done = ended(client, created["id"])
        undisturbed = ended(client, train(client, MODEL, file_id, **asked)["id"])
        assert (done["status"], done["attempt"]) == ("succeeded", 2)
        assert adapter_of(client, done)["sha256"] == adapter_of(client, undisturbed)["sha256"]


def test_pictures_whose_worker_dies_are_the_same_pictures(faulty: Faulty, file_id: str) -> None:
    with faulty.service.client() as client:
        # An adapter that no worker has seen yet: it is applied once a process.
        model = ended(client, train(client, MODEL, file_id, **STEPS, learning_rate=3e-3)["id"])["fine_tuned_model"]
        drawn: list[str] = []
        for fault in DRAWING:
            with faulty.going_wrong(f"{fault}:kill"):
                drawn.append(_draw(client, model))
        drawn.append(_draw(client, model))
        images = [client.get(client.get(place).json()["data"][0]["url"]).content for place in drawn]
    assert [fault for fault, image in zip(DRAWING, images, strict=False) if image != images[-1]] == []
    with faulty.database() as database, database.read() as session:
        attempts = [session.get_one(Sample, place.rsplit("/", 1)[1]).attempt for place in drawn]
    assert attempts == [2] * len(DRAWING) + [1]


def test_a_cancel_whose_api_dies_is_none_and_the_next_is_carried_out(faulty: Faulty, file_id: str) -> None:
    with faulty.service.client() as client:
        created = train(client, MODEL, file_id, steps=20_000, batch_size=4)
        path = f"/v1/fine_tuning/jobs/{created['id']}/cancel"
        reaches(client, created["id"], 5)
        with faulty.other_api("flag_set") as doomed, pytest.raises(httpx.TransportError):
            doomed.post(path)
        reaches(client, created["id"], job(client, created["id"])["progress"]["step"])
        # And one whose worker dies: the job is cancelled all the same, and nobody trains it again.
        with faulty.going_wrong("after_step:kill"):
            client.post(path).raise_for_status()
        assert ended(client, created["id"])["status"] == "cancelled"


def test_a_deletion_whose_api_dies_is_none_and_the_next_one_counts(faulty: Faulty) -> None:
    with faulty.service.client() as client:
        file = push(client, shapes_zip())
        with faulty.other_api("tombstoned") as doomed, pytest.raises(httpx.TransportError):
            doomed.delete(f"/v1/files/{file['id']}")
        assert client.get(f"/v1/files/{file['id']}").is_success
        assert client.delete(f"/v1/files/{file['id']}").is_success
        assert client.get(f"/v1/files/{file['id']}").status_code == 404


def test_a_relay_that_dies_sends_again_and_nothing_is_done_twice(faulty: Faulty) -> None:
    with faulty.service.client() as client:
        with faulty.going_wrong("after_publish_before_mark:kill"):
            file = client.post("/v1/files", **_upload("relay")).json()
        assert _processed(client, file["id"])["status"] == "processed"
    assert faulty.count((Dataset.id == file["id"]) & (Dataset.attempt == 1)) == 1


def test_a_worker_paused_past_its_lease_writes_nothing_more(faulty: Faulty, file_id: str, reference: str) -> None:
    """The zombie wakes when another has finished the job: its adapter is refused, and it goes on with other work."""
    celery = ("-A", "worker.app", "worker", "-Q", "train", "-n", "other@%h", "--concurrency", "1")
    with faulty.service.client() as client:
        with faulty.going_wrong("before_succeeded:stop"):
            created = train(client, MODEL, file_id, **STEPS)
        zombie = wait_for(lambda: _stopped(faulty.service.children()), bool)[0]
        with faulty.other_process("celery", *celery):
            done = ended(client, created["id"])
        assert (done["status"], done["attempt"]) == ("succeeded", 2)
        os.kill(zombie, signal.SIGCONT)
        after = ended(client, train(client, MODEL, file_id, **STEPS)["id"])
        assert adapter_of(client, done)["sha256"] == adapter_of(client, after)["sha256"] == reference
        assert job(client, created["id"]) == done
    assert faulty.count(Adapter.job_id == created["id"]) == 1


def test_in_the_end_rows_and_objects_agree(faulty: Faulty, file_id: str) -> None:
    """Last, after all that died above: every row has ended, what rows name is there, and nothing else is."""
    with faulty.service.client() as client, faulty.going_wrong("mid_object_delete:kill"):
        ended(client, train(client, MODEL, file_id, **STEPS)["id"])
        for pid in faulty.service.children():
            if b"worker.upkeep" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)  # the next one begins with what may go
    wait_for(lambda: faulty.count(OutboxMessage.sent_at.is_(None)), lambda unsent: unsent == 0)
    assert faulty.count(Job.status.not_in(ENDED)) == 0
    assert faulty.count(Sample.status.not_in(ENDED)) == 0
    assert faulty.count((Dataset.status == "uploaded") & Dataset.deleted_at.is_(None)) == 0
    store = open_store(make_settings(faulty.service.folder))
    orphans = retention.Orphans(clock=iter((0.0, 2 * retention.GRACE_SECONDS)).__next__)
    with faulty.database() as database:
        *_, removed = (
            retention.sweep(database, store, orphans, timedelta(days=1), keep_checkpoints=1) for _ in range(2)
        )
        assert removed >= 3  # what died between an object and its row left something
        with database.read() as session:
            named = retention.named_keys(session)
            adapters = {row.object_key: row.sha256 for row in session.scalars(select(Adapter))}
    assert {info.key for info in store.list()} == named
    assert {key: hashlib.sha256(store.get(key)).hexdigest() for key in adapters} == adapters


def _processed(client: httpx.Client, file_id: str) -> dict[str, Any]:
    return wait_for(lambda: client.get(f"/v1/files/{file_id}").json(), lambda file: file["status"] != "uploaded")


def _upload(name: str) -> dict[str, Any]:
    """Of a file of that name, as httpx has it."""
    return {"files": {"file": (f"{name}.zip", shapes_zip())}, "data": {"purpose": "fine-tune"}}


def _draw(client: httpx.Client, model: str) -> str:
    """Where the request is that drew it."""
    body = {"model": model, "prompt": "disc", "seed": 3, "steps": 8}
    place = client.post("/v1/images/generations", json=body, headers={"Prefer": "respond-async"}).headers["location"]
    done = wait_for(lambda: client.get(place).json(), lambda found: found["status"] in ENDED)
    assert done["status"] == "succeeded", done
    return place


def _stopped(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"]

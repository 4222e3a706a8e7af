"""The main job as its users have it, on the embedded default and on the real stack: the same story, the same code."""

import hashlib
import io
import os
import signal
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from client import CompletedImage, DiffFit, PartialImage
from tests.e2e.service import RunningService, adapter_of, ended, job, push, reaches, running, step_of, train, wait_for
from tests.e2e.shapes import shapes_zip
from tests.servers import Valkey

pytestmark = pytest.mark.e2e

STEPS = 24
MODEL = "tiny-dit"


def test_the_openai_client_uploads_trains_follows_and_draws(service: RunningService) -> None:
    key = service.key_file.read_text().strip()
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=key)

    file = client.files.create(file=("shapes.zip", shapes_zip()), purpose="fine-tune")
    assert client.files.wait_for_processing(file.id, poll_interval=0.1).status == "processed"

    created = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        suffix="shapes",
        seed=7,
        method={"type": "difffit", "difffit": {"hyperparameters": {"steps": STEPS, "batch_size": 4}}},  # type: ignore[typeddict-item]
    )
    done = wait_for(lambda: client.fine_tuning.jobs.retrieve(created.id), lambda found: found.finished_at is not None)
    assert done.status == "succeeded", done.error
    assert done.fine_tuned_model is not None

    messages = [event.message for event in client.fine_tuning.jobs.list_events(created.id, limit=100)]
    assert any("Step 24/24" in message for message in messages)
    assert "successfully completed" in messages[0]
    assert [item.step_number for item in client.fine_tuning.jobs.checkpoints.list(created.id)]
    assert done.fine_tuned_model in [model.id for model in client.models.list()]

    drawn = client.images.generate(
        model=done.fine_tuned_model, prompt="disc", n=2, response_format="b64_json", extra_body={"seed": 5, "steps": 4}
    )
    assert drawn.data is not None
    assert len(drawn.data) == 2
    again = client.images.generate(
        model=done.fine_tuned_model, prompt="disc", n=1, response_format="b64_json", extra_body={"seed": 6, "steps": 4}
    )
    assert again.data is not None
    assert again.data[0].b64_json == drawn.data[1].b64_json  # image i of n is drawn from seed + i


def test_previews_metrics_and_the_adapter_can_be_had(service: RunningService) -> None:
    with service.client() as client:
        file = push(client, shapes_zip())
        assert file["dataset"]["classes"] == [{"name": "bar", "count": 12}, {"name": "disc", "count": 12}]
        found = ended(client, train(client, MODEL, file["id"], steps=STEPS, batch_size=4)["id"])
        assert found["status"] == "succeeded", found

        metrics = client.get(f"/v1/fine_tuning/jobs/{found['id']}/metrics").json()["data"]
        assert metrics[-1]["step"] == STEPS
        assert all(np.isfinite(metric["train_loss"]) for metric in metrics)

        previews = client.get(f"/v1/fine_tuning/jobs/{found['id']}/previews").json()["data"]
        assert previews[-1]["step"] == STEPS
        shown = client.get(f"/v1/fine_tuning/jobs/{found['id']}/previews/{previews[-1]['id']}/content")
        assert Image.open(io.BytesIO(shown.content)).width > 0

        adapter = adapter_of(client, found)
        content = client.get(f"/v1/adapters/{adapter['id']}/content").content
        assert hashlib.sha256(content).hexdigest() == adapter["sha256"]
        assert len(content) == adapter["bytes"]
        header = int.from_bytes(content[:8], "little") + 8  # safetensors: a length, a JSON header, then the tensors
        assert len(content) - header == 4 * adapter["parameters"]


def test_base_and_two_adapters_share_a_batch_and_each_draws_as_alone(service: RunningService) -> None:
    with service.client() as client:
        file = push(client, shapes_zip())
        jobs = [
            train(client, MODEL, file["id"], steps=STEPS, batch_size=4, learning_rate=rate) for rate in (1e-3, 1e-2)
        ]
        models = [MODEL, *[ended(client, created["id"])["fine_tuned_model"] for created in jobs]]

        def draw(model: str, wait: bool) -> httpx.Response:
            body = {"model": model, "prompt": "", "n": 1, "seed": 3, "steps": 60, "response_format": "b64_json"}
            prefer = {} if wait else {"Prefer": "respond-async"}
            return client.post("/v1/images/generations", json=body, headers=prefer)

        alone = [draw(model, wait=True).json()["data"][0]["b64_json"] for model in models]
        assert len(set(alone)) == 3

        asked = [draw(model, wait=False) for model in models for _ in range(3)]
        assert {reply.status_code for reply in asked} == {202}
        places = [reply.headers["location"] for reply in asked]
        drawn = [
            wait_for(lambda place=place: client.get(place).json(), lambda found: found["status"] == "succeeded")
            for place in places
        ]
        assert max(found["stats"]["distinct_adapters"] for found in drawn) == 2  # the base is not counted
        assert max(found["stats"]["batch_size"] for found in drawn) > 3
        for index, found in enumerate(drawn):
            image = client.get(found["data"][0]["url"]).content
            assert _differs(image, alone[index // 3]) <= 1

    with DiffFit(service.url, service.key_file.read_text().strip()) as difffit:
        mixed = difffit.images.generate(MODEL, adapters=[(models[1], 1.0), (models[2], 0.0)], seed=3, steps=60)
        first, *_, last = difffit.images.stream(models[1], partial_images=2, seed=3, steps=250)
    assert _differs(mixed.images[0].data, alone[1]) <= 1  # a weight of nothing adds nothing
    assert isinstance(first, PartialImage)
    assert isinstance(last, CompletedImage)


def test_a_worker_killed_halfway_ends_in_the_same_adapter(service: RunningService) -> None:
    steps = 400
    asked = {"steps": steps, "batch_size": 4, "checkpoint_every": 25}
    with service.client() as client:
        file = push(client, shapes_zip())
        undisturbed = ended(client, train(client, MODEL, file["id"], **asked)["id"])

        disturbed = train(client, MODEL, file["id"], **asked)
        found = reaches(client, disturbed["id"], steps // 3)
        assert found["status"] == "running"
        os.kill(_device_process(service), signal.SIGKILL)
        found = ended(client, disturbed["id"])

        assert found["status"] == "succeeded", found
        assert found["attempt"] > undisturbed["attempt"]
        assert adapter_of(client, found)["sha256"] == adapter_of(client, undisturbed)["sha256"]


def test_images_are_drawn_while_a_job_trains(service: RunningService) -> None:
    with service.client() as client:
        file = push(client, shapes_zip())
        created = train(client, MODEL, file["id"], steps=2000, batch_size=4)
        before = reaches(client, created["id"], 0)
        body = {"model": MODEL, "prompt": "circle", "seed": 1, "steps": 8, "response_format": "b64_json"}
        assert client.post("/v1/images/generations", json=body).status_code == 200
        after = job(client, created["id"])
        assert (before["status"], after["status"]) == ("running", "running")
        moved = reaches(client, created["id"], step_of(after))
        assert moved["attempt"] == before["attempt"]  # the same claim: it went on, it did not start again

        assert client.post(f"/v1/fine_tuning/jobs/{created['id']}/cancel").status_code == 200
        assert ended(client, created["id"])["status"] == "cancelled"


def test_a_paused_job_waits_and_goes_on_from_where_it_was(service: RunningService) -> None:
    with service.client() as client:
        file = push(client, shapes_zip())
        asked = {"steps": 300, "batch_size": 4}
        straight = ended(client, train(client, MODEL, file["id"], **asked)["id"])
        created = train(client, MODEL, file["id"], **asked)
        reaches(client, created["id"], 20)
        client.post(f"/v1/fine_tuning/jobs/{created['id']}/pause").raise_for_status()
        paused = wait_for(lambda: job(client, created["id"]), lambda found: found["status"] == "paused")
        assert 0 < step_of(paused) < 300
        client.post(f"/v1/fine_tuning/jobs/{created['id']}/resume").raise_for_status()
        found = ended(client, created["id"])
        assert found["status"] == "succeeded"
        assert adapter_of(client, found)["sha256"] == adapter_of(client, straight)["sha256"]


def test_ctrl_c_ends_every_process_and_a_second_start_resumes_the_job(tmp_path: Path, tiny_base: Path) -> None:
    with running(tmp_path / "data", tiny_base, lease_seconds="3") as service:
        with service.client() as client:
            file = push(client, shapes_zip())
            created = train(client, MODEL, file["id"], steps=1500, batch_size=4)
            reaches(client, created["id"], 20)
        children = service.children()
        assert len(children) >= 5
        printed = service.stop()
        assert "stopped" in printed
        time.sleep(0.2)
        assert [pid for pid in children if _is_alive(pid)] == []

        service.start()
        with service.client() as client:
            found = ended(client, created["id"], 240)
            assert found["status"] == "succeeded"
            events = client.get(f"/v1/fine_tuning/jobs/{created['id']}/events", params={"limit": 100}).json()["data"]
            assert not [event for event in events if event["level"] != "info"]  # a shutdown is nobody's failure


def test_a_killed_supervisor_leaves_no_process_behind(tmp_path: Path, tiny_base: Path) -> None:
    with running(tmp_path / "data", tiny_base) as service:
        children = service.children()
        assert len(children) >= 5
        service.kill()
        wait_for(lambda: [pid for pid in children if _is_alive(pid)], lambda alive: alive == [], seconds=20)


def test_a_killed_broker_comes_back_and_what_is_asked_meanwhile_is_done(tmp_path: Path, tiny_base: Path) -> None:
    with running(tmp_path / "data", tiny_base) as service, service.client() as client:
        for _ in range(2):
            killed = _broker_process(service)
            os.kill(killed, signal.SIGKILL)
            wait_for(lambda killed=killed: _is_alive(killed), lambda alive: not alive)
            file = push(client, shapes_zip())
            done = ended(client, train(client, MODEL, file["id"], steps=STEPS, batch_size=4)["id"])
            assert done["status"] == "succeeded", done
        children = service.children()
        assert _broker_process(service) in children
        assert "broker ended with -9; starting it again" in service.stop()
        assert [pid for pid in children if _is_alive(pid)] == []


@pytest.mark.stack
def test_with_the_broker_gone_a_worker_that_runs_trains_and_draws_on(tmp_path: Path, tiny_base: Path) -> None:
    with Valkey.running() as broker:
        settings = {"broker_url": broker.url, "slice_seconds": "1"}
        with running(tmp_path / "data", tiny_base, **settings) as service, service.client() as client:
            created = train(client, MODEL, push(client, shapes_zip())["id"], steps=20_000, batch_size=4)
            begun = wait_for(lambda: job(client, created["id"]), lambda found: step_of(found) > 0)
            broker.kill()
            wait_for(lambda: job(client, created["id"]), lambda found: found["attempt"] >= begun["attempt"] + 2)
            body = {"model": MODEL, "prompt": "circle", "seed": 1, "steps": 4, "response_format": "b64_json"}
            assert client.post("/v1/images/generations", json=body).status_code == 200
            assert client.get("/readyz").json()["checks"]["broker"]["status"] != "ok"
            broker.start()
            wait_for(lambda: client.get("/readyz").json()["checks"]["broker"]["status"], lambda status: status == "ok")
            assert client.post("/v1/images/generations", json=body).status_code == 200


def _broker_process(service: RunningService) -> int:
    """Valkey shows the socket that it listens on as its command line."""
    [broker] = [pid for pid in service.children() if b"valkey.sock" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return broker


def _device_process(service: RunningService) -> int:
    """The child of the device worker that holds the base: the largest process of the service."""
    return max(service.children(), key=_resident)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_worker_that_hangs_ends_itself_and_its_job_goes_on(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery starts another child, which takes the job from its checkpoint and has fewer steps to go than the hang."""
    monkeypatch.setenv("FAULT", "after_step:30:sleep")
    settings = {"lease_seconds": "3", "stall_seconds": "20"}
    with running(tmp_path / "data", tiny_base, **settings) as service, service.client() as client:
        file = push(client, shapes_zip())
        created = train(client, MODEL, file["id"], steps=40, batch_size=4, checkpoint_every=10)
        done = ended(client, created["id"])
        assert (done["status"], done["attempt"]) == ("succeeded", 2), done


def _differs(image: bytes, other_b64: str) -> int:
    import base64

    one, two = (np.asarray(Image.open(io.BytesIO(data)), dtype=int) for data in (image, base64.b64decode(other_b64)))
    return int(np.abs(one - two).max())

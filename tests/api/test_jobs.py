import json
import threading
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from core.jobs import attempts
from core.models import Job, OutboxMessage
from tests import rows
from tests.api.conftest import Owner, Service, assert_problem, job_body, unknown, upload

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def file_id(service: Service, owner: Owner) -> str:
    return service.dataset(owner).id


def test_a_job_is_queued_in_openais_shape(service: Service, client: TestClient, file_id: str) -> None:
    reply = client.post("/v1/fine_tuning/jobs", json=job_body(file_id, seed=7, suffix="shapes", metadata={"a": "b"}))
    assert reply.status_code == 200, reply.text
    job = reply.json()
    assert job["object"] == "fine_tuning.job"
    assert (job["status"], job["model"], job["training_file"], job["seed"]) == ("queued", "tiny-dit", file_id, 7)
    assert (job["suffix"], job["metadata"], job["queue"]) == ("shapes", {"a": "b"}, {"position": 1})
    assert job["method"]["difffit"]["hyperparameters"]["steps"] == 10
    assert (job["result_files"], job["validation_file"], job["fine_tuned_model"]) == ([], None, None)
    assert client.get(f"/v1/fine_tuning/jobs/{job['id']}").json() == job
    with service.database.read() as session:
        topics = session.scalars(select(OutboxMessage.topic).where(OutboxMessage.topic == "job.train")).all()
    assert topics == ["job.train"]


def test_a_job_on_a_file_that_is_not_validated_waits_for_it(client: TestClient) -> None:
    file_id = upload(client).json()["id"]
    job = client.post("/v1/fine_tuning/jobs", json=job_body(file_id)).json()
    assert (job["status"], job["queue"]) == ("validating_files", None)


def test_a_job_on_a_refused_file_is_refused(service: Service, owner: Owner, client: TestClient) -> None:
    file_id = service.dataset(owner, "error").id
    reply = client.post("/v1/fine_tuning/jobs", json=job_body(file_id))
    assert_problem(reply, 409, "file_not_usable", "/training_file")
    assert reply.headers["x-should-retry"] == "false"


def test_the_seed_is_drawn_where_none_is_given(client: TestClient, file_id: str) -> None:
    seeds = {client.post("/v1/fine_tuning/jobs", json=job_body(file_id)).json()["seed"] for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize(
    ("previews", "every"), [(False, None), ({"every": 3}, 3), (True, 3), (None, 3)], ids=["off", "given", "on", "left"]
)
def test_previews_are_asked_for_beside_the_method(client: TestClient, file_id: str, previews: Any, every: Any) -> None:
    job = client.post("/v1/fine_tuning/jobs", json=job_body(file_id, previews=previews)).json()
    assert job["method"]["difffit"]["hyperparameters"]["preview_every"] == every


def test_hyperparameters_in_openais_older_place_count_and_are_blamed_there(client: TestClient, file_id: str) -> None:
    body = {"model": "tiny-dit", "training_file": file_id}
    good = client.post("/v1/fine_tuning/jobs", json=body | {"hyperparameters": {"batch_size": 4, "n_epochs": "auto"}})
    assert good.json()["method"]["difffit"]["hyperparameters"]["batch_size"] == 4
    bad = client.post("/v1/fine_tuning/jobs", json=body | {"hyperparameters": {"batch_size": -4}})
    problem = assert_problem(bad, 422, "invalid", "/hyperparameters/batch_size")
    assert problem["error"]["param"] == "hyperparameters.batch_size"
    late = client.post("/v1/fine_tuning/jobs", json=job_body(file_id, previews={"every": 50_000}))
    assert_problem(late, 422, "invalid", "/previews/every")


@pytest.mark.parametrize(
    ("verb", "status", "then"),
    [("cancel", "cancelled", "job_ended"), ("pause", "paused", None), ("resume", None, "job_not_paused")],
)
def test_verbs_move_a_waiting_job(
    client: TestClient, file_id: str, verb: str, status: str | None, then: str | None
) -> None:
    path = f"/v1/fine_tuning/jobs/{client.post('/v1/fine_tuning/jobs', json=job_body(file_id)).json()['id']}"
    if status:
        assert client.post(f"{path}/{verb}").json()["status"] == status
        assert client.get(path).json()["status"] == status
    again = client.post(f"{path}/{verb}")
    if then:
        assert_problem(again, 409, then)
        assert again.headers["x-should-retry"] == "false"
    else:
        assert again.json()["status"] == status
        assert client.post(f"{path}/resume").json()["status"] == "queued"


def test_a_change_may_name_the_state_that_it_was_decided_on(client: TestClient, file_id: str) -> None:
    job_id = client.post("/v1/fine_tuning/jobs", json=job_body(file_id)).json()["id"]
    path = f"/v1/fine_tuning/jobs/{job_id}"
    etag = client.get(path).headers["etag"]
    assert client.get(path, headers={"If-None-Match": etag}).status_code == 304
    assert client.post(f"{path}/pause", headers={"If-Match": etag}).status_code == 200
    assert_problem(client.post(f"{path}/cancel", headers={"If-Match": etag}), 412, "precondition_failed")
    assert client.get(path).json()["status"] == "paused"


def test_what_others_do_moves_no_state_of_mine(client: TestClient, file_id: str) -> None:
    first, second = (client.post("/v1/fine_tuning/jobs", json=job_body(file_id)).json()["id"] for _ in range(2))
    path = f"/v1/fine_tuning/jobs/{second}"
    etag = client.get(path).headers["etag"]
    client.post(f"/v1/fine_tuning/jobs/{first}/cancel")
    assert client.get(path, headers={"If-None-Match": etag}).status_code == 200, "its place in the queue is another"
    assert client.post(f"{path}/cancel", headers={"If-Match": etag}).status_code == 200


def test_a_tenant_has_only_so_many_unfinished_jobs(service: Service, client: TestClient, file_id: str) -> None:
    service.settings.max_queued_jobs = 2
    for _ in range(2):
        assert client.post("/v1/fine_tuning/jobs", json=job_body(file_id)).status_code == 200
    reply = client.post("/v1/fine_tuning/jobs", json=job_body(file_id))
    assert_problem(reply, 429, "too_many_jobs")
    assert int(reply.headers["retry-after"]) > 0


def labelled(client: TestClient, **query: str) -> list[str]:
    """The notes of the jobs that are listed."""
    return [job["metadata"].get("note", "") for job in client.get(JOBS, params=query).json()["data"]]


def test_jobs_are_listed_by_their_metadata(service: Service, client: TestClient, file_id: str) -> None:
    stranger = service.owner()
    for asker, file, metadata in (
        (client, file_id, {"note": "1", "team": "a", "stage": "live"}),
        (client, file_id, {"note": "2", "team": "b", "stage": "live"}),
        (client, file_id, {"note": "3", "team": "a", "": ""}),
        (client, file_id, None),
        (stranger.client, service.dataset(stranger).id, {"note": "4", "team": "a"}),
    ):
        assert asker.post(JOBS, json=job_body(file, metadata=metadata)).status_code == 200
    assert labelled(client) == ["", "3", "2", "1"]
    assert labelled(client, **{"metadata[team]": "a"}) == ["3", "1"]
    assert labelled(client, **{"metadata[team]": "a", "metadata[stage]": "live"}) == ["1"]
    assert labelled(client, **{"metadata[team]": "zzz"}) == []
    assert labelled(client, **{"metadata[]": ""}) == ["3"]
    assert labelled(client, metadata="null") == [""]
    first = client.get(JOBS, params={"metadata[team]": "a", "limit": 1}).json()
    assert first["has_more"]
    assert labelled(client, **{"metadata[team]": "a", "after": first["last_id"]}) == ["1"]


def test_jobs_are_listed_by_their_state(service: Service, client: TestClient, file_id: str) -> None:
    stranger = service.owner()
    assert stranger.client.post(JOBS, json=job_body(service.dataset(stranger).id)).status_code == 200
    paths = []
    for note in "1234":
        job = client.post(JOBS, json=job_body(file_id, metadata={"note": note, "team": "ab"[note > "2"]})).json()
        paths.append(f"{JOBS}/{job['id']}")
    for path in paths[::2]:
        client.post(f"{path}/pause")
    assert labelled(client, status="queued") == ["4", "2"]
    assert labelled(client, status="paused") == ["3", "1"]
    assert labelled(client, **{"status": "paused", "metadata[team]": "a"}) == ["1"]
    assert labelled(client, status="paused", limit="1", after=paths[3].rsplit("/", 1)[1]) == ["3"]
    assert labelled(client, status="failed") == []
    assert_problem(client.get(JOBS, params={"status": "done"}), 422, "invalid", "/status")


@pytest.mark.parametrize("path", [JOBS, "/v1/adapters"])
@pytest.mark.parametrize(
    "query",
    [
        "metadata=a",
        "metadata=",
        "metadata.team=a",
        "metadata[team=a",
        "metadata=null&metadata[team]=a",
        "metadata[team]=a&metadata[team]=b",
        f"metadata[{'k' * 65}]=a",
        f"metadata[k]={'v' * 513}",
        "&".join(f"metadata[{number}]=a" for number in range(17)),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused(client: TestClient, path: str, query: str) -> None:
    assert_problem(client.get(f"{path}?{query}"), 422, "invalid", "/metadata")


def test_what_a_job_leaves_behind_is_listed(service: Service, owner: Owner, client: TestClient) -> None:
    job_id, adapter = service.trained(owner)
    path = f"/v1/fine_tuning/jobs/{job_id}"
    job = client.get(path).json()
    assert (job["status"], job["fine_tuned_model"], job["adapter_id"]) == ("succeeded", adapter.model, adapter.id)
    (checkpoint,) = client.get(f"{path}/checkpoints").json()["data"]
    assert (checkpoint["object"], checkpoint["step_number"]) == ("fine_tuning.job.checkpoint", 5)
    assert checkpoint["fine_tuning_job_id"] == job_id
    (metric,) = client.get(f"{path}/metrics").json()["data"]
    assert (metric["step"], metric["train_loss"], metric["valid_loss"]) == (5, 0.5, 0.6)
    assert client.get(f"{path}/metrics", params={"after": 5}).json()["data"] == []
    (preview,) = client.get(f"{path}/previews").json()["data"]
    picture = client.get(preview["url"])
    assert (picture.content, picture.headers["content-type"]) == (b"png", "image/png")


def test_a_job_shows_how_its_numbers_come_about_and_what_it_cost(
    service: Service, client: TestClient, file_id: str
) -> None:
    path = f"{JOBS}/{client.post(JOBS, json=job_body(file_id)).json()['id']}"
    waiting = client.get(path).json()
    assert (waiting["numeric_path"], waiting["device_seconds"]) == (None, 0)
    with service.database.write() as session:
        plan = rows.claim_job(session, service.catalog)
        rows.report_step(session, plan, 1, seconds=0.5)
    etag = client.get(path).headers["etag"]
    numeric_path = {"torch": "2.9.1", "device": "cpu", "threads": 1, "dtype": "float32", "micro_batch": 8}
    with service.database.write() as session:
        assert attempts.fix_numeric_path(session, plan, numeric_path)
        rows.report_step(session, plan, 2, seconds=1.0)
    running = client.get(path).json()
    assert (running["numeric_path"], running["device_seconds"]) == (numeric_path, 1.5)
    decided = client.post(f"{path}/pause", headers={"If-Match": etag})
    assert decided.status_code == 200, "neither is a state that a caller decides by"


def test_events_come_newest_first_in_pages(service: Service, owner: Owner, client: TestClient) -> None:
    path = f"/v1/fine_tuning/jobs/{service.trained(owner)[0]}/events"
    everything = client.get(path, params={"limit": 100}).json()["data"]
    assert everything[0]["message"] == "The job has successfully completed"
    first = client.get(path, params={"limit": 2}).json()
    rest = client.get(path, params={"limit": 100, "after": first["last_id"]}).json()
    assert first["has_more"]
    assert first["data"] + rest["data"] == everything
    assert {event["object"] for event in everything} == {"fine_tuning.job.event"}
    assert_problem(client.get(path, params={"after": "nonsense"}), 404, "not_found", "/after")


def test_the_stream_tells_everything_in_order_and_ends_with_the_job(service: Service, owner: Owner) -> None:
    path = f"/v1/fine_tuning/jobs/{service.trained(owner)[0]}/events"
    told = _stream(owner.client, path)
    listed = owner.client.get(path, params={"limit": 100}).json()["data"]
    assert [event for _, event in told] == listed[::-1]
    assert [number for number, _ in told] == sorted(number for number, _ in told)
    middle = told[2][0]
    assert _stream(owner.client, path, {"Last-Event-ID": str(middle)}) == told[3:]
    assert _stream(owner.client, path, {"Last-Event-ID": str(told[-1][0])}) == []


def test_the_stream_follows_a_job_to_its_end(service: Service, owner: Owner, client: TestClient, file_id: str) -> None:
    job_id = client.post("/v1/fine_tuning/jobs", json=job_body(file_id)).json()["id"]
    told: list[Any] = []
    follower = threading.Thread(
        target=lambda: told.extend(_stream(owner.client, f"/v1/fine_tuning/jobs/{job_id}/events"))
    )
    follower.start()
    with service.database.write() as session:
        plan = rows.claim_job(session, service.catalog)
    with service.database.write() as session:
        attempts.add_metric(session, plan, 1, {"train_loss": 1.0, "total_steps": 10})
    with service.database.write() as session:
        assert attempts.fail(session, plan, code="diverged", message="the loss is not a number")
    follower.join(20)
    assert not follower.is_alive()
    assert told[-1][1]["message"] == "Job failed: the loss is not a number"
    assert "metrics" in [event["type"] for _, event in told]
    assert client.get(f"/v1/fine_tuning/jobs/{job_id}").json()["error"]["code"] == "diverged"


@pytest.mark.parametrize("last", ["x", "-1", "9" * 400])
def test_a_last_event_id_that_is_none_is_refused(client: TestClient, file_id: str, last: str) -> None:
    job_id = client.post("/v1/fine_tuning/jobs", json=job_body(file_id)).json()["id"]
    headers = {"Accept": "text/event-stream", "Last-Event-ID": last}
    assert_problem(client.get(f"/v1/fine_tuning/jobs/{job_id}/events", headers=headers), 422, "invalid")


def test_another_jobs_preview_is_not_found(service: Service, owner: Owner, client: TestClient, file_id: str) -> None:
    job_id, _ = service.trained(owner)
    other = client.post("/v1/fine_tuning/jobs", json=job_body(file_id)).json()["id"]
    (preview,) = client.get(f"/v1/fine_tuning/jobs/{job_id}/previews").json()["data"]
    reply = client.get(f"/v1/fine_tuning/jobs/{other}/previews/{preview['id']}/content")
    assert_problem(reply, 404, "not_found")


def test_positions_follow_the_order_in_which_jobs_are_claimed(service: Service, file_id: str, owner: Owner) -> None:
    mine = [owner.client.post("/v1/fine_tuning/jobs", json=job_body(file_id)).json()["id"] for _ in range(2)]
    other = service.owner()
    theirs = other.client.post("/v1/fine_tuning/jobs", json=job_body(service.dataset(other).id)).json()["id"]
    with service.database.write() as session:
        attempts.charge(session, owner.tenant.id, 10.0)  # the other has used less of the device: it goes first
    shown = {job_id: owner.client.get(f"/v1/fine_tuning/jobs/{job_id}").json()["queue"]["position"] for job_id in mine}
    shown[theirs] = other.client.get(f"/v1/fine_tuning/jobs/{theirs}").json()["queue"]["position"]
    assert shown == {theirs: 1, mine[0]: 2, mine[1]: 3}
    with service.database.write() as session:
        assert rows.claim_job(session, service.catalog).job_id == theirs


def test_a_job_of_an_unknown_file_or_model_names_the_field(service: Service, client: TestClient, file_id: str) -> None:
    reply = client.post("/v1/fine_tuning/jobs", json=job_body(unknown("file")))
    assert_problem(reply, 404, "not_found", "/training_file")
    reply = client.post("/v1/fine_tuning/jobs", json=job_body(file_id, model="gpt"))
    assert_problem(reply, 422, "unknown_model", "/model")
    with service.database.read() as session:
        assert session.scalars(select(Job)).all() == []


def _stream(client: TestClient, path: str, headers: dict[str, str] | None = None) -> list[tuple[int, Any]]:
    reply = client.get(path, headers={"Accept": "text/event-stream", **(headers or {})})
    assert reply.headers["content-type"].startswith("text/event-stream")
    told = []
    for block in reply.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            assert fields["event"] == "fine_tuning.job.event"
            told.append((int(fields["id"]), json.loads(fields["data"])))
    return told


def test_a_job_that_continues_on_the_same_file_holds_out_the_same_pictures(
    service: Service, owner: Owner, client: TestClient, file_id: str
) -> None:
    job_id, adapter = service.trained(owner)
    origin = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()
    (checkpoint,) = client.get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints").json()["data"]

    def seed(training_file: str, **fields: object) -> int:
        body = {"training_file": training_file, **fields}
        return client.post("/v1/fine_tuning/jobs", json=body).json()["seed"]

    own = origin["training_file"]
    assert seed(own, model=adapter.model) == origin["seed"]
    assert seed(own, model=origin["model"], checkpoint=checkpoint["id"]) == origin["seed"]
    assert seed(own, model=adapter.model, seed=origin["seed"] + 1) == origin["seed"] + 1
    assert own != file_id
    assert seed(file_id, model=adapter.model) != origin["seed"]


def test_a_job_continues_from_a_tuned_model_or_a_checkpoint(
    service: Service, owner: Owner, client: TestClient, file_id: str
) -> None:
    job_id, adapter = service.trained(owner)
    (checkpoint,) = client.get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints").json()["data"]
    tuned = client.post("/v1/fine_tuning/jobs", json=job_body(file_id, model=adapter.model)).json()
    assert (tuned["model"], tuned["continued_from"]) == ("tiny-dit", {"type": "adapter", "id": adapter.id})
    from_step = client.post("/v1/fine_tuning/jobs", json=job_body(file_id, checkpoint=checkpoint["id"])).json()
    assert from_step["continued_from"] == {"type": "checkpoint", "id": checkpoint["id"]}
    name = checkpoint["fine_tuned_model_checkpoint"]
    by_name = client.post("/v1/fine_tuning/jobs", json=job_body(file_id, model=name)).json()
    assert (by_name["model"], by_name["continued_from"]) == (from_step["model"], from_step["continued_from"])
    drawn = client.post("/v1/images/generations", json={"model": name})
    assert_problem(drawn, 422, "checkpoint_not_drawn", "/model")
    missing = client.post("/v1/fine_tuning/jobs", json=job_body(file_id, model=f"{job_id}:ckpt-step-77"))
    assert_problem(missing, 404, "not_found", "/model")
    fresh = client.post("/v1/fine_tuning/jobs", json=job_body(file_id)).json()
    assert fresh["continued_from"] is None
    both = client.post("/v1/fine_tuning/jobs", json=job_body(file_id, model=adapter.model, checkpoint=checkpoint["id"]))
    assert_problem(both, 422, "invalid", "/checkpoint")
    twice = client.post("/v1/fine_tuning/jobs", json=job_body(file_id, model=name, checkpoint="ckpt-of-another"))
    assert_problem(twice, 422, "invalid", "/checkpoint")
    hyperparameters = {"method": {"type": "difffit", "difffit": {"hyperparameters": {"layout": "bitfit"}}}}
    other = client.post("/v1/fine_tuning/jobs", json=job_body(file_id, model=adapter.model) | hyperparameters)
    assert_problem(other, 422, "wrong_layout", "/method/difffit/hyperparameters/layout")
    older = {"model": adapter.model, "training_file": file_id, "hyperparameters": {"layout": "bitfit"}}
    assert_problem(client.post("/v1/fine_tuning/jobs", json=older), 422, "wrong_layout", "/hyperparameters/layout")


def test_what_another_tenant_has_cannot_be_continued_and_looks_unknown(
    service: Service, owner: Owner, client: TestClient, file_id: str
) -> None:
    other = service.owner()
    job_id, adapter = service.trained(other)
    (checkpoint,) = other.client.get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints").json()["data"]

    def refused(theirs: str, nobodys: str, code: str, pointer: str) -> None:
        field = pointer.removeprefix("/")
        replies = [client.post("/v1/fine_tuning/jobs", json=job_body(file_id, **{field: x})) for x in (theirs, nobodys)]
        assert_problem(replies[0], 404, code, pointer)
        assert replies[0].content == replies[1].content.replace(nobodys.encode(), theirs.encode())

    refused(adapter.model, "ft:nobody", "model_not_found", "/model")
    refused(checkpoint["id"], unknown("ftckpt"), "not_found", "/checkpoint")


def test_a_job_may_ask_for_as_many_devices_as_the_installation_allows(
    client: TestClient, service: Service, file_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "tiny-dit", "training_file": file_id, "hyperparameters": {"devices": 2}}
    refused = client.post("/v1/fine_tuning/jobs", json=body)
    problem = assert_problem(refused, 422, "invalid", "/hyperparameters/devices")
    assert problem["detail"] == "devices is 2; this service trains a job on at most 1"
    monkeypatch.setattr(service.settings, "max_devices", 2)
    job = client.post("/v1/fine_tuning/jobs", json=body).json()
    assert job["method"]["difffit"]["hyperparameters"]["devices"] == 2

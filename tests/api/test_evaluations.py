from typing import Any

from fastapi.testclient import TestClient
from sqlalchemy import select

from core.evaluations import service as evaluations
from core.jobs import attempts
from core.models import Adapter, Dataset, Evaluation, Job, OutboxMessage
from tests import rows
from tests.api.conftest import Owner, Service, assert_problem, unknown


def ask(client: TestClient, file_id: str, model: str = "tiny-dit", **fields: Any) -> Any:
    return client.post("/v1/evaluations", json={"model": model, "file": file_id, **fields})


def measure(service: Service, evaluation_id: str) -> None:
    """What a device worker does."""
    with service.database.write() as session:
        plan = evaluations.claim(session, rows.WORKER, rows.LEASE, service.catalog)
        assert plan is not None
        assert plan.evaluation_id == evaluation_id
        assert evaluations.finish(session, plan, rows.EVALUATED)


def test_an_evaluation_is_queued_with_what_it_will_measure(service: Service, owner: Owner, client: TestClient) -> None:
    dataset = service.dataset(owner)
    made = ask(client, dataset.id, images=50, seed=4)
    assert made.status_code == 200, made.text
    shown = made.json()
    assert (shown["object"], shown["status"], shown["file"]) == ("evaluation", "queued", dataset.id)
    assert shown["progress"] == {"drawn": 0, "total": 50}
    request = shown["request"]
    assert (request["part"], request["images"], request["seed"], request["baseline"]) == ("all", 50, 4, False)
    assert (request["guidance"], request["guidance_scale"], request["steps"]) == ("cfg", 3.0, 20)
    assert client.get(f"/v1/evaluations/{shown['id']}").json() == shown
    assert client.get("/v1/evaluations").json()["data"] == [shown]
    with service.database.read() as session:
        assert "evaluation.measure" in session.scalars(select(OutboxMessage.topic)).all()


def test_an_adapter_on_its_own_file_is_measured_on_what_was_held_out(
    service: Service, owner: Owner, client: TestClient
) -> None:
    job_id, adapter = service.trained(owner)
    with service.database.write() as session:
        job = session.get_one(Job, job_id)
        dataset_id, seed = job.dataset_id, job.seed
    problem = assert_problem(ask(client, dataset_id, adapter.model), 422, "too_few_images", "/file")
    assert "3 images held out of training" in problem["detail"]
    grow(service, dataset_id)
    shown = ask(client, dataset_id, adapter.model).json()
    assert (shown["request"]["part"], shown["request"]["part_seed"]) == ("held_out", seed)
    assert shown["progress"]["total"] == 400, "the same number before and after"
    other = service.dataset(owner)
    assert ask(client, other.id, adapter.model, baseline=False).json()["request"]["part"] == "all"


def test_the_adapter_shows_how_far_it_moved(service: Service, owner: Owner, client: TestClient) -> None:
    _, adapter = service.trained(owner)
    made = ask(client, service.dataset(owner).id, adapter.model).json()
    measure(service, made["id"])
    shown = client.get(f"/v1/evaluations/{made['id']}").json()
    assert (shown["status"], shown["result"]["moved"]) == ("succeeded", 0.75)
    metrics = client.get(f"/v1/adapters/{adapter.id}").json()["metrics"]
    assert metrics["evaluation"]["kernel_distance"] == rows.EVALUATED["after"]["kernel_distance"]
    assert metrics["evaluation"]["kernel_distance_before"] == {"value": 400.0, "error": 9.0}
    assert (metrics["evaluation"]["moved"], metrics["evaluation"]["id"]) == (0.75, made["id"])


def test_a_job_can_ask_for_one(service: Service, owner: Owner, client: TestClient) -> None:
    dataset = service.dataset(owner)
    grow(service, dataset.id)
    body = {"model": "tiny-dit", "training_file": dataset.id, "hyperparameters": {"steps": 10}, "evaluate": True}
    job = client.post("/v1/fine_tuning/jobs", json=body).json()
    assert job["evaluate"] is True
    with service.database.write() as session:
        plan = rows.claim_job(session, service.catalog)
        adapter = rows.adapter_for(plan)
        assert attempts.finish(session, plan, adapter, {})
    [queued] = client.get("/v1/evaluations").json()["data"]
    assert (queued["adapter_id"], queued["file"], queued["request"]["part"]) == (adapter.id, dataset.id, "held_out")
    events = [event["message"] for event in client.get(f"/v1/fine_tuning/jobs/{job['id']}/events").json()["data"]]
    assert f"Evaluation queued: {queued['id']}" in events


def test_a_waiting_one_is_cancelled_at_once_and_a_running_one_soon(
    service: Service, owner: Owner, client: TestClient
) -> None:
    dataset = service.dataset(owner)
    waiting = ask(client, dataset.id).json()["id"]
    assert client.post(f"/v1/evaluations/{waiting}/cancel").json()["status"] == "cancelled"
    assert_problem(client.post(f"/v1/evaluations/{waiting}/cancel"), 409, "evaluation_ended")
    running = ask(client, dataset.id).json()["id"]
    with service.database.write() as session:
        plan = evaluations.claim(session, rows.WORKER, rows.LEASE, service.catalog)
        assert plan is not None
    assert client.post(f"/v1/evaluations/{running}/cancel").json()["status"] == "running"
    with service.database.write() as session:
        assert evaluations.finish(session, plan, rows.EVALUATED) is False
    assert client.get(f"/v1/evaluations/{running}").json()["status"] == "cancelled"


def test_its_file_cannot_be_deleted_meanwhile(service: Service, owner: Owner, client: TestClient) -> None:
    dataset = service.dataset(owner)
    made = ask(client, dataset.id).json()["id"]
    assert_problem(client.delete(f"/v1/files/{dataset.id}"), 409, "file_in_use")
    client.post(f"/v1/evaluations/{made}/cancel")
    assert client.delete(f"/v1/files/{dataset.id}").json()["deleted"] is True


def test_what_cannot_be_measured_is_refused_by_name(service: Service, owner: Owner, client: TestClient) -> None:
    dataset = service.dataset(owner)
    assert_problem(ask(client, service.dataset(owner, "error").id), 409, "file_not_usable", "/file")
    assert_problem(ask(client, unknown("file")), 404, "not_found", "/file")
    assert_problem(ask(client, dataset.id, "ft:nobody"), 404, "model_not_found", "/model")
    assert_problem(ask(client, dataset.id, "no-such-base"), 422, "unknown_model", "/model")
    assert_problem(ask(client, dataset.id, images=7), 422, "invalid", "/images")
    assert_problem(ask(client, dataset.id, baseline=True), 422, "invalid", "/baseline")
    assert_problem(ask(client, dataset.id, guidance="domain"), 422, "invalid", "/guidance")
    assert_problem(ask(client, dataset.id, colour="red"), 422, "invalid", "/colour")


def test_a_tenant_has_so_many_at_a_time(service: Service, owner: Owner, client: TestClient) -> None:
    dataset = service.dataset(owner)
    service.settings.max_queued_evaluations = 2
    for _ in range(2):
        assert ask(client, dataset.id).status_code == 200
    refused = ask(client, dataset.id)
    assert_problem(refused, 429, "too_many_evaluations")
    assert "retry-after" in refused.headers
    other = service.owner()
    assert ask(other.client, service.dataset(other).id).status_code == 200


def test_another_tenants_evaluation_does_not_exist(service: Service, owner: Owner, client: TestClient) -> None:
    theirs = ask(client, service.dataset(owner).id).json()["id"]
    stranger = service.owner().client
    for method, path in (("GET", "{}"), ("POST", "{}/cancel")):
        foreign = stranger.request(method, f"/v1/evaluations/{path.format(theirs)}")
        nobodys = stranger.request(method, f"/v1/evaluations/{path.format('x' * len(theirs))}")
        assert foreign.status_code == nobodys.status_code == 404
        assert foreign.text == nobodys.text.replace("x" * len(theirs), theirs)
    assert stranger.get("/v1/evaluations").json()["data"] == []
    assert client.get(f"/v1/evaluations/{theirs}").json()["status"] == "queued"


def test_a_base_that_has_changed_fails_it_when_it_is_claimed(
    service: Service, owner: Owner, client: TestClient
) -> None:
    made = ask(client, service.dataset(owner).id).json()["id"]
    with service.database.write() as session:
        session.get_one(Evaluation, made).base_fingerprint = "another"
        assert evaluations.claim(session, rows.WORKER, rows.LEASE, service.catalog) is None
    shown = client.get(f"/v1/evaluations/{made}").json()
    assert (shown["status"], shown["error"]["code"]) == ("failed", "base_changed")


def test_a_repeat_under_one_key_is_one_evaluation(service: Service, owner: Owner, client: TestClient) -> None:
    body = {"model": "tiny-dit", "file": service.dataset(owner).id}
    first, again = (
        client.post("/v1/evaluations", json=body, headers={"Idempotency-Key": "once"}).json() for _ in range(2)
    )
    assert first == again
    with service.database.read() as session:
        assert len(session.scalars(select(Evaluation)).all()) == 1


def grow(service: Service, dataset_id: str) -> None:
    """A file of 100 images a class, so that enough is held out."""
    with service.database.write() as session:
        session.get_one(Dataset, dataset_id).classes = [{"name": name, "count": 100} for name in "ab"]


def test_the_adapter_of_an_evaluation_may_be_gone(service: Service, owner: Owner, client: TestClient) -> None:
    _, adapter = service.trained(owner)
    made = ask(client, service.dataset(owner).id, adapter.model).json()["id"]
    client.delete(f"/v1/adapters/{adapter.id}")
    measure(service, made)
    assert client.get(f"/v1/evaluations/{made}").json()["model"] == adapter.model
    with service.database.read() as session:
        assert "evaluation" in session.get_one(Adapter, adapter.id).metrics

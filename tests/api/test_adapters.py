import hashlib

from fastapi.testclient import TestClient

from tests.api.conftest import Owner, Service, assert_problem, job_body, unknown


def test_an_adapter_is_shown_with_what_it_is_made_of(service: Service, owner: Owner, client: TestClient) -> None:
    job_id, adapter = service.trained(owner)
    shown = client.get(f"/v1/adapters/{adapter.id}").json()
    assert (shown["job_id"], shown["model"], shown["sha256"]) == (job_id, adapter.model, adapter.sha256)
    assert (shown["parameters"], shown["base_parameters"], shown["classes"]) == (20, 20_000, ["a", "b"])
    assert client.get("/v1/adapters").json()["data"] == [shown]


def test_its_bytes_are_streamed_under_their_digest(service: Service, owner: Owner, client: TestClient) -> None:
    _, adapter = service.trained(owner)
    path = f"/v1/adapters/{adapter.id}/content"
    reply = client.get(path)
    assert hashlib.sha256(reply.content).hexdigest() == adapter.sha256
    assert reply.headers["etag"] == f'"{adapter.sha256}"'
    assert reply.headers["content-disposition"].startswith("attachment")
    head = client.head(path)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", reply.headers["etag"])
    assert int(head.headers["content-length"]) == len(reply.content)
    assert client.get(path, headers={"If-None-Match": reply.headers["etag"]}).status_code == 304
    many = ",".join(f"{i}-{i}" for i in range(1000))
    assert client.get(path, headers={"Range": f"bytes={many}"}).content == reply.content


def test_bytes_that_are_gone_are_said_to_be_gone(service: Service, owner: Owner, client: TestClient) -> None:
    _, adapter = service.trained(owner)
    service.store.delete(adapter.object_key)
    problem = assert_problem(client.get(f"/v1/adapters/{adapter.id}/content"), 410, "object_missing")
    assert adapter.object_key not in str(problem)


def test_metadata_is_replaced_unless_somebody_was_faster(service: Service, owner: Owner, client: TestClient) -> None:
    _, adapter = service.trained(owner)
    path = f"/v1/adapters/{adapter.id}"
    old = client.get(path).headers["etag"]
    changed = client.patch(path, json={"metadata": {"stage": "live"}}, headers={"If-Match": old})
    assert changed.json()["metadata"] == {"stage": "live"}
    assert changed.headers["etag"] == client.get(path).headers["etag"] != old
    assert_problem(client.patch(path, json={"metadata": {}}, headers={"If-Match": old}), 412, "precondition_failed")
    told = client.patch(path, json={"metadata": {"stage": "live"}}, headers={"If-None-Match": "*"})
    assert (told.status_code, told.json()["metadata"]) == (200, {"stage": "live"}), "304 is for who reads"
    for name in (path, f"/v1/models/{adapter.model}"):
        assert_problem(client.delete(name, headers={"If-Match": old}), 412, "precondition_failed")
    assert client.get(path).json()["metadata"] == {"stage": "live"}


def test_adapters_are_listed_by_their_metadata(service: Service, owner: Owner, client: TestClient) -> None:
    stranger = service.owner()
    made = [service.trained(asker)[1].id for asker in (owner, owner, owner, stranger)]
    for asker, adapter_id, stage in zip((client, client, stranger.client), (*made[:2], made[3]), "aba", strict=True):
        asker.patch(f"/v1/adapters/{adapter_id}", json={"metadata": {"stage": stage, "team": "x"}})

    def listed(**query: str) -> list[str]:
        return [adapter["id"] for adapter in client.get("/v1/adapters", params=query).json()["data"]]

    assert listed() == [made[2], made[1], made[0]]
    assert listed(**{"metadata[stage]": "a"}) == [made[0]]
    assert listed(**{"metadata[team]": "x"}) == [made[1], made[0]]
    assert listed(**{"metadata[team]": "x", "after": made[1]}) == [made[0]]
    assert listed(metadata="null") == [made[2]]


def test_a_deleted_adapter_is_no_model_any_more(service: Service, owner: Owner, client: TestClient) -> None:
    job_id, adapter = service.trained(owner)
    assert client.delete(f"/v1/adapters/{adapter.id}").json()["deleted"] is True
    assert_problem(client.get(f"/v1/adapters/{adapter.id}"), 404, "not_found")
    assert_problem(client.get(f"/v1/models/{adapter.model}"), 404, "model_not_found")
    reply = client.post("/v1/images/generations", json={"model": adapter.model, "prompt": "a"})
    assert_problem(reply, 404, "model_not_found", "/model")
    assert client.get(f"/v1/fine_tuning/jobs/{job_id}").json()["fine_tuned_model"] == adapter.model


def test_models_are_the_bases_and_ones_own(service: Service, owner: Owner, client: TestClient) -> None:
    _, adapter = service.trained(owner)
    base, tuned = client.get("/v1/models").json()["data"]
    assert (base["id"], base["kind"], base["image_size"], base["owned_by"]) == ("tiny-dit", "base", 8, "system")
    assert base["classes"] == ["circle", "class 1", "class 2", "class 3"]
    assert (tuned["id"], tuned["kind"], tuned["adapter_id"]) == (adapter.model, "adapter", adapter.id)
    assert (tuned["classes"], tuned["bytes"], tuned["base"]) == (["a", "b"], adapter.bytes, "tiny-dit")
    for model in (base, tuned):
        assert client.get(f"/v1/models/{model['id']}").json() == model
    assert service.owner().client.get("/v1/models").json()["data"] == [base]


def test_a_model_says_what_a_job_on_its_base_may_ask_for(service: Service, owner: Owner, client: TestClient) -> None:
    service.trained(owner)
    base, tuned = client.get("/v1/models").json()["data"]
    assert (base["conditioning"], base["prediction"]) == ("class", "epsilon")
    assert (base["layers"], base["max_image_size"], base["image_size_step"]) == (4, 16, 2)
    told = ("conditioning", "prediction", "layers", "max_image_size", "image_size_step")
    assert [tuned[name] for name in told] == [base[name] for name in told]
    file_id = service.dataset(owner).id
    for size, status in ((16, 200), (18, 422), (15, 422)):
        body = job_body(file_id, method={"type": "difffit", "difffit": {"hyperparameters": {"image_size": size}}})
        assert client.post("/v1/fine_tuning/jobs", json=body).status_code == status


def test_ones_own_model_can_be_deleted_and_a_base_cannot(service: Service, owner: Owner, client: TestClient) -> None:
    _, adapter = service.trained(owner)
    assert_problem(client.delete("/v1/models/tiny-dit"), 409, "base_model")
    etag = client.get(f"/v1/adapters/{adapter.id}").headers["etag"]
    assert client.delete(f"/v1/models/{adapter.model}", headers={"If-Match": etag}).json() == {
        "id": adapter.model,
        "object": "model",
        "deleted": True,
    }
    assert_problem(client.get(f"/v1/adapters/{adapter.id}"), 404, "not_found")
    assert_problem(client.get(f"/v1/models/owner/{unknown('x')}"), 404, "model_not_found")


def test_keys_are_made_shown_once_and_revoked_at_once(service: Service, owner: Owner, client: TestClient) -> None:
    made = client.post("/v1/api_keys", json={"name": "ci"}).json()
    other = service.client(made["secret"])
    assert other.get("/v1/models").status_code == 200
    listed = client.get("/v1/api_keys").json()["data"]
    assert [item["name"] for item in listed] == ["ci", "test"]
    assert made["secret"] not in str(listed)
    assert client.delete(f"/v1/api_keys/{made['id']}").json()["deleted"] is True
    assert_problem(other.get("/v1/models"), 401, "invalid_api_key")
    assert_problem(client.delete(f"/v1/api_keys/{owner.key_id}"), 409, "last_api_key")
    assert client.get("/v1/models").status_code == 200


def test_keys_come_newest_first_in_pages(client: TestClient, owner: Owner) -> None:
    made = [client.post("/v1/api_keys", json={"name": name}).json()["id"] for name in "abc"]
    first = client.get("/v1/api_keys", params={"limit": 2}).json()
    assert [key["id"] for key in first["data"]] == [made[2], made[1]]
    assert first["has_more"]
    rest = client.get("/v1/api_keys", params={"limit": 2, "after": first["last_id"]}).json()
    assert [key["id"] for key in rest["data"]] == [made[0], owner.key_id]
    assert not rest["has_more"]
    assert_problem(client.get("/v1/api_keys", params={"after": "key-x"}), 404, "not_found", "/after")

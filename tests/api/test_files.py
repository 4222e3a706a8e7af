import http.client
import io
import json
import os
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from core import faults
from core.models import Dataset, OutboxMessage
from core.storage.base import StorageUnavailable
from core.storage.local import LocalStore
from core.tenants import leaving
from tests.api.conftest import Owner, Service, archive, assert_problem, upload
from tests.api.serving import running, wait_until


def test_an_upload_is_kept_whole_and_asked_to_be_validated(service: Service, client: TestClient) -> None:
    data = archive()
    reply = upload(client, data)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert body | {"id": "", "created_at": 0, "sha256": ""} == {
        "id": "",
        "object": "file",
        "bytes": len(data),
        "created_at": 0,
        "expires_at": None,
        "filename": "shapes.zip",
        "purpose": "fine-tune",
        "status": "uploaded",
        "status_details": None,
        "error_code": None,
        "sha256": "",
        "dataset": None,
    }
    assert client.get(f"/v1/files/{body['id']}/content").content == data
    assert service.spooled() == []
    with service.database.read() as session:
        message = session.scalars(select(OutboxMessage)).one()
    assert (message.topic, message.payload) == ("dataset.validate", {"dataset_id": body["id"]})


def test_a_large_upload_in_small_pieces_is_kept_byte_for_byte(client: TestClient) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("a/0.png", bytes(range(256)) * 20_000)  # five spool batches
    form = _form([("purpose", None, b"fine-tune"), ("file", "big.zip", data.getvalue())])

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(form), 10_007):
            yield form[start : start + 10_007]

    reply = client.post("/v1/files", content=pieces(), headers={"Content-Type": "multipart/form-data; boundary=xx"})
    assert reply.status_code == 200, reply.text
    assert client.get(f"/v1/files/{reply.json()['id']}/content").content == data.getvalue()


def test_files_are_listed_newest_first_in_pages(client: TestClient) -> None:
    ids = [upload(client).json()["id"] for _ in range(3)]
    first = client.get("/v1/files", params={"limit": 2}).json()
    assert [item["id"] for item in first["data"]] == [ids[2], ids[1]]
    assert (first["object"], first["first_id"], first["last_id"], first["has_more"]) == ("list", ids[2], ids[1], True)
    rest = client.get("/v1/files", params={"limit": 2, "after": ids[1]}).json()
    assert ([item["id"] for item in rest["data"]], rest["has_more"]) == ([ids[0]], False)
    assert client.get("/v1/files", params={"purpose": "assistants"}).json()["data"] == []


def test_a_deleted_file_is_gone(client: TestClient) -> None:
    file_id = upload(client).json()["id"]
    assert client.delete(f"/v1/files/{file_id}").json() == {"id": file_id, "object": "file", "deleted": True}
    assert_problem(client.get(f"/v1/files/{file_id}"), 404, "not_found")


def test_the_report_is_shown_once_there_is_one(service: Service, owner: Owner, client: TestClient) -> None:
    waiting = service.dataset(owner, "uploaded")
    early = client.get(f"/v1/files/{waiting.id}/report")
    assert_problem(early, 409, "file_not_validated")
    assert int(early.headers["retry-after"]) > 0
    assert "x-should-retry" not in early.headers
    client.delete(f"/v1/files/{waiting.id}")
    ready = service.dataset(owner)
    verdict = {"name": "a/0.png", "class": "a", "verdict": "accepted", "code": None, "detail": None}
    report = {"status": "processed", "code": None, "detail": None, "images": 1, "rejected": 0}
    report |= {"classes": [{"name": "a", "count": 1}], "verdicts": [verdict | {"width": 16, "height": 16}]}
    service.store.put(ready.report_key or "", json.dumps(report | {"sha256": "1"}).encode())
    shown = client.get(f"/v1/files/{ready.id}/report").json()
    assert shown == report | {"id": ready.id, "object": "file.report"}
    assert client.get(f"/v1/files/{ready.id}").json()["dataset"] == {
        "images": 32,
        "rejected": 0,
        "classes": [{"name": "a", "count": 20}, {"name": "b", "count": 12}],
    }


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"", "not_an_archive"), (b"MZ" * 1000, "not_an_archive"), (b"PK\x05\x06" + b"\0" * 18, "no_images"),
     (b"BZh91AY", "unsupported_compression"), (archive()[:-30], "truncated")],
)  # fmt: skip
def test_what_is_plainly_no_archive_is_refused_and_leaves_nothing(
    service: Service, client: TestClient, data: bytes, code: str
) -> None:
    assert_problem(upload(client, data), 422, code, "/file")
    assert _nothing_is_left(service)


def _form(parts: list[tuple[str, str | None, bytes]], end: bytes = b"--xx--\r\n") -> bytes:
    body = b""
    for name, filename, data in parts:
        named = f'; filename="{filename}"' if filename is not None else ""
        body += f'--xx\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + data + b"\r\n"
    return body + end


PURPOSE = ("purpose", None, b"fine-tune")
FILE = ("file", "x.zip", archive())


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        pytest.param(_form([PURPOSE, FILE], end=b""), 400, "malformed_multipart", id="A8 no closing boundary"),
        pytest.param(_form([PURPOSE, FILE])[:-60], 400, "malformed_multipart", id="A8 truncated"),
        pytest.param(_form([FILE] * 1500), 400, "malformed_multipart", id="A9 1500 files"),
        pytest.param(_form([(f"f{i}", None, b"") for i in range(5000)]), 400, "malformed_multipart", id="A10 fields"),
        pytest.param(_form([("purpose", None, b"x" * 9000), FILE]), 400, "malformed_multipart", id="A10 long field"),
        pytest.param(_form([("p" * 65536, None, b"x"), FILE]), 400, "malformed_multipart", id="A10 part header"),
        pytest.param(_form([PURPOSE, FILE, FILE]), 422, "invalid", id="A11 two files"),
        pytest.param(_form([PURPOSE, FILE, ("more", None, b"x")]), 422, "unknown_part", id="A11 extra field"),
        pytest.param(_form([PURPOSE, FILE, ("more", "y.zip", b"x")]), 422, "unknown_part", id="A11 extra file"),
        pytest.param(_form([PURPOSE]), 422, "invalid", id="no file"),
        pytest.param(_form([FILE]), 422, "invalid", id="no purpose"),
        pytest.param(_form([("purpose", None, b"batch"), FILE]), 422, "invalid", id="other purpose"),
        pytest.param(_form([PURPOSE, PURPOSE, FILE]), 422, "invalid", id="purpose twice"),
        pytest.param(b"", 400, "malformed_multipart", id="empty"),
        pytest.param(b"garbage", 400, "malformed_multipart", id="garbage"),
    ],
)
def test_a_bad_form_is_refused_and_leaves_nothing(
    service: Service, client: TestClient, body: bytes, status: int, code: str
) -> None:
    reply = client.post("/v1/files", content=body, headers={"Content-Type": "multipart/form-data; boundary=xx"})
    assert_problem(reply, status, code)
    assert _nothing_is_left(service)


@pytest.mark.parametrize("content_type", ["multipart/form-data", f"multipart/form-data; boundary={'b' * 300}"])
def test_a_form_without_a_usable_boundary_is_malformed(client: TestClient, content_type: str) -> None:
    reply = client.post("/v1/files", content=_form([PURPOSE, FILE]), headers={"Content-Type": content_type})
    assert_problem(reply, 400, "malformed_multipart")


@pytest.mark.parametrize(
    ("given", "shown"),
    [("../../etc/passwd", "passwd"), ("a\\b.zip", "b.zip"), ("x\x00\x1b[31m.zip", "x[31m.zip"), ("", "upload")],
)
def test_a_file_name_is_shown_and_never_opened(service: Service, client: TestClient, given: str, shown: str) -> None:
    body = _form([PURPOSE, ("file", given, archive())])
    reply = client.post("/v1/files", content=body, headers={"Content-Type": "multipart/form-data; boundary=xx"})
    assert reply.json()["filename"] == shown
    (key,) = service.objects()
    assert key.endswith(f"/datasets/{reply.json()['id']}/archive")


def test_a_store_that_is_away_leaves_no_row(
    service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise StorageUnavailable("the store does not answer")

    monkeypatch.setattr(LocalStore, "put_file", away)
    reply = upload(client)
    assert_problem(reply, 503, "storage_unavailable")
    assert int(reply.headers["retry-after"]) > 0
    assert _nothing_is_left(service)


@pytest.mark.parametrize("size", [1_000, 3_000_000], ids=["less than a buffer", "several batches"])
def test_a_full_spool_is_said_and_leaves_nothing(service: Service, client: TestClient, size: int) -> None:
    spool = service.settings.data_dir / "spool"
    spool.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", str(spool)], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        (spool / "others").write_bytes(b"x" * 4096)
        reply = upload(client, archive() + b"\0" * size)
        assert_problem(reply, 503, "spool_unavailable")
        assert int(reply.headers["retry-after"]) > 0
        assert [path.name for path in service.spooled()] == ["others"]
    finally:
        subprocess.run(["umount", str(spool)], check=True)
    assert _nothing_is_left(service)
    assert upload(client).status_code == 200


@pytest.mark.parametrize("point", ["body_staged", "before_commit"])
def test_an_upload_that_dies_before_its_commit_leaves_nothing(
    service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    faults._passed.clear()
    monkeypatch.setenv("FAULT", f"{point}:raise")
    assert_problem(upload(client), 500, "internal_error")
    monkeypatch.delenv("FAULT")
    assert _nothing_is_left(service)


def test_a_file_over_the_limit_is_refused(service: Service, client: TestClient) -> None:
    service.settings.max_upload_bytes = 100
    assert_problem(upload(client), 413, "body_too_large")
    assert _nothing_is_left(service)


def test_the_ninth_upload_at_once_of_a_tenant_waits_and_others_do_not(service: Service, owner: Owner) -> None:
    gate = service.app.state.uploads
    with ExitStack() as under_way:
        for _ in range(8):
            under_way.enter_context(gate.one(owner.tenant.id))
        reply = upload(owner.client)
        assert_problem(reply, 429, "too_many_uploads")
        assert int(reply.headers["retry-after"]) > 0
        assert upload(service.owner().client).status_code == 200
    assert upload(owner.client).status_code == 200


def test_a_client_that_hangs_up_leaves_nothing(service: Service, owner: Owner) -> None:
    body = _form([PURPOSE, ("file", "x.zip", archive() + b"\0" * 3_000_000)])
    with running(service) as port:
        for share in (0.1, 0.5, 0.99):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.putrequest("POST", "/v1/files")
            connection.putheader("Authorization", str(owner.client.headers["authorization"]))
            connection.putheader("Content-Type", "multipart/form-data; boundary=xx")
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders()
            connection.send(body[: int(len(body) * share)])
            connection.close()
        wait_until(lambda: _nothing_is_left(service))


def test_an_upload_that_ends_after_its_tenant_was_suspended_leaves_nothing(service: Service, owner: Owner) -> None:
    body = _form([PURPOSE, FILE])
    with running(service) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.putrequest("POST", "/v1/files")
        connection.putheader("Authorization", str(owner.client.headers["authorization"]))
        connection.putheader("Content-Type", "multipart/form-data; boundary=xx")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:100])
        wait_until(service.spooled)  # its key was looked at, its body is awaited
        leaving.suspend(service.database, owner.tenant.id)
        connection.send(body[100:])
        reply = connection.getresponse()
        assert (reply.status, json.loads(reply.read())["error"]["code"]) == (403, "tenant_suspended")
        connection.close()
        assert _nothing_is_left(service)


def test_a_caller_without_a_key_is_told_before_its_body_is_read(service: Service) -> None:
    with running(service) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.putrequest("POST", "/v1/files")
        connection.putheader("Content-Type", "multipart/form-data; boundary=xx")
        connection.putheader("Content-Length", str(60 * 1024**2))
        connection.endheaders()
        reply = connection.getresponse()  # not one byte of the 60 MiB has been sent
        assert reply.status == 401
        assert reply.headers["content-type"] == "application/problem+json"
        assert reply.headers["connection"] == "close"
        connection.close()


def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_read(service: Service, owner: Owner) -> None:
    with running(service) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.putrequest("POST", "/v1/files")
        connection.putheader("Authorization", str(owner.client.headers["authorization"]))
        connection.putheader("Content-Type", "multipart/form-data; boundary=xx")
        connection.putheader("Content-Length", str(600 * 1024**2))
        connection.endheaders()
        reply = connection.getresponse()  # not one byte of the 600 MiB has been sent
        assert (reply.status, json.loads(reply.read())["error"]["code"]) == (413, "body_too_large")
        assert reply.headers["connection"] == "close"
        connection.close()
    assert service.spooled() == []


def _nothing_is_left(service: Service) -> bool:
    with service.database.read() as session:
        rows = session.scalars(select(Dataset)).all()
    return not rows and not service.objects() and not service.spooled()


def test_what_a_killed_process_left_in_the_spool_goes_with_a_later_upload(service: Service, client: TestClient) -> None:
    spool = service.settings.data_dir / "spool"
    spool.mkdir()
    for name in ("left", "under-way-elsewhere"):
        (spool / name).write_bytes(b"half an upload")
    os.utime(spool / "left", (0, 0))
    assert upload(client).status_code == 200
    assert [path.name for path in service.spooled()] == ["under-way-elsewhere"]

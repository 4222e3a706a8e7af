"""Retries and errors, against a server that fails on request."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from client.errors import ApiError, ClientError, Unreachable
from client.files import Files
from client.images import CompletedImage, Images
from client.jobs import Jobs
from client.transport import Transport

Reply = tuple[int, dict[str, str], dict | bytes]
PROBLEM = {
    "type": "urn:difffit:error:invalid",
    "title": "Unprocessable Content",
    "status": 422,
    "detail": "steps is 0",
    "errors": [{"pointer": "/method/difffit/hyperparameters/steps", "detail": "must be at least 1"}],
    "error": {"code": "invalid", "message": "steps is 0", "param": "steps", "type": "invalid_request_error"},
}
CUT: Reply = (0, {}, {})


@dataclass
class Server:
    """Answers with `replies` in turn, the last one from then on; `CUT` hangs up without a word.

    A path of `at` has its own answer, always the same.
    """

    replies: list[Reply] = field(default_factory=list)
    at: dict[str, Reply] = field(default_factory=dict)
    seen: list[str | None] = field(default_factory=list)
    """What each asked with `replies` had seen: its Last-Event-ID."""
    keys: list[str | None] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    url: str = ""

    @property
    def requests(self) -> int:
        return len(self.keys)

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path in self.at:
            reply = self.at[handler.path]
        else:
            reply = self.replies[min(len(self.seen), len(self.replies) - 1)]
            self.seen.append(handler.headers["Last-Event-ID"])
        self.keys.append(handler.headers["Idempotency-Key"])
        self.bodies.append(_body(handler))
        status, headers, body = reply
        if reply == CUT:
            handler.close_connection = True
            handler.connection.close()
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))


@pytest.fixture
def server() -> Iterator[Server]:
    script = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            script.handle(self)

        do_POST = do_DELETE = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        script.url = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield script
        listening.shutdown()
        thread.join()


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def transport(server: Server, waits: list[float]) -> Iterator[Transport]:
    made = Transport(server.url, "dfk_test", timeout=5, retries=3, sleep=waits.append)
    yield made
    made.close()


def test_a_busy_service_is_asked_again_after_the_time_that_it_names(
    server: Server, transport: Transport, waits: list[float]
) -> None:
    server.replies = [(429, {"Retry-After": "7"}, {}), (503, {"Retry-After": "1"}, {}), (200, {}, {"id": "x"})]
    assert transport.post("/v1/things", {"a": 1}) == {"id": "x"}
    assert waits == [7.0, 1.0]


def test_a_conflict_is_asked_again_where_it_says_when(server: Server, transport: Transport, waits: list[float]) -> None:
    server.replies = [(409, {"Retry-After": "2"}, {}), (409, {"x-should-retry": "false"}, {})]
    with pytest.raises(ApiError) as caught:
        transport.post("/v1/things")
    assert (caught.value.status, server.requests, waits) == (409, 2, [2.0])


def test_every_repeat_of_a_post_carries_the_same_key_and_body(server: Server, transport: Transport) -> None:
    server.replies = [CUT, (503, {}, {}), (200, {}, {})]
    transport.post("/v1/things", {"a": 1})
    assert len(set(server.keys)) == 1
    assert server.keys[0]
    assert [json.loads(body) for body in server.bodies] == [{"a": 1}] * 3


def test_two_posts_carry_two_keys(server: Server, transport: Transport) -> None:
    server.replies = [(200, {}, {})]
    transport.post("/v1/things")
    transport.post("/v1/things")
    assert len(set(server.keys)) == 2


def test_an_upload_that_broke_is_sent_again_from_its_first_byte(
    server: Server, transport: Transport, tmp_path: Path
) -> None:
    archive = tmp_path / "set.zip"
    archive.write_bytes(bytes(range(256)) * 1000)
    file = {"id": "file-1", "filename": "set.zip", "bytes": 256_000, "status": "uploaded", "created_at": 1}
    server.replies = [(503, {}, {}), (200, {}, file)]
    told: list[tuple[int, int]] = []
    assert Files(transport).push(archive, lambda sent, total: told.append((sent, total))).id == "file-1"
    assert [archive.read_bytes() in body for body in server.bodies] == [True, True]
    assert told[-1] == (256_000, 256_000)


def test_a_final_refusal_is_not_repeated(server: Server, transport: Transport, waits: list[float]) -> None:
    server.replies = [
        (503, {"x-should-retry": "false", "Location": "/v1/images/generations/img-1"}, {"detail": "not yet"})
    ]
    with pytest.raises(ApiError) as caught:
        transport.post("/v1/images/generations", {})
    assert (server.requests, waits) == (1, [])
    assert caught.value.location == "/v1/images/generations/img-1"


@pytest.mark.parametrize("first", [CUT, (503, {"Retry-After": "1"}, {})])
def test_a_delete_whose_first_answer_was_lost_is_done_when_the_thing_is_gone(
    server: Server, transport: Transport, first: Reply
) -> None:
    server.replies = [first, (404, {}, {"detail": "no such thing"})]
    transport.delete("/v1/things/1")
    assert server.requests == 2


@pytest.mark.parametrize("replies", [[(404, {}, {})], [(429, {"Retry-After": "1"}, {}), (404, {}, {})]])
def test_a_delete_of_what_was_never_there_is_an_error(
    server: Server, transport: Transport, replies: list[Reply]
) -> None:
    server.replies = replies
    with pytest.raises(ApiError, match="404"):
        transport.delete("/v1/things/1")


def test_a_read_after_a_broken_connection_is_still_not_found(server: Server, transport: Transport) -> None:
    server.replies = [CUT, (404, {}, {})]
    with pytest.raises(ApiError, match="404"):
        transport.get("/v1/things/1")


def test_patience_ends(server: Server, transport: Transport) -> None:
    server.replies = [(503, {"Retry-After": "1"}, {"detail": "the database is away", "error": {"code": "unavailable"}})]
    with pytest.raises(ApiError) as caught:
        transport.get("/v1/things")
    assert (server.requests, caught.value.status, caught.value.code) == (4, 503, "unavailable")


def test_a_problem_reads_as_one_line_that_names_the_field(server: Server, transport: Transport) -> None:
    server.replies = [(422, {}, PROBLEM)]
    with pytest.raises(ApiError) as caught:
        transport.post("/v1/fine_tuning/jobs", {})
    assert str(caught.value) == ("steps is 0 (/method/difffit/hyperparameters/steps: must be at least 1) [422 invalid]")
    assert server.requests == 1


def test_a_page_that_is_no_json_is_quoted_in_short(server: Server, transport: Transport) -> None:
    server.replies = [(500, {}, {})]
    with pytest.raises(ApiError, match=r"Internal Server Error \[500 http_error\]"):
        transport.get("/v1/things")


def test_nobody_there_is_said_with_what_to_do(waits: list[float]) -> None:
    transport = Transport("http://127.0.0.1:9", None, retries=1, sleep=waits.append)
    with pytest.raises(Unreachable, match=r"no answer from http://127.0.0.1:9 \(connection refused\): start it with"):
        transport.get("/healthz")
    transport.close()
    assert len(waits) == 1


def test_pages_are_walked_to_the_limit(server: Server, transport: Transport) -> None:
    server.replies = [
        (200, {}, {"data": [{"id": "a"}, {"id": "b"}], "has_more": True, "last_id": "b"}),
        (200, {}, {"data": [{"id": "c"}], "has_more": True, "last_id": "c"}),
    ]
    assert [item["id"] for item in transport.page("/v1/things", limit=3)] == ["a", "b", "c"]
    assert server.requests == 2


COMPLETED = b"""event: image_generation.completed
data: {"type": "image_generation.completed", "b64_json": "cGlj",
data: "seed": 5, "image_index": 0}

"""


def test_a_stream_is_read_over_pings_and_lines(server: Server, transport: Transport) -> None:
    server.replies = [(200, {}, b": ping\n\nid: 7\n" + COMPLETED.replace(b"\n", b"\r\n") + b": ping\n\n")]
    [event] = Images(transport).stream("tiny-dit")
    assert isinstance(event, CompletedImage)
    assert (event.image.data, event.image.seed) == (b"pic", 5)
    assert json.loads(server.bodies[0]) == {
        "model": "tiny-dit",
        "prompt": "",
        "response_format": "b64_json",
        "stream": True,
        "partial_images": 0,
    }
    assert server.keys == [None]  # without a key, a reader who goes away has cancelled


def test_a_stream_is_asked_for_again_where_it_was_refused_for_now(
    server: Server, transport: Transport, waits: list[float]
) -> None:
    server.replies = [(429, {"Retry-After": "5"}, {}), (200, {}, COMPLETED)]
    assert len(list(Images(transport).stream("tiny-dit"))) == 1
    assert (server.requests, waits) == (2, [5.0])


@pytest.mark.parametrize(("status", "requests"), [(429, 4), (503, 1), (422, 1)])
def test_a_stream_that_stays_refused_is_an_error(
    server: Server, transport: Transport, status: int, requests: int
) -> None:
    server.replies = [(status, {"Retry-After": "1"}, {"detail": "no"})]
    with pytest.raises(ApiError, match="no") as caught:
        list(Images(transport).stream("tiny-dit"))
    assert (server.requests, caught.value.status) == (requests, status)


@pytest.mark.parametrize(
    ("headers", "reply", "reason"),
    [
        ({}, b": ping\n\n", "after 0 of 2 images"),
        ({}, COMPLETED + COMPLETED.rstrip(), "after 1 of 2 images"),
        ({"Content-Length": "9999"}, COMPLETED, "peer closed connection"),
    ],
)
def test_a_stream_that_ends_early_says_so(
    server: Server, transport: Transport, headers: dict[str, str], reply: bytes, reason: str
) -> None:
    server.replies = [(200, headers, reply)]
    with pytest.raises(Unreachable, match=f"the stream ended early.*{reason}"):
        list(Images(transport).stream("tiny-dit", n=2))
    assert server.requests == 1


HANDED_OVER: Reply = (503, {"x-should-retry": "false", "Location": "/v1/images/generations/img-1"}, {})


@pytest.mark.parametrize(
    ("status", "error", "code", "message"),
    [
        (
            "failed",
            {"code": "out_of_memory", "message": "it is too large", "param": "size"},
            "out_of_memory",
            "too large",
        ),
        ("cancelled", None, "cancelled", "img-1 was cancelled"),
    ],
)
def test_images_that_fail_after_the_service_went_on_without_us_raise_their_code(
    server: Server, transport: Transport, status: str, error: dict[str, str] | None, code: str, message: str
) -> None:
    server.replies = [HANDED_OVER]
    server.at = {"/v1/images/generations/img-1": (200, {}, {"id": "img-1", "status": status, "error": error})}
    with pytest.raises(ApiError, match=message) as caught:
        Images(transport).generate("tiny-dit")
    assert caught.value.code == code


def test_a_key_with_a_line_end_is_refused_before_it_is_sent() -> None:
    with pytest.raises(ClientError, match="without line ends"):
        Transport("http://127.0.0.1:9", "dfk_a\nb")


JOB = "/v1/fine_tuning/jobs/ftjob-1"
GIVEN = {"model": "m", "training_file": "file-1", "method": {"difffit": {"hyperparameters": {}}}}
JOBS: dict[str, Reply] = {
    status: (200, {}, {"id": "ftjob-1", "status": status, "created_at": 1, **GIVEN})
    for status in ("running", "succeeded")
}
LAST: Reply = (404, {}, {"detail": "asked more often than it should be"})


def events(*numbers: int, is_broken: bool = False) -> Reply:
    data = "".join(f'id: {number}\ndata: {{"created_at": 1}}\n\n' for number in numbers)
    return 200, {"Content-Length": "9999"} if is_broken else {}, f"retry: 2000\n\n{data}".encode()


def followed(transport: Transport, retries: int = 20) -> list[str]:
    return [event.id for event in Jobs(transport).events("ftjob-1", retries=retries)]


def test_a_stream_that_breaks_after_its_last_event_ends_with_the_job(server: Server, transport: Transport) -> None:
    server.replies = [events(1, 2, is_broken=True), events(), LAST]
    server.at = {JOB: JOBS["succeeded"]}
    assert followed(transport) == ["1", "2"]
    assert server.seen == [None, "2"]


def test_events_outlast_a_service_that_is_away_longer_than_one_call_waits(
    server: Server, transport: Transport, waits: list[float]
) -> None:
    away: Reply = (503, {"Retry-After": "7"}, {"detail": "the database is away"})
    server.replies = [events(1, is_broken=True), *[CUT] * 8, away, events(2), LAST]
    server.at = {JOB: JOBS["succeeded"]}
    assert followed(transport) == ["1", "2"]
    assert server.seen == [None, *["1"] * 10]
    assert waits[-1] == 7.0
    assert max(waits[:-1]) < 5


def test_a_service_that_is_away_when_the_stream_has_ended_is_asked_again(server: Server, transport: Transport) -> None:
    one_call: list[Reply] = [CUT] * 4
    server.replies = [events(1), *one_call, events(2), JOBS["running"], events(3), JOBS["succeeded"], LAST]
    assert followed(transport) == ["1", "2", "3"]


@pytest.mark.parametrize("retries", [0, 2])
def test_events_give_up_after_so_many_breaks_with_nothing_new(
    server: Server, transport: Transport, retries: int
) -> None:
    server.replies = [CUT]
    with pytest.raises(Unreachable):
        followed(transport, retries)
    assert server.requests == 1 + retries


def test_events_of_a_job_that_is_not_there_are_refused_at_once(server: Server, transport: Transport) -> None:
    server.replies = [LAST]
    with pytest.raises(ApiError, match="404"):
        followed(transport)
    assert server.requests == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_has_not_is_named_and_nothing_is_sent(
    server: Server, transport: Transport, number: float
) -> None:
    with pytest.raises(ClientError, match=rf"^method\.difffit\.hyperparameters\.learning_rate is {number}: it must be"):
        Jobs(transport).create("file-1", model="m", hyperparameters={"steps": 3, "learning_rate": number})
    with pytest.raises(ClientError, match=rf"^guidance_interval\.0 is {number}: it must be a finite number$"):
        Images(transport).generate("m", guidance_interval=(number, 1.0))
    with pytest.raises(ClientError, match=rf"^adapters\.1\.weight is {number}: it must be a finite number$"):
        next(Images(transport).stream("m", adapters=[("ft:a", 1.0), ("ft:b", number)]))
    assert server.requests == 0

"""Requests that no HTTP library would send (FAULTS §2 A): refused, dropped or cut off, and the next is answered."""

import json
import socket
import time

import pytest

from tests.api.conftest import Owner, Service
from tests.api.serving import running

BODY = json.dumps({"name": "second"}).encode()


def exchanged(port: int, request: bytes, *, hangs_up: bool = False) -> list[int]:
    """The statuses of all that comes back, until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        if hangs_up:
            connection.shutdown(socket.SHUT_WR)
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    return [int(part[:3]) for part in reply.split(b"HTTP/1.1 ")[1:]]


def create_key(owner: Owner, length: int = len(BODY), **headers: bytes) -> bytes:
    """A request that makes a key, whole and right unless told otherwise."""
    fields = {
        b"Host": b"here",
        b"Connection": b"close",
        b"Authorization": owner.client.headers["authorization"].encode(),
        b"Content-Type": b"application/json",
        b"Content-Length": str(length).encode(),
        **{name.replace("_", "-").encode(): value for name, value in headers.items()},
    }
    lines = [b"POST /v1/api_keys HTTP/1.1", *(b"%s: %s" % pair for pair in fields.items())]
    return b"\r\n".join([*lines, b"", BODY])


def keys_of(owner: Owner) -> int:
    return len(owner.client.get("/v1/api_keys").json()["data"])


def test_a_request_that_is_right_is_answered(service: Service, owner: Owner) -> None:
    """Control of those below."""
    with running(service) as port:
        assert exchanged(port, create_key(owner, X_Long=b"x" * 1000)) == [200]
    assert keys_of(owner) == 2


@pytest.mark.parametrize(
    ("length", "headers", "statuses"),
    [
        pytest.param(len(BODY) - 5, {}, [400], id="A3 shorter than the body"),
        pytest.param(len(BODY) + 5, {}, [], id="A3 longer than the body"),
        pytest.param(-1, {}, [400], id="A3 negative"),
        pytest.param(len(BODY), {"content_length": b"3"}, [400], id="A3 two that differ"),
        pytest.param(len(BODY), {"X_Long": b"x" * 64 * 1024}, [400], id="A20 a header of 64 KiB"),
        pytest.param(len(BODY), {f"X_{n}": b"x" * 400 for n in range(200)}, [400], id="A20 200 headers of 400 bytes"),
        pytest.param(len(BODY), {"X_Evil": b"a\rX-More: b"}, [400], id="A20 a lone CR"),
        pytest.param(len(BODY), {"X_Evil": b"a\r\nno header"}, [400], id="A20 CRLF and no header"),
        pytest.param(len(BODY), {"X_Evil": b"a\x00b"}, [400], id="A20 a NUL"),
    ],
)
def test_a_request_that_is_none_is_refused_and_does_nothing(
    service: Service, owner: Owner, length: int, headers: dict[str, bytes], statuses: list[int]
) -> None:
    with running(service) as port:
        request = create_key(owner, length, **headers)
        assert exchanged(port, request, hangs_up=length > len(BODY)) == statuses  # or it would wait for the rest
        assert exchanged(port, b"GET /healthz HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n") == [200]
    assert keys_of(owner) == 1


@pytest.fixture
def short_deadline(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr("api.protocol.HEADER_SECONDS", 0.5)
    return 0.5


@pytest.mark.parametrize("before", [b"", b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n"], ids=["first", "second"])
def test_a_head_that_drips_is_cut_off(service: Service, short_deadline: float, before: bytes) -> None:
    """A5: a byte now and then keeps no connection open, on a new one and on one that was used before."""
    with running(service) as port, socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(before)
        connection.settimeout(short_deadline / 5)
        reply = b""
        for letter in b"GET /healthz HTTP/1.1\r\nHost: " + b"x" * 200:
            try:
                connection.sendall(bytes([letter]))
                part = connection.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break
            if not part:
                break
            reply += part
        else:
            pytest.fail("it was never cut off")
        *answered, cut = reply.split(b"HTTP/1.1 ")[1:]
        assert [part[:3] for part in answered] == [b"200"] * bool(before)
        assert (cut[:3], json.loads(cut.partition(b"\r\n\r\n")[2])["error"]["code"]) == (b"408", "headers_too_slow")
        assert b"connection: close" in cut


def test_a_connection_on_which_nothing_comes_is_closed_without_a_word(service: Service, short_deadline: float) -> None:
    with running(service) as port:
        assert exchanged(port, b"") == []


def test_a_body_may_take_longer_than_a_head(service: Service, owner: Owner, short_deadline: float) -> None:
    """And the connection serves on after it."""
    request = create_key(owner).replace(b"Connection: close\r\n", b"")
    with running(service) as port, socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request[: -len(BODY)])
        time.sleep(2 * short_deadline)
        connection.sendall(BODY)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        assert b"".join(iter(lambda: connection.recv(65536), b"")).startswith(b"HTTP/1.1 200")
    assert keys_of(owner) == 2

"""An HTTP proxy before a real S3 server that does to chosen requests what networks and servers do (FAULTS 22 to 25)."""

import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

Toxic = Literal["slow_down", "reset", "lost_reply", "half_a_body", "error_in_200"]
"""`slow_down`: refused by 503 before it is done. `reset`: the connection breaks before it is done. `lost_reply`: done,
and the connection breaks before the reply. `half_a_body`: the reply's head whole, its body half, then the end.
`error_in_200`: not done, and an error within a reply of status 200, as S3 gives to what it copies or completes."""

_REFUSAL = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>try again</Message></Error>"
_BY_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class ToxicProxy:
    """`choose(method, path)` says what is done to a request; None passes it on. `struck` counts what was done."""

    def __init__(self, endpoint: str) -> None:
        self.backend = urlsplit(endpoint).netloc
        self.choose: Callable[[str, str], Toxic | None] = lambda _method, _path: None
        self.requests: list[tuple[str, str]] = []
        self.struck = 0

    def strike(self, toxic: Toxic, times: int = 10**9, verbs: str = "", part: str = "") -> None:
        """The first `times` requests from now on of these methods and with this in their path."""
        left = times
        lock = threading.Lock()

        def choose(method: str, path: str) -> Toxic | None:
            nonlocal left
            with lock:
                if left and (not verbs or method in verbs.split()) and part in path:
                    left -= 1
                    return toxic
            return None

        self.choose = choose
        self.requests.clear()
        self.struck = 0


@contextmanager
def toxic_proxy(endpoint: str) -> Iterator[tuple[ToxicProxy, str]]:
    """The proxy and its own endpoint."""
    proxy = ToxicProxy(endpoint)
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: ToxicProxy

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):  # ValueError: the reply's file was closed by a reset
            self.close_connection = True

    def _pass(self) -> None:
        proxy = self.proxy
        proxy.requests.append((self.command, self.path))
        body = self._body()
        toxic = proxy.choose(self.command, self.path)
        proxy.struck += toxic is not None
        if toxic == "reset":
            self._reset()
        elif toxic == "slow_down":
            self._answer(503, [], _REFUSAL % b"SlowDown")
        elif toxic == "error_in_200":
            self._answer(200, [], _REFUSAL % b"InternalError")
        else:
            status, headers, reply = self._forward(body)
            if toxic == "lost_reply":
                self._reset()
            else:
                self._answer(status, headers, reply, half=toxic == "half_a_body")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass  # http.server's names

    def _body(self) -> bytes:
        """As it came, chunks with their frames."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while True:
            line = self.rfile.readline()
            chunk = self.rfile.read(int(line.split(b";")[0], 16) + 2)
            body += line + chunk
            if line.strip().startswith(b"0") and int(line.split(b";")[0], 16) == 0:
                return body

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        backend = http.client.HTTPConnection(self.proxy.backend, timeout=30)
        try:
            backend.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "expect":
                    backend.putheader(name, value)
            backend.endheaders()
            backend.send(body)
            reply = backend.getresponse()
            return reply.status, reply.getheaders(), reply.read()
        finally:
            backend.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, half: bool = False) -> None:
        self.send_response_only(status)
        told = {name.lower(): value for name, value in headers}
        for name, value in headers:
            if name.lower() not in _BY_CONNECTION:
                self.send_header(name, value)
        length = told.get("content-length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if half else body)
        if half:
            self.close_connection = True

    def _reset(self) -> None:
        """RST, not FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_words: Any) -> None:
        pass

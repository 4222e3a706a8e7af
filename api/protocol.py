"""HTTP/1.1 as uvicorn speaks it, with an end to waiting for a request's headers, which uvicorn does not have."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.errors import HeadersTooSlow, domain_problem

HEADER_SECONDS = 20.0


class DeadlineProtocol(H11Protocol):
    """A connection that has not sent a whole head after `HEADER_SECONDS` is answered 408, and closed.

    One that has sent nothing is closed without a word. Between two requests uvicorn's own keep-alive timeout runs.
    """

    _deadline: asyncio.TimerHandle | None = None
    _has_begun = False  # whether a byte of the next head has come

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # pyright: ignore[reportArgumentType]  # uvicorn names asyncio.Transport
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_waiting():
            self._has_begun = True
            self._wait_for_head()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _is_waiting(self) -> bool:
        return self.conn.their_state is h11.IDLE and not self.transport.is_closing()

    def _wait_for_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline, self._has_begun = None, False

    def _give_up(self) -> None:
        if not self._is_waiting():
            return
        if self._has_begun:
            error = HeadersTooSlow(f"the head of the request did not come within {HEADER_SECONDS:g} s")
            reply = domain_problem(error, "")
            head = [*reply.raw_headers, (b"connection", b"close")]
            events = h11.Response(status_code=reply.status_code, headers=head), h11.Data(data=bytes(reply.body))
            for event in (*events, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

"""uvicorn's HTTP/1.1 with the patience of one who has other clients: slow, endless or too many are ended."""

from typing import TYPE_CHECKING, Any

from vitral.ship.serve.exchange import LINGER_BYTES, LINGER_SECONDS, as_json
from vitral.ship.serve.options import ServeOptions

if TYPE_CHECKING:
    import asyncio

    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Base
else:  # the package is there when a server begins
    Base = object

_MOST_HEADER_BYTES = 64 * 1024
_PHRASES = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Unavailable",
}


class Patient(Base):
    """Ends a connection whose headers come too slowly or are too many, and those beyond the most."""

    options: ServeOptions
    _timer: "asyncio.TimerHandle | None" = None
    _reading_body = False  # else headers are awaited
    _header_bytes = 0
    _ended_in_piece = False  # whether the headers ended in the bytes that are being read
    _bytes_to_throw_away: int | None = None  # None: the connection goes on

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.options.max_connections:
            self._end(503, "too many connections")
        else:
            self._await_headers()

    def data_received(self, data: bytes) -> None:
        if self._bytes_to_throw_away is not None:
            self._throw_away(len(data))
            return
        if not self._reading_body and self._timer is None:
            self._await_headers()
        self._ended_in_piece = self._reading_body
        super().data_received(data)
        if not self._ended_in_piece:
            self._header_bytes += len(data)
            if self._header_bytes > _MOST_HEADER_BYTES:
                self._end(431, "the headers are too long")

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        self._reading_body, self._ended_in_piece, self._header_bytes = True, True, 0
        if sum(len(name) + len(value) for name, value in self.headers) > _MOST_HEADER_BYTES:
            self._end(431, "the headers are too long")
        if self._bytes_to_throw_away is not None:
            raise ValueError("the connection is ended")  # stops the parser
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._reading_body = False
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        # Of a new connection the request is on its way: it is told that the server ends, and not cut off.
        if self.cycle is not None:
            super().shutdown()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        # What a client does not read of its answer would be kept for ever.
        self.loop.call_later(self.options.body_timeout, self.transport.abort)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's
        self._end(400, "this is not HTTP/1.1")

    def _await_headers(self) -> None:
        self._timer = self.loop.call_later(self.options.header_timeout, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._end(408, f"the headers did not come within {self.options.header_timeout:g} s")

    def _end(self, status: int, line: str) -> None:
        """Answers, if no answer has begun, and closes once the client can have read it."""
        self._stop_waiting()
        if self._bytes_to_throw_away is not None or self.transport.is_closing():
            return
        self._bytes_to_throw_away = LINGER_BYTES
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                self.transport.close()
                return
            self.cycle.disconnected = True  # its handler is told that nobody listens
            self.cycle.message_event.set()
        body = as_json({"error": line}).body
        self.transport.write(
            f"HTTP/1.1 {status} {_PHRASES[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
            + body
        )
        self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def _throw_away(self, count: int) -> None:
        self._bytes_to_throw_away = (self._bytes_to_throw_away or 0) - count
        if self._bytes_to_throw_away < 0:
            self.transport.abort()


def protocol_class(options: ServeOptions) -> type:
    """The protocol of a connection, with the times and limits of these options."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    return type("PatientProtocol", (Patient, HttpToolsProtocol), {"options": options})

"""uvicorn's HTTP/1.1 with the patience of one who has other clients: slow, endless or too many are ended."""

from typing import TYPE_CHECKING, Any

from vitral.ship.serve.exchange import as_json
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

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.options.max_connections:
            self._end(503, "too many connections")
        else:
            self._await_headers()

    def data_received(self, data: bytes) -> None:
        if not self._reading_body and self._timer is None:
            self._await_headers()
        if not self._reading_body:
            self._header_bytes += len(data)
        super().data_received(
            data
        )  # complete headers set the count to 0, also if the whole body came with them
        if not self._reading_body and self._header_bytes > _MOST_HEADER_BYTES:
            self._end(431, "the headers are too long")

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        self._reading_body, self._header_bytes = True, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._reading_body = False
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

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
        self._stop_waiting()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            body = as_json({"error": line}).body
            self.transport.write(
                f"HTTP/1.1 {status} {_PHRASES[status]}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
                + body
            )
        self.transport.close()


def protocol_class(options: ServeOptions) -> type:
    """The protocol of a connection, with the times and limits of these options."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    return type("PatientProtocol", (Patient, HttpToolsProtocol), {"options": options})

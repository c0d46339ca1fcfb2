"""Connections of HTTP/1.1 that stay open, by httptools' parser.

So a request costs the generator some 0.05 to 0.09 ms of a core, and 3 ms by httpx (docs/log.md, 2026-11-27).
On a machine of few cores the generator takes its time from the server that it measures.
"""

import asyncio
import ssl
from collections import deque
from typing import NamedTuple

from vitral.bench.serving.target import Target
from vitral.runtime.extras import need

REFUSED = "refused"


class Reply(NamedTuple):
    """What came back: the status, the body, and whether it said when to come again."""

    status: int
    body: bytes
    retry_after: bool


class Lost(Exception):
    """A request that got no answer, and why: "refused", "closed", "timed out" or "not HTTP"."""


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        import httptools

        self.is_open = False
        self._parser = httptools.HttpResponseParser(self)
        self._waiting: asyncio.Future[Reply] | None = None
        self._body: list[bytes] = []
        self._retry_after = False

    async def ask(self, request: bytes, timeout: float) -> Reply:
        """Send a request and wait for its answer. Raises Lost."""
        loop = asyncio.get_running_loop()
        waiting = self._waiting = loop.create_future()
        timer = loop.call_later(timeout, self._lose, "timed out")
        self._transport.write(request)
        try:
            return await waiting
        finally:
            timer.cancel()
            if not waiting.done() or waiting.cancelled():
                self.close()

    def close(self) -> None:
        self.is_open = False
        self._transport.abort()

    def _lose(self, reason: str) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(Lost(reason))
        self.close()

    # --- What asyncio tells -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.is_open = transport, True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        self._lose("closed")

    def data_received(self, data: bytes) -> None:
        import httptools

        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._lose("not HTTP")

    # --- What the parser tells --------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._body, self._retry_after = [], False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._retry_after |= name.lower() == b"retry-after" and value.strip().isdigit()

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # a word in between, such as 100 Continue
            return
        if not self._parser.should_keep_alive():
            self.is_open = False
            self._transport.close()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(Reply(status, b"".join(self._body), self._retry_after))


class Connections:
    """Open connections to one server: as many as there are requests at a time, and none is opened twice."""

    def __init__(self, target: Target, timeout: float, most: int) -> None:
        need("bench serve", "httptools", extra="serve")
        self.target, self._timeout = target, timeout
        self._idle: deque[Connection] = deque()
        self._places = asyncio.Semaphore(most)
        self._tls = ssl.create_default_context() if target.secure else None

    async def ask(self, request: bytes) -> Reply:
        """Send a request over a connection that is free, or a new one. Raises Lost."""
        async with self._places:
            connection = self._free() or await self._new()
            try:
                return await connection.ask(request, self._timeout)
            finally:
                if connection.is_open:
                    self._idle.append(connection)

    def _free(self) -> Connection | None:
        while self._idle:  # the one that was used last, so that the others' time runs out together
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _new(self) -> Connection:
        loop, target = asyncio.get_running_loop(), self.target
        opening = loop.create_connection(Connection, target.host, target.port, ssl=self._tls)
        try:
            return (await asyncio.wait_for(opening, self._timeout))[1]
        except TimeoutError:
            raise Lost("timed out") from None
        except OSError:
            raise Lost(REFUSED) from None

    async def close(self) -> None:
        while self._idle:
            self._idle.pop().close()
        await asyncio.sleep(0)  # in which the sockets are closed

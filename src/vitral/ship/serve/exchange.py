"""One request and its answer: bodies are counted while they come, answers are JSON of one line of errors."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl

from vitral.ship.serve.options import ServeOptions
from vitral.ship.serve.refusal import Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# After a refusal, what still comes of the body is read and thrown away for so long, so that the client reads
# the answer: to a connection that is closed at once it goes on writing, and sees no more than a reset.
LINGER_SECONDS, LINGER_BYTES = 1.0, 64 * 2**20
_SEND_SECONDS = 60.0  # for a client to take an answer


@dataclass
class Bodies:
    """How many bytes of bodies are in the memory, of all requests together."""

    most: int
    taken: int = 0


@dataclass(frozen=True)
class Reply:
    """What is answered."""

    body: bytes
    status: int = 200
    media_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    content = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Reply(content.encode(errors="replace"), status, headers=headers or {})


def refused(refusal: Refusal) -> Reply:
    return as_json({"error": refusal.line}, refusal.status, refusal.headers)


class Exchange:
    """A request as the handlers read it."""

    def __init__(self, scope: Scope, receive: Receive, options: ServeOptions, bodies: Bodies) -> None:
        self._scope, self._receive = scope, receive
        self._options, self._bodies = options, bodies
        self._taken = 0
        self.content_digest = ""  # what a log may say of a picture

    @cached_property
    def headers(self) -> dict[str, str]:
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in self._scope["headers"]}

    @cached_property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self._scope["query_string"].decode("latin-1"), keep_blank_values=True))

    @property
    def path_params(self) -> dict[str, str]:
        return self._scope.get("path_params", {})

    @property
    def method(self) -> str:
        return self._scope["method"]

    @property
    def client(self) -> str:
        """The address that the request came from; what it says of itself is not believed."""
        client = self._scope.get("client")
        return client[0] if client else ""

    @property
    def media_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    def number(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number of the query. Raises Refusal if it is none."""
        text = self.query.get(name, str(default))
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
            raise Refusal(422, f"{name}={text[:20]!r}: it must be a whole number from {low} to {high:,}")
        return int(text)

    def check_length(self) -> None:
        """Raises Refusal if the body is said to be too large, or cannot be counted."""
        if self.headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "bodies must not be compressed: leave Content-Encoding out", closes=True)
        length = self.headers.get("content-length")
        if length is not None and (not length.isdecimal() or int(length[:20]) > self._options.max_body):
            raise self._too_large()

    async def body(self) -> bytes:
        """Reads the body. Raises Refusal if it is too large or too slow."""
        self.check_length()
        try:
            async with asyncio.timeout(self._options.body_timeout):
                content = await self._read()
        except TimeoutError:
            raise Refusal(
                408, f"the body did not come within {self._options.body_timeout:g} s", "timeout", closes=True
            ) from None
        if not content:
            raise Refusal(400, "the body is empty; send a picture's bytes, or JSON")
        if self._options.log is not None:
            self.content_digest = hashlib.sha256(content).hexdigest()[:16]
        return content

    async def _read(self) -> bytes:
        parts: list[bytes] = []
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            part = message.get("body", b"")
            self._take(len(part))
            parts.append(part)
            more = message.get("more_body", False)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _take(self, count: int) -> None:
        self._taken += count
        self._bodies.taken += count
        if self._taken > self._options.max_body:
            raise self._too_large()
        if self._bodies.taken > self._bodies.most:
            raise Refusal(503, "too many bodies at a time", "overloaded", retry_after=1, closes=True)

    def _too_large(self) -> Refusal:
        most = self._options.max_body
        return Refusal(
            413, f"the body is too large; this server takes {most:,} bytes", "too_large", closes=True
        )

    async def gone(self) -> None:
        """Returns when the client has gone; to be awaited after the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def release(self) -> None:
        """Gives the memory of the body back."""
        self._bodies.taken -= self._taken
        self._taken = 0

    async def linger(self) -> None:
        """Throws away for a moment what still comes of the body."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                left, more = LINGER_BYTES, True
                while left > 0 and more:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    more = message.get("more_body", False)


class Disconnected(Exception):
    """The client has gone; nobody reads an answer."""


async def answer(exchange: Exchange, send: Send, reply: Reply, headers: dict[str, str]) -> None:
    """Sends a reply; of one that ends the connection the rest of the request is read before it is closed."""
    fields = {
        "content-type": reply.media_type,
        "content-length": str(len(reply.body)),
        **headers,
        **reply.headers,
    }
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
    closes = reply.headers.get("connection") == "close"
    try:
        async with asyncio.timeout(_SEND_SECONDS):
            await send({"type": "http.response.start", "status": reply.status, "headers": raw})
            await send({"type": "http.response.body", "body": reply.body, "more_body": closes})
    except TimeoutError:
        raise Disconnected from None
    if closes:
        await exchange.linger()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

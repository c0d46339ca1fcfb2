"""What every request passes before its handler: is it for us, may it ask; and what every answer carries."""

import hmac
import time
import traceback
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from vitral.runtime.plainjson import to_json
from vitral.ship.serve.exchange import Bodies, Disconnected, Exchange, Receive, Scope, Send, answer, refused
from vitral.ship.serve.metrics import Metrics
from vitral.ship.serve.options import ServeOptions
from vitral.ship.serve.refusal import Refusal

# For probes, which carry no token; and for the page, which asks its reader for one and knows nothing else.
OPEN_ROUTES = frozenset(["/healthz", "/readyz", "/"])
_HEADERS = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
Handler = Callable[[Exchange], Any]  # an async function that gives a Reply


class Guard:
    """Wraps the handlers: checks, errors as JSON, headers, metrics, and the count of what is under way."""

    def __init__(self, options: ServeOptions, metrics: Metrics, tell: Callable[[str], None]) -> None:
        self._options, self._metrics, self._tell = options, metrics, tell
        self._tokens = [token.encode() for token in options.tokens]
        self._bodies = Bodies(options.max_bodies)
        self.under_way = 0
        self.draining = False

    def of(self, route: str, handler: Handler) -> "Guarded":
        return Guarded(self, route, handler)

    async def run(self, route: str, handler: Handler, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, whatever happens."""
        began_at = time.monotonic()
        exchange = Exchange(scope, receive, self._options, self._bodies)
        self.under_way += 1
        status = 499  # the client has gone: nobody is told, and this is counted
        try:
            reply = await self._reply(route, handler, exchange)
            status = reply.status
            await answer(exchange, send, reply, self._headers())
        except Disconnected:
            self._metrics.rejected("disconnected")
        finally:
            self.under_way -= 1
            exchange.release()
            self._note(route, exchange, status, time.monotonic() - began_at)

    async def _reply(self, route: str, handler: Handler, exchange: Exchange) -> Any:
        try:
            self._check(route, exchange)
            return await handler(exchange)
        except Refusal as refusal:
            if refusal.reason:
                self._metrics.rejected(refusal.reason)
            return refused(refusal)
        except Disconnected:
            raise
        except Exception as error:
            number = uuid.uuid4().hex[:8]
            trace = " | ".join(line.strip() for line in traceback.format_exception(error))
            self._tell(f"error {number} in {route}: {trace}")
            return refused(Refusal(500, f"an error of the server; its log has it as {number}"))

    def _headers(self) -> dict[str, str]:
        # An idle connection would hold up the end; its client comes again elsewhere.
        return {**_HEADERS, "connection": "close"} if self.draining else _HEADERS

    def _note(self, route: str, exchange: Exchange, status: int, seconds: float) -> None:
        self._metrics.request(route, status, seconds)
        if self._options.log is not None:
            fields = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "route": route,
                "code": status,
                "seconds": round(seconds, 4),
                "body_sha256": exchange.content_digest or None,
            }
            self._options.log(to_json(fields))

    # --- Checks -----------------------------------------------------------------------------------

    def _check(self, route: str, exchange: Exchange) -> None:
        """Raises Refusal for a request that is not for this server, or may not ask."""
        if self._options.on_loopback:
            _refuse_other_names(exchange.headers.get("host", ""))
        origin = exchange.headers.get("origin")
        if origin is not None and exchange.method == "POST" and not _is_own(origin, exchange):
            raise Refusal(403, "requests of other sites' pages are refused", "origin", closes=True)
        if self._tokens and route not in OPEN_ROUTES and not self._may(exchange):
            raise Refusal(
                401,
                "this server asks for a token: send Authorization: Bearer ...",
                "unauthorized",
                closes=True,
            )

    def _may(self, exchange: Exchange) -> bool:
        given = _token_in(exchange.headers.get("authorization", ""))
        found = False
        for token in self._tokens:  # every one is compared, so that the time says nothing
            found |= hmac.compare_digest(given, token)
        return found


class Guarded:
    """One route as an ASGI application."""

    def __init__(self, guard: Guard, route: str, handler: Handler) -> None:
        self._guard, self._route, self._handler = guard, route, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guard.run(self._route, self._handler, scope, receive, send)


def _refuse_other_names(host: str) -> None:
    """A page of another name that was made to resolve to this machine is no page of ours (DNS rebinding)."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if name not in ("localhost", "127.0.0.1", "::1"):
        raise Refusal(
            421, "this server answers to localhost and 127.0.0.1 alone; see --host", "host", closes=True
        )


def _is_own(origin: str, exchange: Exchange) -> bool:
    return urlsplit(origin).netloc == exchange.headers.get("host") if "//" in origin else False


def _token_in(header: str) -> bytes:
    scheme, _, token = header.partition(" ")
    return token.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b""

"""The server's life: it listens, answers, and when it is asked to stop finishes what is under way."""

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vitral.runtime.errors import VitralError
from vitral.runtime.extras import need
from vitral.runtime.stopping import StopSignal, stop_signal
from vitral.ship.serve.app import App
from vitral.ship.serve.http import protocol_class
from vitral.ship.serve.options import ServeOptions
from vitral.ship.serve.served import Served

if TYPE_CHECKING:
    from uvicorn import Server as Base
else:  # the package is there when a server begins
    Base = object

# After the last request, for those whose clients have not yet heard that the server ends.
_NOTICE_SECONDS = 0.3
_BACKLOG = 512


def serve(
    served: Served,
    options: ServeOptions,
    *,
    listening: Callable[[str], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
    stop: StopSignal | None = None,
) -> int:
    """Serves a model until the process is asked to stop.

    Args:
        served: the model.
        options: where, and within which limits.
        listening: is told the address, such as "http://127.0.0.1:8000", once requests are taken.
        tell: is told of errors, in one line each.
        stop: what asks to stop; None: SIGINT, SIGTERM and SIGHUP.

    Returns:
        how many requests were not finished within the grace.

    Raises:
        VitralError: if a package is missing, or the port cannot be had.
    """
    if stop is None:
        with stop_signal() as signals:
            return serve(served, options, listening=listening, tell=tell, stop=signals)
    need("serving", "uvicorn", "httptools", extra="serve")  # uvicorn's protocol is made of httptools
    import uvicorn

    app = App(served, options, tell)
    with _listener(options) as listener:
        config = uvicorn.Config(
            app.asgi(),
            http=protocol_class(options),
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="error",  # else whoever sends nonsense fills the log
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
            backlog=_BACKLOG,
        )
        server = type("DrainingServer", (Draining, uvicorn.Server), {})(config)
        server.app, server.stop = app, stop
        server.listening = lambda: listening(_address(options.host, listener))
        asyncio.run(server.serve(sockets=[listener]))
    return app.unfinished


class Draining(Base):
    """uvicorn's server, that heeds our signals, and drains before it ends."""

    app: App
    stop: StopSignal
    listening: Callable[[], None]
    _asked_at: float | None = None
    _quiet_since: float | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.listening()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or (self.stop.requested and self._drained())

    def _drained(self) -> bool:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self.app.drain()
        self.app.unfinished = self.app.guard.under_way
        if self.app.unfinished:
            self._quiet_since = None
        elif self._quiet_since is None:
            self._quiet_since = now
        quiet = self._quiet_since is not None and now - self._quiet_since >= _NOTICE_SECONDS
        return quiet or now - self._asked_at >= self.app.options.grace


def _listener(options: ServeOptions) -> socket.socket:
    """A socket that is bound. Raises VitralError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    # By its protocol asyncio knows it for TCP, and sends at once: else the second part of an answer waits for
    # the client to acknowledge the first, which takes its system 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
    except OSError as error:
        listener.close()
        raise VitralError(
            f"{options.host}, port {options.port}: cannot listen there: {error.strerror or error}; choose "
            "another --port, such as 0 for any that is free"
        ) from error
    return listener


def _address(host: str, listener: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"

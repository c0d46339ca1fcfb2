"""What tests of the server share: a model of arithmetic, pictures, servers here and behind a port."""

import asyncio
import http.client
import io
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import httpx
import numpy as np
from PIL import Image

from vitral.artifacts.engine import Answers
from vitral.artifacts.predictor import Predictor
from vitral.images.preprocess import Preprocess
from vitral.runtime.errors import VitralError
from vitral.runtime.stopping import StopSignal
from vitral.ship.serve.app import App
from vitral.ship.serve.options import ServeOptions
from vitral.ship.serve.served import Served
from vitral.ship.serve.server import serve

LABELS = ("red", "green", "blue")
JPEG, JSON = {"content-type": "image/jpeg"}, {"content-type": "application/json"}
HOST = "http://127.0.0.1:8000"
T = TypeVar("T")


class Colours:
    """Logits are a tenth of the mean of each channel; it can be slow, and fail at a plain picture."""

    name = "colours 1.0"
    batch_sizes: tuple[int, ...] = ()

    def __init__(self, wait: Callable[[], object] = lambda: None, fails_at: int | None = None) -> None:
        self.wait, self.fails_at = wait, fails_at
        self.batches: list[int] = []

    def __call__(self, pixels_BHWC: np.ndarray) -> Answers:
        self.batches.append(len(pixels_BHWC))
        self.wait()
        if any((pixels == self.fails_at).all() for pixels in pixels_BHWC):
            raise VitralError("this picture breaks the engine")
        logits_BL = pixels_BHWC.mean(axis=(1, 2), dtype=np.float32) / 10
        odds_BL = np.exp(logits_BL - logits_BL.max(1, keepdims=True))
        return Answers(logits_BL, odds_BL / odds_BL.sum(1, keepdims=True))


def served(
    engine: Any = None, abstain_below: float | None = None, size: tuple[int, int] = (13, 17)
) -> Served:
    predictor = Predictor(engine or Colours(), Preprocess(size), LABELS, abstain_below=abstain_below)
    return Served(predictor, "colours")


def picture(seed: int, size: tuple[int, int] = (31, 23)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(value: int) -> bytes:
    return encoded(Image.new("RGB", (17, 13), (value,) * 3))


class Server:
    """An application in this process, and a client of it."""

    def __init__(self, app: App) -> None:
        self.app, self._asgi = app, app.asgi()

    def client(self, address: str = "10.0.0.1") -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self._asgi, client=(address, 1234))
        return httpx.AsyncClient(transport=transport, base_url=HOST, timeout=20)

    async def ready(self) -> None:
        while self.app.why_not_ready == "the model is warming up":
            await asyncio.sleep(0.005)


@asynccontextmanager
async def in_process(model: Served | None = None, **options: Any) -> AsyncIterator[Server]:
    server = Server(App(model or served(), replace(ServeOptions(), **options)))
    async with server.app.running():
        await server.ready()
        yield server


def asked(
    ask: Callable[[Server, httpx.AsyncClient], Awaitable[T]], model: Served | None = None, **options: Any
) -> T:
    """What an async function makes of a server."""

    async def run() -> T:
        async with in_process(model, **options) as server, server.client() as client:
            return await ask(server, client)

    return asyncio.run(run())


class Listening:
    """A server behind a port, in a thread."""

    def __init__(self) -> None:
        self.stop, self.unfinished, self.url = StopSignal(), -1, ""
        self.lines: list[str] = []

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


def status(port: int, method: str, path: str, body: bytes | None = None) -> int:
    """Asks a server behind a port, with no more than the standard library, which begins at once."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, JPEG if body else {})
        return connection.getresponse().status
    finally:
        connection.close()


@contextmanager
def behind_a_port(model: Served | None = None, **options: Any) -> Iterator[Listening]:
    found, begun = Listening(), threading.Event()

    def listening(url: str) -> None:
        found.url = url
        begun.set()

    def run() -> None:
        wanted = replace(ServeOptions(port=0, log=found.lines.append), **options)
        found.unfinished = serve(model or served(), wanted, listening=listening, stop=found.stop)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert begun.wait(20)
        while status(found.port, "GET", "/readyz") != 200:
            pass
        yield found
    finally:
        found.stop.request()
        thread.join(20)
        assert not thread.is_alive()

"""The application: the table of routes with its handlers, around one model."""

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from vitral.runtime.errors import VitralError
from vitral.runtime.extras import need
from vitral.runtime.version import vitral_version
from vitral.ship.serve.admission import Admission
from vitral.ship.serve.exchange import Exchange, Reply, as_json
from vitral.ship.serve.guard import Guard, Handler
from vitral.ship.serve.inference_protocol import InferenceProtocol
from vitral.ship.serve.looking import Looking
from vitral.ship.serve.metrics import Metrics
from vitral.ship.serve.options import ServeOptions
from vitral.ship.serve.pipeline import Pipeline
from vitral.ship.serve.predict import Predictions
from vitral.ship.serve.refusal import Refusal
from vitral.ship.serve.routes import ROUTES, openapi
from vitral.ship.serve.served import Served

if TYPE_CHECKING:
    from starlette.applications import Starlette

# The answer of a picture alone and of the same picture in a batch: sums in another order, and no more.
_BATCH_TOLERANCE = 1e-3
WARMING_UP, DRAINING = "the model is warming up", "the server is ending"


class App:
    """One model behind its routes.

    Args:
        served: the model.
        options: limits and times.
        tell: is told of errors, in one line each.
    """

    def __init__(
        self, served: Served, options: ServeOptions, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        self.served, self.options = served, options
        self._tell = tell
        info = {"version": vitral_version(), "model": served.name, "engine": served.predictor.engine.name}
        self.metrics = Metrics(info, lambda: self.pipeline.waiting)
        self.pipeline = Pipeline(served.predictor, options, self.metrics)
        self.admission = Admission(self.pipeline.seconds_for, options.deadline)
        self.guard = Guard(options, self.metrics, tell)
        self.unfinished = 0  # requests, when the server ended
        self._problem: str | None = WARMING_UP  # why it is not ready

    # --- Beginning and end ------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self, _: Any = None) -> AsyncIterator[None]:
        """Starts the threads; the model is warmed up by the one that owns it, and ready after it."""
        self.pipeline.start(self._warm_up)
        try:
            yield
        finally:
            self.pipeline.close()

    def _warm_up(self) -> None:
        """Computes every size of a batch, and checks that a picture's answer is its own."""
        try:
            pixels_HWC = _noise(self.served.predictor.preprocess.img_size)
            self.pipeline.batcher.time_sizes(pixels_HWC)
            self._check_batches(pixels_HWC)
            self._problem = None
        except Exception as error:
            self._problem = "the model failed its check"
            self._tell(f"the model failed its check and is not ready: {error}")
        seconds = self.pipeline.seconds_for(1)
        if seconds > self.options.deadline / 2:
            self._tell(
                f"one picture takes {seconds:.2f} s here: with --deadline {self.options.deadline:g}s most "
                f"requests will be refused; give --deadline {math.ceil(10 * seconds)}s"
            )

    def _check_batches(self, pixels_HWC: np.ndarray) -> None:
        answers = self.served.predictor.answers
        alone = answers(pixels_HWC[None]).probabilities[0]
        together = answers(np.stack([pixels_HWC, 255 - pixels_HWC, pixels_HWC[::-1]])).probabilities[0]
        if (apart := float(np.abs(alone - together).max())) > _BATCH_TOLERANCE:
            raise VitralError(f"a picture's probabilities differ by {apart:.1e} alone and within a batch")

    def drain(self) -> None:
        """Takes no new work from now on; what is under way is finished."""
        self.guard.draining = True

    @property
    def why_not_ready(self) -> str | None:
        return DRAINING if self.guard.draining else self._problem

    # --- Routes -----------------------------------------------------------------------------------

    def asgi(self) -> "Starlette":
        """The ASGI application. Raises VitralError if an extra's package is missing."""
        need("serving", "starlette", "prometheus_client", extra="serve")
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        handlers = self._handlers()
        routes = [
            Route(route.path, self.guard.of(route.path, handlers[route.name]), methods=[route.method])
            for route in ROUTES
        ]
        application = Starlette(
            routes=routes, lifespan=self.running, exception_handlers={HTTPException: self._not_found}
        )
        application.router.redirect_slashes = False
        return application

    def _handlers(self) -> dict[str, Handler]:
        predictions = Predictions(self.served, self.options, self.pipeline, self.admission, self.metrics)
        looking, v2 = Looking(predictions), InferenceProtocol(predictions, lambda: self.why_not_ready)
        description = as_json(openapi(self.served, with_token=bool(self.options.tokens)))
        about, page = as_json(self.served.about()), _page()
        working = {
            "predict": predictions.predict,
            "explain": looking.explain,
            "attention": looking.attention,
            "v2_infer": v2.infer,
        }
        return {
            **{name: self._when_ready(handler) for name, handler in working.items()},
            "page": _always(page),
            "model": _always(about),
            "openapi": _always(description),
            "health": _always(as_json({"live": True})),
            "ready": self._ready,
            "metrics": self._metrics,
            "v2_server": v2.server,
            "v2_live": v2.live,
            "v2_ready": v2.ready,
            "v2_model": v2.model,
            "v2_model_ready": v2.model_ready,
        }

    def _when_ready(self, handler: Handler) -> Handler:
        async def checked(exchange: Exchange) -> Reply:
            if why_not := self.why_not_ready:
                reason = "draining" if self.guard.draining else "not_ready"
                raise Refusal(503, why_not, reason, retry_after=1, closes=self.guard.draining)
            return await handler(exchange)

        return checked

    async def _ready(self, _: Exchange) -> Reply:
        why_not = self.why_not_ready
        if why_not is None:
            return as_json({"ready": True})
        return as_json({"ready": False, "error": why_not}, 503, {"retry-after": "1"})

    async def _metrics(self, _: Exchange) -> Reply:
        content, media_type = self.metrics.page()
        return Reply(content, media_type=media_type)

    async def _not_found(self, _: Any, error: Any) -> Any:
        """404 and 405, as JSON like all else; through the guard, for they tell which routes there are."""
        said = {404: "there is no such route; see /openapi.json", 405: "this route does not take this method"}
        headers = dict(error.headers or {})

        async def handler(_: Exchange) -> Reply:
            return as_json({"error": said.get(error.status_code, "refused")}, error.status_code, headers)

        return self.guard.of("(none)", handler)


def _always(reply: Reply) -> Handler:
    async def handler(_: Exchange) -> Reply:
        return reply

    return handler


def _page() -> Reply:
    from vitral.ship.page.server import page_for_server

    content, headers = page_for_server()
    fields = {name.lower(): value for name, value in headers.items()}
    return Reply(content, media_type=fields.pop("content-type"), headers=fields)


def _noise(img_size: tuple[int, int]) -> np.ndarray:
    """A picture without meaning, (H, W, 3)."""
    return np.random.default_rng(0).integers(0, 256, (*img_size, 3), np.uint8)

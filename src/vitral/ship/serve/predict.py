"""``POST /v1/predict``: pictures in, labels with probabilities out."""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from vitral.runtime.errors import ImageError
from vitral.ship.serve.admission import Admission
from vitral.ship.serve.batching import Answer
from vitral.ship.serve.exchange import Disconnected, Exchange, Reply, as_json
from vitral.ship.serve.metrics import Metrics
from vitral.ship.serve.options import ServeOptions
from vitral.ship.serve.pipeline import Picture, Pipeline
from vitral.ship.serve.refusal import Refusal, too_late
from vitral.ship.serve.served import Served

_MOST_LABELS = 1000  # of an answer
Found = Answer | ImageError


class Predictions:
    """Asks the model about pictures, for every route that does."""

    def __init__(
        self,
        served: Served,
        options: ServeOptions,
        pipeline: Pipeline,
        admission: Admission,
        metrics: Metrics,
    ) -> None:
        self.served, self.options = served, options
        self.pipeline, self.admission, self._metrics = pipeline, admission, metrics

    async def predict(self, exchange: Exchange) -> Reply:
        """Answers for one picture as it is, or for several as base64 within JSON."""
        top = exchange.number("top", 5, 1, _MOST_LABELS)
        pictures = await self.pictures(exchange)
        found = await self.ask(exchange, pictures)
        if all(isinstance(one, ImageError) for one in found):
            which = (
                "the picture"
                if len(found) == 1
                else f"none of the {len(found)} pictures can be read; the first"
            )
            raise Refusal(422, f"{which} {found[0]}", "unreadable")
        engine = self.served.predictor.engine.name
        return as_json(
            {
                "predictions": [self.prediction(one, top) for one in found],
                "model": {"name": self.served.name, "engine": engine},
            }
        )

    def prediction(self, found: Found, top: int) -> dict[str, Any]:
        """What is said of one picture, as JSON."""
        if isinstance(found, ImageError):
            return {"label": None, "abstained": False, "top": [], "error": str(found)}
        said = self.served.predictor.prediction("", found.probabilities_L, top)
        label = None if said.abstained else said.top[0][0]
        self._metrics.predicted(label)
        pairs = [{"label": name, "probability": probability} for name, probability in said.top]
        return {"label": label, "abstained": said.abstained, "top": pairs, "error": None}

    async def pictures(self, exchange: Exchange) -> list[Picture]:
        """The pictures of a request. Raises Refusal for what is none."""
        media_type = exchange.media_type
        exchange.check_length()  # before any byte is read, who sends too much or comes in vain is told so
        if media_type != "application/json" and not _is_picture(media_type):
            raise Refusal(
                415,
                f"Content-Type {media_type[:50]!r}: send a picture's bytes as image/jpeg or its like, or "
                'application/json {"images": [base64, ...]}',
                closes=True,
            )
        self.admission.check(exchange.client)
        content = await exchange.body()
        if media_type != "application/json":
            return [content]
        return self._listed(await self.pipeline.call(lambda: parsed(content)))

    def _listed(self, value: Any) -> list[Picture]:
        images = value.get("images") if isinstance(value, dict) else None
        if not isinstance(images, list) or not images or not all(isinstance(one, str) for one in images):
            raise Refusal(400, 'send {"images": [base64, ...]}: a list of texts, one a picture')
        if len(images) > self.options.max_images:
            raise Refusal(
                413, f"{len(images):,} pictures; send {self.options.max_images} a request", "too_large"
            )
        return images

    async def ask(self, exchange: Exchange, pictures: Sequence[Picture]) -> list[Found]:
        """The model's answers, or why a picture cannot be read; one failure is one picture's.

        Raises:
            Refusal: if they would not be answered in time.
            Disconnected: if the client goes meanwhile; then nothing more is computed for it.
        """
        deadline = time.monotonic() + self.options.deadline
        with self.admission.place(exchange.client, len(pictures)):
            items = [self.pipeline.begin(picture, deadline) for picture in pictures]
            futures = [item.ticket for item in items]
            gone = asyncio.ensure_future(exchange.gone())
            try:
                done = asyncio.gather(*futures, return_exceptions=True)
                left = max(deadline - time.monotonic(), 0.0)
                await asyncio.wait((done, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not done.done():
                    done.cancel()
                    with suppress(asyncio.CancelledError):
                        await done
                    if gone.done():
                        raise Disconnected
                    raise too_late(self.options.deadline)
                return [_found(one) for one in done.result()]
            finally:
                for item in items:
                    item.dropped = True
                gone.cancel()
                with suppress(asyncio.CancelledError):
                    await gone


def _found(outcome: Any) -> Found:
    if isinstance(outcome, BaseException) and not isinstance(outcome, ImageError):
        raise outcome
    return outcome


def _is_picture(media_type: str) -> bool:
    return media_type == "application/octet-stream" or (
        media_type.startswith("image/") and media_type != "image/svg+xml"
    )


def parsed(content: bytes) -> Any:
    """JSON of a stranger. Raises Refusal for what is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is not JSON") from None

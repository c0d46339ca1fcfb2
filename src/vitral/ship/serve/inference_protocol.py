"""The Open Inference Protocol, version 2, over HTTP: what KServe, Triton's and Seldon's clients speak.

github.com/kserve/open-inference-protocol. A model takes either pictures as files, ``BYTES [N]`` in base64, or
the pixels that it sees, ``UINT8 [N, H, W, 3]``.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from vitral.runtime.errors import ImageError
from vitral.runtime.version import vitral_version
from vitral.ship.serve.batching import Answer
from vitral.ship.serve.exchange import Exchange, Reply, as_json
from vitral.ship.serve.pipeline import Picture
from vitral.ship.serve.predict import Predictions, parsed
from vitral.ship.serve.refusal import Refusal

VERSION = "1"  # the one version that a server has of its model
PICTURES, PIXELS = "image", "pixels"
_BASE64 = {"content_type": "base64"}


class InferenceProtocol:
    """The routes below ``/v2``."""

    def __init__(self, predictions: Predictions, why_not_ready: Callable[[], str | None]) -> None:
        self._predictions, self._why_not_ready = predictions, why_not_ready
        self._served = predictions.served
        predictor = self._served.predictor
        self._shape = (*predictor.preprocess.img_size, 3)
        # In their order; the first is given where a client names none.
        self._outputs: dict[str, tuple[str, list[int]]] = {
            "probabilities": ("FP32", [-1, len(predictor.labels)]),
            "logits": ("FP32", [-1, len(predictor.labels)]),
            "label": ("BYTES", [-1]),
            "abstained": ("BOOL", [-1]),
        }

    async def server(self, _: Exchange) -> Reply:
        return as_json({"name": "vitral", "version": vitral_version(), "extensions": []})

    async def live(self, _: Exchange) -> Reply:
        return as_json({"live": True})

    async def ready(self, _: Exchange) -> Reply:
        """The protocol asks for a 4xx where a server is not ready."""
        why_not = self._why_not_ready()
        return as_json({"ready": why_not is None}, 200 if why_not is None else 400)

    async def model_ready(self, exchange: Exchange) -> Reply:
        self._check_name(exchange)
        why_not = self._why_not_ready()
        return as_json({"name": self._served.name, "ready": why_not is None}, 200 if why_not is None else 400)

    async def model(self, exchange: Exchange) -> Reply:
        self._check_name(exchange)
        return as_json(
            {
                "name": self._served.name,
                "versions": [VERSION],
                "platform": f"vitral_{self._served.predictor.engine.name.partition(' ')[0]}",
                "inputs": [
                    {
                        "name": PICTURES,
                        "datatype": "BYTES",
                        "shape": [-1],
                        "parameters": {"content_type": "base64"},
                    },
                    {"name": PIXELS, "datatype": "UINT8", "shape": [-1, *self._shape]},
                ],
                "outputs": [
                    {"name": name, "datatype": datatype, "shape": shape}
                    for name, (datatype, shape) in self._outputs.items()
                ],
            }
        )

    async def infer(self, exchange: Exchange) -> Reply:
        """Answers for one of the two inputs; a picture that cannot be read fails its request."""
        self._check_name(exchange)
        predictions = self._predictions
        predictions.admission.check(exchange.client)
        content = await exchange.body()
        asked, pictures = await predictions.pipeline.call(lambda: self._asked(parsed(content)))
        found = await predictions.ask(exchange, pictures)
        answers: list[Answer] = []
        for index, one in enumerate(found):
            if isinstance(one, ImageError):
                raise Refusal(422, f"picture {index} {one}", "unreadable")
            answers.append(one)
        reply = {"model_name": self._served.name, "model_version": VERSION}
        if "id" in asked:
            reply["id"] = asked["id"]
        return as_json({**reply, "outputs": self._written(answers, self._wanted(asked))})

    def _check_name(self, exchange: Exchange) -> None:
        name, version = exchange.path_params["model"], exchange.path_params.get("version", VERSION)
        if name != self._served.name:
            raise Refusal(404, f"there is no model {name[:50]!r}; this server has {self._served.name!r}")
        if version != VERSION:
            raise Refusal(404, f"there is no version {version[:50]!r}; this server has {VERSION!r}")

    def _asked(self, request: Any) -> tuple[dict[str, Any], list[Picture]]:
        """The request, known to be sound, and its pictures."""
        inputs = request.get("inputs") if isinstance(request, dict) else None
        if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
            raise Refusal(400, f'"inputs" must be a list of one input, {PICTURES!r} or {PIXELS!r}')
        if not isinstance(request.get("id", ""), str):
            raise Refusal(400, '"id" must be a text')
        self._wanted(request)
        given = inputs[0]
        read = {(PICTURES, "BYTES"): self._files, (PIXELS, "UINT8"): self._pixels}.get(
            (str(given.get("name")), str(given.get("datatype")))
        )
        if read is None:
            raise Refusal(400, f"the input must be {PICTURES!r} of BYTES, or {PIXELS!r} of UINT8")
        shape = given.get("shape")
        if (
            not isinstance(shape, list)
            or not shape
            or not all(type(side) is int and side > 0 for side in shape)
        ):
            raise Refusal(400, '"shape" must be a list of whole numbers above 0')
        if shape[0] > (most := self._predictions.options.max_images):
            raise Refusal(413, f"{shape[0]:,} pictures; send {most} a request", "too_large")
        return request, read(shape, given.get("data"))

    def _files(self, shape: list[int], data: Any) -> list[Picture]:
        texts = isinstance(data, list) and all(isinstance(one, str) for one in data)
        if len(shape) != 1 or not texts or len(data) != shape[0]:
            raise Refusal(
                400, f"{PICTURES!r} is BYTES of shape [N]: N texts, each base64 of a picture's file"
            )
        return data

    def _pixels(self, shape: list[int], data: Any) -> list[Picture]:
        wanted = f"{PIXELS!r} is UINT8 of shape {['N', *self._shape]}".replace("'N'", "N")
        if tuple(shape[1:]) != self._shape:
            raise Refusal(400, f"{wanted}, not {shape[:8]}")
        if (numbers := _whole_numbers(data, math.prod(shape))) is None:
            raise Refusal(400, f"{wanted}: {math.prod(shape):,} whole numbers from 0 to 255, flat or nested")
        return list(numbers.reshape(shape))

    def _wanted(self, request: dict[str, Any]) -> list[str]:
        outputs = request.get("outputs")
        if not outputs:
            return [name for name in self._outputs if name != "logits"]
        named = isinstance(outputs, list) and all(isinstance(one, dict) for one in outputs)
        names = [str(one.get("name")) for one in outputs] if named else []
        if not names or not set(names) <= self._outputs.keys():
            raise Refusal(
                400, f'"outputs" must be a list of objects with a "name": {", ".join(self._outputs)}'
            )
        return names

    def _written(self, answers: list[Answer], wanted: list[str]) -> list[dict[str, Any]]:
        said = [self._predictions.prediction(one, 1) for one in answers]
        values: dict[str, Callable[[], list[Any]]] = {
            "probabilities": lambda: np.concatenate([one.probabilities_L for one in answers]).tolist(),
            "logits": lambda: np.concatenate([one.logits_L for one in answers]).tolist(),
            "label": lambda: [one["label"] or "" for one in said],
            "abstained": lambda: [one["abstained"] for one in said],
        }
        return [
            {
                "name": name,
                "datatype": self._outputs[name][0],
                "shape": [len(answers), *self._outputs[name][1][1:]],
                "data": values[name](),
            }
            for name in wanted
        ]


def _whole_numbers(data: Any, count: int) -> np.ndarray | None:
    """So many bytes; None if the data are anything else."""
    try:
        numbers = np.asarray(data)
    except (ValueError, TypeError, OverflowError):
        return None
    if numbers.dtype.kind not in "iu" or numbers.size != count or numbers.min() < 0 or numbers.max() > 255:
        return None
    return numbers.astype(np.uint8)

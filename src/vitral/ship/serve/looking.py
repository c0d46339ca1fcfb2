"""Looks into a model for ``/v1/explain`` and ``/v1/attention``; torch is imported when one is asked for."""

import base64
import io
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vitral.runtime.errors import ImageError, VitralError
from vitral.ship.serve.exchange import Exchange, Reply, as_json
from vitral.ship.serve.predict import Predictions
from vitral.ship.serve.refusal import Refusal

if TYPE_CHECKING:
    from vitral.explain.inside import Inside
    from vitral.inference.classifier import Classifier

# A look may take so many times as long as an answer may.
_PATIENCE = 20
_MOST_PASSES = 4.0  # through the model, of a method that strangers may ask for
_MOST_BYTES = 32 * 2**20  # of attention in an answer


class Looking:
    """The two routes that show what a model looks at."""

    def __init__(self, predictions: Predictions) -> None:
        self._predictions = predictions
        self._served = predictions.served
        self._deadline = _PATIENCE * predictions.options.deadline

    async def explain(self, exchange: Exchange) -> Reply:
        """The map of one picture: how much each patch counts for a class, or for it and against another."""
        classifier = self._classifier()
        pixels_HWC = await self._pixels(exchange)
        query = exchange.query
        target, against = query.get("class") or "predicted", query.get("against") or None
        method = query.get("method") or None
        found = await self._look(lambda: explained(classifier, pixels_HWC, target, against, method))
        return as_json({**found, "picture": _data_url(pixels_HWC)})

    async def attention(self, exchange: Exchange) -> Reply:
        """Who looks where, in all heads of all layers, or of the one that the query names."""
        classifier = self._classifier()
        facts = self._served.facts
        one = "layer" in exchange.query
        layers = (
            [exchange.number("layer", 0, 0, facts["layers"] - 1)] if one else list(range(facts["layers"]))
        )
        tokens = facts["prefix_tokens"] + facts["grid"][0] * facts["grid"][1]
        if (size := len(layers) * facts["heads"] * tokens**2) > _MOST_BYTES:
            raise Refusal(
                413,
                f"attention of {tokens:,} tokens takes {size / 2**20:,.0f} MiB; ask for one: ?layer=0",
            )
        pixels_HWC = await self._pixels(exchange)
        return as_json(await self._look(lambda: attended(classifier, pixels_HWC, layers)))

    def _classifier(self) -> "Classifier":
        if not self._served.explains or self._served.classifier is None:
            raise Refusal(
                501,
                "this server answers by an exported model, which shows nothing of its inside; serve the "
                "model's own folder",
                closes=True,
            )
        return self._served.classifier

    async def _pixels(self, exchange: Exchange) -> np.ndarray:
        pictures = await self._predictions.pictures(exchange)
        if len(pictures) != 1:
            raise Refusal(400, "send one picture")
        try:
            return await self._predictions.pipeline.pixels(pictures[0])
        except ImageError as error:
            raise Refusal(422, f"the picture {error}", "unreadable") from None

    async def _look(self, work: Any) -> dict[str, Any]:
        look = self._predictions.pipeline.look(work, time.monotonic() + self._deadline)
        try:
            return await look.ticket
        except VitralError as error:
            raise Refusal(422, " ".join(str(error).split())) from None
        finally:
            look.dropped = True


def explained(
    classifier: "Classifier", pixels_HWC: np.ndarray, target: str, against: str | None, method: str | None
) -> dict[str, Any]:
    """The map of a picture that the model sees, (H, W, 3), as JSON.

    Raises:
        VitralError: if there is no such class or method, or the method takes too long for a server.
    """
    from vitral.explain.attribution.method import Settings
    from vitral.explain.attribution.methods import DEFAULT, METHODS, find

    row, config = find(method or DEFAULT), classifier.model.config
    if row.cost(config, Settings()) > _MOST_PASSES:
        quick = [name for name, one in METHODS.items() if one.cost(config, Settings()) <= _MOST_PASSES]
        raise VitralError(f"method={row.name} takes too long for a server; it has {', '.join(quick)}")
    inside = _inside(classifier)
    relevance = inside.relevance(pixels_HWC, method=row.name, target=target, against=against)
    return {
        "grid": list(inside.grid),
        "values": [float(value) for value in relevance.values[0].flatten().tolist()],
        "target": relevance.targets[0],
        "against": relevance.against[0] if relevance.against else None,
        "method": relevance.method,
        "about": row.says,
    }


def attended(classifier: "Classifier", pixels_HWC: np.ndarray, layers: list[int]) -> dict[str, Any]:
    """The attention of a picture that the model sees, (H, W, 3): rows in 8 bits, each with its maximum.

    Row q of head a in layer l, in 0..1, is ``weights[l, a, q] / 255 * maxima[l, a, q]``.
    """
    import torch

    from vitral.explain.observe import SeenAttention, observe

    def in_bytes(_: int, seen: SeenAttention) -> tuple[np.ndarray, np.ndarray]:
        rows_ATT = seen.weights()[0]
        maxima_AT1 = rows_ATT.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        bytes_ATT = (rows_ATT / maxima_AT1 * 255).round().to(torch.uint8)
        return bytes_ATT.cpu().numpy(), maxima_AT1[..., 0].cpu().numpy()

    model, inside = classifier.model, _inside(classifier)
    images_BCHW = next(iter(inside.classifier.batches(pixels_HWC, 1)))
    with torch.inference_mode(), classifier.placement.autocast():
        seen = observe(model, images_BCHW, in_bytes, layers=layers, keep_outputs=False).taken
    weights, maxima = (np.stack([seen[layer][part] for layer in layers]) for part in (0, 1))
    return {
        "layers": len(layers),
        "first_layer": layers[0],
        "heads": model.config.num_heads,
        "grid": list(inside.grid),
        "prefix_tokens": model.config.num_prefix_tokens,
        "tokens": weights.shape[-1],
        "weights": base64.b64encode(weights.tobytes()).decode(),
        "maxima": base64.b64encode(maxima.astype("<f4").tobytes()).decode(),
        "picture": _data_url(pixels_HWC),
    }


def _inside(classifier: "Classifier") -> "Inside":
    """Looks at pixels as they are: they were resized and cropped, and are not to be so again."""
    from vitral.explain.inside import Inside

    whole = replace(classifier.preprocess, crop_fraction=1.0)
    return Inside(replace(classifier, preprocess=whole))


def _data_url(pixels_HWC: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

"""The page that runs a model: the model as ONNX with what its attention computed, within one HTML file."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vitral.artifacts.about import About
from vitral.artifacts.engine import Engine
from vitral.artifacts.engines.onnx import OnnxEngine
from vitral.artifacts.golden import check_answers, golden_picture
from vitral.artifacts.manifest import TOLERANCES, Form
from vitral.explain.observe import SeenAttention, observe
from vitral.inference.classifier import Classifier
from vitral.model.kernels import Kernels, set_kernels
from vitral.model.vit import VisionTransformer
from vitral.ship.export.onnx import write_onnx
from vitral.ship.export.pixels import OUTPUTS, PixelsModel, exported
from vitral.ship.page.web import refuse_too_large, write_web

_LOOKED = ("attention", "maxima")
# Of attention in one answer, in bytes: a browser holds it beside the model for each picture that is shown.
_MOST_ATTENTION = 64 * 2**20


class LookingModel(PixelsModel):
    """`PixelsModel` that also gives the attention of the first image, in 8 bits as the page holds it.

    Its outputs are `logits`, `probabilities`, `attention` (layers, A, T, T) uint8, `maxima` (layers, A, T):
    row q of a head is ``attention[layer, head, q] / 255 * maxima[layer, head, q]``. They are the weights that
    layers mix by, and cost next to nothing: the explicit kernel computes them in any case.
    """

    def __init__(self, classifier: Classifier) -> None:
        # A copy: the explicit kernel is for this form alone.
        super().__init__(replace(classifier, model=copy.deepcopy(classifier.model)))
        set_kernels(self.model, Kernels(attention="explicit"))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        seen = observe(self.model, self.images(pixels), _in_bytes, keep_outputs=False)
        logits_BL = seen.logits_BL.float()
        rows, maxima = zip(*(seen.taken[layer] for layer in sorted(seen.taken)), strict=True)
        return logits_BL, self.probabilities(logits_BL), torch.stack(rows), torch.stack(maxima)


def _in_bytes(_: int, seen: SeenAttention) -> tuple[Tensor, Tensor]:
    weights_ATT = seen.weights()[0]
    maxima_AT = weights_ATT.amax(dim=-1)
    shares_ATT = weights_ATT / maxima_AT[..., None].clamp_min(torch.finfo(torch.float32).tiny)
    return (shares_ATT * 255).round().to(torch.uint8), maxima_AT


def write_page(folder: Path, classifier: Classifier, about: About, engine: Engine, opset: int = 20) -> Path:
    """Writes ``index.html``; the model inside must answer the golden picture as torch does.

    Args:
        folder: where to.
        classifier: in float32, on the CPU, with portable kernels.
        about: what travels with the weights.
        engine: the classifier's answers.
        opset: of ONNX's operators.

    Raises:
        VitralError: if the model cannot be exported, is too large for a page, or answers otherwise.
    """
    looks = can_be_looked_into(classifier)
    model = (LookingModel if looks else PixelsModel)(classifier)
    program = exported(model, about.preprocess.img_size)
    outputs = (*OUTPUTS, *_LOOKED) if looks else OUTPUTS
    pixels_HWC = about.preprocess.pixels(golden_picture())
    expected = engine(pixels_HWC[None])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path, *more = write_onnx(program, Path(scratch, "model.onnx"), about.to_json(), opset, outputs)
        refuse_too_large(sum(file.stat().st_size for file in (path, *more)) / 1e6)
        inside = OnnxEngine(path, Form("onnx", {path.name: ""}))
        check_answers(inside, pixels_HWC, expected, TOLERANCES["float32"], "the model of the page")
        return write_web(folder, about, path.read_bytes(), expected)


def can_be_looked_into(classifier: Classifier) -> bool:
    """Whether attention can be an output: the model is ours, no tokens merge, and it is not too large."""
    model = classifier.model
    if not isinstance(model, VisionTransformer) or any(getattr(model, "merge", ())):
        return False
    height, width = classifier.preprocess.img_size
    patch, config = model.config.patch_size, model.config
    tokens = config.num_prefix_tokens + (height // patch) * (width // patch)
    return config.num_layers * config.num_heads * tokens**2 <= _MOST_ATTENTION

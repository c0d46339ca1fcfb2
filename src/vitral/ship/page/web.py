"""The page that runs the model itself: one file, from a disk or any host, without a server that computes.

In it lie ONNX Runtime Web (`vendor/`, by ``scripts/vendor_ort_web``), the weights and the golden picture.
Its build has no WebGPU (docs/page.md says why).
"""

import gzip
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from vitral.artifacts.about import About
from vitral.artifacts.engine import Answers
from vitral.artifacts.golden import golden_png
from vitral.images.preprocess import resizes_rows_first
from vitral.model.config import ViTConfig
from vitral.runtime.errors import VitralError
from vitral.runtime.files import write_atomically
from vitral.runtime.settings import build
from vitral.ship.inside import inside
from vitral.ship.page.assemble import encoded, policy, render, script

FILE = "index.html"
TOLERANCE = 1e-4  # of the largest logit; WebAssembly adds in another order
# A browser holds the weights as text, as bytes and as tensors at once (docs/page.md has what was tried).
_MOST_MEGABYTES = 128

_WORDS = {
    "invitation": "Choose, drop, paste or photograph one. It is looked at in this page and goes nowhere.",
    "promise": "The model is in this file and runs in your browser. Nothing is sent anywhere.",
}
_MAY = "'wasm-unsafe-eval' blob:"  # what the runtime needs: machine code of WebAssembly, its glue as a blob


def write_web(folder: Path, about: About, model: bytes, golden: Answers) -> Path:
    """Writes ``index.html``: the page with the model, its runtime and a golden check inside.

    Args:
        folder: where to.
        about: what travels with the weights.
        model: ONNX, `pixels` (B, H, W, 3) uint8 -> `logits` and `probabilities`; where it can be looked into
            also `attention` (layers, heads, T, T) uint8 and `maxima` (layers, heads, T) of the first image.
        golden: what torch answers to the golden picture.

    Raises:
        VitralError: if the weights are too large for one file.
    """
    refuse_too_large(len(model) / 1e6)
    scripts = [_runtime(), script("engine_wasm.js")]
    blocks = {
        "runtime-wasm": encoded(_vendored("ort-wasm-simd-threaded.wasm.gz")),
        "runtime-mjs": encoded(_vendored("ort-wasm-simd-threaded.mjs")),
        "model": encoded(model),
        "golden-pixels": encoded(gzip.compress(_golden_pixels(about).tobytes(), mtime=0)),
    }
    page = render(
        about.name, _WORDS, _told(about, golden), golden_png(), scripts, blocks, policy(scripts, "", _MAY)
    )
    write_atomically(folder / FILE, page)
    return folder / FILE


def refuse_too_large(megabytes: float) -> None:
    """Raises VitralError if weights of so many megabytes are too large for one file."""
    if megabytes > _MOST_MEGABYTES:
        raise VitralError(
            f"the weights are {megabytes:.0f} MB, and a page of one file holds up to {_MOST_MEGABYTES}; "
            "`vitral serve` shows the same page of a model of any size"
        )


def _told(about: About, golden: Answers) -> dict[str, Any]:
    """What the page's script is told of the model."""
    preprocess = about.preprocess
    return {
        "engine": "wasm",
        "labels": list(about.labels),
        "abstain_below": about.abstain_below,
        "preprocess": {**preprocess.record(), "rows_first": resizes_rows_first()},
        "description": _description(about),
        "golden": {
            "logits": [float(value) for value in golden.logits[0]],
            "probabilities": [float(value) for value in golden.probabilities[0]],
            "tolerance": TOLERANCE,
        },
    }


def _description(about: About) -> dict[str, Any]:
    """As ``GET /v1/model`` of a server says it."""
    return {
        "name": about.name, "labels": list(about.labels), "multi_label": about.multi_label,
        "abstain_below": about.abstain_below, "temperature": about.temperature, "licence": about.licence,
        "parameters": about.parameters, "img_size": list(about.preprocess.img_size), **_inside(about),
    }  # fmt: skip


def _inside(about: About) -> dict[str, Any]:
    """Layers, heads, grid of patches and the names of the tokens that are no patches.

    A model that is not ours shows a grid of our own, 14 panes along its longer side.
    """
    height, width = about.preprocess.img_size
    architecture = about.architecture
    if not architecture:
        pane = max(height, width) / 14
        grid = [max(round(height / pane), 1), max(round(width / pane), 1)]
        return {"layers": 0, "heads": 0, "grid": grid, "prefix_tokens": 0, "prefix_names": []}
    return inside(build(ViTConfig, architecture), (height, width))


def _golden_pixels(about: About) -> np.ndarray:
    return about.preprocess.pixels(golden_png())


def _runtime() -> str:
    """The runtime's script, without the name of a map of its source, which is not here."""
    text = _vendored("ort.wasm.min.js").decode()
    return text.rpartition("//# sourceMappingURL=")[0].strip()


def _vendored(name: str) -> bytes:
    return resources.files("vitral.ship.page").joinpath("vendor", name).read_bytes()

#!/usr/bin/env python
"""Measures which forms each family has, and how far they are from torch: the table of docs/export.md.

    scripts/export_table.py run FILE      # measures what FILE, JSON lines, does not have yet; an hour
    scripts/export_table.py table FILE    # puts the table into docs/export.md

Each model is tiny (two layers, 40 channels) and has random weights, norms and scales away from their initial
values. Its forms are opened by their engines and compared with torch for batches of 1, 3 and 8, at two sizes.
Numbers are the largest difference of a logit, relative to the largest logit.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

import vitral
from tests.test_layouts import NARROW, TIMM, randomize
from vitral.artifacts.engine import Engine
from vitral.artifacts.manifest import Form
from vitral.artifacts.open import engine_of
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.inference.engine import ClassifierEngine
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError
from vitral.ship.export.export import about_of, in_float32
from vitral.ship.export.forms import Source, refuse_forms, write_form

PAGE = Path(__file__).parents[1] / "docs" / "export.md"
BEGIN, END = "<!-- table: scripts/export_table.py -->\n", "<!-- end of table -->\n"
KINDS = "onnx", "pt2", "openvino"
BATCHES = 1, 3, 8
LIMIT = 1e-5
LABELS = tuple("abcdefg")

_TINY: dict[str, Any] = {"embed_dim": 40, "num_layers": 2, "num_heads": 5, "num_classes": 7, "dropout": 0.0}
_ROTARY = {"position": "none", "num_heads": 5}
# Of Vitral's own parts: what each changes of the paper's model.
OURS: dict[str, dict[str, Any]] = {
    "the paper's (learned positions, class token)": {},
    "4 registers, QK-norm, LayerScale": {
        "embedding": {"register_tokens": 4},
        "layer": {"layer_scale": 0.1, "attention": {"qk_norm": True}},
    },
    "attention pooling": {"pooling": "map"},
    "mean pooling, SwiGLU, RMSNorm": {
        "pooling": "mean",
        "norm": {"kind": "rms"},
        "layer": {"feed_forward": {"gated": True, "activation": "silu"}},
    },
    "rotary, axial": {**_ROTARY, "layer": {"attention": {"rotary": {"kind": "axial"}}}},
    "rotary, mixed": {**_ROTARY, "layer": {"attention": {"rotary": {"kind": "mixed"}}}},
    "relative bias, geometric (BEiT)": {"layer": {"attention": {"relative_bias": "layer"}}},
    "relative bias, bicubic": {
        "layer": {"attention": {"relative_bias": "shared", "relative_resize": "bicubic"}}
    },
    "sinusoidal": {"position": "sinusoidal"},
    "sinusoidal, two-dimensional": {"position": "sinusoidal_2d"},
    "convolutional stem (hybrid)": {"stem": (8, 16)},
    "post-norm": {"layer": {"order": "post"}},
    "parallel layers": {"layer": {"order": "parallel"}},
    "tokens merge (r = 4)": {"merge": 4},
    "tokens merge, rotary (r = 4)": {
        **_ROTARY, "merge": 4, "layer": {"attention": {"rotary": {"kind": "axial"}}},
    },
}  # fmt: skip


def ours(change: dict[str, Any], side: int) -> Classifier:
    """A model of ours with one thing changed."""
    change = dict(change)
    merge = change.pop("merge", None)
    model = VisionTransformer(32, 8, **{**_TINY, **change}).eval()
    randomize(model)
    with tempfile.TemporaryDirectory() as folder:
        from vitral.checkpoints.checkpoint import Checkpoint
        from vitral.checkpoints.folder import save_checkpoint

        save_checkpoint(Path(folder), Checkpoint(model, Preprocess((32, 32)), LABELS))
        classifier = vitral.load(folder, img_size=side, device="cpu")
    classifier.model.merge_tokens(merge)
    return classifier


def timms(name: str, options: dict[str, Any], folder: Path, patch: int) -> None:
    """Saves a model of timm, four patches wide, as timm saves it."""
    import timm

    heads = {"attn_pool_num_heads": 5} if "pe_core" in name else {}
    settings = {**NARROW, **heads, "num_classes": 7, **options}
    theirs = timm.create_model(name, img_size=4 * patch, **settings).eval()
    randomize(theirs)
    timm.models.save_for_hf(theirs, folder, safe_serialization=True)


def of_timm(folder: Path, side: int) -> Classifier:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of preprocessing that no file states
        return replace(vitral.load(folder, img_size=side, device="cpu"), labels=LABELS)


def models() -> Iterator[tuple[str, int, Callable[[Path], Callable[[int], Classifier]]]]:
    """Each model's name, its patch, and what gives it at a size."""
    for name, change in OURS.items():
        yield name, 8, lambda _, change=change: lambda side: ours(change, side)
    for name, options in TIMM:
        patch = int(re.search(r"patch(\d+)", name)[1]) if "patch" in name else 16  # pyrefly: ignore

        def prepared(
            folder: Path, name: str = name, options: dict[str, Any] = options, patch: int = patch
        ) -> Callable[[int], Classifier]:
            timms(name, options, folder, patch)
            return lambda side: of_timm(folder, side)

        told = ", ".join(f"{key} {value}" for key, value in options.items() if key != "num_classes")
        yield f"timm {name}{f' ({told})' if told else ''}", patch, prepared


def distance(engine: Engine, reference: Engine, side: int) -> float:
    """The worst of all batches."""
    generator = np.random.default_rng(side)
    worst = 0.0
    for batch in BATCHES:
        pixels_BHWC = generator.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
        expected = reference(pixels_BHWC).logits
        found = engine(pixels_BHWC).logits
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return worst


def form_distances(
    classifier: Classifier, kinds: tuple[str, ...], sides: dict[int, Engine], *, dynamic_size: bool = False
) -> dict[str, float | str]:
    """Of each form the distance from torch at these sizes, or why there is none."""
    found: dict[str, float | str] = {}
    reference = in_float32(classifier)
    about = about_of(reference, "model")
    possible = []
    for kind in kinds:
        try:
            refuse_forms([kind], classifier, 20, dynamic_size=dynamic_size)
            possible.append(kind)
        except VitralError as error:
            found[kind] = str(error)
    if not possible:
        return found
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            source = Source.of(reference, about, ClassifierEngine(reference), 20, dynamic_size=dynamic_size)
        except VitralError as error:
            return {**found, **dict.fromkeys(possible, str(error))}
        for kind in possible:
            try:
                draft = write_form(kind, folder, source)
                form = Form(draft.kind, dict.fromkeys(draft.files, ""), options={"threads": 1})
                engine = engine_of(folder, about, form, trusted=True)
                found[kind] = max(distance(engine, reference, side) for side, reference in sides.items())
            except VitralError as error:
                found[kind] = str(error)
            except Exception as error:  # an engine's own, or torch's guards: it is written down, not hidden
                found[kind] = f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found


def measured(at: Callable[[int], Classifier], patch: int) -> dict[str, dict[str, float | str]]:
    """At the model's own size, at any size, and where that cannot be at a second size."""
    own, second = 4 * patch, 6 * patch
    classifier, larger = at(own), at(second)
    at_own, at_second = (ClassifierEngine(in_float32(model)) for model in (classifier, larger))
    fixed = form_distances(classifier, KINDS, {own: at_own})
    any_size = form_distances(classifier, KINDS, {own: at_own, second: at_second}, dynamic_size=True)
    left = tuple(kind for kind in KINDS if isinstance(any_size[kind], str))
    again = form_distances(larger, left, {second: at_second}) if left else {}
    return {"fixed": fixed, "any size": any_size, "second": again}


def run(file: Path) -> None:
    torch.set_num_threads(1)
    known = {json.loads(line)["model"] for line in file.read_text().splitlines()} if file.exists() else set()
    for name, patch, prepare in models():
        if name in known:
            continue
        with tempfile.TemporaryDirectory() as folder:
            result = measured(prepare(Path(folder)), patch)
        with file.open("a") as out:
            out.write(json.dumps({"model": name, **result}) + "\n")
        print(name, json.dumps(result), flush=True)


def cell(value: float | str) -> str:
    if isinstance(value, str):
        return "no"
    return f"{value:.0e}" if value <= LIMIT else f"**{value:.0e}**"


def table(file: Path) -> str:
    """The table, and why there is a no."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [
        "| model | ONNX | .pt2 | OpenVINO | any size: ONNX | .pt2 | OpenVINO |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    reasons: dict[str, None] = {}
    for row in rows:
        fixed = [
            max(values) if all(isinstance(v, float) for v in values) else values[0]
            for values in ([row["fixed"][kind], row["second"].get(kind, 0.0)] for kind in KINDS)
        ]
        any_size = [row["any size"][kind] for kind in KINDS]
        reasons |= {value: None for value in (*fixed, *any_size) if isinstance(value, str)}
        lines.append(f"| {row['model']} | {' | '.join(cell(value) for value in (*fixed, *any_size))} |")
    return "\n".join([*lines, "", "Why not:", "", *(f"- {reason}" for reason in reasons)]) + "\n"


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("file", type=Path)
    asked = parser.parse_args()
    if asked.what == "run":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        run(asked.file)
        return
    text = PAGE.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table(asked.file)}\n{END}{after}")


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Which of a library's plain Vision Transformers Vitral reads, and whether their numbers agree.

    scripts/coverage.py timm [PATTERN]

Every architecture of timm's vision_transformer.py, deit.py, eva.py and beit.py is built with random weights
and two layers, saved as timm saves it, loaded by Vitral, and its tokens and logits compared at two image
sizes; then converted back, loaded strictly by timm, and compared again. A tag is covered if its architecture
is. Needs the `peers` extra, nothing to download.
"""

import argparse
import contextlib
import gc
import json
import re
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from vitral.checkpoints.convert import convert
from vitral.checkpoints.folder import load_checkpoint
from vitral.runtime.errors import VitralError

FILES = ("vision_transformer", "deit", "eva", "beit")
TOLERANCE = 1e-5

# What Vitral does not express, by architecture; anything else must be read.
EXCEPTIONS = {
    r"_(dwee|dlittle|dpwee)_": "differential attention (experimental)",
    r"_18x2_": "parallel attentions and MLPs; no weights are published",
    r"sapiens2": "grouped-query attention that changes from layer to layer, scales on attention only",
}


@dataclass(frozen=True)
class Outcome:
    architecture: str
    tags: tuple[str, ...]
    error: float | None  # largest relative error; None if it was not compared
    reason: str = ""

    @property
    def covered(self) -> bool:
        return self.error is not None and self.error <= TOLERANCE


def architectures() -> dict[str, tuple[str, ...]]:
    """Architecture -> tags, of the four files."""
    names = {name for file in FILES for name in timm.list_models(module=file)}
    tags = {name: [] for name in names}
    for full in timm.list_models("*", include_tags=True, module=list(FILES)):
        name, _, tag = full.partition(".")
        tags[name].append(tag)
    return {name: tuple(found) for name, found in sorted(tags.items())}


def randomize(model: nn.Module) -> None:
    """Weights away from their initial values, of a size that keeps activations in range."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if re.search(r"gamma|norm.*weight|lambda_", name) and parameter.ndim <= 1:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim > 1 and name.endswith("weight"):
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            elif name != "rope.freqs":
                parameter.copy_(0.2 * noise)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def compare(name: str) -> float:
    """The largest relative error of tokens and logits at two sizes."""
    patch = timm.create_model(name, depth=1, device="meta").patch_embed.patch_size[0]
    grids = (4, 4), (6, 6)
    classes = {} if timm.get_pretrained_cfg(name).num_classes else {"num_classes": 5}
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        size = tuple(side * patch for side in grids[0])
        theirs = timm.create_model(name, depth=2, img_size=size, **classes).eval()
        randomize(theirs)
        timm.models.save_for_hf(theirs, folder, safe_serialization=True)
        for grid in grids:
            size = tuple(side * patch for side in grid)
            if grid != grids[0]:
                theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=size).eval()
            images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
            ours = load_checkpoint(Path(folder), **({} if grid == grids[0] else {"img_size": size})).model
            with torch.inference_mode():
                features = ours.features(images)
                errors.append(
                    relative_error(
                        features.patch_tokens,
                        theirs.forward_features(images)[:, ours.config.num_prefix_tokens :],
                    )
                )
                errors.append(relative_error(ours(images), theirs(images)))
        certificate = convert(folder, Path(folder) / "back", "timm")
        errors += [part["relative"] for part in (certificate.features, certificate.logits) if part]
    return max(errors)


def check(name: str, tags: tuple[str, ...]) -> Outcome:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return Outcome(name, tags, compare(name))
    except VitralError as error:
        return Outcome(name, tags, None, str(error))
    except Exception as error:
        return Outcome(name, tags, None, f"{type(error).__name__}: {error}")
    finally:
        gc.collect()


def line(outcome: Outcome) -> str:
    excepted = next(
        (why for names, why in EXCEPTIONS.items() if re.search(names, outcome.architecture)), None
    )
    what = f"{outcome.error:.1e}" if outcome.error is not None else excepted or outcome.reason[:150]
    state = "ok" if outcome.covered else "not" if excepted else "MISS"
    return f"{state:4} {outcome.architecture} ({len(outcome.tags)} tags): {what}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", choices=["timm"])
    parser.add_argument("pattern", nargs="?", default="", help="only architectures whose name this finds")
    parser.add_argument("--json", type=Path, help="write the outcomes there")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    outcomes = []
    for name, tags in architectures().items():
        if re.search(arguments.pattern, name):
            outcome = check(name, tags)
            outcomes.append(outcome)
            print(line(outcome), flush=True)
    covered = [outcome for outcome in outcomes if outcome.covered]
    all_tags, tags = (sum(len(o.tags) for o in found) for found in (outcomes, covered))
    print(f"timm {timm.__version__}: {len(covered)} of {len(outcomes)} architectures agree to {TOLERANCE:g}, "
          f"which are {tags} of {all_tags} tags ({tags / all_tags:.1%})")  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=1))
    sys.exit(len(covered) < len(outcomes))


if __name__ == "__main__":
    main()

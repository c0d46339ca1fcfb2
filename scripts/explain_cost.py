#!/usr/bin/env python
"""What looking into a model costs beside a forward pass, and beside a pass forward and back.

    python scripts/explain_cost.py time [--model ViT-B/16@224 --batch 8] [--ways NAME ...]
    python scripts/explain_cost.py memory [--model ViT-L/14@518 --batch 1]

The ways are "class rows" and "mean rows" (attention of all layers and heads, from the class token and as
the mean of all patches' rows) and the methods of `vitral explain --list`. "back" is a forward pass and the
gradient of a logit at the embedded tokens, weights frozen.

`time` interleaves rounds in one process; on a CPU with one thread and by CPU time, so that other work on the
machine counts less. `memory` gives the peak of a process for each way, on a GPU that of torch's allocator.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vitral
from vitral.bench.rounds import interleaved
from vitral.explain.attention import look
from vitral.explain.attribution.attribute import attribute
from vitral.explain.attribution.method import Settings
from vitral.explain.attribution.methods import METHODS
from vitral.explain.observe import frozen, observe
from vitral.explain.target import Question
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.runtime.devices import Placement

SLOW = {"integrated_gradients", "occlusion", "rise"}
WAYS = ["class rows", "mean rows", *(name for name in METHODS if name not in SLOW)]
Ways = dict[str, Callable[[], object]]


def classifier(arguments: argparse.Namespace) -> Classifier:
    torch.manual_seed(0)
    model = vitral.create(arguments.model)
    placement = Placement.choose(arguments.device, arguments.precision)
    return Classifier(placement.place(model).eval(), Preprocess(model.config.img_size), (), placement)


def contenders(given: Classifier, images: torch.Tensor, ways: list[str]) -> Ways:
    question = Question(torch.zeros(len(images), dtype=torch.long, device=images.device))
    grid, layers = given.model.embedding.grid_of(images), range(len(given.model.layers))

    @torch.inference_mode()
    def forward() -> object:
        with given.placement.autocast():
            return given.model(images)

    def back() -> object:
        with frozen(given.model), given.placement.autocast():
            seen = observe(given.model, images, layers=[], all_queries=False, keep_outputs=False)
            return torch.autograd.grad(question.scores(seen.logits_BL).sum(), seen.embedded_BTD)

    def rows(query: str) -> Callable[[], object]:
        looking = look(given.model, grid, layers, queries=[query])
        return torch.inference_mode()(lambda: looking.rows(given, images))

    def explain(name: str) -> Callable[[], object]:
        return lambda: attribute(given, images, METHODS[name], lambda _: question, Settings(steps=2, masks=8))

    found: Ways = {"forward": forward, "back": back, "class rows": rows("class"), "mean rows": rows("mean")}
    found |= {name: explain(name) for name in METHODS}
    return {name: found[name] for name in ("forward", "back", *ways)}


def made(arguments: argparse.Namespace) -> tuple[Classifier, torch.Tensor]:
    given = classifier(arguments)
    height, width = given.preprocess.img_size
    return given, given.placement.put(torch.randn(arguments.batch, 3, height, width))


def timed(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    given, images = made(arguments)
    on_gpu = given.placement.device.type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    found = interleaved(
        contenders(given, images, arguments.ways),
        arguments.rounds,
        synchronize=torch.cuda.synchronize if on_gpu else lambda: None,
        clock=time.perf_counter if on_gpu else time.process_time,
    )
    return [
        {"way": name, "ms": statistics.median(seconds) * 1e3}
        | {
            f"of {of}": statistics.median(one / other for one, other in zip(seconds, found[of], strict=True))
            for of in ("forward", "back")
        }
        for name, seconds in found.items()
    ]


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    peaks: dict[str, float] = {}
    for way in ("forward", "back", *arguments.ways):
        command = [sys.executable, __file__, "alone", "--ways", way]
        command += [
            f"--{name}={getattr(arguments, name)}" for name in ("model", "batch", "device", "precision")
        ]
        peaks[way] = float(subprocess.check_output(command, text=True))
    return [
        {"way": way, "MiB": peak, "of forward": peak / peaks["forward"], "of back": peak / peaks["back"]}
        for way, peak in peaks.items()
    ]


def alone(arguments: argparse.Namespace) -> None:
    given, images = made(arguments)
    (way,) = arguments.ways
    contenders(given, images, [way] if way in WAYS + sorted(SLOW) else [])[way]()
    on_gpu = given.placement.device.type == "cuda"
    peak = (
        torch.cuda.max_memory_allocated() / 1024
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    print(peak / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("time", "memory", "alone"))
    parser.add_argument("--model", default="ViT-B/16@224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--ways", nargs="*", default=WAYS)
    parser.add_argument("--out", type=Path, help="the rows as JSON")
    arguments = parser.parse_args()
    if arguments.what == "alone":
        alone(arguments)
        return
    rows = timed(arguments) if arguments.what == "time" else memory(arguments)
    for row in rows:
        way, *figures = row.values()
        names = list(row)[1:]
        print(
            f"{way:20}", "  ".join(f"{value:8.2f} {name}" for name, value in zip(names, figures, strict=True))
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

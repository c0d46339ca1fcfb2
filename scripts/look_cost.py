#!/usr/bin/env python
"""What looking costs beside a plain forward pass: peak memory, each way in a process of its own, and time.

    python scripts/look_cost.py memory [--size L --patch 14 --img-size 518]
    python scripts/look_cost.py time [--size B --patch 16 --img-size 224 --batch 8]

`memory` prints the peak of a forward pass, of the class token's rows of all layers, and of the mean rows of
all patches of all layers, in MiB above the loaded model. `time` interleaves rounds in one process.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import vitral
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.runtime.devices import Placement


def classifier(arguments: argparse.Namespace) -> Classifier:
    torch.manual_seed(0)
    name = f"ViT-{arguments.size}/{arguments.patch}"
    model = vitral.create(name, num_classes=1000, img_size=arguments.img_size)
    placement = Placement.choose("cpu", "float32")
    labels = tuple(map(str, range(1000)))
    return Classifier(placement.place(model).eval(), Preprocess(model.config.img_size), labels, placement)


def ways(given: Classifier, images: torch.Tensor) -> dict[str, Callable[[], object]]:
    looked = vitral.Inside(given)
    every = range(len(given.model.layers))

    @torch.inference_mode()
    def forward() -> object:
        return given.model(images)

    pixels = list(images)
    return {
        "forward": forward,
        "logits": lambda: given.logits(pixels, batch_size=len(pixels)),
        "class rows": lambda: looked.attention(pixels, layers=every, batch_size=len(pixels)),
        "mean rows": lambda: looked.attention(pixels, layers=every, queries=["mean"], batch_size=len(pixels)),
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(arguments: argparse.Namespace) -> None:
    given = classifier(arguments)
    images = torch.rand(arguments.batch, 3, arguments.img_size, arguments.img_size)
    before = peak_mib()
    ways(given, images)[arguments.way]()
    print(f"{before:.0f} {peak_mib():.0f}")


def memory(arguments: argparse.Namespace) -> None:
    peaks = {}
    for way in ("forward", "logits", "class rows", "mean rows"):
        command = [sys.executable, __file__, "alone", "--way", way]
        command += [f"--{name}={getattr(arguments, name)}" for name in ("size", "patch", "batch")]
        command += [f"--img-size={arguments.img_size}"]
        before, peaks[way] = map(float, subprocess.check_output(command, text=True).split())
        plain = peaks["forward" if way == "forward" else "logits"]
        above = peaks[way] - before
        print(
            f"{way:11} peak {peaks[way]:,.0f} MiB, {peaks[way] / plain:.3f} of the pass; {above:,.0f} MiB",
            flush=True,
        )


def timed(arguments: argparse.Namespace) -> None:
    images = torch.rand(arguments.batch, 3, arguments.img_size, arguments.img_size)
    calls = ways(classifier(arguments), images)
    del calls["forward"]
    seconds: dict[str, list[float]] = {way: [] for way in calls}
    for turn in range(arguments.rounds + 1):
        for way, call in calls.items():
            began = time.perf_counter()
            call()
            if turn:
                seconds[way].append(time.perf_counter() - began)
    plain = seconds["logits"]
    for way, taken in seconds.items():
        ratios = [one / other for one, other in zip(taken, plain, strict=True)]
        print(
            f"{way:11} {statistics.median(taken) * 1e3:8.1f} ms  {statistics.median(ratios):.3f} of the pass"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("memory", "time", "alone"))
    parser.add_argument("--size", default="L")
    parser.add_argument("--patch", type=int, default=14)
    parser.add_argument("--img-size", type=int, default=518)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--way")
    arguments = parser.parse_args()
    {"memory": memory, "time": timed, "alone": alone}[arguments.what](arguments)


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""What each method of attribution costs beside a forward pass and a pass forward and back.

    python scripts/explain_cost.py [--size B --patch 16 --img-size 224 --batch 8] [--methods NAME ...]

Rounds are interleaved in one process of one thread, and CPU time is read, so that other work on the machine
counts less. "back" is a forward pass and the gradient of a logit at the embedded tokens, weights frozen.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import vitral
from vitral.bench.rounds import interleaved
from vitral.explain.attribution.attribute import attribute
from vitral.explain.attribution.method import Settings
from vitral.explain.attribution.methods import METHODS
from vitral.explain.observe import frozen, observe
from vitral.explain.target import Question
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.runtime.devices import Placement

SLOW = {"integrated_gradients", "occlusion", "rise"}


def classifier(arguments: argparse.Namespace) -> Classifier:
    torch.manual_seed(0)
    model = vitral.create(f"ViT-{arguments.size}/{arguments.patch}", img_size=arguments.img_size)
    placement = Placement.choose(arguments.device, "float32")
    return Classifier(placement.place(model).eval(), Preprocess(model.config.img_size), (), placement)


def contenders(
    given: Classifier, images: torch.Tensor, methods: list[str]
) -> dict[str, Callable[[], object]]:
    question = Question(torch.zeros(len(images), dtype=torch.long, device=images.device))

    @torch.inference_mode()
    def forward() -> object:
        return given.model(images)

    def back() -> object:
        with frozen(given.model):
            seen = observe(given.model, images, layers=[], all_queries=False)
            return torch.autograd.grad(question.scores(seen.logits_BL).sum(), seen.embedded_BTD)

    def explain(name: str) -> Callable[[], object]:
        return lambda: attribute(given, images, METHODS[name], lambda _: question, Settings(steps=2, masks=8))

    return {"forward": forward, "back": back, **{name: explain(name) for name in methods}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="B")
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="*", default=[name for name in METHODS if name not in SLOW])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    given = classifier(arguments)
    images = given.placement.put(torch.randn(arguments.batch, 3, arguments.img_size, arguments.img_size))
    on_gpu = given.placement.device.type == "cuda"
    found = interleaved(
        contenders(given, images, arguments.methods),
        arguments.rounds,
        synchronize=torch.cuda.synchronize if on_gpu else lambda: None,
        clock=time.perf_counter if on_gpu else time.process_time,
    )
    print(f"{'':20}      ms   of F  of FB (median of {arguments.rounds} rounds' ratios)")
    for name, seconds in found.items():
        ratios = [
            statistics.median(one / other for one, other in zip(seconds, found[of], strict=True))
            for of in ("forward", "back")
        ]
        print(f"{name:20} {statistics.median(seconds) * 1e3:8.0f}  {ratios[0]:5.2f}  {ratios[1]:5.2f}")


if __name__ == "__main__":
    main()

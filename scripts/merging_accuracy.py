#!/usr/bin/env python
"""What merging tokens costs in accuracy and saves in time, on the same images, in turns.

    vitral probe WEIGHTS DATA --img-size 392 --per-class 50 --limit 100 --out probe    # a model with a head
    python scripts/merging_accuracy.py probe DATA --merge 52 --images 1500

Batches go through the model as it is and with merged tokens, in turns, in one process. After every batch the
loss so far stands in points, with its 95 % interval (Agresti and Min, 2005), and the ratio of CPU times.
"""

import argparse
import time

import numpy as np

import vitral
from vitral.data.image_data import open_data
from vitral.evaluation.analysis.comparison import difference
from vitral.evaluation.evaluate import choose_split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--merge", required=True, help="as `vitral eval --merge` takes it")
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=4)
    asked = parser.parse_args()
    plain, merged = (
        vitral.load(asked.model, device="cpu", precision="float32", merge=merge)
        for merge in (None, asked.merge)
    )
    _, split = choose_split(plain, open_data(asked.data), "test", print)
    split = split.take(np.random.default_rng(0).permutation(len(split))[: asked.images])
    right: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    seconds = [0.0, 0.0]
    for first in range(0, len(split), asked.batch):
        rows = range(first, min(first + asked.batch, len(split)))
        images = [split.images[row] for row in rows]
        for place, model in enumerate((plain, merged)):
            begun = time.process_time()
            answers = model.logits(images, batch_size=asked.batch).argmax(1).numpy()
            seconds[place] += time.process_time() - begun
            right[place].append(answers == split.labels[rows])
        found = difference(*(np.concatenate(of) for of in right))
        loss, low, high = (-100 * share for share in (found.value, found.high, found.low))
        print(
            f"{found.images} images: {found.first:.2%} -> {found.second:.2%}, loss {loss:.2f} points "
            f"({low:.2f} to {high:.2f}), {seconds[0] / seconds[1]:.2f} times as fast",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Measures `vitral check` on copies and wrong labels that are put into real data on purpose.

    python scripts/check_planted.py 'cifar10/{split}.parquet' --copies 1000
    python scripts/check_planted.py 'cifar10/{split}.parquet' --model MODEL --wrong 0.05 --limit 10000

Copies are stored anew at quality 50, cropped to 90 % of each side at a random place, mirrored, or made 10 %
brighter, a quarter of them each. A pair that holds a copy is right if the other is its original, or another
copy of that; it is not counted if the original itself is found to be near the other (CIFAR has such pairs of
its own); else it is wrong. Labels are changed to any other class, and found by the probability that the
cross-validated probes give them.
"""

import argparse
import io
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from vitral.checks.check import Check, check
from vitral.data.image_data import ImageData, open_data
from vitral.data.names import Names
from vitral.data.split import Split
from vitral.data.subsets import thinned
from vitral.images.picture import open_image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def cropped(image: Image.Image, random: np.random.Generator) -> bytes:
    """Nine tenths of each side, at a random place, as large as before."""
    width, height = image.size
    left, top = random.uniform(0, 0.1 * width), random.uniform(0, 0.1 * height)
    box = left, top, left + 0.9 * width, top + 0.9 * height
    return encoded(image.resize(image.size, Image.Resampling.BICUBIC, box=box))


KINDS: dict[str, Callable[[Image.Image, np.random.Generator], bytes]] = {
    "quality 50": lambda image, _: encoded(image, "JPEG", quality=50),
    "crop 90 %": cropped,
    "mirror": lambda image, _: encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "brightness 10 %": lambda image, _: encoded(ImageEnhance.Brightness(image).enhance(1.1)),
}


def with_copies(data: ImageData, count: int, random: np.random.Generator) -> tuple[ImageData, dict[str, str]]:
    """The data with copies in its last split, and of each copy's name the original's."""
    splits = dict(data.splits)
    every = [(name, row) for name, split in splits.items() for row in range(len(split))]
    images, labels, originals = [], [], {}
    for number, place in enumerate(random.choice(len(every), count, replace=False).tolist()):
        name, row = every[place]
        kind = list(KINDS)[number % len(KINDS)]
        images.append(KINDS[kind](open_image(splits[name].images[row]), random))
        labels.append(splits[name].labels[row])
        originals[f"{kind}/{number}"] = splits[name].names[row]
    *_, last = splits
    old = splits[last]
    splits[last] = Split(
        [*(old.images[row] for row in range(len(old))), *images],
        np.concatenate([old.labels, labels]),
        Names.of([*old.names, *originals]),
    )
    return ImageData(data.source, data.classes, splits), originals


def judged_copies(found: Check, originals: dict[str, str]) -> dict[str, Any]:
    """Recall of each kind, and the precision of the pairs that hold a copy."""
    names = found.subject.split.names
    pairs = {
        frozenset(names[row] for row in finding.rows)
        for kind in found.kinds
        if kind.key.startswith(("near", "same_file"))
        for finding in kind.findings
    }
    hits, asked = Counter(), Counter(name.split("/")[0] for name in originals)
    right, wrong = 0, []
    for pair in pairs:
        copies = [name for name in pair if name in originals]
        if not copies:
            continue
        of = {originals.get(name, name) for name in pair}
        if len(of) == 1:
            right += 1
        elif frozenset(of) not in pairs:
            wrong.append(sorted(pair))
    for name, original in originals.items():
        hits[name.split("/")[0]] += frozenset((name, original)) in pairs
    return {
        "recall": {kind: hits[kind] / asked[kind] for kind in asked},
        "recall of all": sum(hits.values()) / max(len(originals), 1),
        "precision": right / max(right + len(wrong), 1),
        "wrong": wrong[:20],
        "pairs without copies": sum(not any(name in originals for name in pair) for pair in pairs),
    }


def with_wrong_labels(
    data: ImageData, share: float, random: np.random.Generator
) -> tuple[ImageData, set[str]]:
    """The data with so many labels changed to any other class, and the names of those images."""
    splits, changed = {}, set()
    for name, split in data.splits.items():
        rows = random.choice(len(split), round(share * len(split)), replace=False)
        labels = split.labels.copy()
        labels[rows] = (labels[rows] + random.integers(1, len(data.classes), len(rows))) % len(data.classes)
        splits[name] = Split(split.images, labels, split.names)
        changed |= {split.names[row] for row in rows.tolist()}
    return ImageData(data.source, data.classes, splits), changed


def judged_labels(found: Check, changed: set[str]) -> dict[str, Any]:
    """How well the wrong labels are found, by rank and as they are flagged."""
    from sklearn.metrics import average_precision_score

    search = found.labels
    assert search is not None
    names = found.subject.split.names
    truth = np.array([names[row] in changed for row in search.rows.tolist()])
    own = search.probabilities[np.arange(len(truth)), search.labels]
    flagged = np.zeros(len(truth), dtype=bool)
    flagged[[doubt.position for doubt in search.doubts.doubts]] = True
    clean = truth == 0
    return {
        "AUPRC": average_precision_score(truth, -own),
        "probe agrees": search.accuracy,
        "probe agrees, labels left as they were": float(
            (search.probabilities.argmax(1) == search.labels)[clean].mean()
        ),
        "flagged": int(flagged.sum()),
        "precision of flags": float(truth[flagged].mean()),
        "recall of flags": float(flagged[truth].mean()),
        "estimated share": search.doubts.share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--copies", type=int, default=0)
    parser.add_argument("--wrong", type=float, default=0.0)
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, help="images of each split")
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    data = open_data(options.data, val_fraction=0)
    if options.limit:
        splits = {name: thinned(split, options.limit) for name, split in data.splits.items()}
        data = ImageData(data.source, data.classes, splits)
    originals, changed = {}, set()
    if options.copies:
        data, originals = with_copies(data, options.copies, random)
    if options.wrong:
        data, changed = with_wrong_labels(data, options.wrong, random)
    found = check(data, options.model, workers=options.workers)
    result: dict[str, Any] = {"images": len(found.subject), "seconds": found.seconds}
    result |= {kind.key: len(kind.findings) for kind in found.kinds if kind.findings}
    if options.copies:
        result |= judged_copies(found, originals)
    if options.wrong:
        result |= judged_labels(found, changed)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""What is wrong or surprising about single images, by one look at each: broken, blank, tiny, of odd shape."""

from collections.abc import Iterator

import numpy as np

from vitral.checks.findings import Finding, Kind, Subject, single
from vitral.checks.look import Looks
from vitral.images.stored import SURPRISES

# Grey levels of the small picture: of one colour; the noise of a scanner and JPEG's rounding stay below.
_BLANK = 6
# Pixels of the shorter side; below, or below this share of the usual one, there is next to nothing to see.
_TINY, _TINY_SHARE = 16, 0.1
# Longer to shorter side; a model that is given the middle sees a quarter of such a picture, or less.
_ODD = 4.0
# Where so many of the images are so, it is what the data is like.
_USUAL_SHARE = 0.2
# Points by which the way images are stored tells their class better than the commonest class does.
_TELLING, _ENOUGH = 0.1, 40


def stored_kinds(subject: Subject, looks: Looks) -> Iterator[Kind]:
    """Tell what one look at each image showed, a kind at a time."""
    sound, seen = np.flatnonzero(looks.sound), looks.seen
    broken = np.flatnonzero(~looks.sound)
    yield Kind(
        "broken",
        "cannot be read",
        "wrong",
        "Training passes over them and says so; mend or remove them.",
        single(broken, (seen[row].damage for row in broken)),
    )
    blank = [row for row in sound.tolist() if seen[row].spread < _BLANK]
    yield Kind(
        "blank",
        "of one colour",
        "wrong",
        "There is nothing in them to learn a label from.",
        single(blank, ("one colour" for _ in blank)),
    )
    yield from _of_size(sound, looks)
    for key, means in SURPRISES.items():
        rows = [row for row in sound.tolist() if key in dict(seen[row].surprises)]
        words = (dict(seen[row].surprises)[key] for row in rows)
        yield Kind(
            f"stored:{key}",
            means.split(":")[0],
            "note",
            f"{means[:1].upper()}{means[1:]}.",
            single(rows, words),
        )
    yield _shortcuts(subject, looks, sound)


def is_blank(looks: Looks) -> np.ndarray:
    """Tell which images are of one colour, (n,); damaged ones are not."""
    return looks.sound & (np.array([seen.spread for seen in looks.seen], dtype=int) < _BLANK)


def _of_size(sound: np.ndarray, looks: Looks) -> Iterator[Kind]:
    sizes = looks.sizes[sound]
    shorter, longer = (sizes.min(1), sizes.max(1)) if len(sizes) else (np.empty(0), np.empty(0))
    usual = float(np.median(shorter)) if len(sizes) else 0.0
    limit = min(max(float(_TINY), _TINY_SHARE * usual), usual)
    tiny = np.flatnonzero(shorter < limit)
    yield Kind(
        "tiny",
        "much smaller than the others",
        "doubtful",
        f"Half of the images have a shorter side of {usual:,.0f} pixels or more; enlarged, these show "
        "next to nothing.",
        single(sound[tiny], (_pixels(sizes[place]) for place in tiny)),
    )
    odd = np.flatnonzero(longer >= _ODD * np.maximum(shorter, 1))
    odd = odd[np.argsort(-(longer / np.maximum(shorter, 1))[odd], kind="stable")]
    if len(odd) > _USUAL_SHARE * len(sizes):
        odd = odd[:0]
    yield Kind(
        "shape",
        "much longer than wide, or wider than long",
        "doubtful",
        "A model that is given the middle square sees a small part of them.",
        single(sound[odd], (_pixels(sizes[place]) for place in odd)),
    )


def _pixels(size: np.ndarray) -> str:
    return f"{size[1]:,}x{size[0]:,} pixels"


def class_kinds(subject: Subject) -> Iterator[Kind]:
    """Tell which classes have few images to learn from."""
    train = subject.data.splits["train"]
    counts = (
        train.labels.sum(0)
        if train.multi_label
        else np.bincount(train.labels, minlength=len(subject.data.classes))
    )
    few = [place for place in np.argsort(counts, kind="stable") if counts[place] < _FEW]
    words = (f"{subject.data.classes[place]}: {_images(counts[place])} to train on" for place in few)
    yield Kind(
        "few",
        f"classes of fewer than {_FEW} training images",
        "doubtful",
        "A model learns little of them, and what is measured on them varies from one draw to the next.",
        tuple(Finding((), each) for each in words),
    )


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


_FEW = 10


# --- Shortcuts -------------------------------------------------------------------------------------


def _shortcuts(subject: Subject, looks: Looks, sound: np.ndarray) -> Kind:
    """Whether the way that images are stored tells their class: a model would learn that instead."""
    found = []
    if not subject.split.multi_label and len(sound) >= _ENOUGH:
        labels = subject.split.labels[sound]
        seen = [looks.seen[row] for row in sound.tolist()]
        ways = {
            "the format": [each.stored for each in seen],
            "the size in pixels": [each.size for each in seen],
            "whether it has colours": [each.grey for each in seen],
            "how it is stored": [tuple(key for key, _ in each.surprises) for each in seen],
        }
        for name, values in ways.items():
            known, chance = _told_by(values, labels)
            if known - chance >= _TELLING:
                words = (
                    f"{name} alone tells the class of {known:.0%} of the images, and chance of {chance:.0%}"
                )
                found.append(Finding((), words, known))
    return Kind(
        "shortcut",
        "ways to tell the class without looking",
        "doubtful",
        "A model learns what is easiest. Where the classes come from different cameras or programs, it may "
        "learn those, and fail on new images.",
        tuple(sorted(found, key=lambda each: -(each.measure or 0))),
    )


def _told_by(values: list, labels: np.ndarray) -> tuple[float, float]:
    """How many classes of one half of the images the commonest class of each value in the other half tells.

    Beside it, how many the commonest class of all does.
    """
    codes = np.unique([repr(value) for value in values], return_inverse=True)[1]
    half = np.random.default_rng(0).permutation(len(labels)) % 2 == 0
    counts = np.zeros((codes.max() + 1, labels.max() + 1), dtype=np.int64)
    np.add.at(counts, (codes[half], labels[half]), 1)
    commonest = counts.sum(0).argmax()
    said = np.where(counts.sum(1) > 0, counts.argmax(1), commonest)[codes[~half]]
    return float((said == labels[~half]).mean()), float((labels[~half] == commonest).mean())

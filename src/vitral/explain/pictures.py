"""Maps of many images as files: for each image one picture for people and one array for programs."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from vitral.explain.attribution.asking import POSITIVE, asking
from vitral.explain.attribution.method import Method
from vitral.explain.attribution.methods import DEFAULT, METHODS, find
from vitral.explain.inside import Inside
from vitral.explain.maps import Relevance
from vitral.explain.render import Panel, Strip, matplotlib_tables, png, sheet
from vitral.explain.target import Target, class_index
from vitral.inference.classifier import Classifier
from vitral.runtime.errors import ImageError, VitralError
from vitral.runtime.files import write_atomically

# How maps are drawn: between patches too, each patch a square, or one beside the other.
Look = Literal["smooth", "patches", "both"]

Progress = Callable[[float], None]

_TOP = 3  # labels above a picture
_BATCH_SIZE = 8


@dataclass(frozen=True)
class Map:
    """One map of one image: what is drawn, what is written above and below it, and what is told of it."""

    values: np.ndarray  # (rows, columns)
    strip: str  # maps of one strip share their scale
    about_strip: str
    title: str
    detail: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Explained:
    """One image with its maps and files, or why there are none."""

    image: str
    top: tuple[tuple[str, float], ...] = ()  # (label, probability), likeliest first; none of a model without
    maps: tuple[Map, ...] = ()
    picture: Path | None = None  # .png
    array: Path | None = None  # .npy, float32 (maps, rows, columns), in the order of `maps`
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What `vitral explain --json` prints."""
        label, probability = self.top[0] if self.top else (None, None)
        files = {"picture": str(self.picture), "maps": str(self.array)} if self.picture else None
        return {
            "image": self.image,
            "label": label,
            "probability": probability,
            "grid": list(self.maps[0].values.shape) if self.maps else None,
            "maps": [one.facts for one in self.maps],
            "files": files,
            "error": self.error,
        }


class Asked(Protocol):
    """What is asked of each image."""

    def refuse(self, classifier: Classifier) -> None:
        """Raises VitralError for what the model cannot be asked, before the first image."""

    def maps(self, inside: Inside, pictures: list[Image.Image], progress: Progress) -> list[list[Map]]:
        """Computes the maps of each picture; `progress` is told how many are done, such as 2.4."""


@dataclass(frozen=True)
class Attribution:
    """Which patches count for a class: a strip for each method, a map for each class.

    Without classes, the predicted one; of a multi-label model each that it says is there.
    """

    methods: tuple[str, ...] = (DEFAULT,)
    classes: tuple[Target, ...] = ()
    against: Target | None = None

    def refuse(self, classifier: Classifier) -> None:
        rows = [find(name) for name in self.methods]
        of_class = [row.name for row in rows if row.of_class]
        if of_class and classifier.metadata.get("regression"):
            others = [name for name, row in METHODS.items() if not (row.of_class or row.is_control)]
            raise VitralError(
                f"this model is a regression, without classes, and {' and '.join(of_class)} explains a "
                f"class; {' or '.join(others)} can serve"
            )
        for target in (*self.classes, self.against):
            if isinstance(target, str):
                class_index(target, classifier.labels, classifier.model.config.num_classes)
        for row in [row for row in rows if row.of_class] or rows:
            for target in self.classes or self._targets(classifier, row):
                asking(classifier, row, target, self.against)

    def maps(self, inside: Inside, pictures: list[Image.Image], progress: Progress) -> list[list[Map]]:
        found: list[list[Map]] = [[] for _ in pictures]
        rows = [METHODS[name] for name in self.methods]
        asked = [(row, target) for row in rows for target in self._targets(inside.classifier, row)]
        for before, (row, target) in enumerate(asked):

            def tell(done: float, before: int = before) -> None:
                progress((before * len(pictures) + done) / len(asked))

            against = self.against if row.of_class else None
            given = inside.relevance(pictures, method=row.name, target=target, against=against, progress=tell)
            for place, image in enumerate(given.images):
                found[image].append(_of_relevance(given, place))
        return found

    def _targets(self, classifier: Classifier, method: Method) -> tuple[Target, ...]:
        if not method.of_class:
            return ("predicted",)
        return self.classes or (POSITIVE if classifier.multi_label else "predicted",)


def _of_relevance(found: Relevance, place: int) -> Map:
    method, target = METHODS[found.method], found.targets[place]
    against = found.against[place] if found.against else None
    score, outside = float(found.scores[place]), float(found.prefix_mass[place])
    facts = {
        "method": found.method,
        "target": target if method.of_class else None,
        "against": against,
        "score": score if method.of_class else None,
        "probability": float(found.probabilities[place]) if method.of_class else None,
        "prefix_mass": outside,
        "certificate": found.certificate,
        "layers": found.layers,
    }
    return Map(
        values=found.values[place].numpy(),
        strip=found.method,
        about_strip=method.says,
        title=f"{target} rather than {against}" if against else target or "any class",
        detail=_joined(f"score {score:.2f}" if method.of_class else "", _outside(outside)),
        facts=facts,
    )


@dataclass(frozen=True)
class Heads:
    """Where the class token looks, or the mean of the patches without one: a map for each layer and head."""

    layers: tuple[int, ...] | None = (-1,)  # None: all
    heads: tuple[int, ...] | None = None  # None: all

    def refuse(self, classifier: Classifier) -> None:
        pass

    def maps(self, inside: Inside, pictures: list[Image.Image], progress: Progress) -> list[list[Map]]:
        layers = range(len(inside.model.layers)) if self.layers is None else self.layers
        seen = inside.attention(pictures, layers=layers, heads=self.heads)
        progress(len(pictures))
        [query] = seen.queries
        who = "the class token" if query == "class" else "the patches, their mean,"
        found: list[list[Map]] = []
        for values_LAQYX, prefix_LAQP in zip(seen.values, seen.prefix, strict=True):
            maps = []
            for place, layer in enumerate(seen.layers):
                for column, head in enumerate(seen.heads):
                    outside = float(prefix_LAQP[place, column, 0].sum())
                    facts = {"method": "attention", "layer": layer, "head": head, "query": query}
                    facts |= {"prefix_mass": outside, "certificate": seen.certificate[place]}
                    about = f"attention probabilities: where {who} looks"
                    values = values_LAQYX[place, column, 0].numpy()
                    maps.append(
                        Map(values, f"layer {layer}", about, f"head {head}", _outside(outside), facts)
                    )
            found.append(maps)
        return found


@dataclass(frozen=True)
class Drawing:
    """How maps are drawn, and where their files are put."""

    out: Path
    look: Look | None = None  # None: "both" of a single map, else "smooth"
    batch_size: int = _BATCH_SIZE
    on_images: Callable[[float, int], None] = lambda *_: None  # told how many are done, of how many


def explain_images(
    inside: Inside, images: Sequence[str], asked: Asked, drawing: Drawing
) -> Iterator[Explained]:
    """Computes, draws and writes the maps of image files, one after the other.

    Each file is whole or not there, so that whoever stops in the middle keeps what is finished.

    Args:
        inside: the model.
        images: paths.
        asked: `Attribution` or `Heads`.
        drawing: how, and into which folder.

    Raises:
        VitralError: if the model cannot be asked this.
    """
    matplotlib_tables()
    asked.refuse(inside.classifier)
    names = iter(file_names(images))
    for start in range(0, len(images), drawing.batch_size):
        paths = images[start : start + drawing.batch_size]
        opened = [_open(inside.classifier, path) for path in paths]
        pictures = [picture for picture in opened if isinstance(picture, Image.Image)]

        def tell(done: float, start: int = start) -> None:
            drawing.on_images(start + done, len(images))

        found = iter(asked.maps(inside, pictures, tell) if pictures else ())
        for path, picture in zip(paths, opened, strict=True):
            name = next(names)
            if isinstance(picture, ImageError):
                yield Explained(path, error=str(picture))
                continue
            yield _write(inside.classifier, path, picture, tuple(next(found)), drawing, name)


def _open(classifier: Classifier, path: str) -> Image.Image | ImageError:
    """The picture, or why it is none; also one that is too narrow to be resized."""
    try:
        picture = classifier.preprocess.open(path)
        classifier.preprocess.fit(picture)
    except ImageError as error:
        return error
    return picture


def _write(
    classifier: Classifier,
    path: str,
    picture: Image.Image,
    maps: tuple[Map, ...],
    drawing: Drawing,
    name: str,
) -> Explained:
    named = classifier.labels and not classifier.metadata.get("regression")
    top = classifier.predict(picture, top=_TOP)[0].top if named else ()
    drawn = drawing.out / f"{name}.png"
    array = drawing.out / f"{name}.npy"
    explained = Explained(path, top, maps, drawn, array)
    drawing.out.mkdir(parents=True, exist_ok=True)
    write_atomically(array, _npy(np.stack([one.values for one in maps]).astype(np.float32)))
    write_atomically(drawn, png(_sheet(classifier.preprocess.fit(picture), explained, drawing.look)))
    return explained


def _sheet(picture: Image.Image, explained: Explained, look: Look | None) -> Image.Image:
    """The page of one image."""
    maps = explained.maps
    look = look or ("both" if len(maps) == 1 else "smooth")
    strips = []
    for name in dict.fromkeys(one.strip for one in maps):
        own = [one for one in maps if one.strip == name]
        panels = []
        for one in own:
            for smooth in {"smooth": (True,), "patches": (False,), "both": (True, False)}[look]:
                detail = "patch by patch" if look == "both" and not smooth else one.detail
                panels.append(Panel(one.values, one.title, detail, smooth=smooth))
        strips.append(Strip(panels, name, own[0].about_strip))
    rows, columns = maps[0].values.shape
    labels = ", ".join(f"{label} {probability:.1%}" for label, probability in explained.top)
    note = (
        f"{picture.width}x{picture.height} pixels, {rows}x{columns} patches; maps of one strip share a scale"
    )
    if certificate := max(one.facts["certificate"] for one in maps):
        note += f"; certificate {certificate:.0e}"
    return sheet(picture, Path(explained.image).name, [labels] if labels else [], strips, [note])


def file_names(images: Sequence[str]) -> list[str]:
    """A name for each image's files, without suffix: its own, with a number where others have the same.

    >>> file_names(["a/cat.jpg", "b/cat.png", "b/dog.png"])
    ['cat', 'cat-2', 'dog']
    """
    taken: set[str] = set()
    names = []
    for image in images:
        stem, number = Path(image).stem, 1
        name = stem
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def _outside(mass: float) -> str:
    return f"{mass:.0%} on prefix tokens" if mass > 0 else ""


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)

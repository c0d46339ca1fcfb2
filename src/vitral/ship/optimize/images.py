"""The images of a search: to measure ranges on, to fit temperatures to, and to judge forms by.

No image serves two of these, and those that a form is judged by were never learnt from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitral.data.batches import DamageCount
from vitral.data.columns import Columns
from vitral.data.image_data import DataSource, open_data
from vitral.data.loader import Loader
from vitral.data.split import Split
from vitral.data.subsets import in_turns, thinned
from vitral.data.workers import Loading, reader_count
from vitral.evaluation.analysis.answers import training_images
from vitral.evaluation.calibration import CALIBRATION_IMAGES
from vitral.evaluation.evaluate import choose_split
from vitral.images.picture import ImageSource
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.runtime.errors import VitralError

CALIBRATING = 300  # images that ranges are measured on, evenly from the classes
TRYING = 100  # further ones, by which strengths of SmoothQuant are compared
_MOST_FITTING = 1000  # of held-out images; a temperature needs no more
_FITTING_SHARE = 5  # where there are no other held-out images, one in so many
_MAX_BYTES = 2**31  # of the pixels of held-out images
_READ_AT_ONCE = 256
_MAX_DAMAGED = 0.01


@dataclass(frozen=True)
class Pixels:
    """Images as the model sees them, uint8 (n, H, W, 3) in a .npy file, and their labels."""

    file: Path
    labels: np.ndarray  # (n,), or (n, L) of several labels an image

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "Pixels":
        """The first so many of them."""
        return Pixels(self.file, self.labels[:count])


@dataclass(frozen=True)
class Images:
    """The splits that a search uses."""

    training: Split  # at most `CALIBRATING` + `TRYING`, in turns over the classes
    fitting: Split  # held out; temperatures are fitted to them
    judging: Split  # held out
    judging_name: str  # "test" or "val"


def choose_images(classifier: Classifier, source: DataSource, warn: Callable[[str], None]) -> Images:
    """Choose the images of a source: judged by are the test images, else those that training held out.

    Raises:
        VitralError: if the source cannot be used, or has classes that the model lacks.
    """
    made_by = classifier.metadata
    fraction, seed = made_by.get("val_fraction") or 0.2, made_by.get("seed", 0)
    data = open_data(source, val_fraction=fraction, seed=seed, columns=Columns.of_metadata(made_by))
    name = "test" if "test" in data.splits else "val"
    _, judging = choose_split(classifier, data, name, warn)
    if name == "test" and "val" in data.splits:
        _, held_out = choose_split(classifier, data, "val", lambda _: None)
        fitting = thinned(held_out, _MOST_FITTING)
    else:
        rows = np.arange(len(judging))
        for_fitting = rows % max(_FITTING_SHARE, len(judging) // _MOST_FITTING) == 0
        judging, fitting = judging.take(rows[~for_fitting]), judging.take(rows[for_fitting])
    training = training_images(classifier, data)
    if training.multi_label:
        training = thinned(training, CALIBRATING + TRYING)
    else:
        training = training.take(in_turns(training, 0)[: CALIBRATING + TRYING])
    return Images(training, fitting, judging, name)


def most_that_fit(preprocess: Preprocess) -> int:
    """How many images' pixels are kept at most."""
    height, width = preprocess.img_size
    return min(_MAX_BYTES // (3 * height * width), 5 * CALIBRATION_IMAGES)


def write_pixels(
    split: Split,
    preprocess: Preprocess,
    file: Path,
    warn: Callable[[str], None],
    on_images: Callable[[int, int], None],
) -> Pixels:
    """Read images into a file; damaged ones are left out.

    Raises:
        VitralError: if more than one in a hundred is damaged, or none can be read.
    """
    damage, parts, labels, done = DamageCount(len(split), _MAX_DAMAGED, warn), [], [], 0
    loading = Loading(reader_count(len(split)), warn)
    loader = Loader(split, partial(_pixels, preprocess), loading)
    for batch in loader.evaluation_batches(_READ_AT_ONCE):
        damage.add(batch)
        done += batch.asked
        on_images(done, len(split))
        if len(batch.labels):
            parts.append(batch.images.numpy())
            labels.append(batch.labels.numpy())
    if not parts:
        raise VitralError("none of the images could be read, so there is nothing to judge forms by")
    np.save(file, np.concatenate(parts))
    return Pixels(file, np.concatenate(labels))


def _pixels(preprocess: Preprocess, image: ImageSource) -> Tensor:
    return torch.from_numpy(preprocess.pixels(image))

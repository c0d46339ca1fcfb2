"""Scikit-learn's handwritten digits."""

import numpy as np
from PIL import Image

from vitral.data.split import Found, Split


def read_digits() -> Found:
    from sklearn.datasets import load_digits

    ink, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    # 8x8 pixels of ink from 0 to 16.
    pixels = np.rint(ink * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    images = [Image.fromarray(array) for array in pixels]
    names = [f"digit {index}" for index in range(len(images))]
    return Found(tuple("0123456789"), {"train": Split(images, labels, names)})

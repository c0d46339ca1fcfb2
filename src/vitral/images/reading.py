"""Reads images ahead: while a batch is computed, the next one is decoded."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from os import PathLike
from typing import TypeVar

import numpy as np
from PIL import Image

from vitral.images.picture import ImageSource, is_tensor
from vitral.runtime.errors import ImageError
from vitral.runtime.threads import DECODING_THREADS

Read = TypeVar("Read")


def batches_ahead(
    images: Iterable[ImageSource], read: Callable[[ImageSource], Read], batch_size: int
) -> Iterator[tuple[list[str], list[Read | ImageError]]]:
    """Yields names and read images, in order; of one that cannot be read, the error in its place."""
    pool = ThreadPoolExecutor(DECODING_THREADS)
    try:
        numbered = enumerate(images)

        def read_or_error(image: ImageSource) -> Read | ImageError:
            try:
                return read(image)
            except ImageError as error:
                return error

        def submit() -> tuple[list[str], list[Future[Read | ImageError]]]:
            chunk = list(islice(numbered, batch_size))
            names = [image_name(index, image) for index, image in chunk]
            return names, [pool.submit(read_or_error, image) for _, image in chunk]

        names, reading = submit()
        while names:
            following = submit()
            yield names, [future.result() for future in reading]
            names, reading = following
    finally:
        # Whoever stops in the middle waits for the images in hand, not for those in line.
        pool.shutdown(cancel_futures=True)


def image_name(index: int, image: ImageSource) -> str:
    """The path, or "image 3" for what has no name."""
    return str(image) if isinstance(image, str | PathLike) else f"image {index}"


def as_sequence(images: ImageSource | Iterable[ImageSource]) -> Iterable[ImageSource]:
    """Gives several images as they are, and one as a list of one."""
    single = isinstance(images, str | bytes | PathLike | Image.Image)
    array = (isinstance(images, np.ndarray) or is_tensor(images)) and images.ndim <= 3
    return [images] if single or array else images  # pyrefly: ignore[bad-return]

"""Each library's way from files to batches, as its own documentation writes it; a call is a pass over all."""

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vitral.bench.data.workload import SMALLEST_CROP, Photographs
from vitral.data.loader import Loader
from vitral.data.workers import Loading
from vitral.images.augmentation import Augmentation
from vitral.images.preprocess import Decoding

Pass = Callable[[], Iterator[Tensor]]  # batches (B, 3, H, W), normalized, of every image once


@dataclass(frozen=True)
class LoaderContender:
    """A library's loader in one configuration."""

    library: str
    configuration: str
    detail: str
    training: Pass
    evaluation: Pass


def loaders(photos: Photographs, libraries: Iterable[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Give names of libraries, and what makes the contenders of each; to make them may raise anything."""
    yield "vitral", lambda: _ours(photos)
    for library in libraries:
        if library in _THEIRS:
            yield library, lambda make=_THEIRS[library]: make(photos)


def _ours(photos: Photographs) -> list[LoaderContender]:
    details = {
        "full": "every pixel, Pillow's resize",
        "fast": "JPEGs divided while 2 pixels are left for each, torch's resize",
        "fastest": "JPEGs divided while 1 pixel is left for each, torch's resize",
    }
    kept = _ours_with(photos, "fast", "decoded pictures kept in memory after the first pass", again=True)
    return [
        *(_ours_with(photos, decoding, details[decoding]) for decoding in get_args(Decoding)),
        replace(kept, configuration="kept"),
    ]


def _ours_with(
    photos: Photographs, decoding: Decoding, detail: str, *, again: bool = False
) -> LoaderContender:
    settings, split = photos.settings, photos.split
    preprocess = replace(settings.preprocess, decoding=decoding)
    augmentation = Augmentation("resized", crop_scale=SMALLEST_CROP, flip=True)
    loader = Loader(split, preprocess, Loading(settings.workers), again=again)
    size = min(settings.batch_size, len(split))

    def training() -> Iterator[Tensor]:
        batches = loader.training_batches(augmentation, batch_size=size, seed=0)
        yield from (batch.images for batch in islice(batches, len(split) // size))
        batches.close()

    def evaluation() -> Iterator[Tensor]:
        return (batch.images for batch in loader.evaluation_batches(size))

    return LoaderContender("vitral", decoding, detail, training, evaluation)


def _torchvision(photos: Photographs) -> list[LoaderContender]:
    transforms, v2 = (
        importlib.import_module(f"torchvision.{name}") for name in ("transforms", "transforms.v2")
    )
    preprocess, size = photos.settings.preprocess, photos.settings.img_size
    mode = transforms.InterpolationMode(preprocess.interpolation)
    crop = {"scale": (SMALLEST_CROP, 1.0), "interpolation": mode}
    normal = transforms.Normalize(preprocess.mean, preprocess.std)
    default = [transforms.ToTensor(), normal]
    quick = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocess.mean, preprocess.std)]
    shorter = photos.settings.shorter_side
    return [
        LoaderContender(
            "torchvision",
            "default",
            "ImageFolder, RandomResizedCrop and ToTensor on Pillow's pictures",
            _folder(
                photos,
                transforms.Compose(
                    [transforms.RandomResizedCrop(size, **crop), transforms.RandomHorizontalFlip(), *default]
                ),
                training=True,
            ),
            _folder(
                photos,
                transforms.Compose([transforms.Resize(shorter, mode), transforms.CenterCrop(size), *default]),
            ),
        ),
        LoaderContender(
            "torchvision",
            "best documented",
            "ImageFolder, transforms v2 on tensors of bytes",  # as its "performance considerations" advise
            _folder(
                photos,
                v2.Compose(
                    [v2.PILToTensor(), v2.RandomResizedCrop(size, **crop), v2.RandomHorizontalFlip(), *quick]
                ),
                training=True,
            ),
            _folder(
                photos,
                v2.Compose([v2.PILToTensor(), v2.Resize(shorter, mode), v2.CenterCrop(size), *quick]),
            ),
        ),
    ]


def _folder(photos: Photographs, transform: Any, *, training: bool = False) -> Pass:
    """Batches of torchvision's ImageFolder by torch's DataLoader."""
    datasets = importlib.import_module("torchvision.datasets")
    dataset = datasets.ImageFolder(photos.folder, transform)
    return _dataloader(photos, dataset, training=training)


def _dataloader(
    photos: Photographs, dataset: Any, collate: Callable | None = None, *, training: bool
) -> Pass:
    settings = photos.settings
    loader = DataLoader(
        dataset,
        settings.batch_size,
        shuffle=training,
        drop_last=training,
        num_workers=settings.workers,
        collate_fn=collate,
    )
    return lambda: (batch[0] if isinstance(batch, list | tuple) else batch for batch in loader)


def _timm(photos: Photographs) -> list[LoaderContender]:
    data = importlib.import_module("timm.data")
    settings = photos.settings

    def made(*, training: bool) -> Pass:
        dataset = data.create_dataset("", root=str(photos.folder))
        loader = data.create_loader(
            dataset,
            (3, settings.img_size, settings.img_size),
            settings.batch_size,
            is_training=training,
            scale=(SMALLEST_CROP, 1.0),
            color_jitter=None,
            interpolation=settings.interpolation,
            crop_pct=settings.preprocess.crop_fraction,
            num_workers=settings.workers,
            persistent_workers=False,
            device=torch.device("cpu"),
        )
        return lambda: (images for images, _ in loader)

    detail = "create_loader, its prefetcher: bytes are normalized on the device"
    return [LoaderContender("timm", "default", detail, made(training=True), made(training=False))]


def _transformers(photos: Photographs) -> list[LoaderContender]:
    """Training as its example `run_image_classification.py`; evaluation by a processor, as its pipeline."""
    transforms = importlib.import_module("torchvision.transforms")
    settings, preprocess = photos.settings, photos.settings.preprocess
    mode = transforms.InterpolationMode(preprocess.interpolation)
    altered = transforms.Compose(
        [
            transforms.RandomResizedCrop(settings.img_size, (SMALLEST_CROP, 1.0), interpolation=mode),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(preprocess.mean, preprocess.std),
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processor = importlib.import_module("transformers").CLIPImageProcessor(
            size={"shortest_edge": settings.shorter_side},
            crop_size={"height": settings.img_size, "width": settings.img_size},
            resample=3 if settings.interpolation == "bicubic" else 2,
            image_mean=list(preprocess.mean),
            image_std=list(preprocess.std),
        )

    def processed(items: list) -> Tensor:
        return processor([image for image, _ in items], return_tensors="pt").pixel_values

    def stacked(items: list) -> Tensor:
        return torch.stack([image for image, _ in items])

    datasets = importlib.import_module("torchvision.datasets")
    return [
        LoaderContender(
            "transformers",
            "default",
            "its example's transforms to train; CLIPImageProcessor to evaluate",
            _dataloader(photos, datasets.ImageFolder(photos.folder, altered), stacked, training=True),
            _dataloader(photos, datasets.ImageFolder(photos.folder), processed, training=False),
        )
    ]


_THEIRS: dict[str, Callable[[Photographs], list[LoaderContender]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}

"""A checkpoint's preprocessing against its own library's, on photographs and on pictures of odd sizes.

Where a library resizes with Pillow the pixels are equal. Where transformers resizes with torch they differ
by grey levels, of 255, that are bounded below.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import models

from vitral.checkpoints.layouts import preprocessing
from vitral.checkpoints.layouts.timm import preprocessing as timm
from vitral.checkpoints.layouts.transformers import preprocessing as transformers
from vitral.images.preprocess import Preprocess

HALF = (0.5, 0.5, 0.5)
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.fixture(params=["a dozen", pytest.param("all", marks=pytest.mark.slow)], scope="module")
def photos(request: pytest.FixtureRequest, shared: Path) -> list[Image.Image]:
    """Wide, tall and large ones; one is stored in grey."""
    paths = sorted((shared / "data/photos").glob("*.jpg"))
    assert len(paths) == 100
    if request.param == "a dozen":
        paths = [*paths[5::10], *(path for path in paths if "milk_can" in path.name or "throne" in path.name)]
    found = [decoded(path) for path in paths]
    assert {photo.mode for photo in found} == {"RGB", "L"}
    return found


def decoded(path: Path) -> Image.Image:
    with Image.open(path) as photo:
        photo.load()
        return photo


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def odd_pictures(count: int) -> Iterator[Image.Image]:
    draw = random.Random(0)
    for _ in range(count):
        yield noise(draw.randint(20, 150), draw.randint(20, 150))


# --- timm ------------------------------------------------------------------------------------------

# Of a pretrained_cfg what preprocessing reads.
TIMM: dict[str, dict[str, Any]] = {
    "ViT": {"input_size": (3, 224, 224), "crop_pct": 0.9, "mean": HALF, "std": HALF},
    "DeiT III at 384": {"input_size": (3, 384, 384), "crop_pct": 1.0, "crop_mode": "center"},
    "BEiT at 384": {"input_size": (3, 384, 384), "crop_pct": 0.95, "crop_mode": "center"},
    "EVA at 336": {
        "input_size": (3, 336, 336), "crop_pct": 1.0, "crop_mode": "squash", "mean": CLIP[0], "std": CLIP[1],
    },
    "EVA-02 at 448": {
        "input_size": (3, 448, 448), "crop_pct": 0.95, "crop_mode": "squash", "mean": CLIP[0], "std": CLIP[1],
    },
    "plain numbers": {
        "input_size": (3, 160, 160), "crop_pct": 0.875, "interpolation": "bilinear",
        "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0),
    },
    "fitted and padded": {"input_size": (3, 224, 224), "crop_pct": 1.0, "crop_mode": "border", "mean": HALF},
    "fitted, padded and cropped": {"input_size": (3, 224, 224), "crop_pct": 0.9, "crop_mode": "border"},
    "a tall rectangle": {"input_size": (3, 160, 112), "crop_pct": 0.9},
    "a wide rectangle": {"input_size": (3, 112, 144), "crop_pct": 1.0, "interpolation": "bilinear"},
    "a squashed rectangle": {"input_size": (3, 128, 96), "crop_pct": 0.95, "crop_mode": "squash"},
    "a padded rectangle": {"input_size": (3, 96, 128), "crop_pct": 1.0, "crop_mode": "border"},
    "nothing said": {"input_size": (3, 224, 224)},
    "nothing said in so many words": {
        "input_size": (3, 224, 224), "crop_pct": None, "crop_mode": None, "interpolation": None, "mean": None,
        "std": None,
    },
}  # fmt: skip


def timm_pair(about: dict[str, Any]) -> tuple[Preprocess, Any]:
    data = pytest.importorskip("timm.data")
    theirs = data.create_transform(**data.resolve_data_config(pretrained_cfg=about), is_training=False)
    return timm.read_preprocess(about, tuple(about["input_size"][1:])), theirs


@pytest.mark.parametrize("about", TIMM.values(), ids=TIMM.keys())
def test_photos_reach_the_model_as_timm_sends_them(about: dict[str, Any], photos: list[Image.Image]) -> None:
    ours, theirs = timm_pair(about)
    for photo in photos:
        assert torch.equal(ours(photo), theirs(photo.convert("RGB")))


@pytest.mark.parametrize("about", TIMM.values(), ids=TIMM.keys())
def test_odd_sizes_are_rounded_cut_and_padded_as_in_timm(about: dict[str, Any]) -> None:
    """At a quarter of the size, where a pixel is much; pictures are larger, smaller or in between."""
    height, width = about["input_size"][1:]
    ours, theirs = timm_pair({**about, "input_size": (3, height // 4, width // 4)})
    for picture in odd_pictures(30):
        assert torch.equal(ours(picture), theirs(picture))


@pytest.mark.slow
def test_every_published_configuration_of_timm_is_read_as_timm_reads_it(shared: Path) -> None:
    library = pytest.importorskip("timm")
    read = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    distinct: dict[str, dict[str, Any]] = {}
    for name in library.list_pretrained():
        about = library.get_pretrained_cfg(name).to_dict()
        # VOLO crops more than it resizes to, which is no plain ViT's way.
        if about["input_size"][0] == 3 and (about["crop_pct"] or 0) <= 1:
            distinct.setdefault(str([about.get(key) for key in read]), about)
    photos = [decoded(path) for path in sorted((shared / "data/photos").glob("*.jpg"))[37::50]]
    assert len(distinct) > 100
    assert len(photos) == 2
    for about in distinct.values():
        ours, theirs = timm_pair(about)
        for photo in photos:
            assert torch.equal(ours(photo), theirs(photo)), about


# --- transformers ----------------------------------------------------------------------------------


class Bound(NamedTuple):
    """How far pixels may be from each other, in grey levels of 255."""

    largest: float
    mean: float
    beyond_one: float  # the share of values further away than one level


# The 100 photos' worst is in brackets. The classes that resize with Pillow: (0, 0, 0).
EXACT = Bound(1e-3, 1e-4, 0)
# (2, 0.014, 0.00007). Torch takes Pillow's steps with weights of another fixed point.
TORCH = Bound(2.01, 0.03, 0.0005)
# (8, 0.25, 0.004), Lanczos (15, 0.25, 0.005). Where that is less work Pillow resamples columns before rows,
# torch never does; in between both round to 8 bits and cut off what the filter shoots over.
TORCH_COLUMNS_FIRST = Bound(16, 0.35, 0.01)
# (1, 0.30, 0). DINOv3's class resizes in floats and rounds nowhere.
TORCH_FLOATS = Bound(1.5, 0.35, 0.001)

TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViT", {}),
    "a squashed rectangle": ("ViT", {"size": {"height": 128, "width": 96}, "resample": 3}),
    "not normalized": ("ViT", {"do_normalize": False}),
    "of other scale": ("ViT", {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}),
    "of bytes": ("ViT", {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [64.0] * 3}),
    "Lanczos": ("ViT", {"resample": 1}),
    "DeiT": ("DeiT", {}),
    "BEiT": ("Beit", {}),
    "DINOv2": (
        "Bit",
        {
            "size": {"shortest_edge": 256},
            "crop_size": 224,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
    ),
    "CLIP": ("CLIP", {}),
    "SigLIP": ("Siglip", {}),
    "DINOv3": ("DINOv3ViT", {}),
}
BACKENDS = {"torch": "ImageProcessor", "Pillow": "ImageProcessorPil"}


def processor_class(name: str, backend: str) -> Any:
    found = getattr(pytest.importorskip("transformers"), name + BACKENDS[backend], None)
    if found is None:
        pytest.skip(f"transformers has no {name}{BACKENDS[backend]}")
    return found


def theirs_of(processor: Any, image: Image.Image) -> Tensor:
    if not processor.do_convert_rgb:
        image = image.convert("RGB")
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def assert_within(bound: Bound, ours: Tensor, theirs: Tensor, preprocess: Preprocess) -> None:
    assert ours.shape == theirs.shape
    levels = (ours - theirs).abs() * torch.tensor(preprocess.std)[:, None, None] * 255
    assert levels.max() <= bound.largest
    assert levels.mean() <= bound.mean
    assert (levels > 1.01).float().mean() <= bound.beyond_one


def bound_of(name: str, backend: str, preprocess: Preprocess, image: Image.Image) -> Bound:
    if backend == "Pillow":
        return EXACT
    if name == "DINOv3":
        return TORCH_FLOATS
    if preprocess.resize == "squash" and image.height > image.width:
        return TORCH_COLUMNS_FIRST
    return TORCH


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_photos_reach_the_model_as_transformers_sends_them(
    name: str, backend: str, photos: list[Image.Image], tmp_path: Path
) -> None:
    kind, options = TRANSFORMERS[name]
    processor = processor_class(kind, backend)(**options)
    processor.save_pretrained(tmp_path)
    about = json.loads((tmp_path / transformers.PREPROCESSOR_FILE).read_text())
    ours = transformers.read_preprocess(about, (224, 224))
    for photo in photos:
        bound = bound_of(name, backend, ours, photo)
        assert_within(bound, ours(photo), theirs_of(processor, photo), ours)


@pytest.mark.parametrize(("edge", "side"), [(32, 32), (32, 28), (29, 24)])
def test_odd_sizes_are_rounded_and_cut_as_in_transformers(edge: int, side: int) -> None:
    size = {"size": {"shortest_edge": edge}, "crop_size": {"height": side, "width": side}}
    processor = processor_class("CLIP", "Pillow")(**size)
    ours = transformers.read_preprocess({**processor.to_dict(), **size}, (side, side))
    for picture in odd_pictures(30):
        assert_within(EXACT, ours(picture), theirs_of(processor, picture), ours)


# As older versions wrote it, and many folders on the hub still say it: bare numbers, gaps and nulls.
OLD = {
    "ViT": {"do_normalize": True, "do_resize": True, "image_mean": HALF, "image_std": HALF, "size": 224},
    "DeiT": {
        "feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224, "resample": 3,
        "do_center_crop": True, "do_normalize": True, "image_mean": HALF, "image_std": HALF,
    },
    "Beit": {
        "feature_extractor_type": "BeitFeatureExtractor", "size": 224, "crop_size": 224, "resample": 2,
        "do_center_crop": False, "do_normalize": True, "image_mean": HALF, "image_std": HALF,
    },
    "CLIP": {
        "feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3,
        "do_center_crop": True, "do_normalize": True, "image_mean": CLIP[0], "image_std": CLIP[1],
    },
    "Siglip": {
        "image_processor_type": "SiglipImageProcessorFast", "size": {"height": 224, "width": 224},
        "crop_size": None, "do_center_crop": None, "do_convert_rgb": None, "do_rescale": True, "resample": 3,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": HALF, "image_std": HALF,
    },
}  # fmt: skip


@pytest.mark.parametrize(("kind", "about"), OLD.items(), ids=OLD.keys())
def test_what_older_versions_wrote_is_read_as_transformers_reads_it(kind: str, about: dict[str, Any]) -> None:
    processor = processor_class(kind, "Pillow").from_dict(about)
    ours = transformers.read_preprocess(about, (224, 224))
    for picture in odd_pictures(5):
        assert_within(EXACT, ours(picture), theirs_of(processor, picture), ours)


# --- torchvision -----------------------------------------------------------------------------------

# Weights, and the side, the width and the patch of their model.
TORCHVISION = {
    "ViT_B_16_Weights.IMAGENET1K_V1": (224, 768, 16),
    "ViT_B_32_Weights.IMAGENET1K_V1": (224, 768, 32),
    "ViT_L_16_Weights.IMAGENET1K_V1": (224, 1024, 16),
    "ViT_L_32_Weights.IMAGENET1K_V1": (224, 1024, 32),
    "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1": (384, 768, 16),
    "ViT_L_16_Weights.IMAGENET1K_SWAG_E2E_V1": (512, 1024, 16),
    "ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1": (518, 1280, 14),
    "ViT_H_14_Weights.IMAGENET1K_SWAG_LINEAR_V1": (224, 1280, 14),
}
# Their shapes are those of IMAGENET1K_V1.
CANNOT_BE_TOLD = {
    "ViT_B_16_Weights.IMAGENET1K_SWAG_LINEAR_V1",
    "ViT_L_16_Weights.IMAGENET1K_SWAG_LINEAR_V1",
}


@pytest.mark.parametrize(("name", "shape"), TORCHVISION.items(), ids=TORCHVISION.keys())
def test_photos_reach_the_model_as_torchvision_sends_them(
    name: str, shape: tuple[int, int, int], photos: list[Image.Image]
) -> None:
    side, width, patch = shape
    ours, theirs = preprocessing.torchvision((side, side), width, patch), models.get_weight(name).transforms()
    for photo in photos:
        assert torch.equal(ours(photo), theirs(photo.convert("RGB")))


def test_all_weights_of_torchvision_are_accounted_for() -> None:
    published = {
        str(weights)
        for kind in ("b_16", "b_32", "l_16", "l_32", "h_14")
        for weights in models.get_model_weights(f"vit_{kind}")
    }
    assert published == {*TORCHVISION, *CANNOT_BE_TOLD}

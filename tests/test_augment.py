"""Augmentations: each result is looked for among the pictures that the original can become by hand."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vitral.augment import Crop, batch_mixer, training_transform
from vitral.data import seeded
from vitral.preprocess import Preprocess

# mean 0 and std 1: a tensor holds value / 255 of the picture.
PLAIN = Preprocess((16, 24), mean=(0, 0, 0), std=(1, 1, 1))


def transform(
    crop: Crop = "none", *, crop_scale: float = 0.35, flip: bool = False, rand_augment: float = 0
) -> Callable[..., Tensor]:
    return training_transform(PLAIN, crop, crop_scale, flip=flip, rand_augment=rand_augment)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def coordinates(side: int) -> Image.Image:
    """Red tells the column and green the row, so that a crop shows where it was taken."""
    columns = np.tile(np.linspace(0, 255, side), (side, 1))
    return Image.fromarray(np.stack([columns, columns.T, 0 * columns], -1).astype(np.uint8))


def pixels(tensor: Tensor) -> np.ndarray:
    return (tensor * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def drawn(augment: Callable[..., Tensor], image: Image.Image, times: int) -> list[np.ndarray]:
    results = []
    for seed in range(times):
        with seeded(seed):
            results.append(pixels(augment(image)))
    return results


def equal_to_one_of(result: np.ndarray, candidates: list[np.ndarray]) -> bool:
    return any(np.array_equal(result, candidate) for candidate in candidates)


# --- Pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["padded", "resized", "none"])
@pytest.mark.parametrize("size", [(24, 16), (7, 5), (90, 40), (1, 60)])
def test_every_crop_gives_the_size_asked_for(crop: Crop, size: tuple[int, int]) -> None:
    result = transform(crop, flip=True, rand_augment=9)(noise(*size))
    assert result.shape == (3, 16, 24)
    assert result.dtype == torch.float32


def test_none_only_preprocesses() -> None:
    image = noise(50, 31)
    assert torch.equal(transform()(image), PLAIN(image))


def test_padded_shifts_by_up_to_an_eighth_over_mirrored_edges() -> None:
    image = noise(24, 16)
    wide = np.pad(np.asarray(image), ((2, 2), (3, 3), (0, 0)), mode="reflect")
    shifts = [wide[top : top + 16, left : left + 24] for top in range(5) for left in range(7)]
    results = drawn(transform("padded"), image, 60)
    assert all(equal_to_one_of(result, shifts) for result in results)
    assert len({result.tobytes() for result in results}) > 20


@pytest.mark.parametrize(("crop_scale", "smallest", "largest"), [(0.6, 0.55, 0.7), (0.1, 0.08, 0.3)])
def test_resized_keeps_at_least_the_asked_share_of_the_area(
    crop_scale: float, smallest: float, largest: float
) -> None:
    areas = []
    for result in drawn(transform("resized", crop_scale=crop_scale), coordinates(256), 60):
        height, width = np.ptp(result[..., 1]), np.ptp(result[..., 0])
        areas.append(float(height) * float(width) / 255**2)
    # The outermost half pixels of the result are lost to the measure.
    assert smallest < min(areas) < largest
    assert max(areas) > 0.75


def test_without_flip_nothing_is_mirrored() -> None:
    image = noise(24, 16)
    assert all(np.array_equal(result, np.asarray(image)) for result in drawn(transform(), image, 20))


def test_flip_mirrors_every_other_image() -> None:
    image = noise(24, 16)
    upright, mirrored = np.asarray(image), np.asarray(image)[:, ::-1]
    results = drawn(transform(flip=True), image, 200)
    assert all(equal_to_one_of(result, [upright, mirrored]) for result in results)
    # Half of 200, give or take four standard deviations.
    assert 72 < sum(np.array_equal(result, mirrored) for result in results) < 128


def test_rand_augment_alters_pictures() -> None:
    image = noise(24, 16)
    results = drawn(transform(rand_augment=9), image, 20)
    assert sum(np.array_equal(result, np.asarray(image)) for result in results) < 5
    assert len({result.tobytes() for result in results}) > 12


@pytest.mark.parametrize("crop", ["padded", "resized"])
def test_the_seed_decides_everything(crop: Crop) -> None:
    augment, image = transform(crop, flip=True, rand_augment=9), noise(50, 40)
    once = drawn(augment, image, 10)
    torch.manual_seed(99)
    again = drawn(augment, image, 10)
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert len({result.tobytes() for result in once}) == 10


def test_the_result_is_normalized_as_in_evaluation() -> None:
    preprocess = Preprocess((16, 24), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    augment = training_transform(preprocess, "resized", 0.35, flip=True, rand_augment=0)
    image = Image.new("RGB", (30, 30), (10, 20, 30))
    torch.testing.assert_close(augment(image), preprocess(image))


# --- Batches ---------------------------------------------------------------------------------------

LABELS = torch.tensor([2, 0, 1, 4, 3, 0])
# Image i is wholly of its label's value: a mixture's mean is the labels' mean, weighted as the targets say.
IMAGES = LABELS.float().reshape(6, 1, 1, 1).expand(6, 3, 16, 24).contiguous()


def mixed(mixup: float, cutmix: float, seed: int) -> tuple[Tensor, Tensor]:
    with seeded(seed):
        return batch_mixer(mixup, cutmix, num_classes=5)(IMAGES, LABELS)


def test_without_mixing_images_stay_and_targets_are_certain() -> None:
    images, targets = mixed(0, 0, seed=0)
    assert torch.equal(images, IMAGES)
    assert targets.dtype == torch.float32
    assert targets.tolist()[:2] == [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert torch.equal(targets.argmax(1), LABELS)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0, 0), (0.8, 0), (0, 1), (0.8, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_targets_are_probabilities_in_proportion_to_what_is_seen(
    mixup: float, cutmix: float, seed: int
) -> None:
    images, targets = mixed(mixup, cutmix, seed)
    assert targets.shape == (6, 5)
    assert (targets >= 0).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    torch.testing.assert_close(images.mean((1, 2, 3)), targets @ torch.arange(5.0))


def test_mixup_blends_whole_pictures() -> None:
    for seed in range(10):
        images, _ = mixed(0.8, 0, seed)
        assert (images == images[:, :, :1, :1]).all()


def test_cutmix_pastes_a_rectangle_of_one_other_picture() -> None:
    pasted = 0
    for seed in range(10):
        images, _ = mixed(0, 1, seed)
        for image, label in zip(images, LABELS, strict=True):
            rows, columns = torch.nonzero(image[0] != label, as_tuple=True)
            if len(rows):
                pasted += 1
                patch = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
                assert len(patch.unique()) == 1
                assert patch[0].numel() == len(rows)
    assert pasted > 20


def test_with_both_each_batch_takes_one() -> None:
    blended = [bool((images % 1 != 0).any()) for images, _ in (mixed(0.8, 1, seed) for seed in range(30))]
    assert 5 < sum(blended) < 25

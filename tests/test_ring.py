"""Memory that batches are written into again and again: what is kept never changes, nobody waits."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitral.data.batches import Batch, LoadedImage, collate
from vitral.data.ring import Ring, used_again
from vitral.data.workers import Loading

SIDE = 64
KEYS = [list(range(first, first + 4)) for first in range(0, 80, 4)]


class Pictures(Dataset):
    """Every pixel of an image is its key; of `kind` "float" tensors (3, H, W), else bytes (H, W, 3)."""

    def __init__(self, kind: str, damaged: tuple[int, ...] = ()) -> None:
        self.kind, self.damaged = kind, damaged

    def __getitem__(self, index: int) -> LoadedImage:
        key = index
        if key in self.damaged:
            return LoadedImage(key, np.array(key), None, f"{key}.png", "torn")
        if self.kind == "float":
            return LoadedImage(key, np.array(key), torch.full((3, SIDE, SIDE), key + 0.5))
        return LoadedImage(key, np.array(key), np.full((SIDE, SIDE, 3), key, dtype=np.uint8))


def whole(batch: Batch) -> Any:
    return batch.images


def view(batch: Batch) -> Any:
    return batch.images[1:, 3:5]


def array(batch: Batch) -> Any:
    return batch.images.numpy()[:, ::2]


def flat_image(batch: Batch) -> Any:
    return batch.images[-1].reshape(-1)


@pytest.mark.parametrize(
    ("workers", "kind", "kept_as"),
    [
        *((0, kind, kept_as) for kind in ("bytes", "float") for kept_as in (whole, view, array, flat_image)),
        (2, "bytes", view),
        (2, "float", array),
    ],
)
def test_what_is_kept_of_a_batch_never_changes(
    workers: int, kind: str, kept_as: Callable[[Batch], Any]
) -> None:
    """Of all batches and of every third; compared with copies made at once."""
    for every in (1, 3):
        kept, copies = [], []
        for number, batch in enumerate(Loading(workers).batches(Pictures(kind), KEYS, collate)):
            assert batch.images.reshape(4, -1).float().mean(1).floor().tolist() == KEYS[number]
            if number % every == 0:
                kept.append(kept_as(batch))
                copies.append(torch.as_tensor(kept[-1]).clone())
        del batch
        assert all(torch.equal(torch.as_tensor(one), copy) for one, copy in zip(kept, copies, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_used_again_where_nothing_is_kept(workers: int) -> None:
    places = {batch.images.data_ptr() for batch in Loading(workers).batches(Pictures("bytes"), KEYS, collate)}
    assert len(places) <= (3 if workers == 0 else 2 * workers + 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_left_out_of_a_piece(workers: int) -> None:
    pictures = Pictures("bytes", damaged=(0, 5, 8, 9, 10, 11))
    first, second, third, *_ = list(Loading(workers).batches(pictures, KEYS, collate))
    assert first.images[:, 0, 0, 0].tolist() == first.rows.tolist() == first.labels.tolist() == [1, 2, 3]
    assert second.images[:, -1, -1, -1].tolist() == [4, 6, 7]
    assert (len(third.images), len(third.damaged)) == (0, 4)


def test_a_piece_is_free_again_once_nothing_refers_to_it() -> None:
    ring = Ring(100, 2)
    assert ring.nbytes >= 100
    one = ring.memory(100)
    part = one.view(10, 10)[3:]
    del one
    assert ring.free == 1
    other = ring.memory(100)
    assert ring.free == 0
    beside = ring.memory(100)  # nobody waits
    assert len({tensor.data_ptr() for tensor in (part, other, beside)}) == 3
    del part
    assert ring.free == 1
    del other, beside
    assert ring.free == 2


def test_what_is_larger_than_a_piece_gets_memory_of_its_own() -> None:
    ring = Ring(100, 1)
    assert len(ring.memory(2 * ring.nbytes)) == 2 * ring.nbytes
    assert ring.free == 1
    memory = used_again()
    assert [len(memory(size)) for size in (10, 100_000, 20)] == [10, 100_000, 20]


def test_a_batch_too_large_for_its_piece_comes_all_the_same() -> None:
    """The first batch says how large pieces are; a later one is of larger images, and of types of its own."""

    class Growing(Dataset):
        def __getitem__(self, index: int) -> LoadedImage:
            key = index
            kind = torch.bfloat16 if key >= 40 else torch.uint8
            return LoadedImage(key, np.array(key), torch.full((3, key + 1), key, dtype=kind))

    keys = [[key, key] for key in range(60)]
    found: list[Tensor] = [batch.images for batch in Loading(2).batches(Growing(), keys, collate)]
    assert [tuple(images.shape) for images in found] == [(2, 3, key + 1) for key in range(60)]
    assert all((images == key).all() for key, images in enumerate(found))
    assert found[-1].dtype == torch.bfloat16


def test_a_batch_is_pinned_by_a_copy_after_which_its_piece_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """What DataLoader's thread does with it; the copy itself is torch's, and needs a GPU."""

    def pinned(batch: Batch) -> Batch:
        return replace(batch, images=batch.images.clone())

    monkeypatch.setattr(Batch, "pin_memory", pinned)
    ring = Ring(4 * 3 * SIDE * SIDE, 2)
    piece, pictures = ring.take(), Pictures("bytes")
    packed = ring.packed(piece, lambda memory: collate((pictures[key] for key in range(4)), 4, memory))
    assert len(packed.content) < 2000  # the images themselves are in the piece
    batch = pickle.loads(pickle.dumps(packed)).pin_memory()
    assert batch.images[:, 0, 0, 0].tolist() == batch.labels.tolist() == batch.rows.tolist() == [0, 1, 2, 3]
    assert ring.free == 2


def test_images_that_differ_are_refused_and_not_stretched() -> None:
    sizes = iter([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 1, 3), np.uint8)])
    images = (LoadedImage(0, np.array(0), pixels) for pixels in sizes)
    with pytest.raises(ValueError, match=r"differ: uint8 \(4, 1, 3\) after uint8 \(4, 4, 3\)"):
        collate(images, 2)

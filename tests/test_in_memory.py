"""Images in memory give, to the bit, the batches that loading one by one gives."""

import io
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import Reporter, write_images
from vitral.data.batches import Batch
from vitral.data.image_data import open_data
from vitral.data.in_memory import fits_in_memory
from vitral.data.loader import Loader
from vitral.data.randomness import Sampling
from vitral.data.split import Split
from vitral.data.workers import Loading
from vitral.images.augmentation import Augmentation, Moves
from vitral.images.preprocess import Preprocess
from vitral.recipes.recipe import Recipe
from vitral.training.loop import train
from vitral.training.run import Run

PREPROCESS = Preprocess((8, 16), mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
CPU = torch.device("cpu")
MOVES = Augmentation(crop="padded", flip=True)


def split_of(count: int = 13, damaged: tuple[int, ...] = ()) -> Split:
    """Noise of odd sizes as PNG files."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        height, width = rng.integers(8, 40, 2)
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    for row in damaged:
        files[row] = b"no image"
    return Split(files, np.arange(count) % 3, [f"image {row}" for row in range(count)])


def in_memory(split: Split, workers: int = 0, device: torch.device = CPU) -> Loader:
    return Loader(split, PREPROCESS, Loading(workers), keep_on=device).open()


def taken(
    loader: Loader, steps: int, augmentation: Augmentation, first_step: int = 0, **sampling: Any
) -> list[Batch]:
    batches = loader.training_batches(
        augmentation, batch_size=4, seed=1, first_step=first_step, sampling=Sampling(**sampling)
    )
    return list(islice(batches, steps))


def stream(
    split: Split, steps: int, augmentation: Augmentation, first_step: int = 0, **sampling: Any
) -> list[Batch]:
    return taken(in_memory(split), steps, augmentation, first_step, **sampling)


def assert_same_bits(ours: list[Batch], theirs: list[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.labels.dtype == b.labels.dtype
        assert a.damaged == b.damaged
        assert a.rows.tolist() == b.rows.tolist()


# --- The same batches ----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_in_evaluation_they_are_the_batches_of_loading(workers: int) -> None:
    split = split_of(13, damaged=(0, 6))
    ours = list(in_memory(split, workers).evaluation_batches(4))
    assert_same_bits(ours, list(Loader(split, PREPROCESS).evaluation_batches(4)))
    assert [name for batch in ours for name, _ in batch.damaged] == ["image 0", "image 6"]


@pytest.mark.parametrize(
    "sampling", [{}, {"repeats": 2}, {"balanced": True}, {"balanced": True, "repeats": 3}], ids=str
)
@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(), Augmentation(flip=True), Augmentation(crop="padded"), MOVES],
    ids=["none", "flip", "padded", "both"],
)
def test_in_memory_decoded_or_loaded_by_workers_training_sees_the_same_bits(
    sampling: dict[str, Any], augmentation: Augmentation
) -> None:
    split, first_step = split_of(13, damaged=(5,)), 2
    memory = taken(in_memory(split), 7, augmentation, first_step, **sampling)
    assert_same_bits(taken(Loader(split, PREPROCESS), 7, augmentation, first_step, **sampling), memory)
    workers = Loader(split, PREPROCESS, Loading(2))
    assert_same_bits(taken(workers, 7, augmentation, first_step, **sampling), memory)


def test_what_is_decoded_once_and_what_is_decoded_anew_are_altered_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = Augmentation(
        "resized", flip=True, rand_augment=9, three_augment=True, color_jitter=0.3, erasing=0.5
    )
    split, found = split_of(13, damaged=(5,)), []
    for share in (0, 0.1):
        monkeypatch.setattr("vitral.data.kept.SHARE_TO_TAKE", share)
        loaders = (Loader(split, PREPROCESS, Loading(workers), again=True) for workers in (0, 2))
        found += [taken(loader, 7, every) for loader in loaders]
    for other in found[1:]:
        assert_same_bits(other, found[0])


def test_an_image_is_moved_by_its_own_numbers_whatever_stands_beside_it() -> None:
    """In batches of another size the same image of an epoch moves alike, and each copy by itself."""
    split = split_of(12)
    seen = {}
    for size in (3, 4):
        batches = in_memory(split).training_batches(MOVES, batch_size=size, seed=1)
        for batch in islice(batches, 12 // size):
            for row, image in zip(batch.rows.tolist(), batch.images, strict=True):
                assert torch.equal(seen.setdefault(row, image), image)
    assert len(seen) == 12


def test_evaluation_may_ask_for_some_rows() -> None:
    split, rows = split_of(13, damaged=(6,)), np.array([7, 6, 0, 12, 3])
    ours = list(in_memory(split).evaluation_batches(4, rows))
    assert_same_bits(ours, list(Loader(split, PREPROCESS).evaluation_batches(4, rows)))
    assert [batch.rows.tolist() for batch in ours] == [[7, 0, 12], [3]]


def test_lists_of_labels_stay_lists() -> None:
    single = split_of(6)
    several = Split(single.images, np.eye(3, dtype=bool)[single.labels], single.names)
    ours = list(in_memory(several).evaluation_batches(4))
    assert_same_bits(ours, list(Loader(several, PREPROCESS).evaluation_batches(4)))
    assert ours[0].labels.shape == (4, 3)


def test_a_split_of_damaged_images_alone_gives_empty_batches() -> None:
    (batch,) = in_memory(split_of(2, damaged=(0, 1))).evaluation_batches(4)
    assert len(batch.labels) == len(batch.images) == 0
    assert len(batch.damaged) == 2


# --- Moves ---------------------------------------------------------------------------------------


def noise_pixels(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(2).integers(0, 256, (count, 8, 16, 3), dtype=np.uint8))


def moved(pixels: torch.Tensor, rows: torch.Tensor, augmentation: Augmentation) -> torch.Tensor:
    """Each by numbers of its own; a picture alone comes to the same."""
    moves = Moves.of(augmentation, (8, 16))
    decided = moves.decide(np.random.default_rng(3).random((len(rows), moves.NUMBERS)))
    results = moves.many(pixels, rows, torch.from_numpy(decided))
    for row, move, result in zip(rows.tolist(), decided.tolist(), results.numpy(), strict=True):
        assert np.array_equal(moves.one(pixels[row].numpy(), move), result)
    return results


def moves_seen(augmentation: Augmentation, count: int) -> Counter:
    """How often one picture came down and across by how much, and mirrored: found among all that may come."""
    pixels = noise_pixels(2)
    wide = np.pad(pixels[1].numpy(), ((1, 1), (2, 2), (0, 0)), mode="reflect")
    known = {}
    for top in range(3):
        for left in range(5):
            cut = wide[top : top + 8, left : left + 16]
            known |= {cut.tobytes(): (top, left, False), cut[:, ::-1].tobytes(): (top, left, True)}
    results = moved(pixels, torch.ones(count, dtype=torch.int64), augmentation)
    assert results.shape == (count, 8, 16, 3)
    return Counter(known[result.numpy().tobytes()] for result in results)


def test_padded_and_flip_give_each_shift_over_mirrored_edges_and_its_mirror_image_as_often() -> None:
    seen = moves_seen(Augmentation(crop="padded", flip=True), 6000)
    assert len(seen) == 3 * 5 * 2
    # 200 are expected of each, with a deviation of 14.
    assert min(seen.values()) > 140
    assert max(seen.values()) < 260


@pytest.mark.parametrize(
    ("augmentation", "wanted"),
    [
        (Augmentation(), {(1, 2, False)}),
        (Augmentation(flip=True), {(1, 2, False), (1, 2, True)}),
        (Augmentation(crop="padded"), {(top, left, False) for top in range(3) for left in range(5)}),
    ],
)
def test_only_what_is_asked_for_moves(augmentation: Augmentation, wanted: set) -> None:
    assert set(moves_seen(augmentation, 500)) == wanted


def test_each_image_of_a_batch_moves_by_itself() -> None:
    pixels = noise_pixels(40)
    results = moved(pixels, torch.arange(40), Augmentation(flip=True))
    mirrored = [torch.equal(result, image.flip(1)) for result, image in zip(results, pixels, strict=True)]
    assert 8 < sum(mirrored) < 32


@pytest.mark.parametrize(
    ("change", "only"),
    [
        ({}, True),
        ({"crop": "padded", "flip": True}, True),
        ({"crop": "resized"}, False),
        ({"crop": "simple"}, False),
        ({"three_augment": True}, False),
        ({"rand_augment": 9.0}, False),
        ({"color_jitter": 0.1}, False),
        ({"erasing": 0.1}, False),
    ],
    ids=str,
)
def test_what_is_no_move_is_left_to_loading(change: dict[str, Any], only: bool) -> None:
    assert Augmentation(**change).only_moves == only


# --- The stream and the run ----------------------------------------------------------------------


class Listener(Reporter):
    run: Run

    def __init__(self) -> None:
        self.messages: list[str] = []

    def begin(self, run: Run) -> None:
        self.run = run

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.mark.parametrize("first_step", [1, 3, 4])
def test_started_later_it_is_the_tail_of_the_whole(first_step: int) -> None:
    split = split_of(13, damaged=(3,))
    assert_same_bits(stream(split, 5, MOVES, first_step), stream(split, 5 + first_step, MOVES)[first_step:])


def test_an_image_moves_otherwise_in_the_next_epoch() -> None:
    first, second = stream(split_of(4), 2, MOVES)
    order = first.labels.argsort(stable=True), second.labels.argsort(stable=True)
    assert not torch.equal(first.images[order[0]], second.images[order[1]])


def test_drawing_leaves_the_generator_as_it_was() -> None:
    loader = in_memory(split_of(4))
    before = torch.get_rng_state()
    next(loader.training_batches(MOVES, batch_size=4, seed=1))
    assert torch.equal(before, torch.get_rng_state())


def test_large_images_and_many_are_not_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    split = split_of(4)
    assert fits_in_memory(split, PREPROCESS)
    assert fits_in_memory(split, Preprocess((64, 64)))
    assert not fits_in_memory(split, Preprocess((64, 65)))
    monkeypatch.setattr("vitral.data.in_memory.KEPT_BYTES", 4 * 8 * 16 * 3 - 1)
    assert not fits_in_memory(split, PREPROCESS)


def test_in_memory_or_loaded_a_run_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(str(write_images(tmp_path / "images", {"ant": 12, "bee": 12}, size=(16, 16))))
    recipe = Recipe(
        model="ViT-Pico/8", epochs=2, batch_size=4, crop="padded", flip=True, rand_augment=0, device="cpu"
    )
    train(data, tmp_path / "memory", recipe)
    monkeypatch.setattr("vitral.data.loader.fits_in_memory", lambda *_: False)
    train(data, tmp_path / "decoded", recipe)
    monkeypatch.setattr("vitral.data.kept.SHARE_TO_TAKE", 0)
    train(data, tmp_path / "loaded", recipe.changed(workers=2))
    names = "memory", "decoded", "loaded"
    memory, *others = ((tmp_path / name / "last/model.safetensors").read_bytes() for name in names)
    assert others == [memory, memory]


def test_a_run_keeps_small_images_and_names_damaged_ones(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", {"ant": 12, "bee": 12}, size=(16, 16))
    (folder / "bee" / "011.png").write_bytes(b"no image")
    listener = Listener()
    recipe = Recipe(model="ViT-Pico/8", epochs=2, batch_size=4, rand_augment=0, max_damaged=0.2)
    train(open_data(str(folder)), tmp_path / "run", recipe, listeners=[listener])
    assert all(listener.run.loader(name).in_memory for name in ("train", "val"))
    assert len(listener.messages) == 1
    assert "skipped damaged image bee/011.png" in listener.messages[0]

"""The order by blocks, against what it promises: each image once, few blocks at a time."""

import numpy as np
import pytest

from vitral.data.blocks import LANES, Blocks
from vitral.data.randomness import Sampling


def blocks_of(sizes: list[int], nbytes: float = 2**25) -> Blocks:
    return Blocks(np.repeat(np.arange(len(sizes)), sizes), nbytes, thrashes=True)


def epoch(blocks: Blocks, batch_size: int, seed: int = 0) -> np.ndarray:
    return blocks.order(batch_size, np.random.default_rng(seed)).reshape(-1, batch_size)


@pytest.mark.parametrize(
    ("sizes", "batch_size"),
    [([100] * 40, 64), ([7, 1, 300, 5, 5, 91], 32), ([13] * 11, 12), ([50], 16), ([3, 2], 1)],
)
def test_each_image_comes_once_and_few_are_left_out(sizes: list[int], batch_size: int) -> None:
    steps_B = epoch(blocks_of(sizes), batch_size)
    assert len(np.unique(steps_B)) == steps_B.size
    assert len(steps_B) == sum(sizes) // batch_size  # as many steps as whole batches
    assert set(steps_B.ravel().tolist()) <= set(range(sum(sizes)))


def test_other_images_are_left_out_in_each_epoch() -> None:
    blocks = blocks_of([10] * 21)
    seen = set()
    for seed in range(8):
        seen |= set(epoch(blocks, 64, seed).ravel().tolist())
    assert seen == set(range(210))


def test_a_lane_goes_from_block_to_block() -> None:
    """Within a lane a window of blocks is over before the next begins, so that each block is read once."""
    sizes, batch_size = [100] * 64, 32
    blocks = blocks_of(sizes, nbytes=2**24)  # 2^29 bytes in 16 lanes: windows of two
    lanes_LN = epoch(blocks, batch_size).reshape(-1, LANES, batch_size // LANES).swapaxes(0, 1)
    for lane_N in lanes_LN.reshape(LANES, -1):
        window_N = np.arange(lane_N.size) // 200
        for number in range(lane_N.size // 200):
            assert len(np.unique(blocks.of_row[lane_N[window_N == number]])) == 2
        assert (np.diff(lane_N) != 1).mean() > 0.9  # and inside it, shuffled


def test_no_batch_holds_more_blocks_than_the_windows() -> None:
    blocks = blocks_of([100] * 640, nbytes=2**23)  # windows of four blocks
    open_at_once = [
        len(np.unique(blocks.of_row[epoch(blocks, 64)[step : step + 5]])) for step in range(0, 1000, 50)
    ]
    assert max(open_at_once) <= LANES * 4 * 2  # where windows end, the next ones begin


@pytest.mark.parametrize(("nbytes", "lanes"), [(2**25, 16), (1.1e8, 4), (2**29, 1), (2**40, 1)])
def test_large_blocks_have_fewer_lanes(nbytes: float, lanes: int) -> None:
    """So that what a batch is taken of fits: a process that keeps 2^30 bytes reads each block once."""
    blocks = blocks_of([64] * 64, nbytes)
    kept: dict[int, None] = {}
    reads = 0
    for row in epoch(blocks, 32).ravel():
        block = int(blocks.of_row[row])
        reads += block not in kept
        kept.pop(block, None)
        kept[block] = None
        while len(kept) > max(2**30 / nbytes, 1):
            kept.pop(next(iter(kept)))
    assert reads <= 64 + lanes  # a block that two lanes share may be read twice


def test_blocks_of_one_class_are_mixed() -> None:
    """Shards written class by class: a batch takes of many."""
    blocks = blocks_of([100] * 100)
    classes = [len(np.unique(rows // 100)) for rows in epoch(blocks, 64)]
    assert min(classes) >= 12


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_resumed_run_sees_what_one_never_stopped_does(repeats: int) -> None:
    labels = np.zeros(210, np.int64)
    sampling = Sampling(repeats=repeats, blocks=blocks_of([10] * 21))
    begun = sampling.steps(labels, 16, seed=5, first_step=0)
    whole = [next(begun) for _ in range(40)]
    for first_step in (1, 12, 13, 27):
        step = next(sampling.steps(labels, 16, seed=5, first_step=first_step))
        np.testing.assert_array_equal(step.rows, whole[first_step].rows)
        assert step.epoch == whole[first_step].epoch


def test_blocks_follow_the_rows_that_are_taken() -> None:
    blocks = blocks_of([10] * 6)
    taken = blocks.take(np.arange(0, 60, 3))
    rows = epoch(taken, 4)
    assert sorted(rows.ravel().tolist()) == list(range(20))
    assert taken.of_row.tolist() == [row // 10 for row in range(0, 60, 3)]


def test_the_parts_of_a_batch_read_blocks_of_their_own() -> None:
    """What two ranks read of one epoch, each its half of every batch, overlaps in one cut block at most."""
    blocks = blocks_of([100] * 64)
    steps_B = epoch(blocks, 64)
    first, second = (set(blocks.of_row[part].ravel().tolist()) for part in np.split(steps_B, 2, axis=1))
    assert len(first & second) <= 1

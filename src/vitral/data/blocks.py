"""`Blocks`: which images are cheap to read together, and an order of an epoch that heeds it.

The order is a closed form of the generator and the sizes. It knows of no worker and no rank, so that any
number of them gives the same batches, and a run is taken up at any step by drawing one epoch's order again.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

# Places in the epoch from which each batch takes an equal part. Of one place alone, the images of a batch
# would be neighbours; and the parts of a batch, which ranks compute, would each read all that it reads.
LANES = 16


@dataclass(frozen=True)
class Blocks:
    """Row groups of parquet files, or shards."""

    of_row: np.ndarray  # (n,) the number of each image's block
    nbytes: float  # of a block, on average
    thrashes: bool  # whether to read images in any order would read blocks again and again
    room: int = (
        2**29
    )  # bytes that the windows of all lanes may hold; whoever keeps twice that reads each once

    def take(self, rows: np.ndarray) -> "Blocks":
        """Gives those of these rows."""
        return replace(self, of_row=self.of_row[rows])

    def order(self, batch_size: int, generator: np.random.Generator) -> np.ndarray:
        """Draws the rows of an epoch as batches take them, one batch after the other.

        The blocks are permuted and their rows laid end to end; that is cut into lanes of one length; within a
        lane, rows are shuffled inside windows of some blocks; a batch takes the next rows of each lane, the
        first lane's first. As many rows as fill no batch are left out, others in each epoch. There are fewer
        lanes where blocks are so large that one for each has no room.
        """
        fitting = max(int(self.room / max(self.nbytes, 1.0)), 1)  # blocks
        lanes = math.gcd(batch_size, min(LANES, 2 ** (fitting.bit_length() - 1)))
        _, of_row = np.unique(self.of_row, return_inverse=True)
        place_of_block = generator.permutation(int(of_row.max()) + 1)
        place_of_row = place_of_block[of_row]
        laid_out = np.argsort(place_of_row, kind="stable")
        length = len(laid_out) // lanes
        rows_LN = laid_out[: lanes * length].reshape(lanes, length)
        window = max(fitting // lanes, 1)
        places_LN = place_of_row[rows_LN]
        windows_LN = (places_LN - places_LN[:, :1]) // window
        shuffled_LN = np.lexsort((generator.random((lanes, length)), windows_LN), axis=-1)
        rows_LN = np.take_along_axis(rows_LN, shuffled_LN, axis=1)
        share = batch_size // lanes
        steps = length // share
        return rows_LN[:, : steps * share].reshape(lanes, steps, share).swapaxes(0, 1).reshape(-1)

"""`World`: the processes that train together, and what they decide together. There is one process as yet."""

import os
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from vitral.runtime.errors import VitralError


@dataclass(frozen=True)
class Verdict:
    """What all processes decided after a step."""

    spent: bool  # the budget is
    asked: bool  # somebody wants the run to stop

    @property
    def stops(self) -> bool:
        return self.spent or self.asked


@dataclass(frozen=True)
class World:
    """Which of how many processes this is; alone, its reductions change nothing."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Self:
        """The world that torchrun's environment names.

        Raises:
            VitralError: if there are several processes; each would train the whole, all into one folder.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count > 1:
            raise VitralError(
                f"WORLD_SIZE={count}: training runs in one process only; start it without torchrun, "
                "or with --nproc-per-node 1"
            )
        return cls()

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over the processes."""
        return tensor

    def any(self, flag: bool) -> bool:  # noqa: FBT001 - a reduction of it
        """Whether a flag is set in one process at least."""
        return flag

    def stops(self, *, spent: bool, asked: bool) -> Verdict:
        """Decide after a step whether all go on: the clock, the budget and signals differ by process."""
        return Verdict(self.any(spent), self.any(asked))

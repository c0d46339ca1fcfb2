"""`near_duplicates`: the same picture twice, stored anew, resized, mirrored or slightly cropped."""

from collections.abc import Callable
from dataclasses import dataclass

from vitral.data.split import Split


@dataclass(frozen=True)
class NearDuplicate:
    """Two images that show the same picture."""

    row: int  # of the held-out images
    name: str
    other_row: int  # of the training images, or of the held-out ones where `within` is true
    other_name: str
    within: bool  # both are held out
    distance: float  # 0 is the same pixels at low resolution, 2 a negative: 1 - their correlation
    mirrored: bool  # the one is the other's mirror image
    same_label: bool


@dataclass(frozen=True)
class NearDuplicates:
    """The pairs that were found, the nearest first."""

    pairs: tuple[NearDuplicate, ...]
    held_out: int  # images that were looked at
    train: int
    left_out: int  # training images that were not looked at, for there are too many
    seconds: float

    @property
    def leaked(self) -> int:
        """Count the held-out images that have a near-duplicate among the training images."""
        return len({pair.row for pair in self.pairs if not pair.within})


def near_duplicates(
    held_out: Split,
    train: Split | None,
    *,
    workers: int | None = None,
    on_images: Callable[[int, int], None] = lambda *_: None,
) -> NearDuplicates:
    """Find pairs of the same picture among held-out images, and between them and training images."""
    raise NotImplementedError

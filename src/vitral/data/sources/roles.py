"""The words by which people call splits."""

import re
from itertools import chain

WORDS = {
    "train": ("train", "training", "trainset"),
    "val": ("val", "valid", "validation", "valset", "dev"),
    "test": ("test", "testing", "testset"),
}
_WORD = re.compile(rf"(?<![^\W_])(?:{'|'.join(chain(*WORDS.values()))})(?![^\W_])")


def without_role(name: str) -> str:
    """Gives a name with ``{split}`` in the place of the first word for a split."""
    return _WORD.sub("{split}", name, count=1)


def role(name: str) -> str | None:
    """Gives the split that a name speaks of, alone or with other words (seg_train, Training Set).

    Returns:
        "train", "val" or "test"; None if it speaks of none or of two.
    """
    words = set(re.split(r"[^a-z]+", name.lower()))
    roles = [role for role, spellings in WORDS.items() if words & set(spellings)]
    return roles[0] if len(roles) == 1 else None

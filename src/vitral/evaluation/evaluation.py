"""`Evaluation`: how well a model does on labelled images; each task has its own."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from vitral.evaluation.mistakes import Mistakes
from vitral.images import notebook

_CLASSES_IN_NOTEBOOKS = 20


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation(ABC):
    """How well a model does on labelled images. Shares are 0..1.

    The figures beside these depend on the task: see `SingleLabelEvaluation` and `MultiLabelEvaluation`.
    """

    score_name: ClassVar[str]  # of the figure that people are told of an epoch, and its key in JSON
    score_words: ClassVar[str]  # the same for people

    n: int  # images
    loss: float  # mean over the images, nats
    per_class: Mapping[str, Any]
    mistakes: Mistakes | None = field(default=None, compare=False)  # if they were asked for

    @classmethod
    @abstractmethod
    def of(cls, outcomes: Any, classes: Iterable[str]) -> Self:
        """Compute the figures from the outcomes of all images and the names of the L classes."""

    def __getattr__(self, name: str) -> Any:
        """Say which figures there are; it also lets type checkers accept those of each task."""
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(f"a {type(self).__name__} has no {name!r}; it has {', '.join(vars(self))}")

    @property
    def score(self) -> float:
        """The figure that people are told of an epoch."""
        return getattr(self, self.score_name)

    @property
    def brief(self) -> str:
        """The score in a line that has little room."""
        return f"{self.score:.1%}"

    @property
    @abstractmethod
    def merit(self) -> float:
        """What the best epoch is chosen by."""

    @property
    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """What a run records of each epoch, beside the loss."""

    @property
    def chance(self) -> float | None:
        """The score of always naming the commonest class; None where that means nothing."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        del values["mistakes"], values["per_class"]
        return {**values, "per_class": {name: vars(result) for name, result in self.per_class.items()}}

    @abstractmethod
    def figures(self) -> list[tuple[str, str]]:
        """Return name and value of each figure, for people."""

    @abstractmethod
    def class_rows(self, most: int) -> list[dict[str, str]]:
        """Return a row a class for people, by heading, the worst first and `most` rows at most."""

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {value}" for name, value in self.figures())
        return f"<{type(self).__name__} of {self.n:,} images: {figures}>"

    def _repr_html_(self) -> str:
        rows = self.class_rows(_CLASSES_IN_NOTEBOOKS)
        by_class = notebook.table(
            [tuple(row.values()) for row in rows], tuple(rows[0]), "by class, the worst first"
        )
        return notebook.table(self.figures(), title=f"{self.n:,} images") + by_class


def distinct(classes: Iterable[str]) -> list[str]:
    """Make the names of classes differ; of two cranes, as ImageNet has, the second says its number."""
    found: dict[str, None] = {}
    for place, name in enumerate(classes):
        found[name if name not in found else f"{name} (class {place})"] = None
    return list(found)

"""`Material`: all that the sections of a report are made from."""

from dataclasses import dataclass, field

from vitral.data.split import Images, Split
from vitral.evaluation.analysis.answers import Answers
from vitral.evaluation.analysis.classes import ByClass
from vitral.evaluation.analysis.label_errors import LabelErrors
from vitral.evaluation.analysis.near_duplicates import NearDuplicates
from vitral.explain.faithfulness.record import Faithfulness
from vitral.explain.figures.page import Page
from vitral.reports.looking import Explained
from vitral.reports.pictures import Pictures
from vitral.reports.subject import Subject


@dataclass(frozen=True)
class Material:
    """A model, and what it said of labelled images if there are any."""

    subject: Subject
    pictures: Pictures = field(default_factory=lambda: Pictures(0))
    data: str | None = None  # the data's name, as the user gave it
    answers: Answers | None = None
    classes: ByClass | None = None
    labels: LabelErrors | None = None
    duplicates: NearDuplicates | None = None
    explained: tuple[Explained, ...] | str = ()  # or why there are no maps
    faithfulness: Faithfulness | str = ""  # or why it was not measured
    figures: Page | str = ""  # or why there are none
    training: Split | None = None  # the training images, where there are any to compare with
    doubts: tuple[str, ...] = ()  # what was said while the images were judged

    @property
    def training_images(self) -> Images | None:
        return self.training.images if self.training else None

    @property
    def multi_label(self) -> bool:
        return self.subject.classifier.multi_label


NO_DATA = "No images were given, so nothing was judged anew: name the data after the run."

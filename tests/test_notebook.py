"""What a notebook shows of a classifier, its answers and an evaluation: read back by an HTML parser."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitral.artifacts.prediction import Prediction
from vitral.evaluation.multi_label import MultiLabelEvaluation, MultiLabelOutcomes
from vitral.evaluation.single_label import SingleLabelEvaluation, SingleLabelOutcomes
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement


class Cells(HTMLParser):
    """The text of each cell; every tag has to be closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.found.append(data)


def evaluation(names: list[str]) -> SingleLabelEvaluation:
    labels, predictions, ones = np.array([0, 1, 1]), np.array([1, 1, 1]), np.ones(3)
    return SingleLabelEvaluation.of(SingleLabelOutcomes(labels, predictions, ones > 0, ones, ones), names)


def test_an_evaluation_shows_its_figures_and_its_confusion() -> None:
    cells = Cells(evaluation(["<b>ant</b>", "bee"])._repr_html_()).found
    assert "<b>ant</b>" in cells
    assert cells[-6:] == ["<b>ant</b>", "0", "1", "bee", "0", "2"]
    assert any("66.67%" in cell for cell in cells)
    assert re.match("<SingleLabelEvaluation of 3 images: accuracy 66.67%", repr(evaluation(["a", "b"])))


def test_of_many_classes_no_heat_map_is_drawn() -> None:
    html = evaluation([f"c{i}" for i in range(31)])._repr_html_()
    assert "rgba" not in html
    assert "<tr>" in html


def test_an_evaluation_of_several_labels_shows_its_classes() -> None:
    shown = np.array([[True, False], [False, True]])
    outcomes = MultiLabelOutcomes(shown, np.log(np.where(shown, 0.9, 0.1)), np.ones(2))
    found = MultiLabelEvaluation.of(outcomes, ["ant", "bee"])
    assert {"ant", "bee", "100.0%"} <= set(Cells(found._repr_html_()).found)
    assert "mean average precision 100.00%" in repr(found)


def test_a_prediction_shows_its_picture(tmp_path: Path) -> None:
    Image.new("RGB", (400, 200), (10, 200, 30)).save(tmp_path / "a.png")
    html = Prediction(str(tmp_path / "a.png"), (("ant", 0.75), ("bee", 0.25)))._repr_html_()
    assert {"ant", "75.0%", "bee", "25.0%"} <= set(Cells(html).found)
    (encoded,) = re.findall(r"base64,([^\"]+)", html)
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as shown:
        assert shown.size == (128, 64)
        assert shown.convert("RGB").getpixel((5, 5)) == (10, 200, 30)


def test_a_prediction_without_a_picture_shows_its_name_or_its_error() -> None:
    assert "image 3" in Cells(Prediction("image 3", (("ant", 1.0),))._repr_html_()).found
    assert "no image" in Cells(Prediction("a.png", (), "no image")._repr_html_()).found


def test_a_classifier_and_features_are_described_in_a_line() -> None:
    model = VisionTransformer(8, 4, embed_dim=8, num_layers=2, num_heads=2, num_classes=4)
    labels = ("ant", "bee", "cat", "dog")
    placement = Placement.choose("cpu", "float32")
    classifier = Classifier(model.eval(), Preprocess((8, 8)), labels, placement, temperature=1.5)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{parameters:,} parameters" in repr(classifier)
    assert "4 (ant, bee, cat, ...)" in repr(classifier)
    assert "1.500" in Cells(classifier._repr_html_()).found
    features = classifier.features(torch.zeros(3, 8, 8, dtype=torch.uint8), layers=(0,))
    assert repr(features).startswith("<Features of 2x2 patches: class_token (1, 8)")
    assert "layer 0 (1, 5, 8)" in repr(features)

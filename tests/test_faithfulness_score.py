"""A whole scoring: what it says of methods whose worth is known, what it keeps on disk, what it refuses."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import vitral
from tests.conftest import write_images
from vitral.explain.attribution.method import Found, Method, Subject
from vitral.explain.faithfulness.record import Faithfulness
from vitral.explain.faithfulness.redrawn import STAGES
from vitral.explain.faithfulness.score import methods_to_score, score
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError

PATCH, SIDE = 4, 20
LABELS = ("ant", "bee", "cat")


@pytest.fixture(autouse=True, scope="module")
def _alone() -> Iterator[None]:
    """In one thread of this process: so small a model only waits for other threads, and loaders to start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitral.data.workers.cpu_count", lambda: 0)
        yield
    torch.set_num_threads(threads)


def made(**options: Any) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(
            SIDE, PATCH, embed_dim=16, num_layers=2, num_heads=2, num_classes=3, dropout=0.0, **options
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.normal_(std=0.3)
    return Classifier(model.eval(), Preprocess((SIDE, SIDE)), LABELS, Placement.choose("cpu", "float32"))


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return made()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", dict.fromkeys(LABELS, 13), (SIDE, SIDE))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `found` was kept."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def found(classifier: Classifier, data: Path, kept: Path) -> Faithfulness:
    return score(classifier, data, METHODS, cache=kept, **QUICK)


def occlusion(subject: Subject) -> Found:
    """What each patch takes from the score if it alone is filled: close to the best that a map can be."""
    count, batch = (SIDE // PATCH) ** 2, len(subject.images_BCHW)
    shows_NHW = 1 - torch.eye(count).unflatten(1, (SIDE // PATCH,) * 2)
    shows_NHW = shows_NHW.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    filled_RCHW = (subject.images_BCHW[:, None] * shows_NHW[:, None]).flatten(0, 1)
    with torch.inference_mode():
        logits_BL, logits_RL = subject.model(subject.images_BCHW), subject.model(filled_RCHW)
    question = subject.ask(logits_BL)
    left_BN = (
        question.take(torch.arange(batch).repeat_interleave(count))
        .scores(logits_RL)
        .unflatten(0, (batch, -1))
    )
    return Found(question.scores(logits_BL)[:, None] - left_BN, logits_BL)


def reversed_occlusion(subject: Subject) -> Found:
    found = occlusion(subject)
    return found._replace(map_BT=-found.map_BT)


def brightness(subject: Subject) -> Found:
    """Knows the picture, and nothing of the model."""
    map_BN = torch.nn.functional.avg_pool2d(subject.images_BCHW.mean(1), PATCH).flatten(1)
    return Found(map_BN, subject.model(subject.images_BCHW).detach())


def row(name: str, compute: Any) -> Method:
    return Method(
        name, "a test's", "nothing", of_class=True, cost=lambda *_: 1, reference="", compute=compute
    )


METHODS = [row("worst", reversed_occlusion), row("best", occlusion), row("bright", brightness)]
QUICK: dict[str, Any] = {"steps": 5, "split": "all"}


def without_seconds(found: Faithfulness) -> str:
    """All numbers but times."""

    def cleared(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cleared(of) for name, of in value.items() if name not in ("seconds", "drop_share")}
        return [cleared(of) for of in value] if isinstance(value, list | tuple) else value

    return json.dumps(cleared(found.to_dict()))


def test_methods_come_in_the_order_of_their_worth(found: Faithfulness) -> None:
    assert (found.n, found.damaged, found.split, found.redrawn_images) == (39, 0, "all", 32)
    names = [scored.method for scored in found.methods if not scored.control]
    assert names == ["best", "bright", "worst"]
    for fill in ("drop", "mean"):
        best, worst, random = (found[name].fills[fill] for name in ("best", "worst", "random"))
        assert 0 in random.srg
        assert best.srg.low > 0 > worst.srg.high
        assert not set(best.group) & set(random.group)
        assert best.srg.mean == pytest.approx(best.insertion.mean - best.deletion.mean)
        # The same passes with the order turned round: the best map's deletion is the worst one's insertion.
        assert worst.srg.mean == pytest.approx(-best.srg.mean)
        turned = found["best, reversed"].fills[fill]
        assert turned.srg.mean == pytest.approx(worst.srg.mean)
    best, worst, turned = (found[name].saco for name in ("best", "worst", "best, reversed"))
    assert best.low > 0 > worst.high
    assert turned.mean == pytest.approx(worst.mean, abs=0.05)


def test_curves_run_from_the_logit_to_what_is_left(found: Faithfulness, classifier: Classifier) -> None:
    best = found["best"].fills["mean"]
    assert found.removed == (0, 5 / 25, 10 / 25, 15 / 25, 20 / 25, 1)
    assert best.deletion_curve[0] == best.insertion_curve[-1]
    assert best.deletion_curve[-1] == best.insertion_curve[0]
    assert best.deletion_curve[2] < found["random"].fills["mean"].deletion_curve[2]


def test_a_map_of_the_picture_alone_fails_the_randomization_check(found: Faithfulness) -> None:
    assert [of.mean for of in found["bright"].redrawn.values()] == pytest.approx([1] * len(STAGES))
    assert not found["bright"].shows_what_was_learned
    head, *_, everything = found["best"].redrawn.values()
    assert head.mean > everything.mean
    assert everything.low < 0.1
    assert any("much the same" in line and "bright" in line for line in found.conclusions())


def test_what_it_says(found: Faithfulness) -> None:
    first, *others = found.conclusions()
    assert first.startswith("most faithful to this model by dropping tokens: best, SRG ")
    assert first.endswith("better than every other beyond chance")
    assert any(line == "no better than the random control, beyond chance: worst" for line in others) or any(
        line == "no better than the random control, beyond chance: bright and worst" for line in others
    )
    assert len(found.rows()[0]) == len(found.headings())
    assert [cells[0] for cells in found.rows()] == [scored.method for scored in found.methods]
    assert "most faithful" in repr(found)
    assert len(found.curve_rows()) == 2 * len(found.methods)
    assert found.drop_share is not None
    assert 0 < found.drop_share < 2


def test_a_run_that_was_killed_goes_on_with_the_same_numbers(
    classifier: Classifier, data: Path, found: Faithfulness, tmp_path: Path
) -> None:

    def stop(done: int, _: int) -> None:
        if done > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(classifier, data, METHODS, cache=tmp_path / "killed", on_images=stop, **QUICK)
    told: list[str] = []
    resumed = score(classifier, data, METHODS, cache=tmp_path / "killed", warn=told.append, **QUICK)
    assert without_seconds(resumed) == without_seconds(found)
    assert len(told) == 1
    assert "parts were in" in told[0]


def test_what_is_known_is_not_computed_again(
    classifier: Classifier, data: Path, kept: Path, found: Faithfulness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitral.explain.faithfulness.block.take_away", None)
    monkeypatch.setattr("vitral.explain.faithfulness.block.attribute", None)
    assert score(classifier, data, METHODS, cache=kept, **QUICK).to_dict() == found.to_dict()


def test_other_weights_are_another_model(classifier: Classifier, data: Path, kept: Path) -> None:
    other = made()
    with torch.no_grad():
        other.model.get_parameter("head.bias").add_(torch.tensor([0.0, 0.0, 1.0]))
    few: dict[str, Any] = {**QUICK, "images": 6, "cache": kept}
    assert without_seconds(score(other, data, METHODS, **few)) != without_seconds(
        score(classifier, data, METHODS, **few)
    )


def test_a_damaged_file_is_named_and_computed_again(
    classifier: Classifier, data: Path, kept: Path, found: Faithfulness, tmp_path: Path
) -> None:
    cache = shutil.copytree(kept, tmp_path / "kept")
    file = sorted(cache.rglob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:20])
    told: list[str] = []
    again = score(classifier, data, METHODS, cache=cache, warn=told.append, **QUICK)
    assert without_seconds(again) == without_seconds(found)
    assert f"{file} is damaged" in told[0]


def test_progress_comes_to_all_images(classifier: Classifier, data: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    some: dict[str, Any] = {**QUICK, "images": 35}
    score(
        classifier,
        data,
        METHODS[1:],
        on_images=lambda *at: told.append((at[0], at[1])),
        cache=tmp_path,
        **some,
    )
    assert told == sorted(told)
    assert told[-1] == (35, 35)
    assert {total for _, total in told} == {35}


def test_images_that_cannot_be_read_are_left_out(classifier: Classifier, tmp_path: Path) -> None:
    data = write_images(tmp_path / "images", dict.fromkeys(LABELS, 2), (SIDE, SIDE))
    (data / "ant" / "000.png").write_bytes(b"no picture")
    told: list[str] = []
    found = score(classifier, data, METHODS[1:2], warn=told.append, **QUICK)
    assert (found.n, found.damaged) == (5, 1)
    assert any("damaged image" in line for line in told)


def test_several_labels_an_image_are_welcome(tmp_path: Path) -> None:
    """Of a multi-label model the likeliest label is explained."""
    folder = write_images(tmp_path / "images", {"one": 6}, (SIDE, SIDE))
    rows = [
        {
            "image": {"bytes": file.read_bytes(), "path": None},
            "labels": ["ant", "cat"] if place % 2 else ["bee"],
        }
        for place, file in enumerate(sorted(folder.rglob("*.png")))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    several = replace(made(), multi_label=True)
    found = score(several, tmp_path / "data.parquet", METHODS[1:2], **QUICK)
    assert found.n == 6


def test_what_removing_means_for_the_model_is_said(data: Path, tmp_path: Path) -> None:
    hybrid = made(pooling="mean", stem=(4,))
    found = score(hybrid, data, METHODS[1:2], images=3, cache=tmp_path, **QUICK)
    pools, empty, stem = found.conclusions()[-3:]
    assert pools.startswith("the head pools patches")
    assert empty.startswith("with all patches dropped nothing is left to read")
    assert "embedded anew for each set of patches" in stem
    # Both fills end in the same point there.
    best = found["best"].fills
    assert best["drop"].deletion_curve[-1] == pytest.approx(best["mean"].deletion_curve[-1], abs=1e-5)


def test_inside_scores_methods_by_name_and_all_quick_ones_by_default(
    classifier: Classifier, data: Path
) -> None:
    found = vitral.Inside(classifier).faithfulness(data, ["rollout"], fill=("mean",), images=6, **QUICK)
    assert {scored.method for scored in found.methods} == {"rollout", "random", "centre", "rollout, reversed"}
    assert found.fills == ("mean",)
    all_quick = [method.name for method in methods_to_score(None, classifier.model.config)]
    assert {"rollout", "legrad"} <= set(all_quick)
    assert "random" not in all_quick
    with pytest.raises(VitralError, match="rolout"):
        vitral.Inside(classifier).faithfulness(data, ["rolout"])


def test_what_cannot_be_scored_is_said(data: Path) -> None:
    headless = made()
    headless.model.reset_classifier(0)
    with pytest.raises(VitralError, match="has no classes; train a head first"):
        score(headless, data, METHODS)
    with pytest.raises(VitralError, match="no method is named"):
        score(made(), data, [])
    with pytest.raises(VitralError, match="fill"):
        score(made(), data, METHODS, fill=())
    with pytest.raises(VitralError, match="blur"):
        score(made(), data, METHODS, fill=("blur",))


def test_every_pair_is_told_with_its_interval(found: Faithfulness) -> None:
    pairs = found.to_dict()["pairs"]["drop"]
    assert len(pairs) == 5 * 4 // 2  # three methods and two controls
    best_and_worst = next(pair for pair in pairs if {pair["first"], pair["second"]} == {"best", "worst"})
    low, high = (abs(best_and_worst["difference"][end]) for end in ("low", "high"))
    assert min(low, high) > 0
    assert best_and_worst["p"] < 1e-4

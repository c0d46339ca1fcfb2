"""A report: its figures are those of other commands, its page is whole, closed, alike and readable."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import vitral as library
from tests.conftest import write_images
from tests.test_cli import Vitral, assert_failed_in_one_line
from tests.test_cli import quick as quick  # fixtures
from tests.test_cli import run as run
from tests.test_cli import vitral as vitral
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.explain.attribution.methods import DEFAULT
from vitral.images.preprocess import Preprocess
from vitral.model.vit import VisionTransformer
from vitral.reports.page import shade
from vitral.reports.report import Report
from vitral.runtime.errors import VitralError

PLAIN: dict[str, Any] = {"maps": 0, "score": 0, "figures": False}
TEMPLATES = Path(library.__file__).parent / "reports" / "templates"


@dataclass
class Page(HTMLParser):
    """What a browser would find in a page."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    @classmethod
    def of(cls, html: str) -> "Page":
        page = cls()
        page.feed(html)
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def blocks(report: Report, section: str) -> list[dict[str, Any]]:
    found = next(part for part in report.to_dict()["sections"] if part["section"] == section)
    return found["blocks"]


def said(report: Report, section: str) -> str:
    return json.dumps(next(part for part in report.to_dict()["sections"] if part["section"] == section))


# --- What it says --------------------------------------------------------------------------------


def test_its_figures_are_those_of_the_evaluation(run: Path, image_folder: Path) -> None:
    evaluation = library.evaluate(run, str(image_folder))
    report = library.report(run, str(image_folder), **PLAIN)
    low, high = evaluation.ci95
    right = round(evaluation.top1 * evaluation.n)
    assert f"Of {evaluation.n} images, the model names {right} rightly" in report.lead
    assert f"95 % interval {100 * low:.1f} to {100 * high:.1f}" in report.lead.replace(
        "\N{NO-BREAK SPACE}", " "
    )
    classes = next(
        block for block in blocks(report, "classes") if block.get("table", "").startswith("Classes")
    )
    found = {
        row["class"]: (row["images"], row["found, %"], row["right when named, %"]) for row in classes["rows"]
    }
    for name, result in evaluation.per_class.items():
        count, recall, precision = found[name]
        assert (count, recall) == (result.n, pytest.approx(result.accuracy))
        assert precision is None or precision == pytest.approx(result.precision)
    counts = next(
        block for block in blocks(report, "classes") if block.get("matrix") == "Confusion in images"
    )
    assert counts["rows"] == evaluation.confusion


def test_the_curves_are_those_of_the_metrics_file(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    report = library.report(run)
    loss, score = blocks(report, "training")[0]["blocks"]
    assert [row["validation"] for row in loss["rows"]] == [line["val_loss"] for line in lines]
    assert [row["validation"] for row in score["rows"]] == [line["val_top1"] for line in lines]


def test_hashes_and_settings_are_those_of_the_files(run: Path) -> None:
    report = library.report(run)
    files = next(block for block in blocks(report, "provenance") if block.get("table") == "Files")
    for row in files["rows"]:
        assert row["SHA-256"] == hashlib.sha256((run / row["file"]).read_bytes()).hexdigest()
    assert {row["file"] for row in files["rows"]} == {"model.safetensors", "config.json", "recipe.toml"}
    settings = next(
        block for block in blocks(report, "provenance") if "settings of" in block.get("facts", "")
    )
    assert settings["batch_size"] == "8"
    machine = next(block for block in blocks(report, "provenance") if "Machine" in block.get("facts", ""))
    assert machine["computed on"] == "cpu, float32"


def test_without_data_it_says_so_and_tells_what_the_run_knows(run: Path) -> None:
    report = library.report(run)
    assert "By the run's own record" in report.lead
    assert "No images were given" in said(report, "classes")
    assert "No images were given" in said(report, "limits")


def test_a_run_that_has_not_finished_is_reported_as_far_as_it_is(run: Path, image_folder: Path) -> None:
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "epo')  # killed while it wrote
    assert "has not finished" in said(library.report(run, str(image_folder), **PLAIN), "training")


def test_of_a_run_without_best_weights_the_last_ones_are_reported(run: Path) -> None:
    (run / "config.json").unlink()
    assert "its latest ones" in said(library.report(run), "provenance")


def test_a_models_folder_has_no_curves(tmp_path: Path, quick: list[str]) -> None:
    report = library.report(tmp_path / "base")
    assert "no run's" in said(report, "training")
    assert "no recipe" in said(report, "provenance")
    assert "not stated" in said(report, "provenance")


def test_a_multi_label_model_has_the_sections_of_its_kind(tmp_path: Path) -> None:
    from tests.test_multilabel import write_squares

    write_squares(tmp_path / "train.parquet", 60, seed=0)
    write_squares(tmp_path / "test.parquet", 24, seed=1)
    data = f"{tmp_path}/{{split}}.parquet"
    library.train(data, tmp_path / "run", steps=2, batch_size=8, workers=0, img_size=16, device="cpu")
    report = library.report(tmp_path / "run", data, maps=2, score=0, figures=False)
    assert "mean average precision" in report.lead
    assert not any("matrix" in block for block in blocks(report, "classes"))
    classes = blocks(report, "classes")[0]
    evaluation = library.evaluate(tmp_path / "run", data)
    for row in classes["rows"]:
        assert row["average precision, %"] == evaluation.per_class[row["class"]].average_precision
    assert "no one confidence" in said(report, "trust")
    assert Page.of(report.html).all("h1")


# --- The page ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With all that a report has."""
    folder = tmp_path_factory.mktemp("page")
    data = write_images(folder / "images", {"ant": 12, "bee": 12, "cat": 12})
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=3, dropout=0.0)
    save_checkpoint(folder / "model", Checkpoint(model, Preprocess((16, 16)), ("ant", "bee", "cat")))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VITRAL_CACHE", str(folder / "cache"))
        return library.report(folder / "model", str(data), maps=4, score=4, workers=0).html


def test_the_page_loads_nothing_and_its_policy_allows_nothing_else(page: str) -> None:
    found = Page.of(page)
    policy = next(meta["content"] for meta in found.all("meta") if meta.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:")
    for tag, allowed in (("style", "style-src"), ("script", "script-src")):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{allowed} 'sha256-{digest}'" in policy
    for tag, attributes in found.tags:
        assert "style" not in attributes, tag
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "srcset"):
            if value := attributes.get(name):
                assert value.startswith(("data:image/", "#")), value[:80]
    assert not re.findall(r"url\(|@import|https?://", re.sub(r"data:[^\"]+", "", page))


def test_every_picture_chart_and_table_says_what_it_is(page: str) -> None:
    found = Page.of(page)
    assert len(found.all("img")) > 3
    assert all("alt" in image for image in found.all("img"))
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in found.all("svg"))
    assert all(table["aria-label"] for table in found.all("table"))
    assert all(cell.get("scope") in ("col", "row") for cell in found.all("th"))
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    links = {link["href"] for link in found.all("a")}
    assert links == {f"#{part['id']}" for part in found.all("section")} | {"#main"}


def test_no_map_is_without_method_class_layers_scale_and_score(page: str) -> None:
    said = [image["alt"] for image in Page.of(page).all("img")]
    maps = [text for text in said if text and text.startswith(f"{DEFAULT} for ")]
    cards = re.findall(rf"{DEFAULT}, layers: .*; scale [\d.e-]+ to [\d.e-]+", page)
    assert len(maps) == 2 * len(cards) >= 4  # each image for its answer, and against another
    assert all(re.search(r": score -?\d+\.\d+.*, layers: \w+", text) for text in maps if text)


def test_the_same_run_gives_the_same_bytes(run: Path, image_folder: Path) -> None:
    how: dict[str, Any] = {"maps": 2, "score": 4, "workers": 0, "figures": False}
    first, again = (library.report(run, str(image_folder), **how) for _ in range(2))
    assert first.html == again.html
    assert first.to_dict() == again.to_dict()


def test_names_are_text_and_no_markup(vitral: Vitral, quick: list[str], tmp_path: Path) -> None:
    hostile = "<script>alert(1)<&'\" script>"
    data = write_images(tmp_path / "images", {hostile: 12, "{{ 7 * 7 }}": 12})
    assert vitral("train", data, "--out", tmp_path / "run", *quick).status == 0
    html = library.report(tmp_path / "run", str(data), **PLAIN).html
    assert html.count("<script>") == 1
    assert "{{ 7 * 7 }}" in html
    assert hostile in "".join(Page.of(html).text)


def test_a_page_has_the_size_that_it_may_have_and_says_what_it_left_out(
    vitral: Vitral, quick: list[str], tmp_path: Path
) -> None:
    data = write_images(tmp_path / "images", {"ant": 60, "bee": 60}, size=(160, 160))
    assert vitral("train", data, "--out", tmp_path / "run", *quick).status == 0
    small, usual = (
        library.report(tmp_path / "run", str(data), maps=24, score=0, figures=False, megabytes=megabytes)
        for megabytes in (0.15, 2)
    )
    assert len(small.html) <= 150_000 < len(usual.html) <= 2_000_000
    assert "were left out to keep the file small" in said(small, "limits")
    assert "were left out to keep the file small" not in said(usual, "limits")


def test_without_pictures_no_image_of_the_data_is_in_the_page(run: Path, image_folder: Path) -> None:
    report = library.report(run, str(image_folder), **PLAIN, pictures=False)
    assert "<img" not in report.html
    assert "left out as asked" in said(report, "limits")


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    digits = colour.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    shares = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground_in_both_schemes(scheme: str) -> None:
    style = (TEMPLATES / "style.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", light))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([\w-]+): (#\w+)", dark))
    for ink in ("ink", "soft", "link"):
        for ground in ("page", "raised"):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    assert contrast(colours["ink"], colours["warn-page"]) >= 4.5
    # Lines and dots need 3:1 (WCAG 2.2, 1.4.11).
    assert all(contrast(colours[f"s{place}"], colours["page"]) >= 3 for place in range(1, 7))
    rules = dict(re.findall(r"\.(q\d) \{ background: [^;]+; color: ([^;]+);", style))
    for step in range(1, 10):
        rule = rules[f"q{step}"]
        ink = colours[rule.removeprefix("var(--").removesuffix(")")] if rule.startswith("var") else rule
        assert contrast(ink, colours[f"q{step}"]) >= 4.5, step


def test_shades_begin_with_the_first_image_and_end_with_all() -> None:
    assert [shade(share) for share in (0, 1e-9, 1 / 9, 0.5, 0.999, 1)] == [0, 1, 2, 5, 9, 9]


# --- Several runs --------------------------------------------------------------------------------


@pytest.fixture
def other(run: Path, vitral: Vitral, quick: list[str], image_folder: Path) -> Path:
    """A second run on the same images, with another seed of its own."""
    words = ["train", image_folder, "--out", run.parent / "other", *quick, "learning_rate=0.01"]
    assert vitral(*words).status == 0
    return run.parent / "other"


def test_runs_are_compared_image_by_image(run: Path, other: Path, image_folder: Path) -> None:
    report = library.report([run, other], str(image_folder))
    first, second = (library.evaluate(one, str(image_folder), mistakes=True) for one in (run, other))
    table = blocks(report, "differences")[0]["rows"][0]
    wrong, also = (
        {row.path for row in one.mistakes.rows} if one.mistakes else set() for one in (first, second)
    )
    assert table["it alone right"] == len(wrong - also)
    assert table["run alone right"] == len(also - wrong)
    assert table["difference, points"] == pytest.approx(second.top1 - first.top1)
    settings = blocks(report, "settings")[0]["rows"]
    assert "learning_rate" in {row["setting"] for row in settings}
    assert Page.of(report.html).all("h1")


def test_runs_of_one_name_are_told_apart(run: Path) -> None:
    report = library.report([run, run.parent / "." / "run", run / "last"])
    assert [row["run"] for row in blocks(report, "runs")[0]["rows"]].count("run") < 2


# --- The command ---------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_says_the_verdict(
    vitral: Vitral, run: Path, image_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    file.write_text("old")
    words = ["--maps", "0", "--score", "0", "--no-figures"]
    result = vitral("report", run, image_folder, "--out", file, *words)
    assert result.status == 0
    assert "the model names" in result.out
    assert file.read_text().startswith("<!doctype html>")


def test_json_is_the_same_report(vitral: Vitral, run: Path, image_folder: Path) -> None:
    words = ["--maps", "0", "--score", "0", "--no-figures", "--json"]
    told = json.loads(vitral("report", run, image_folder, *words).out)
    report = library.report(str(run), str(image_folder), **PLAIN)
    assert told["verdict"] == report.lead
    assert [part["section"] for part in told["sections"]] == [part.key for part in report.sections]


def test_a_recipe_may_ask_for_the_report(
    vitral: Vitral, quick: list[str], image_folder: Path, tmp_path: Path
) -> None:
    result = vitral("train", image_folder, "--out", tmp_path / "run", *quick, "report=true")
    assert result.out.splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
    assert "<h1>run</h1>" in (tmp_path / "run" / "report.html").read_text()


def test_what_cannot_be_reported_is_one_line(
    vitral: Vitral, run: Path, image_folder: Path, tmp_path: Path
) -> None:
    assert vitral("report", run).status == 2
    assert vitral("report", run, "--out", tmp_path / "page.txt").status == 2
    missing = vitral("report", tmp_path / "no", "--out", tmp_path / "a.html")
    assert_failed_in_one_line(missing, "does not exist")
    others = write_images(tmp_path / "others", {"dog": 4, "elk": 4})
    assert_failed_in_one_line(vitral("report", run, others, "--out", tmp_path / "a.html"), "dog, elk")
    assert not (tmp_path / "a.html").exists()
    (tmp_path / "began").mkdir()
    (tmp_path / "began" / "recipe.toml").write_text("steps = 2\n")
    began = vitral("report", tmp_path / "began", "--out", tmp_path / "a.html")
    assert_failed_in_one_line(began, "holds a run that has no model yet")


def test_settings_out_of_their_range_are_refused(run: Path) -> None:
    with pytest.raises(VitralError, match="megabytes"):
        library.report(run, megabytes=0.01)
    with pytest.raises(VitralError, match="name a run"):
        library.report([])

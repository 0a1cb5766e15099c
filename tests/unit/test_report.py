"""Contact sheets, the HTML report, and the evaluation that fills them, by a captioner without a model."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image, ImageColor
from typer.testing import CliRunner, Result

from vlm_bridge.cli.main import app
from vlm_bridge.configuration import DecodeSettings, Recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.errors import DataError
from vlm_bridge.evaluation.caption_statistics import caption_statistics
from vlm_bridge.evaluation.contact_sheet import (
    BROKEN,
    SheetItem,
    contact_sheet,
)
from vlm_bridge.evaluation.predictions import (
    Prediction,
    best,
    drawn,
    read_predictions,
    worst,
    write_predictions,
)
from vlm_bridge.evaluation.report import PEOPLE, ReportedRun, published_on, write_report
from vlm_bridge.evaluation.run import Evaluation, evaluate_captioner, write_evaluation
from vlm_bridge.evaluation.run_folder import read_curves, read_run

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """One 40x30 picture per colour, and a file that is no picture."""
    paths = []
    for colour in COLOURS:
        paths.append(tmp_path / f"{colour}.png")
        Image.new("RGB", (40, 30), colour).save(paths[-1])
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    return [*paths, tmp_path / "broken.jpg"]


@pytest.fixture(autouse=True)
def _no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Java takes seconds and is tested with the metrics."""
    monkeypatch.setenv("PATH", str(tmp_path))


class TestContactSheet:
    @pytest.mark.parametrize(
        "caption", ["", "word " * 500, "x" * 900, "Ein Café, 北京 \U0001f600", "$1 and $2"]
    )
    def test_any_caption_and_a_broken_image_fit(
        self, caption: str, pictures: list[Path], tmp_path: Path
    ) -> None:
        items = [SheetItem(path, caption, "a reference", 0.5) for path in pictures]
        contact_sheet(items, tmp_path / "sheet.png", columns=3, title="Best")
        with Image.open(tmp_path / "sheet.png") as sheet:
            colors = {color for _, color in sheet.convert("RGB").getcolors(2**24)}
        assert {ImageColor.getrgb(name) for name in (*COLOURS, BROKEN)} <= colors

    def test_no_items(self, tmp_path: Path) -> None:
        contact_sheet([], tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as sheet:
            sheet.load()


class Page(HTMLParser):
    """Checks that every opened tag is closed; collects what the page would load, and its tables with exact numbers."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "data" and "td" in self.open:
            self.tables[-1][-1][-1] = dict(attrs)["value"] or ""
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """SVG's self-closing elements load nothing and stay balanced."""

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def rows(self, corner: str) -> dict[str, dict[str, str]]:
        """The table whose first body row or column head has a cell ``corner``: row name -> column name -> cell."""
        for head, *body in self.tables:
            if corner in head:
                return {row[0].strip(): dict(zip(head[1:], row[1:], strict=True)) for row in body}
        raise AssertionError(f"no table with {corner}")


class TestReport:
    def write(self, path: Path, *runs: ReportedRun, **changes: Any) -> str:
        runs = runs or (ReportedRun("lite", metrics={"CIDEr": 0.51234, "num_images": 1000}),)
        write_report(path, runs, **({"title": "t"} | changes))
        return path.read_text(encoding="utf-8")

    def test_needs_nothing_but_itself(self, pictures: list[Path], tmp_path: Path) -> None:
        run = ReportedRun(
            "lite",
            dataset="flickr8k",
            metrics={
                "CIDEr": 0.51234,
                "num_images": 1000,
                "decode": {"num_beams": 3},
                "versions": {"torch": "2"},
            },
            predictions=[predicted(path, "a dog", cider=1.0) for path in pictures],
            curves={
                "train/loss": [(0, 3.0), (10, 2.0)],
                "validation/loss": [(10, 2.5)],
                "train/lr": [(0, 1e-5)],
            },
            recipe_yaml="learning_rate: 0.1\n",
        )
        html = self.write(tmp_path / "report.html", run, notes=["a note"])
        page = Page(html)
        assert len(page.loads) == 4 * len(COLOURS)  # random, best, worst, longest
        assert all(load.startswith("data:image/jpeg;base64,") for load in page.loads)
        assert not re.search(r"url\((?!#)|@import|<script|<link|href=\"(?!#)", html)
        assert "prefers-color-scheme: dark" in html and "width=device-width" in html
        assert "0.5123" in html and "1,000" in html and "cannot be read" in html
        assert "quoted" in html and "arXiv:1502.03044" in html

    def test_every_text_is_escaped(self, pictures: list[Path], tmp_path: Path) -> None:
        evil = "<script>\"&'{x}$y$"
        run = ReportedRun(
            evil,
            dataset=evil,
            metrics={
                evil: 0.5,
                "decode": {evil: evil},
                "versions": {evil: evil},
                "model": {"name": evil},
                "skipped": {evil: evil},
            },
            predictions=[predicted(pictures[0], evil, reference=evil)],
            curves={f"{evil}/{evil}": [(0, 1.0)], f"b/{evil}": [(0, 1.0)]},
            recipe_yaml=f"a: |\n  {evil}\n",
            notes=[evil],
        )
        for runs in ((run,), (run, dataclasses.replace(run, name=f"2{evil}", recipe_yaml="a: 2"))):
            html = self.write(tmp_path / "report.html", *runs, title=evil, notes=[evil])
            Page(html)
            assert "<script>" not in html
            assert html.count("&lt;script&gt;") >= 12

    def test_series_of_one_quantity_share_a_chart(self, tmp_path: Path) -> None:
        curves = {
            "train/loss": [(0, 3.0), (9, 2.0)],
            "validation/loss": [(9, 2.5)],
            "train/lr": [(0, 0.1)],
        }
        html = self.write(tmp_path / "report.html", ReportedRun("lite", curves=curves))
        assert html.count("<svg") == 2
        assert html.count(">train</text>") == html.count(">validation</text>") == 1

    @pytest.mark.parametrize(
        "curve",
        [
            [],
            [(0, float("nan"))],
            [(0, 0.0)],
            [(5, -1e-9), (6, 1e-9)],
            [(i, i**3) for i in range(5000)],
        ],
    )
    def test_curves_of_any_shape(self, curve: list, tmp_path: Path) -> None:
        html = self.write(tmp_path / "report.html", ReportedRun("lite", curves={"train/x": curve}))
        Page(html)
        assert ("<svg" in html) == any(math.isfinite(value) for _, value in curve)
        assert len(html) < 60_000

    def test_several_runs_side_by_side(self, pictures: list[Path], tmp_path: Path) -> None:
        paths = pictures[:4]
        runs = [
            ReportedRun(
                name,
                metrics={"CIDEr": cider, "decode": {"num_beams": 3}},
                predictions=[predicted(path, f"{name} says", cider=cider) for path in paths],
                curves={"train/loss": [(0, 3.0), (9, cider)]},
                recipe_yaml=f"learning_rate: {cider}\nseed: 0\n",
                shares=shares,
                notes=["its note"],
            )
            for name, cider, shares in (("one", 0.4, {}), ("two", 0.6, {"CIDEr": 1.5}))
        ]
        html = self.write(tmp_path / "report.html", *runs)
        page = Page(html)
        assert [float(row["CIDEr"]) for row in page.rows("CIDEr").values()] == [0.4, 0.6]
        assert "150.0%" in html and "Percentages are shares of what one has." in html
        assert "two: its note" in html
        assert (
            html.count("<p><small>one</small>one says")
            == html.count("<p><small>two</small>two says")
            == 8
        )
        differing = next(table for table in page.tables if ["learning_rate", "0.4", "0.6"] in table)
        assert not any("seed" in row for row in differing)


@pytest.mark.parametrize("dataset", ["flickr8k", "flickr30k", "coco"])
def test_published_scores_are_fractions_with_a_source(dataset: str) -> None:
    systems = published_on(dataset)
    assert systems == published_on(f"{dataset.title()}-clean") and not published_on("mine")
    for system in systems:
        assert re.search(r"20\d\d, arXiv:\d{4}\.\d{5}", system["source"])
        scores = system["scores"].items()
        assert all(0 < value < (10 if metric == "CIDEr" else 1) for metric, value in scores)


def predicted(
    path: Path, caption: str, *, cider: float = 0.5, reference: str = "a cat"
) -> Prediction:
    image = CaptionedImage(path, (reference,), path.stem)
    return Prediction(image, caption, -1.0, None, {"CIDEr": cider}, finished=True)


class TestStatistics:
    def test_counts(self) -> None:
        captions = ["A dog runs.", "a dog runs", "a man and a man and a man", "the the end"]
        statistics = caption_statistics(captions, [True, False, None, True])
        assert statistics.lengths == (3, 3, 8, 3)
        assert statistics.mean_length == 17 / 4
        assert statistics.vocabulary == 7
        assert statistics.distinct == 3 / 4
        assert statistics.repeating == 2 / 4
        assert statistics.unfinished == 1 / 3
        assert statistics.phrases[0] == ("a man and a", 1 / 4)

    def test_nothing_said(self) -> None:
        statistics = caption_statistics(["", ""])
        assert (statistics.vocabulary, statistics.mean_length, statistics.unfinished) == (
            0,
            0,
            None,
        )


class TestCurves:
    def test_what_a_continued_run_wrote_twice_holds_as_written_last(self, tmp_path: Path) -> None:
        events = [(1, 3.0), (2, 2.5), (3, 9.0), (2, 2.4), (4, 2.0)]
        lines = [
            json.dumps({"event": "train", "step": s, "loss": v, "samples_per_second": 1})
            for s, v in events
        ]
        lines.append(json.dumps({"event": "decoded", "step": 4, "cider": 0.3, "num_images": 5}))
        (tmp_path / "history.jsonl").write_text("\n".join([*lines, '{"event": "tr']))
        assert read_curves(tmp_path) == {
            "train/loss": [(1, 3.0), (2, 2.4), (4, 2.0)],
            "validation/cider": [(4, 0.3)],
        }
        (tmp_path / "history.jsonl").write_text("\n".join(["{", *lines]))
        with pytest.raises(DataError, match=r"history.jsonl:1"):
            read_curves(tmp_path)
        assert read_curves(tmp_path / "none") == {}


@dataclass
class FakeResult:
    image: str
    caption: str | None
    score: float | None
    error: str | None
    finished: bool | None = True


@dataclass
class FakeValidation:
    perplexity: float
    visual_gain: float


@dataclass
class FakeCaptioner:
    """Says the colour that the file is named after; what it was asked is kept."""

    recipe: Recipe = field(default_factory=Recipe)
    decode: DecodeSettings | None = None
    validated: list[CaptionedImage] = field(default_factory=list)
    visual_gain: float = 0.75

    def caption(
        self,
        images: Sequence[Path],
        *,
        decode: DecodeSettings | None = None,
        batch_size: int = 16,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[FakeResult]:
        self.decode = decode
        progress(len(images))
        return [
            FakeResult(str(path), None, None, "damaged")
            if path.stem == "broken"
            else FakeResult(
                str(path), f"a {path.stem.split('-')[0]} square on the wall", -1.5, None
            )
            for path in images
        ]

    def validate(
        self, images: list[CaptionedImage], *, batch_size: int, world: object = None
    ) -> FakeValidation:
        self.validated = images
        return FakeValidation(perplexity=12.5, visual_gain=self.visual_gain)


@pytest.fixture
def images(pictures: list[Path]) -> list[CaptionedImage]:
    """The green picture has a reference that its caption does not match."""
    return [
        CaptionedImage(
            path,
            ("two cats sleep" if path.stem == "green" else f"a {path.stem} square on the wall",),
            path.stem,
        )
        for path in pictures
    ]


def evaluated(captioner: FakeCaptioner, images: list[CaptionedImage], **options: Any) -> Evaluation:
    return evaluate_captioner(captioner, images, validate=captioner.validate, **options)  # type: ignore[arg-type]


class TestEvaluation:
    def test_scores_and_settings(self, images: list[CaptionedImage]) -> None:
        captioner, decode = FakeCaptioner(), DecodeSettings(num_beams=2)
        evaluation = evaluated(captioner, images, decode=decode)
        assert captioner.decode == decode
        content = evaluation.to_json()
        assert content["num_images"] == 7 and content["num_failures"] == 1
        assert content["perplexity"] == 12.5 and content["visual_gain"] == 0.75
        assert content["decode"]["num_beams"] == 2
        assert content["METEOR"] is None and "Java" in content["skipped"]["METEOR"]
        assert content["tokenizer"] == "regex"
        assert 0 < content["BLEU-4"] < 1
        assert "torch" in content["versions"]
        json.dumps(content, allow_nan=False)

    def test_a_failed_picture_counts_as_empty_and_is_not_validated(
        self, images: list[CaptionedImage]
    ) -> None:
        captioner = FakeCaptioner()
        evaluation = evaluated(captioner, images, decode=DecodeSettings())
        (failure,) = evaluation.failures
        assert failure.error == "damaged" and set(failure.scores.values()) == {0.0}
        assert [image.path.stem for image in captioner.validated] == list(COLOURS)

    def test_best_and_worst(self, images: list[CaptionedImage]) -> None:
        evaluation = evaluated(FakeCaptioner(), images, decode=DecodeSettings())
        worst_two = {item.image.path.stem for item in worst(evaluation.predictions, 2)}
        assert worst_two == {"green", "broken"}
        assert not worst_two & {item.image.path.stem for item in best(evaluation.predictions, 5)}
        assert drawn(evaluation.predictions, 3) == drawn(evaluation.predictions, 3)

    def test_nothing_to_evaluate(self, images: list[CaptionedImage]) -> None:
        with pytest.raises(DataError, match="no images"):
            evaluated(FakeCaptioner(), [], decode=DecodeSettings())
        with pytest.raises(DataError, match="none of the 1 images"):
            evaluated(FakeCaptioner(), images[-1:], decode=DecodeSettings())

    def test_what_is_written(self, images: list[CaptionedImage], tmp_path: Path) -> None:
        captioner = FakeCaptioner(visual_gain=float("nan"))
        evaluation = evaluated(captioner, images, decode=DecodeSettings())
        folder = tmp_path / "deep" / "out"
        write_evaluation(evaluation, folder, title="colours")
        assert sorted(path.name for path in folder.iterdir()) == [
            "contact_sheet.png",
            "metrics.json",
            "predictions.jsonl",
            "report.html",
        ]
        assert json.loads((folder / "metrics.json").read_text())["visual_gain"] is None
        records = [
            json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()
        ]
        assert [record["original_id"] for record in records] == [
            image.original_id for image in images
        ]
        assert records[0]["caption"] == "a red square on the wall"
        assert records[0]["scores"]["BLEU-1"] == pytest.approx(1)
        assert records[-1]["error"] == "damaged"
        assert read_predictions(folder / "predictions.jsonl") == list(evaluation.predictions)

    def test_a_caption_may_hold_any_end_of_line(self, pictures: list[Path], tmp_path: Path) -> None:
        said = [predicted(pictures[0], "two\u2028lines\x85and\nmore")]
        write_predictions(tmp_path / "predictions.jsonl", said)
        assert read_predictions(tmp_path / "predictions.jsonl") == said


class TestReportOfARun:
    """What lies on disk, read again and shown."""

    @pytest.fixture
    def run(self, images: list[CaptionedImage], tmp_path: Path) -> Path:
        """A run folder with a log and an evaluation."""
        folder = tmp_path / "runs" / "lite"
        (folder / "logs").mkdir(parents=True)
        events = [{"event": "train", "step": step, "loss": 1 / step} for step in (1, 2, 3)]
        (folder / "logs" / "history.jsonl").write_text(
            "".join(json.dumps(event) + "\n" for event in events)
        )
        evaluation = evaluated(
            FakeCaptioner(),
            images,
            decode=DecodeSettings(num_beams=2),
            model={"name": "lite"},
            data={"name": "flickr8k", "split": "val"},
        )
        write_evaluation(evaluation, folder / "val", title="colours")
        return folder

    def invoke(self, *arguments: object) -> Result:
        return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)

    def test_its_figures_equal_the_json(self, run: Path) -> None:
        result = self.invoke("report", run)
        assert result.exit_code == 0
        html = (run / "report.html").read_text(encoding="utf-8")
        assert len(html) < 5_000_000
        page = Page(html)
        metrics = json.loads((run / "val" / "metrics.json").read_text())
        scores = page.rows("CIDEr")["lite"]
        for metric in (
            "BLEU-1",
            "BLEU-2",
            "BLEU-3",
            "BLEU-4",
            "ROUGE-L",
            "CIDEr",
            "perplexity",
            "num_images",
        ):
            assert float(scores[metric.replace("num_", "")]) == metrics[metric]
        assert float(scores["visual gain"]) == metrics["visual_gain"]
        assert "METEOR" not in scores or scores["METEOR"] == "-"
        decode = next(
            dict(table) for table in page.tables if any(row[0] == "num_beams" for row in table)
        )
        assert decode["num_beams"] == str(metrics["decode"]["num_beams"])
        predictions = read_predictions(run / "val" / "predictions.jsonl")
        captions = page.rows(PEOPLE)
        assert float(captions["captions"]["lite"]) == len(predictions)
        assert float(captions["unfinished"]["lite"]) == 0
        assert html.count("<svg") == 2  # the loss, and the lengths
        assert "METEOR skipped" in html

    def test_the_evaluation_alone_shows_the_curves_of_its_run(self, run: Path) -> None:
        reported = read_run(run / "val")
        assert reported.curves["train/loss"][0] == (1, 1.0)
        assert reported.name == "lite"

    def test_what_is_missing_is_said(self, run: Path, tmp_path: Path) -> None:
        (run / "val" / "predictions.jsonl").unlink()
        assert any("predictions.jsonl" in note for note in read_run(run).notes)
        (run / "val" / "metrics.json").unlink()
        result = self.invoke("report", run, "--output", tmp_path / "new" / "r.html")
        assert result.exit_code == 0 and "Not evaluated yet" in result.stderr
        assert "Not evaluated yet" in (tmp_path / "new" / "r.html").read_text(encoding="utf-8")

    def test_what_is_damaged_costs_only_itself(self, run: Path) -> None:
        def shown(file: Path, text: str, expected: str) -> str:
            """The report while a file holds ``text``; what stderr says of it is one line."""
            whole = file.read_text(encoding="utf-8")
            file.write_text(text, encoding="utf-8")
            result = self.invoke("report", run)
            file.write_text(whole, encoding="utf-8")
            assert result.exit_code == 0
            assert len([line for line in result.stderr.splitlines() if expected in line]) == 1
            html = (run / "report.html").read_text(encoding="utf-8")
            Page(html)
            assert expected in html
            return html

        predictions, log = run / "val" / "predictions.jsonl", run / "logs" / "history.jsonl"
        first = predictions.read_text(encoding="utf-8").splitlines()[0]
        for broken in ("{", "[]", '{"image": "x.jpg"}', first.replace('"CIDEr"', '"other"')):
            html = shown(
                predictions, f"{first}\n{broken}\n", "predictions.jsonl:2 is not a prediction"
            )
            assert html.count("<svg") == 1 and "<h2>Scores</h2>" in html and "<img" not in html
        assert "<img" in shown(log, "{\n{", "history.jsonl:1 is not an event")
        html = shown(run / "val" / "metrics.json", "{", "cannot read the scores in")
        assert html.count("<svg") == 2 and "<img" in html and "<h2>Scores</h2>" not in html

    def test_pictures_that_were_moved_are_said(self, run: Path, pictures: list[Path]) -> None:
        pictures[0].unlink()
        assert any(f"1 of 7 images are not where they were evaluated, such as {pictures[0]}" in note
                   for note in read_run(run).notes)  # fmt: skip

    def test_no_run(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for path, words in (
            (tmp_path / "none", "no run at"),
            (tmp_path / "empty", "holds neither"),
        ):
            with pytest.raises(DataError, match=words):
                read_run(path)
        (tmp_path / "empty" / "metrics.json").write_text("{")
        with pytest.raises(DataError, match="cannot read the scores in"):
            read_run(tmp_path / "empty")

    def test_side_by_side(self, run: Path, tmp_path: Path) -> None:
        other = run.parent / "other"
        shutil.copytree(run, other)
        metrics = json.loads((other / "val" / "metrics.json").read_text())
        metrics |= {"CIDEr": metrics["CIDEr"] / 2, "model": {"name": "other"}}
        (other / "val" / "metrics.json").write_text(json.dumps(metrics))
        file = tmp_path / "compared.html"
        result = self.invoke("compare", run, other, "--html", file)
        assert result.exit_code == 0, result.stderr
        scores = Page(file.read_text(encoding="utf-8")).rows("CIDEr")
        assert float(scores["other"]["CIDEr"].split("50.0%")[0]) == metrics["CIDEr"]
        shutil.copytree(run / "val", run / "test")
        with pytest.raises(DataError, match="several evaluations"):
            self.invoke("compare", run, other)


def test_evaluate_command(
    drawn_caption_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_bridge.cli.evaluate import evaluate

    captioner = FakeCaptioner(Recipe(decode=DecodeSettings(num_beams=5, max_new_tokens=9)))
    monkeypatch.setattr(
        "vlm_bridge.captioning.pipeline.Captioner.from_pretrained",
        lambda path, device, recipe=None: captioner,
    )

    program = typer.Typer()
    program.command()(evaluate)
    scores, out = tmp_path / "new" / "scores.json", tmp_path / "out"
    arguments = [
        "--checkpoint",
        "best.pth",
        "--data-dir",
        str(drawn_caption_folder),
        "--split",
        "test",
    ]
    arguments += [
        "--limit",
        "6",
        "--num-beams",
        "2",
        "--json",
        str(scores),
        "--output-dir",
        str(out),
    ]
    result = CliRunner().invoke(program, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    content = json.loads(scores.read_text())
    expected = {
        "BLEU-1",
        "BLEU-2",
        "BLEU-3",
        "BLEU-4",
        "METEOR",
        "ROUGE-L",
        "CIDEr",
        "perplexity",
        "visual_gain",
    }
    assert expected | {"num_images", "decode"} <= set(content)
    assert content["num_images"] == 6
    # What is not asked for on the command line comes from the recipe.
    assert (content["decode"]["num_beams"], content["decode"]["max_new_tokens"]) == (2, 9)
    assert f"CIDEr\t{content['CIDEr']:.4f}" in result.stdout
    assert "METEOR skipped: no Java" in result.stderr
    assert (out / "report.html").is_file()

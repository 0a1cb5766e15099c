"""Contact sheets, the HTML report, and the evaluation that fills them, without a model."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image, ImageColor
from typer.testing import CliRunner, Result

from vlm_bridge.captioning.explain import BROKEN, SheetItem, draw_sheet
from vlm_bridge.cli.main import app
from vlm_bridge.configuration import DecodeSettings, Recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.errors import DataError
from vlm_bridge.evaluation.report import PEOPLE, published_on, write_report
from vlm_bridge.evaluation.run import Evaluation, evaluate_captioner, write_evaluation
from vlm_bridge.evaluation.run_folder import (
    Prediction,
    ReportedRun,
    read_curves,
    read_predictions,
    read_run,
)

COLORS = ("red", "green", "blue", "yellow", "purple", "orange")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """One 40x30 image per color, and a file that is no image."""
    paths = [tmp_path / f"{color}.png" for color in COLORS]
    for path in paths:
        Image.new("RGB", (40, 30), path.stem).save(path)
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    return [*paths, tmp_path / "broken.jpg"]


@pytest.fixture
def images(files: list[Path]) -> list[CaptionedImage]:
    """The green image has a reference that its caption does not match."""
    references = ["two cats sleep" if p.stem == "green" else saying(p) for p in files]
    return [CaptionedImage(p, (text,), p.stem) for p, text in zip(files, references, strict=True)]


@pytest.fixture(autouse=True)
def _no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Java takes seconds and is tested with the metrics."""
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize("caption", ["", "word " * 500, "x" * 900, "Ein Café, 北京 \U0001f600"])
def test_any_caption_and_a_broken_image_fit_on_a_contact_sheet(
    caption: str, files: list[Path]
) -> None:
    items = [SheetItem(path, caption, "a reference", 0.5) for path in files]
    sheet = draw_sheet(items, columns=3, title="Best")
    colors = {color for _, color in sheet.getcolors(2**24) or []}
    assert {ImageColor.getrgb(name) for name in (*COLORS, BROKEN)} <= colors
    assert draw_sheet([]).height > 0


def tables(html: str) -> list[list[list[str]]]:
    """Return the cells of a page's tables, numbers with all their digits."""

    def cell(content: str) -> str:
        content = re.sub(r"<small.*?</small>", "", content)
        content = re.sub(r'<data value="([^"]*)">.*?</data>', r"\1", content)
        return unescape(re.sub(r"<[^>]*>", "", content)).strip()

    def inner(tag: str, text: str) -> list[str]:
        return re.findall(rf"<(?:{tag})\b[^>]*>(.*?)</(?:{tag})>", text, re.DOTALL)

    return [
        [[cell(c) for c in inner("th|td", row)] for row in inner("tr", table)]
        for table in inner("table", html)
    ]


def rows_of(html: str, corner: str) -> dict[str, dict[str, str]]:
    """Return the table with a column ``corner``: row name -> column name -> cell."""
    head, *body = next(table for table in tables(html) if corner in table[0])
    return {name: dict(zip(head[1:], cells, strict=True)) for name, *cells in body}


def written(path: Path, *runs: ReportedRun, **changes: Any) -> str:
    write_report(path / "report.html", runs, **({"title": "t"} | changes))
    return (path / "report.html").read_text(encoding="utf-8")


def predicted(path: Path, caption: str, *, cider: float = 0.5, reference: str = "a cat"):
    image = CaptionedImage(path, (reference,), path.stem)
    return Prediction(image, caption, -1.0, None, {"CIDEr": cider}, finished=True)


class TestReport:
    def test_needs_nothing_but_itself(self, files: list[Path], tmp_path: Path) -> None:
        run = ReportedRun(
            "lite",
            metrics={"CIDEr": 0.51234, "num_images": 1000, "data": {"name": "flickr8k"}},
            predictions=[predicted(path, "a dog", cider=1.0) for path in files],
            curves={
                "train/loss": [(0, 3.0), (10, 2.0)],
                "validation/loss": [(10, 2.5)],
                "train/lr": [(0, 0.1)],
            },
        )
        html = written(tmp_path, run)
        loads = re.findall(r'(?:src|href)="([^"]*)', html)
        assert len(loads) == 4 * len(COLORS)  # random, best, worst, longest
        assert all(load.startswith("data:image/jpeg;base64,") for load in loads)
        assert not re.search(r"url\((?!#)|@import|<script|<link|href=\"(?!#)", html)
        assert "0.5123" in html and "1,000" in html and "cannot be read" in html
        assert "quoted" in html and "arXiv:1502.03044" in html
        # Series of one quantity share a chart.
        assert html.count("<svg") == 2
        assert html.count(">train</text>") == html.count(">validation</text>") == 1

    def test_every_text_is_escaped(self, files: list[Path], tmp_path: Path) -> None:
        evil = "<script>\"&'{x}$y$"
        run = ReportedRun(
            evil,
            metrics={evil: 0.5} | {k: {evil: evil} for k in ("decode", "versions", "skipped")},
            predictions=[predicted(files[0], evil, reference=evil)],
            curves={f"{evil}/{evil}": [(0, 1.0)], f"b/{evil}": [(0, 1.0)]},
            recipe_yaml=f"a: |\n  {evil}\n",
            missing=[evil],
        )
        for runs in ((run,), (run, dataclasses.replace(run, name=f"2{evil}", recipe_yaml="a: 2"))):
            html = written(tmp_path, *runs, title=evil)
            assert "<script>" not in html
            assert html.count("&lt;script&gt;") >= 12

    @pytest.mark.parametrize(
        "values", [[], [math.nan], [0.0], [-1e-9, 1e-9], [1e30, -1e30], [i**3 for i in range(5000)]]
    )
    def test_curves_of_any_shape(self, values: list[float], tmp_path: Path) -> None:
        html = written(tmp_path, ReportedRun("lite", curves={"train/x": list(enumerate(values))}))
        assert ("<svg" in html) == any(map(math.isfinite, values)) and "nan" not in html
        assert len(html) < 60_000

    def test_several_runs_side_by_side(self, files: list[Path], tmp_path: Path) -> None:
        runs = [
            ReportedRun(
                name,
                metrics={"CIDEr": cider},
                predictions=[predicted(path, f"{name} says", cider=cider) for path in files[:4]],
                recipe_yaml=f"learning_rate: {cider}\nseed: 0\n",
            )
            for name, cider in (("one", 0.4), ("two", 0.6))
        ]
        html = written(tmp_path, *runs, notes=["a note"], reference="one")
        assert [float(row["CIDEr"]) for row in rows_of(html, "CIDEr").values()] == [0.4, 0.6]
        assert "150.0%" in html and "Percentages are shares of what one has." in html
        assert "a note" in html
        for name in ("one", "two"):
            assert html.count(f"<p><small>{name}</small>{name} says") == 8
        differing = next(
            table for table in tables(html) if ["learning_rate", "0.4", "0.6"] in table
        )
        assert not any("seed" in row for row in differing)

    def test_counts_words_of_captions(self, files: list[Path], tmp_path: Path) -> None:
        captions = ("A dog runs.", "a dog runs", "a man and a man and a man", "the the end")
        predictions = [predicted(p, text) for p, text in zip(files, captions, strict=False)]
        predictions[1] = dataclasses.replace(predictions[1], finished=False)
        predictions[2] = dataclasses.replace(predictions[2], finished=None)
        rows = rows_of(written(tmp_path, ReportedRun("lite", predictions=predictions)), PEOPLE)
        counted = {name: float(row["lite"]) for name, row in rows.items()}
        assert counted == {
            "captions": 4, "mean length, words": 17 / 4, "longest, words": 8,
            "vocabulary, words": 7, "distinct, share": 3 / 4, "unfinished, share": 1 / 3,
        }  # fmt: skip


@pytest.mark.parametrize("dataset", ["flickr8k", "flickr30k", "coco"])
def test_published_scores_are_fractions_with_a_source(dataset: str) -> None:
    systems = published_on(dataset)
    assert systems == published_on(f"{dataset.title()}-clean") and not published_on("mine")
    for system in systems:
        assert re.search(r"20\d\d, arXiv:\d{4}\.\d{5}", system["source"])
        scores = system["scores"].items()
        assert all(0 < value < (10 if metric == "CIDEr" else 1) for metric, value in scores)


def test_steps_that_a_resumed_run_logged_twice_count_as_logged_last(tmp_path: Path) -> None:
    events = [(1, 3.0), (2, 2.5), (3, 9.0), (2, 2.4), (4, 2.0)]
    lines = [json.dumps({"event": "train", "step": s, "loss": v}) for s, v in events]
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


def saying(path: Path) -> str:
    """A caption, with a mark that ends a line in Unicode but not in JSON lines."""
    return f"a {path.stem.split('-')[0]} square on\u2028the wall"


@dataclass
class FakeCaptioner:
    """Names the color that the file is named after; keeps its arguments."""

    recipe: Recipe = field(default_factory=Recipe)
    decode: DecodeSettings | None = None
    validated: list[CaptionedImage] = field(default_factory=list)
    visual_gain: float = 0.75

    def caption(self, images: Sequence[Path], *, decode, batch_size, progress) -> list[Any]:
        self.decode = decode
        progress(len(images))
        return [
            SimpleNamespace(caption=None, score=None, error="damaged", finished=True)
            if path.stem == "broken"
            else SimpleNamespace(caption=saying(path), score=-1.5, error=None, finished=True)
            for path in images
        ]

    def validate(self, images: list[CaptionedImage], **_: object) -> SimpleNamespace:
        self.validated = images
        return SimpleNamespace(perplexity=12.5, visual_gain=self.visual_gain)


def evaluated(images: list[CaptionedImage], captioner: Any = None, **options: Any) -> Evaluation:
    captioner = captioner or FakeCaptioner()
    options = {"decode": DecodeSettings(num_beams=2), "validate": captioner.validate} | options
    return evaluate_captioner(captioner, images, **options)


class TestEvaluation:
    def test_scores_and_settings(self, images: list[CaptionedImage]) -> None:
        captioner = FakeCaptioner()
        evaluation = evaluated(images, captioner)
        content = evaluation.metrics
        assert captioner.decode == DecodeSettings(num_beams=2)
        assert content["num_images"] == 7 and content["num_failures"] == 1
        assert content["perplexity"] == 12.5 and content["visual_gain"] == 0.75
        assert content["decode"]["num_beams"] == 2
        assert content["METEOR"] is None and "Java" in content["skipped"]["METEOR"]
        assert content["tokenizer"] == "regex" and "torch" in content["versions"]
        assert 0 < content["BLEU-4"] < 1
        json.dumps(content, allow_nan=False)
        # A failed image counts as empty and is not validated.
        (failure,) = [p for p in evaluation.predictions if p.error]
        assert failure.error == "damaged" and set(failure.scores.values()) == {0.0}
        assert [image.path.stem for image in captioner.validated] == list(COLORS)

    def test_nothing_to_evaluate(self, images: list[CaptionedImage]) -> None:
        with pytest.raises(DataError, match="no images"):
            evaluated([])
        with pytest.raises(DataError, match="none of the 1 images"):
            evaluated(images[-1:])

    def test_the_files_of_an_evaluation(self, images: list[CaptionedImage], tmp_path: Path) -> None:
        evaluation = evaluated(images, FakeCaptioner(visual_gain=math.nan))
        folder = tmp_path / "deep" / "out"
        write_evaluation(evaluation, folder, title="colors")
        names = {"contact_sheet.png", "metrics.json", "predictions.jsonl", "report.html"}
        assert {path.name for path in folder.iterdir()} == names
        assert json.loads((folder / "metrics.json").read_text())["visual_gain"] is None
        lines = (folder / "predictions.jsonl").read_bytes().splitlines()
        records = [json.loads(line) for line in lines]
        assert records[0]["caption"] == "a red square on\u2028the wall"
        assert records[0]["scores"]["BLEU-1"] == pytest.approx(1)
        assert records[-1]["error"] == "damaged"
        assert read_predictions(folder / "predictions.jsonl") == list(evaluation.predictions)
        html = (folder / "report.html").read_text(encoding="utf-8")
        worst = html.partition("Worst by CIDEr")[2].partition("<h2>")[0]
        assert worst.index("two cats sleep") < worst.index("a red square")


@pytest.fixture
def run(images: list[CaptionedImage], tmp_path: Path) -> Path:
    """A run folder with a log and an evaluation."""
    folder = tmp_path / "runs" / "lite"
    (folder / "logs").mkdir(parents=True)
    events = [{"event": "train", "step": step, "loss": 1 / step} for step in (1, 2, 3)]
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "logs" / "history.jsonl").write_text(lines)
    evaluation = evaluated(images, model={"name": "lite"}, data={"name": "flickr8k"})
    write_evaluation(evaluation, folder / "val", title="colors")
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


class TestReportOfARun:
    def test_its_figures_equal_the_json(self, run: Path) -> None:
        result = invoke("report", run)
        assert result.exit_code == 0
        html = (run / "report.html").read_text(encoding="utf-8")
        assert len(html) < 5_000_000
        metrics = json.loads((run / "val" / "metrics.json").read_text())
        scores = rows_of(html, "CIDEr")["lite"]
        for metric in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr", "perplexity", "num_images"):
            assert float(scores[metric.replace("num_", "")]) == metrics[metric]
        assert float(scores["visual gain"]) == metrics["visual_gain"]
        assert "METEOR" not in scores or scores["METEOR"] == "-"
        decode = next(dict(t) for t in tables(html) if any(row[0] == "num_beams" for row in t))
        assert decode["num_beams"] == str(metrics["decode"]["num_beams"])
        assert float(rows_of(html, PEOPLE)["captions"]["lite"]) == 7
        assert html.count("<svg") == 1 and "METEOR skipped" in html
        # The evaluation alone shows the curves of its run.
        reported = read_run(run / "val")
        assert reported.curves["train/loss"][0] == (1, 1.0) and reported.name == "lite"

    def test_missing_parts_are_noted(self, run: Path, tmp_path: Path) -> None:
        (run / "val" / "predictions.jsonl").unlink()
        assert any("predictions.jsonl" in line for line in read_run(run).missing)
        (run / "val" / "metrics.json").unlink()
        result = invoke("report", run, "--output", tmp_path / "new" / "r.html")
        assert result.exit_code == 0 and "Not evaluated yet" in result.stderr
        assert "Not evaluated yet" in (tmp_path / "new" / "r.html").read_text(encoding="utf-8")

    @pytest.mark.parametrize("line", ["{", "[]", '{"image": "x.jpg"}', "no CIDEr"])
    def test_a_damaged_prediction_is_named(self, line: str, run: Path) -> None:
        path = run / "val" / "predictions.jsonl"
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        line = first.replace('"CIDEr"', '"other"') if line == "no CIDEr" else line
        path.write_text(f"{first}\n{line}\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"predictions.jsonl:2 is not a prediction"):
            read_run(run)

    def test_no_run(self, tmp_path: Path) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        with pytest.raises(DataError, match="no run at"):
            read_run(tmp_path / "none")
        with pytest.raises(DataError, match="holds neither"):
            read_run(empty)
        (empty / "metrics.json").write_text("{")
        with pytest.raises(DataError, match="cannot read the scores in"):
            read_run(empty)

    def test_side_by_side(self, run: Path, tmp_path: Path) -> None:
        other = run.parent / "other"
        shutil.copytree(run, other)
        metrics = json.loads((other / "val" / "metrics.json").read_text())
        metrics |= {"CIDEr": metrics["CIDEr"] / 2, "model": {"name": "other"}}
        (other / "val" / "metrics.json").write_text(json.dumps(metrics))
        file = tmp_path / "compared.html"
        result = invoke("compare", run, other, "--html", file)
        assert result.exit_code == 0, result.stderr
        scores = rows_of(file.read_text(encoding="utf-8"), "CIDEr")
        assert float(scores["other"]["CIDEr"]) == metrics["CIDEr"]


def test_evaluate_command(
    drawn_caption_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = FakeCaptioner(Recipe(decode=DecodeSettings(num_beams=5, max_new_tokens=9)))
    monkeypatch.setattr(
        "vlm_bridge.captioning.pipeline.Captioner.from_pretrained",
        lambda path, device, recipe=None: captioner,
    )
    scores, out = tmp_path / "new" / "scores.json", tmp_path / "out"
    result = invoke(
        "evaluate", "--checkpoint", "best.pth", "--data-dir", drawn_caption_folder,
        "--split", "test", "--limit", 6, "--num-beams", 2, "--json", scores, "--output-dir", out,
    )  # fmt: skip
    assert result.exit_code == 0
    content = json.loads(scores.read_text())
    assert content.keys() >= {"BLEU-4", "METEOR", "CIDEr", "perplexity", "visual_gain", "decode"}
    assert content["num_images"] == 6
    # The recipe has the settings that the command line leaves out.
    assert (content["decode"]["num_beams"], content["decode"]["max_new_tokens"]) == (2, 9)
    assert f"CIDEr\t{content['CIDEr']:.4f}" in result.stdout
    assert "METEOR skipped: no Java" in result.stderr
    assert (out / "report.html").is_file()

"""Contact sheets, the HTML report, and the evaluation that fills them, without a model."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image, ImageColor

from vlm_bridge.captioning.explain import BROKEN, SheetItem, draw_sheet
from vlm_bridge.captioning.pipeline import CaptionResult
from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.errors import DataError
from vlm_bridge.evaluation.report import write_report
from vlm_bridge.evaluation.run import evaluate_captioner, write_evaluation
from vlm_bridge.evaluation.run_folder import (
    Prediction,
    ReportedRun,
    read_curves,
    read_predictions,
    read_run,
)
from vlm_bridge.evaluation.verdict import published_on, ranking, verdict

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
def test_anything_fits_on_a_contact_sheet(caption: str, files: list[Path]) -> None:
    items = [SheetItem(path, caption, "a reference", 0.5) for path in files]
    colors = {color for _, color in draw_sheet(items, columns=3).getcolors(2**24) or []}
    assert {ImageColor.getrgb(name) for name in (*COLORS, BROKEN)} <= colors
    assert draw_sheet([]).height > 0


def value(html: str, row: str) -> float:
    """Return the first number of a table's row, with all its digits."""
    found = re.search(rf'<th>{row}</th><td[^>]*><data value="([^"]*)"', html)
    assert found, row
    return float(found[1])


def written(path: Path, *runs: ReportedRun, **changes: Any) -> str:
    write_report(path / "report.html", runs, **({"title": "t"} | changes))
    return (path / "report.html").read_text(encoding="utf-8")


def predicted(path: Path, caption: str, *, cider: float = 0.5, reference: str = "a cat"):
    image = CaptionedImage(path, (reference,), path.stem)
    return Prediction(image, caption, -1.0, None, {"CIDEr": cider}, finished=True)


def test_a_report_needs_nothing_but_itself(files: list[Path], tmp_path: Path) -> None:
    run = ReportedRun(
        "lite",
        metrics={"CIDEr": 0.51234, "num_images": 1000, "data": {"name": "flickr8k"}},
        predictions=[predicted(path, "a dog", cider=1.0) for path in files],
        curves={"train/loss": [(0, 3.0)], "validation/loss": [(10, 2.5)], "train/lr": [(0, 0.1)]},
    )
    html = written(tmp_path, run)
    loads = re.findall(r'(?:src|href)="([^"#]+)', html)
    assert len(loads) == len(COLORS)
    anchors = set(re.findall(r'href="#([^"]*)', html))
    assert {"scores", "training", "images"} <= anchors == set(re.findall(r'<h2 id="([^"]*)', html))
    assert all(load.startswith("data:image/jpeg;base64,") for load in loads)
    assert not re.search(r"url\((?!#)|@import|<script|<link|href=\"(?!#)", html)
    for text in ("0.5123", "1,000", "cannot be read", "quoted", "arXiv:1502.03044"):
        assert text in html
    # Series of one quantity share a chart.
    assert html.count("<svg") == 2
    assert html.count(">train</text>") == html.count(">validation</text>") == 1


def test_every_text_is_escaped(files: list[Path], tmp_path: Path) -> None:
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
def test_curves_of_any_shape(values: list[float], tmp_path: Path) -> None:
    html = written(tmp_path, ReportedRun("lite", curves={"train/x": list(enumerate(values))}))
    assert ("<svg" in html) == any(map(math.isfinite, values)) and "nan" not in html
    assert len(html) < 60_000


def test_several_runs_side_by_side(files: list[Path], tmp_path: Path) -> None:
    runs = []
    for name, cider in (("one", 0.4), ("two", 0.6)):
        predictions = [predicted(path, f"{name} says", cider=cider) for path in files[:4]]
        recipe = f"learning_rate: {cider}\nseed: 0\n"
        runs.append(ReportedRun(name, {"CIDEr": cider}, predictions, recipe_yaml=recipe))
    html = written(tmp_path, *runs, notes=["a note"], reference="one")
    assert (value(html, "one"), value(html, "two")) == (0.4, 0.6)
    assert "150.0%" in html and "Percentages are shares of what one has." in html
    assert "a note" in html
    for name in ("one", "two"):
        assert html.count(f"<p><small>{name}</small>{name} says") == 4
    differing = html.partition("where they differ</a></h2>")[2].partition("</table>")[0]
    assert "learning_rate" in differing and "seed" not in differing


def test_before_and_after(files: list[Path], tmp_path: Path) -> None:
    before, after = (
        ReportedRun(
            name,
            {"CIDEr": cider, "visual_gain": 0.5},
            [predicted(files[0], name)],
            {"train/loss": [(1, 3.0)], "validation/loss": [(1, 3.0)]} if cider > 0.5 else {},
        )
        for name, cider in (("before", 0.25), ("after", 0.75))
    )
    html = written(tmp_path, before, after, lead="It learned your captions.")
    top, _, images = html.partition('<h2 id="images">')
    assert top.index("It learned your captions.") < top.index(verdict(after)[0])
    assert re.search(r"CIDEr</dt><dd>\S+ \S+>0.75<.*before \S+ \S+>0.25<", top, re.DOTALL)
    assert images.index("<small>before") < images.index("<small>after") < images.index("Scores")
    assert ">train</text>" in html  # named after the run only where several have curves


@pytest.mark.parametrize(
    ("num_images", "num_runs", "galleries", "num_shown"),
    [(1, 1, 1, 1), (12, 2, 1, 12), (14, 1, 4, 12), (90, 1, 4, 48), (90, 2, 3, 36), (90, 3, 2, 24)],
)
def test_no_image_is_shown_twice(
    num_images: int, num_runs: int, galleries: int, num_shown: int, tmp_path: Path
) -> None:
    predictions = [
        predicted(tmp_path / f"{i}.png", "a dog", cider=1 / (1 + i), reference=f"image {i}.")
        for i in range(num_images)
    ]
    html = written(tmp_path, *(ReportedRun(f"run {n}", {}, predictions) for n in range(num_runs)))
    shown = re.findall(r"People: (image \d+\.)", html)
    assert len(shown) == len(set(shown)) == num_shown
    assert html.count('<div class="gallery') == galleries


RISING, FALLING = [(1, 3.0), (50, 2.0), (100, 2.5)], [(1, 3.0), (50, 2.0), (100, 1.5)]


@pytest.mark.parametrize(
    ("metrics", "curves", "expected"),
    [
        ({}, {}, []),
        ({"visual_gain": 0.01}, {}, [r"ignores its images: .* 0\.010 nats", r"Check .* longer"]),
        ({"visual_gain": 0.2}, {}, [r"begins to look", r"Train longer"]),
        ({"visual_gain": 1.352}, {}, [r"looks at its images: visual gain 1\.352", "No problem"]),
        ({}, {"validation/visual_gain": [(1, 0.0), (2, 0.9)]}, ["gain 0.900", "No problem"]),
        ({}, {"validation/visual_gain": [(1, math.nan)]}, []),
        (
            {"METEOR": 0.1, "num_images": 1000, "data": {"name": "flickr8k"}},
            {},
            [r"METEOR is 0\.100, 49% of the 0\.203 that Show"],
        ),
        ({"METEOR": 0.1, "num_images": 40, "data": {"name": "flickr8k"}}, {}, []),
        (
            {"visual_gain": 1.0},
            {"validation/loss": RISING, "train/loss": FALLING},
            ["looks", r"It overfits: .* from 2\.000 at step 50 to 2\.500"],
        ),
        ({}, {"validation/loss": RISING, "train/loss": RISING}, []),
        ({}, {"validation/loss": FALLING, "train/loss": FALLING}, [r"still falling.*train longer"]),
        ({}, {"validation/loss": [(1, 3.0), (50, 2.0), (100, 1.99)]}, []),
    ],
)
def test_a_verdict(metrics: dict, curves: dict, expected: list[str]) -> None:
    found = verdict(ReportedRun("lite", metrics, curves=curves))
    assert len(found) == len(expected), found
    for sentence, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, sentence)


def test_a_verdict_on_captions() -> None:
    same = [predicted(Path(f"{i}.png"), "a dog", reference=f"image {i}") for i in range(10)]
    cut = [dataclasses.replace(each, finished=i > 1) for i, each in enumerate(same)]
    cut_off, repeat = verdict(ReportedRun("lite", {"decode": {"max_new_tokens": 9}}, cut))
    assert cut_off == "20% of the captions are cut off: raise max_new_tokens (9)."
    assert "1 different ones for 10 images, where people wrote 10" in repeat


def test_the_best_of_several_is_named() -> None:
    runs = [ReportedRun(name, {"CIDEr": cider}) for name, cider in (("a", 0.4), ("b", 0.6))]
    assert ranking(runs) == "b has the highest CIDEr: 0.600, before a with 0.400."
    assert ranking([runs[0], runs[0]]) == "a and a have the same CIDEr, 0.400."
    assert ranking([runs[0], ReportedRun("c")]) is None


def test_words_of_captions_are_counted(files: list[Path], tmp_path: Path) -> None:
    captions = ("A dog runs.", "a dog runs", "a man and a man and a man", "the the end")
    predictions = [predicted(p, text) for p, text in zip(files, captions, strict=False)]
    predictions[1] = dataclasses.replace(predictions[1], finished=False)
    predictions[2] = dataclasses.replace(predictions[2], finished=None)
    html = written(tmp_path, ReportedRun("lite", predictions=predictions))
    expected = {
        "captions": 4, "mean length, words": 17 / 4, "longest, words": 8,
        "vocabulary, words": 7, "distinct, share": 3 / 4, "unfinished, share": 1 / 3,
    }  # fmt: skip
    assert {row: value(html, row) for row in expected} == expected


@pytest.mark.parametrize("dataset", ["flickr8k", "flickr30k", "coco"])
def test_published_scores_are_fractions_with_a_source(dataset: str) -> None:
    assert published_on(dataset) == published_on(f"{dataset.title()}-clean") != published_on("mine")
    for system in published_on(dataset):
        assert re.search(r"20\d\d, arXiv:\d{4}\.\d{5}", system["source"])
        for metric, score in system["scores"].items():
            assert 0 < score < (10 if metric == "CIDEr" else 1)


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


class FakeCaptioner:
    """Names the color that the file is named after."""

    visual_gain = 0.75

    def caption(self, images: Sequence[Path], **_: object) -> list[Any]:
        return [
            CaptionResult(str(path), error="damaged")
            if path.stem == "broken"
            else CaptionResult(str(path), saying(path), -1.5, finished=True)
            for path in images
        ]

    def validation(self, images: list[CaptionedImage]) -> SimpleNamespace:
        found = SimpleNamespace(perplexity=12.5, visual_gain=self.visual_gain)
        return SimpleNamespace(add=lambda names, features: None, result=lambda world: found)


def evaluated(images: list[CaptionedImage], captioner: Any = None, **options: Any) -> ReportedRun:
    captioner = captioner or FakeCaptioner()
    return evaluate_captioner(captioner, images, decode=DecodeSettings(num_beams=2), **options)


def test_an_evaluation_records_scores_and_settings(images: list[CaptionedImage]) -> None:
    evaluation = evaluated(images)
    content = evaluation.metrics
    expected = {"num_images": 7, "num_failures": 1, "perplexity": 12.5, "visual_gain": 0.75}
    assert content == {**content, **expected, "METEOR": None, "tokenizer": "regex"}
    assert content["decode"]["num_beams"] == 2 and 0 < content["BLEU-4"] < 1
    assert "Java" in content["skipped"]["METEOR"] and "torch" in content["versions"]
    json.dumps(content, allow_nan=False)
    # A failed image counts as empty.
    (failure,) = [p for p in evaluation.predictions if p.error]
    assert failure.error == "damaged" and set(failure.scores.values()) == {0.0}
    for nothing, message in (([], "none of the 0 images"), (images[-1:], "none of the 1 images")):
        with pytest.raises(DataError, match=message):
            evaluated(nothing)


def test_the_files_of_an_evaluation(images: list[CaptionedImage], tmp_path: Path) -> None:
    captioner = FakeCaptioner()
    captioner.visual_gain = math.nan
    evaluation, folder = evaluated(images, captioner), tmp_path / "deep" / "out"
    write_evaluation(evaluation, folder, title="colors")
    names = {"contact_sheet.png", "metrics.json", "predictions.jsonl", "report.html"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "metrics.json").read_text())["visual_gain"] is None
    first, *_, last = map(json.loads, (folder / "predictions.jsonl").open("rb"))
    assert first["caption"] == "a red square on\u2028the wall"
    assert first["scores"]["BLEU-1"] == pytest.approx(1) and last["error"] == "damaged"
    assert read_predictions(folder / "predictions.jsonl") == list(evaluation.predictions)
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.index("a red square") < html.index("two cats sleep")  # best first


@pytest.fixture
def run(images: list[CaptionedImage], tmp_path: Path) -> Path:
    """A run folder with a log and an evaluation."""
    folder = tmp_path / "runs" / "lite"
    (folder / "logs").mkdir(parents=True)
    line = '{"event": "train", "step": 1, "loss": 1.0}\n'
    (folder / "logs" / "history.jsonl").write_text(line + line.replace("1", "2"))
    evaluation = evaluated(images, model={"name": "lite"}, data={"name": "flickr8k"})
    write_evaluation(evaluation, folder / "val", title="colors")
    return folder


class TestReportOfARun:
    def test_its_figures_equal_the_json(self, run: Path, run_here) -> None:
        assert run_here("report", run).returncode == 0
        html = (run / "report.html").read_text(encoding="utf-8")
        assert len(html) < 5_000_000
        metrics = json.loads((run / "val" / "metrics.json").read_text())
        for metric in ("BLEU-4", "ROUGE-L", "CIDEr", "perplexity", "visual_gain", "num_images"):
            assert f'<data value="{metrics[metric]}">' in html
        assert "METEOR skipped" in html and html.count("<svg") == 1
        assert value(html, "num_beams") == 2 and value(html, "captions") == 7
        # The evaluation alone shows the curves of its run.
        reported = read_run(run / "val")
        assert reported.curves["train/loss"][0] == (1, 1.0) and reported.name == "lite"

    def test_missing_parts_are_noted(self, run: Path, tmp_path: Path, run_here) -> None:
        (run / "val" / "predictions.jsonl").unlink()
        assert any("predictions.jsonl" in line for line in read_run(run).missing)
        (run / "val" / "metrics.json").unlink()
        done = run_here("report", run, "--output-dir", tmp_path / "new")
        assert done.returncode == 0 and "Not evaluated yet" in done.stderr
        assert "Not evaluated yet" in (tmp_path / "new" / "report.html").read_text(encoding="utf-8")

    @pytest.mark.parametrize("line", ["{", "[]", '{"image": "x.jpg"}', "no CIDEr"])
    def test_a_damaged_prediction_is_named(self, line: str, run: Path) -> None:
        path = run / "val" / "predictions.jsonl"
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        line = first.replace('"CIDEr"', '"other"') if line == "no CIDEr" else line
        path.write_text(f"{first}\n{line}\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"predictions.jsonl:2 is not a prediction"):
            read_run(run)

    def test_no_run(self, tmp_path: Path) -> None:
        for path, message in ((tmp_path / "none", "no run at"), (tmp_path, "holds neither")):
            with pytest.raises(DataError, match=message):
                read_run(path)

    def test_side_by_side(self, run: Path, tmp_path: Path, run_here) -> None:
        other = shutil.copytree(run, run.parent / "other")
        run_here("compare", run, other, "--output-dir", tmp_path / "compared")
        html = (tmp_path / "compared" / "report.html").read_text(encoding="utf-8")
        assert "100.0%" in html and html.count("<svg") == 1

"""Contact sheets, the HTML report, and the evaluation that fills them, by a captioner without a model."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image, ImageColor
from typer.testing import CliRunner

from vlm_bridge.configuration import DecodeSettings, Recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.errors import DataError
from vlm_bridge.evaluation.contact_sheet import BROKEN, GAP, TILE_HEIGHT, TILE_WIDTH, SheetItem, contact_sheet
from vlm_bridge.evaluation.report import write_report
from vlm_bridge.evaluation.run import evaluate_captioner, write_evaluation

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
    def test_rows_and_columns(self, pictures: list[Path], tmp_path: Path) -> None:
        items = [SheetItem(path, "a caption", "a reference", 0.5) for path in pictures]
        contact_sheet(items, tmp_path / "sheet.png", columns=3, title="Best")
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.format == "PNG"
            assert sheet.width == GAP + 3 * (TILE_WIDTH + GAP)
            assert sheet.height > 3 * TILE_HEIGHT

    def test_pictures_stand_in_reading_order_and_a_broken_one_is_grey(
        self, pictures: list[Path], tmp_path: Path
    ) -> None:
        chosen = [pictures[0], pictures[-1], pictures[2]]
        contact_sheet([SheetItem(path, "x") for path in chosen], tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as sheet:
            middles = [
                sheet.getpixel((GAP + column * (TILE_WIDTH + GAP) + TILE_WIDTH // 2, GAP + TILE_HEIGHT // 4))
                for column in range(3)
            ]
        assert middles[0] == (255, 0, 0) and middles[2] == (0, 0, 255)
        assert middles[1] == ImageColor.getrgb(BROKEN)

    @pytest.mark.parametrize("caption", ["", "word " * 500, "x" * 900, "Ein Café, 北京 \U0001f600"])
    def test_any_caption_fits(self, caption: str, pictures: list[Path], tmp_path: Path) -> None:
        contact_sheet([SheetItem(pictures[0], caption)], tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.height < 2 * TILE_HEIGHT

    def test_no_items(self, tmp_path: Path) -> None:
        contact_sheet([], tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as sheet:
            sheet.load()


class _Balance(HTMLParser):
    """Checks that every opened tag is closed, and collects what the page would load."""

    VOID = frozenset({"meta", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """SVG's self-closing elements load nothing and stay balanced."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


class TestReport:
    def write(self, path: Path, **changes: Any) -> str:
        arguments: dict[str, Any] = {
            "title": "t",
            "summary": {"CIDEr": 0.51234, "images": 1000},
            "sections": {},
        }
        write_report(path, **(arguments | changes))
        return path.read_text(encoding="utf-8")

    def test_needs_nothing_but_itself(self, pictures: list[Path], tmp_path: Path) -> None:
        page = self.write(
            tmp_path / "report.html",
            sections={"Best": [SheetItem(path, "a dog", "a cat", 1.0) for path in pictures]},
            curves={
                "train/loss": [(0, 3.0), (10, 2.0)],
                "val/loss": [(10, 2.5)],
                "learning_rate": [(0, 1e-5)],
            },
            recipe_yaml="learning_rate: 0.1\n",
            decode={"num_beams": 3},
            environment={"torch": "2"},
            notes=["a note"],
        )
        parser = _Balance()
        parser.feed(page)
        assert parser.open == []
        assert len(parser.loads) == len(COLOURS)
        assert all(load.startswith("data:image/jpeg;base64,") for load in parser.loads)
        assert not re.search(r"url\(|@import|<script|<link", page)
        assert "prefers-color-scheme: dark" in page and "width=device-width" in page
        assert "0.5123" in page and "1,000" in page and "cannot be read" in page

    def test_every_text_is_escaped(self, pictures: list[Path], tmp_path: Path) -> None:
        evil = "<script>\"&'{x}"
        page = self.write(
            tmp_path / "report.html",
            title=evil,
            summary={evil: evil},
            sections={evil: [SheetItem(pictures[0], evil, evil)]},
            curves={f"{evil}/{evil}": [(0, 1.0)], f"b/{evil}": [(0, 1.0)]},
            recipe_yaml=evil,
            decode={evil: evil},
            environment={evil: evil},
            notes=[evil],
        )
        assert "<script>" not in page
        assert page.count("&lt;script&gt;") >= 12

    def test_series_of_one_quantity_share_a_chart(self, tmp_path: Path) -> None:
        curves = {"train/loss": [(0, 3.0), (9, 2.0)], "val/loss": [(9, 2.5)], "lr": [(0, 0.1)]}
        page = self.write(tmp_path / "report.html", curves=curves)
        assert page.count("<svg") == 2
        assert page.count("<polyline") == 3

    @pytest.mark.parametrize(
        "curve",
        [[], [(0, float("nan"))], [(0, 0.0)], [(5, -1e-9), (6, 1e-9)], [(i, i**3) for i in range(5000)]],
    )
    def test_curves_of_any_shape_stay_inside_the_chart(self, curve: list, tmp_path: Path) -> None:
        page = self.write(tmp_path / "report.html", curves={"x": curve})
        for points in re.findall(r'points="([^"]*)"', page):
            places = [tuple(map(float, point.split(","))) for point in points.split()]
            assert len(places) <= 401
            assert all(0 <= x <= 460 and 0 <= y <= 220 for x, y in places)


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
            else FakeResult(str(path), f"a {path.stem.split('-')[0]} square on the wall", -1.5, None)
            for path in images
        ]

    def validate(self, images: list[CaptionedImage], *, batch_size: int) -> FakeValidation:
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


class TestEvaluation:
    def test_scores_and_settings(self, images: list[CaptionedImage]) -> None:
        captioner, decode = FakeCaptioner(), DecodeSettings(num_beams=2)
        evaluation = evaluate_captioner(captioner, images, decode=decode)  # type: ignore[arg-type]
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
        evaluation = evaluate_captioner(captioner, images, decode=DecodeSettings())  # type: ignore[arg-type]
        (failure,) = evaluation.failures
        assert failure.error == "damaged" and set(failure.scores.values()) == {0.0}
        assert [image.path.stem for image in captioner.validated] == list(COLOURS)

    def test_best_and_worst(self, images: list[CaptionedImage]) -> None:
        evaluation = evaluate_captioner(FakeCaptioner(), images, decode=DecodeSettings())  # type: ignore[arg-type]
        worst = {item.image.stem for item in evaluation.worst(2)}
        assert worst == {"green", "broken"}
        assert not worst & {item.image.stem for item in evaluation.best(5)}
        assert evaluation.random(3) == evaluation.random(3)

    def test_nothing_to_evaluate(self, images: list[CaptionedImage]) -> None:
        with pytest.raises(DataError, match="no images"):
            evaluate_captioner(FakeCaptioner(), [], decode=DecodeSettings())  # type: ignore[arg-type]
        with pytest.raises(DataError, match="none of the 1 pictures"):
            evaluate_captioner(FakeCaptioner(), images[-1:], decode=DecodeSettings())  # type: ignore[arg-type]

    def test_what_is_written(self, images: list[CaptionedImage], tmp_path: Path) -> None:
        captioner = FakeCaptioner(visual_gain=float("nan"))
        evaluation = evaluate_captioner(captioner, images, decode=DecodeSettings())  # type: ignore[arg-type]
        folder = tmp_path / "deep" / "out"
        write_evaluation(evaluation, folder, title="colours")
        assert sorted(path.name for path in folder.iterdir()) == [
            "contact_sheet.png",
            "metrics.json",
            "predictions.jsonl",
            "report.html",
        ]
        assert json.loads((folder / "metrics.json").read_text())["visual_gain"] is None
        records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        assert [record["original_id"] for record in records] == [image.original_id for image in images]
        assert records[0]["caption"] == "a red square on the wall"
        assert records[0]["scores"]["BLEU-1"] == pytest.approx(1)
        assert records[-1]["error"] == "damaged"


def test_evaluate_command(
    drawn_caption_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_bridge.cli.evaluate import evaluate

    captioner = FakeCaptioner(Recipe(decode=DecodeSettings(num_beams=5, max_new_tokens=9)))
    loader = types.SimpleNamespace(from_pretrained=lambda path, device, recipe=None: captioner)
    pipeline = types.ModuleType("vlm_bridge.captioning.pipeline")
    monkeypatch.setattr(pipeline, "Captioner", loader, raising=False)
    monkeypatch.setitem(sys.modules, pipeline.__name__, pipeline)

    app = typer.Typer()
    app.command()(evaluate)
    scores, out = tmp_path / "new" / "scores.json", tmp_path / "out"
    arguments = ["--checkpoint", "best.pth", "--data-dir", str(drawn_caption_folder), "--split", "test"]
    arguments += ["--limit", "6", "--num-beams", "2", "--json", str(scores), "--output-dir", str(out)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
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

"""Published captioners: the captions of transformers itself, and clear refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from tiny_captioners import MAX_POSITIONS, SAVE
from vlm_bridge.captioning.pipeline import CaptionResult
from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.errors import ModelError, UsageError
from vlm_bridge.evaluation.baseline import MODELS, BaselineCaptioner

NAMES = sorted(SAVE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in SAVE.items()}


@pytest.fixture(scope="module")
def images(drawn_caption_folder: Path) -> list[Path]:
    return [image.path for image in CaptionFolder.open(drawn_caption_folder).split("val")[:5]]


def load(folder: object, **options: Any) -> BaselineCaptioner:
    return BaselineCaptioner.from_pretrained(str(folder), "cpu", **options)


def caption(
    captioner: BaselineCaptioner, images: list[Path], batch_size: int = 5, **decode: Any
) -> list[CaptionResult]:
    settings = DecodeSettings(**{"num_beams": 2, "max_new_tokens": 8, **decode})
    return captioner.caption(images, decode=settings, batch_size=batch_size)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_are_those_of_transformers(
    name: str, num_beams: int, folders: dict[str, Path], images: list[Path]
) -> None:
    """Saved generation settings do not count; a caption ends before the first EOS."""
    captioner = load(folders[name], prompt="")
    model = getattr(transformers, type(captioner.model).__name__).from_pretrained(folders[name])
    pixels = captioner.processor([open_image(image) for image in images], return_tensors="pt")
    options = {"num_beams": num_beams, "max_new_tokens": 8, "repetition_penalty": 1.0}
    rows = model.eval().generate(pixel_values=pixels["pixel_values"], **options)
    expected = []
    for row in rows[:, 1:].tolist():
        kept = row[: row.index(captioner.eos_id)] if captioner.eos_id in row else row
        expected.append(captioner.tokenizer.decode(kept, skip_special_tokens=True).strip())
    results = caption(captioner, images, num_beams=num_beams)
    assert [result.caption for result in results] == expected
    assert len(set(expected)) > 1, "else this test means nothing"


@pytest.mark.parametrize("name", NAMES)
def test_batches_and_broken_images_change_nothing(
    name: str, folders: dict[str, Path], images: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    captioner = load(folders[name])
    first, error, *others = caption(captioner, [images[0], tmp_path / "broken.jpg", *images[1:]])
    assert error.error and error.caption is None
    alone = caption(captioner, images, batch_size=1)
    assert [result.caption for result in (first, *others)] == [result.caption for result in alone]


def test_the_prompt_is_the_familys_own(folders: dict[str, Path], images: list[Path]) -> None:
    assert load(folders["git"]).prompt == load(folders["vit-gpt2"]).prompt == ""
    blip = load(folders["blip"])
    assert blip.prompt == "a picture of"
    prompted = [str(result.caption) for result in caption(blip, images)]
    bare = [str(result.caption) for result in caption(load(folders["blip"], prompt=""), images)]
    assert prompted != bare and not any("picture" in text for text in prompted)


def test_captions_must_fit_into_the_decoder(folders: dict[str, Path], images: list[Path]) -> None:
    with pytest.raises(UsageError, match=f"exceed the {MAX_POSITIONS} positions"):
        caption(load(folders["git"]), images, max_new_tokens=MAX_POSITIONS + 1)


def refused(name: object) -> str:
    """Return the one line with which a model is refused."""
    with pytest.raises(ModelError) as refusal:
        load(name)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "vlm-bridge-captioner"}, "--checkpoint"),
        ({"model_type": "blip", "architectures": ["BlipForRetrieval"]}, "BlipForRetrieval"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, ", ".join(MODELS.values())),
    ],
)
def test_other_models_are_refused(config: dict, words: str, tmp_path: Path) -> None:
    assert "without a config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert words in refused(tmp_path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
    assert "cannot load the model" in refused(tmp_path / "image.png")
    assert "cannot be reached" in refused("Salesforce/blip-image-captioning-base")


def test_missing_weights_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["blip"], tmp_path, dirs_exist_ok=True)
    weights = load_file(path := tmp_path / "model.safetensors")
    lost = next(key for key in weights if "crossattention.self.query.weight" in key)
    del weights[lost]
    save_file(weights, path, metadata={"format": "pt"})
    message = refused(tmp_path)
    assert "1 weights are missing" in message and lost in message


@pytest.mark.parametrize(
    ("name", "lost", "words"),
    [
        ("git", ("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
        ("blip", ("preprocessor_config.json",), "image processor"),
        ("vit-gpt2", ("model.safetensors",), "model.safetensors"),
    ],
)
def test_a_missing_file_is_named(
    name: str, lost: tuple, words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[name], tmp_path, dirs_exist_ok=True)
    for file in lost:
        (tmp_path / file).unlink(missing_ok=True)
    assert words in refused(tmp_path)

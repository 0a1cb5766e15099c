"""Published captioners: the captions and losses of transformers itself, and no number that is not honest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    BlipForConditionalGeneration,
    GitForCausalLM,
    VisionEncoderDecoderModel,
)

from tiny_captioners import MAX_POSITIONS, SAVE, SIZES, build_bert_tokenizer
from tiny_models import save_tiny_blip
from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage, CaptionFolder
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.errors import ModelError, UsageError
from vlm_bridge.evaluation.baseline import MODELS, BaselineCaptioner

CLASSES: dict[str, Any] = {
    "blip": BlipForConditionalGeneration,
    "git": GitForCausalLM,
    "vit-gpt2": VisionEncoderDecoderModel,
}
NAMES = sorted(SAVE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in SAVE.items()}


@pytest.fixture(scope="module")
def images(drawn_caption_folder: Path) -> list[CaptionedImage]:
    return CaptionFolder.open(drawn_caption_folder).split("val")[:5]


def load(folder: Path, **options: Any) -> BaselineCaptioner:
    return BaselineCaptioner.from_pretrained(str(folder), "cpu", **options)


def captions(
    captioner: BaselineCaptioner, images: list[CaptionedImage], batch_size: int = 5, **decode: Any
):
    settings = DecodeSettings(**{"num_beams": 2, "max_new_tokens": 8, **decode})
    return captioner.caption(
        [image.path for image in images], decode=settings, batch_size=batch_size
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_are_those_of_transformers(
    name: str, num_beams: int, folders: dict[str, Path], images: list[CaptionedImage]
) -> None:
    """Whatever generation settings the authors saved, only ours count; a caption ends before the first EOS."""
    captioner = load(folders[name], prompt="")
    model = CLASSES[name].from_pretrained(folders[name]).eval()
    pixels = captioner.processor([open_image(image.path) for image in images], return_tensors="pt")
    options = {"num_beams": num_beams, "max_new_tokens": 8, "repetition_penalty": 1.0}
    rows = model.generate(pixel_values=pixels["pixel_values"], **options)
    expected = []
    for row in rows[:, 1:].tolist():
        kept = row[: row.index(captioner.eos_id)] if captioner.eos_id in row else row
        expected.append(captioner.tokenizer.decode(kept, skip_special_tokens=True).strip())
    results = captions(captioner, images, num_beams=num_beams)
    assert [result.caption for result in results] == expected
    assert len(set(expected)) > 1, (
        "the model must tell pictures apart for this test to mean anything"
    )
    assert all(result.score is not None and result.score < 0 for result in results)


@pytest.mark.parametrize("name", NAMES)
def test_batching_changes_nothing(
    name: str, folders: dict[str, Path], images: list[CaptionedImage]
) -> None:
    captioner = load(folders[name])
    together, alone = captions(captioner, images), captions(captioner, images, batch_size=1)
    assert [result.caption for result in together] == [result.caption for result in alone]
    assert [result.score for result in together] == pytest.approx(
        [result.score for result in alone], abs=1e-4
    )


def test_the_prompt_is_the_familys_own_unless_given(
    folders: dict[str, Path], images: list[CaptionedImage]
) -> None:
    assert load(folders["git"]).prompt == load(folders["vit-gpt2"]).prompt == ""
    prompted, bare = load(folders["blip"]), load(folders["blip"], prompt="")
    assert prompted.prompt == "a picture of"
    assert not any("picture" in str(result.caption) for result in captions(prompted, images))
    assert [r.caption for r in captions(prompted, images)] != [
        r.caption for r in captions(bare, images)
    ]


def test_a_broken_picture_costs_only_its_own_caption(
    folders: dict[str, Path], images: list[CaptionedImage], tmp_path: Path
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    captioner = load(folders["git"])
    broken = CaptionedImage(tmp_path / "broken.jpg", ("x",), "x")
    first, error, last = captions(captioner, [images[0], broken, images[1]])
    assert error.error and error.caption is None
    assert [first.caption, last.caption] == [r.caption for r in captions(captioner, images[:2])]


def test_captions_must_fit_into_the_decoder(
    folders: dict[str, Path], images: list[CaptionedImage]
) -> None:
    for folder in folders.values():
        with pytest.raises(UsageError, match=f"has {MAX_POSITIONS}: ask for fewer"):
            captions(load(folder), images, max_new_tokens=MAX_POSITIONS + 1)


class TestRefusals:
    """One line each: what it is, and what would work."""

    def refused(self, name: object, **options: Any) -> str:
        with pytest.raises(ModelError) as refusal:
            BaselineCaptioner.from_pretrained(str(name), "cpu", **options)
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    def test_a_language_model(self, tmp_path: Path) -> None:
        tokenizer = build_bert_tokenizer()
        BertModel(BertConfig(**SIZES, vocab_size=len(tokenizer))).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        message = self.refused(tmp_path)
        assert "BertModel" in message
        assert all(class_name in message for class_name in MODELS.values())

    def test_a_captioner_of_this_toolkit(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "vlm-bridge-captioner"}')
        assert f"--checkpoint {tmp_path}" in self.refused(tmp_path)

    def test_another_head_of_a_captioning_family(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "blip", "architectures": ["BlipForImageTextRetrieval"]})
        )
        assert "BlipForImageTextRetrieval" in self.refused(tmp_path)

    def test_weights_that_are_missing(self, tmp_path: Path) -> None:
        save_tiny_blip(tmp_path)
        path = tmp_path / "model.safetensors"
        weights = load_file(path)
        lost = next(key for key in weights if "crossattention.self.query.weight" in key)
        del weights[lost]
        save_file(weights, path, metadata={"format": "pt"})
        message = self.refused(tmp_path)
        assert "1 weights are missing" in message and lost in message

    def test_no_hub(self) -> None:
        message = self.refused("Salesforce/blip-image-captioning-base")
        assert "cannot be reached" in message and "Salesforce/blip-image-captioning-base" in message

    def test_no_model_at_all(self, tmp_path: Path) -> None:
        assert "its config.json is missing" in self.refused(tmp_path)
        Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
        assert "cannot load the model" in self.refused(tmp_path / "picture.png")

    @pytest.mark.parametrize(
        ("lost", "said"),
        [
            (("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
            (("preprocessor_config.json",), "image processor"),
            (("model.safetensors",), "model.safetensors"),
        ],
    )
    @pytest.mark.parametrize("name", NAMES)
    def test_a_folder_with_a_part_missing(
        self, name: str, lost: tuple[str, ...], said: str, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        for path in folders[name].iterdir():
            if path.name not in lost:
                (tmp_path / path.name).symlink_to(path)
        assert said in self.refused(tmp_path)

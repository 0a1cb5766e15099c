"""Validation: perplexity over supervised tokens, and a visual gain of zero for the blind."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from captioners import BRIDGES, SPEAKS_TO, random_features, tiny_captioner, tiny_recipe
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage, CaptionFolder
from vlm_bridge.data_pipeline.features import OnTheFlyPixels
from vlm_bridge.data_pipeline.loader import TokenizedImages
from vlm_bridge.evaluation.run import evaluate_captioner
from vlm_bridge.model_architecture.captioner import CaptionModel, caption_format
from vlm_bridge.training_strategy.validation import Validation, validate

CAPTIONS = (
    ("A small red square on a white background.", "Two dogs."),
    ("A boy and a girl are playing in a pool of water.",),
    ("A green square and a yellow circle.", "Squares.", "Grass near a fence."),
    ("The black dog is above the brown dog.",),
    ("Water.",),
)


@pytest.fixture(params=BRIDGES)
def captioner(request: pytest.FixtureRequest, tiny_vit_dir: Path) -> Captioner:
    language_model = request.getfixturevalue(f"tiny_{SPEAKS_TO[request.param]}_dir")
    recipe = tiny_recipe(tiny_vit_dir, language_model, request.param)
    return Captioner(tiny_captioner(recipe), recipe)


def tokenized(captioner: Captioner, num_images: int = 5) -> TokenizedImages:
    images = [CaptionedImage(Path(f"{n}.jpg"), CAPTIONS[n], str(n)) for n in range(num_images)]
    return TokenizedImages(images, caption_format(captioner.model.language_model, captioner.recipe))


def run(model: CaptionModel, data: TokenizedImages, batch_images: int = 16) -> Validation:
    features = random_features(model, len(data)).numpy()
    return validate(
        model, data, features, batch_images=batch_images, autocast=contextlib.nullcontext
    )


def test_every_word_and_end_counts_once_and_a_uniform_model_knows_its_vocabulary(
    captioner: Captioner,
) -> None:
    model, data = captioner.model, tokenized(captioner)
    with torch.no_grad():
        model.language_model.causal_lm.get_output_embeddings().weight.zero_()
    result = run(model, data)
    assert result.perplexity == pytest.approx(model.language_model.text_config.vocab_size, rel=1e-5)
    encode = model.language_model.encode
    lengths = [len(encode(caption)) + 1 for captions in CAPTIONS for caption in captions]
    assert result.num_tokens == sum(lengths)
    assert Validation(loss=1e4, visual_gain=0.0, num_tokens=1).perplexity < float("inf")


def test_the_batch_size_changes_nothing(captioner: Captioner) -> None:
    results = [run(captioner.model, tokenized(captioner), size) for size in (1, 2, 16)]
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, abs=1e-5)
        assert result.visual_gain == pytest.approx(results[0].visual_gain, abs=1e-5)
        assert result.num_tokens == results[0].num_tokens


def test_the_blind_gain_nothing_from_images(captioner: Captioner) -> None:
    model = captioner.model
    assert abs(run(model, tokenized(captioner)).visual_gain) > 1e-4
    encode = model.bridge.encode
    model.bridge.encode = lambda features: encode(torch.zeros_like(features))
    result = run(model, tokenized(captioner))
    assert result.visual_gain == 0


def test_the_gain_is_the_loss_with_other_images_minus_the_loss(captioner: Captioner) -> None:
    model, data = captioner.model, tokenized(captioner, num_images=2)
    # Of two images, the wrong one is the other one.
    features = random_features(model, 2).numpy()
    right = validate(model, data, features, autocast=contextlib.nullcontext)
    swapped = validate(model, data, features[::-1].copy(), autocast=contextlib.nullcontext)
    assert right.visual_gain == pytest.approx(swapped.loss - right.loss, abs=1e-5)
    assert swapped.visual_gain == pytest.approx(-right.visual_gain, abs=1e-5)


def test_a_single_image_has_no_wrong_one_and_the_mode_stays(captioner: Captioner) -> None:
    for mode in (True, False):
        captioner.model.train(mode)
        assert run(captioner.model, tokenized(captioner, num_images=1)).visual_gain == 0
        assert captioner.model.training == captioner.model.bridge.training == mode
        assert not captioner.model.language_model.training


def test_captioning_measures_the_same_and_encodes_each_image_once(
    captioner: Captioner, drawn_caption_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no Java
    images = CaptionFolder.open(drawn_caption_folder).split("val")
    model = captioner.model
    data = TokenizedImages(images, captioner.format)
    pixels = OnTheFlyPixels(
        [image.path for image in images], lambda x: model.vision_encoder.preprocess(x).numpy()
    )
    on_the_fly = validate(model, data, pixels, batch_images=3, autocast=contextlib.nullcontext)
    encoded: list[int] = []
    features = model.features
    monkeypatch.setattr(
        model, "features", lambda x: (encoded.append(len(x) if x.ndim == 4 else 0), features(x))[1]
    )
    for batch_size in (3, 5, 1):
        encoded.clear()
        metrics = evaluate_captioner(
            captioner, images, decode=captioner.recipe.decode, batch_size=batch_size
        ).metrics
        assert sum(encoded) == len(images)
        assert metrics["perplexity"] == pytest.approx(on_the_fly.perplexity, rel=1e-5)
        assert metrics["visual_gain"] == pytest.approx(on_the_fly.visual_gain, abs=1e-5)


def test_a_damaged_image_takes_no_part_in_losses(
    captioner: Captioner, drawn_caption_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no Java
    (tmp_path / "damaged.jpg").write_bytes(b"no image")
    damaged = CaptionedImage(tmp_path / "damaged.jpg", ("A long caption of words.",), "damaged")
    images = CaptionFolder.open(drawn_caption_folder).split("val")

    def losses(images: list[CaptionedImage]) -> tuple[float, float | None]:
        run = evaluate_captioner(captioner, images, decode=captioner.recipe.decode, batch_size=2)
        return run.metrics["perplexity"], run.metrics["visual_gain"]

    assert losses([damaged, *images])[0] == pytest.approx(losses(images)[0], rel=1e-5)
    # The only image that is left has no wrong one.
    assert losses([damaged, images[0]])[1] == losses(images[:1])[1] == 0

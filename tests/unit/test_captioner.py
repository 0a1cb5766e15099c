"""Invariants of training and captioning, for every bridge and language model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from captioners import (
    BRIDGES,
    LANGUAGE_MODELS,
    SPEAKS_TO,
    SYSTEMS,
    TOY_START,
    caption_loss,
    generated,
    random_features,
    tiny_captioner,
    tiny_recipe,
    toy_captioner,
)
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import DecodeSettings, Recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage, CaptionFolder
from vlm_bridge.data_pipeline.loader import PackedBatch, Row, TokenizedImages, whole_rows
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture.attach import attach
from vlm_bridge.model_architecture.captioner import CaptionModel, build_captioner, caption_format
from vlm_bridge.training_strategy.validation import batch_loss, load_batch

CAPTIONS = (
    "A small red square on a white background.",
    "Two dogs.",
    "A boy and a girl are playing in a pool of water near a fence.",
)


@pytest.fixture(params=SYSTEMS, ids="-".join)
def recipe(request: pytest.FixtureRequest, tiny_vit_dir: Path) -> Recipe:
    bridge, language_model = request.param
    return tiny_recipe(tiny_vit_dir, request.getfixturevalue(f"tiny_{language_model}_dir"), bridge)


@pytest.fixture
def model(recipe: Recipe) -> CaptionModel:
    return tiny_captioner(recipe)


def data_of(model: CaptionModel, recipe: Recipe) -> TokenizedImages:
    images = [CaptionedImage(Path(f"{n}.jpg"), CAPTIONS, str(n)) for n in range(2)]
    return TokenizedImages(images, caption_format(model.language_model, recipe))


@pytest.fixture
def data(model: CaptionModel, recipe: Recipe) -> TokenizedImages:
    return data_of(model, recipe)


def losses_of_each_caption(
    model: CaptionModel, data: TokenizedImages, batch: PackedBatch
) -> list[torch.Tensor]:
    """Return token losses, split by row and caption."""
    losses = caption_loss(model, batch, random_features(model, len(data))).token_losses
    rows, positions = np.nonzero(batch.labels != -100)
    owner = list(zip(rows.tolist(), batch.segments[rows, positions].tolist(), strict=True))
    captions = dict.fromkeys(owner)
    return [losses[torch.tensor([o == caption for o in owner])] for caption in captions]


def test_images_that_share_rows_are_worth_a_row_each(tiny_vit_dir: Path, tiny_gemma2_dir: Path):
    recipe = tiny_recipe(tiny_vit_dir, tiny_gemma2_dir, "cross_attention")
    model = tiny_captioner(recipe)
    assert model.bridge.shares_rows
    data = TokenizedImages(
        [CaptionedImage(Path(f"{n}.jpg"), CAPTIONS[: 1 + n % 3], str(n)) for n in range(7)],
        caption_format(model.language_model, recipe),
    )
    rows, features = whole_rows(data.captions_per_image), random_features(model, 7).numpy()
    found = []
    for share_rows in (False, True):
        model.zero_grad()
        packed = data.pack(rows, share_rows=share_rows)
        loss = batch_loss(model, load_batch(packed, features, model.device))
        loss.total.backward()
        gradients = [parameter.grad for parameter in model.bridge.parameters()]
        found.append((loss.total.detach(), loss.token_losses.sort().values, gradients))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    assert packed.input_ids.shape[0] < 7 and packed.num_tokens == packed.segments.astype(bool).sum()
    assert packed.num_positions < 1.2 * packed.num_tokens


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_later_tokens_change_nothing_before_them_and_the_image_does(
    model: CaptionModel, packed: bool
) -> None:
    segments = torch.tensor([[1] * 6 + [2] * 6 + [0] * 2] * 2) if packed else None
    ids = torch.randint(3, 300, (1, 14)).expand(2, -1)
    image = model.image_inputs(random_features(model, 2))
    logits = model(ids, image, segments)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)
    for t in (0, 2, 5, 8, 12):
        changed = ids.clone()
        changed[:, t + 1 :] = torch.randint(3, 300, (2, 13 - t))
        found = model(changed, image, segments)
        assert torch.equal(found[:, : t + 1], logits[:, : t + 1])
        assert not torch.equal(found, logits)


@torch.no_grad()
def test_a_row_of_several_captions_is_worth_as_many_rows(
    model: CaptionModel, data: TokenizedImages
) -> None:
    places = [(0, 0), (0, 1), (0, 2), (1, 2), (1, 0)]
    alone = [data.pack([Row(image, (caption,))]) for image, caption in places]
    expected = [losses_of_each_caption(model, data, batch)[0] for batch in alone]
    # The second row has pads, and rows of one image are alike.
    batch = data.pack([Row(0, (0, 1, 2)), Row(1, (2, 0))])
    found = losses_of_each_caption(model, data, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    batch.input_ids[batch.segments == 0] = 9  # pads
    for one, other in zip(losses_of_each_caption(model, data, batch), found, strict=True):
        assert torch.equal(one, other)
    batch.input_ids[0, batch.segments[0] == 1] = 7
    changed = losses_of_each_caption(model, data, batch)
    assert not torch.allclose(changed[0], found[0])
    assert all(torch.equal(one, other) for one, other in zip(changed[1:], found[1:], strict=True))


@torch.no_grad()
def test_training_sees_what_generation_sees(model: CaptionModel, data: TokenizedImages) -> None:
    found = losses_of_each_caption(model, data, data.pack([Row(0, (0, 1, 2))]))
    image = model.image_inputs(random_features(model, 2)[:1])
    for number, losses in enumerate(found):
        caption = data.caption(0, number)
        log_probs = model(torch.tensor([caption.input_ids]), image)[0].log_softmax(-1)
        expected = -log_probs[torch.arange(len(caption.labels)), torch.tensor(caption.labels)]
        torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)


def test_only_the_bridge_learns(model: CaptionModel, data: TokenizedImages) -> None:
    model.train()
    caption_loss(model, data.pack([Row(0, (0, 1))]), random_features(model, 2)).total.backward()
    for name, parameter in model.named_parameters():
        learns = name.startswith("bridge.")
        assert parameter.requires_grad == learns
        moves = parameter.grad is not None and bool(parameter.grad.any())
        assert moves == learns or "key.bias" in name, name
    assert model.bridge.training
    assert not model.vision_encoder.training
    assert not model.language_model.training


def test_builds_on_the_meta_device(recipe: Recipe, model: CaptionModel) -> None:
    meta = build_captioner(recipe, meta=True)
    assert all(parameter.is_meta for parameter in meta.parameters())
    shapes = {name: tensor.shape for name, tensor in meta.trained_state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in model.trained_state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("bridge", ["cross_attention", "cross_attention_above"])
@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_untrained_cross_attention_is_the_bare_language_model(
    tiny_vit_dir: Path, language_model: str, bridge: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{language_model}_dir")
    model = build_captioner(tiny_recipe(tiny_vit_dir, folder, bridge))
    ids = torch.randint(3, 300, (2, 12))
    logits = model(ids, model.image_inputs(random_features(model, 2)))
    bare = model.language_model.causal_lm(ids).logits
    torch.testing.assert_close(logits, bare, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "use_amp"), [("float32", True), ("bfloat16", False)])
@pytest.mark.parametrize(
    ("bridge", "language_model"), [system for system in SYSTEMS if system[1] in ("llama", "bert")]
)
def test_trains_and_captions_in_every_precision(
    tiny_vit_dir: Path,
    bridge: str,
    language_model: str,
    dtype: str,
    use_amp: bool,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(f"tiny_{language_model}_dir")
    recipe = tiny_recipe(tiny_vit_dir, folder, bridge, dtype)
    model, exact = tiny_captioner(recipe), tiny_captioner(tiny_recipe(tiny_vit_dir, folder, bridge))
    batch = data_of(model, recipe).pack([Row(0, (0, 1, 2))])
    with torch.autocast("cpu", torch.bfloat16, enabled=use_amp):
        loss = caption_loss(model, batch, random_features(model, 1))
        captions, _ = generated(model, random_features(model, 1), [1], recipe.decode)
    loss.total.backward()
    assert len(captions) == 1
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.bridge.parameters())
    reference = caption_loss(exact, batch, random_features(exact, 1))
    assert loss.total.item() == pytest.approx(reference.total.item(), rel=0.02)


def test_features_are_standardized_and_the_seed_decides_the_bridge(
    tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    one, same, other = (
        build_captioner(tiny_recipe(tiny_vit_dir, tiny_llama_dir, seed=seed)) for seed in (0, 0, 1)
    )
    weight, again, different = (
        model.bridge.resampler.vision_projection.weight for model in (one, same, other)
    )
    assert torch.equal(weight, again)
    assert not torch.equal(weight, different)
    scale = one.feature_scale
    assert scale is not None
    features = 3 * random_features(one, 8) + 5
    scale.measure(features)
    flat = scale(features).flatten(0, 1)
    torch.testing.assert_close(flat.mean(0), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat.std(0), torch.ones(32), atol=1e-5, rtol=0)
    assert {"feature_scale.mean", "feature_scale.std"} < one.trained_state_dict().keys()


GREEDY = DecodeSettings(num_beams=1, max_new_tokens=10)
BEAMS = DecodeSettings(num_beams=3, max_new_tokens=10)
SAMPLE = DecodeSettings(num_beams=1, max_new_tokens=8, do_sample=True, temperature=1.5, seed=1)
NUM_IMAGES = 8


@pytest.fixture(params=BRIDGES)
def bridge(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("decode", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_a_batch_is_captioned_as_its_images_alone(bridge: str, decode: DecodeSettings) -> None:
    model = toy_captioner(bridge)
    features = random_features(model, NUM_IMAGES)
    together, scores = generated(model, features, [TOY_START], decode)
    # The batch must be worth comparing: captions that end, and at different lengths.
    assert len({len(ids) for ids in together}) > 2
    assert min(len(ids) for ids in together) < decode.max_new_tokens
    for index in range(NUM_IMAGES):
        (alone,), (score,) = generated(model, features[index : index + 1], [TOY_START], decode)
        assert alone == together[index]
        assert score == pytest.approx(scores[index], abs=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(("bridge", "language_model"), SYSTEMS)
def test_the_cache_changes_nothing(
    tiny_vit_dir: Path,
    language_model: str,
    bridge: str,
    num_beams: int,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(f"tiny_{language_model}_dir")
    model = tiny_captioner(tiny_recipe(tiny_vit_dir, folder, bridge))
    features, prompt = random_features(model, 3), [1, 40, 50]
    # Longer than tiny Gemma 2's window.
    decode = DecodeSettings(num_beams=num_beams, max_new_tokens=14)
    cached, scores = generated(model, features, prompt, decode)
    assert plainly_generated(model, features, prompt, decode, use_cache=False) == cached
    for one, ids, score in zip(features.split(1), cached, scores, strict=True):
        tokens = [*ids, model.language_model.eos_id][:14]
        row = torch.tensor([[*prompt, *tokens]])
        with torch.inference_mode():
            log_probs = model(row[:, :-1], model.image_inputs(one)).log_softmax(-1)[0, 2:]
        chosen = log_probs.gather(-1, row[0, 3:, None])
        assert score == pytest.approx(chosen.mean().item(), abs=1e-5)
        if num_beams == 1:  # the likeliest tokens of the training path
            assert ids == log_probs[: len(ids)].argmax(-1).tolist()


@torch.inference_mode()
def plainly_generated(
    model: CaptionModel,
    features: torch.Tensor,
    prompt: list[int],
    decode: DecodeSettings,
    **options: Any,
) -> list[list[int]]:
    """Return captions by the language model's own `generate` alone, with its own options."""
    eos = model.language_model.eos_id
    rows = torch.tensor([prompt] * len(features))
    with attach(model.language_model, model.image_inputs(features)) as attached:
        inputs = attached.inputs(rows)
        size = inputs.get("inputs_embeds", rows).shape[:2]
        found = model.language_model.causal_lm.generate(
            **(inputs | {"input_ids": rows}),
            attention_mask=torch.ones(size, dtype=torch.long),
            num_beams=decode.num_beams,
            max_new_tokens=decode.max_new_tokens,
            pad_token_id=eos,
            eos_token_id=eos,
            **options,
        )
    ends = [[*row, eos] for row in found[:, len(prompt) :].tolist()]
    return [row[: row.index(eos)] for row in ends]


def test_the_n_best_are_the_best_beams_in_order(bridge: str) -> None:
    model = toy_captioner(bridge)
    features = random_features(model, NUM_IMAGES)
    best, scores = generated(model, features, [TOY_START], BEAMS)
    all_beams, all_scores = generated(model, features, [TOY_START], BEAMS, num_return_sequences=3)
    assert (all_beams[::3], all_scores[::3]) == (best, pytest.approx(scores, abs=1e-5))
    for start in range(0, 3 * NUM_IMAGES, 3):
        assert len(set(map(tuple, all_beams[start : start + 3]))) == 3
        # With a length penalty of 1, beams are ranked by their scores.
        own = all_scores[start : start + 3]
        assert own == sorted(own, reverse=True)
    with pytest.raises(ConfigurationError, match=r"more than decode\.num_beams=3"):
        generated(model, features, [TOY_START], BEAMS, num_return_sequences=4)


@pytest.mark.parametrize(("bridge", "num_beams"), [("cross_attention", 3), ("deep_prefix", 1)])
def test_a_static_cache_and_a_compiled_model_take_the_same_captions(
    bridge: str, num_beams: int
) -> None:
    model = toy_captioner(bridge)
    features, decode = random_features(model, NUM_IMAGES), BEAMS.replace(num_beams=num_beams)
    expected, _ = generated(model, features, [TOY_START], decode)
    with pytest.raises(ModelError, match="caption without --compile"):
        model.use_static_cache()  # for NVIDIA GPUs
    causal_lm = model.language_model.causal_lm
    model.language_model.is_compiled = True
    torch._dynamo.reset()  # it compiles a function so many times, for all models together
    counter = CompileCounter()  # traces, and runs the graphs as they are
    causal_lm.forward = torch.compile(causal_lm.forward, backend=counter)
    static = {"cache_implementation": "static"}
    for some in (features, features[:3]):
        found = plainly_generated(model, some, [TOY_START], decode, **static)
        assert found == expected[: len(some)]
    assert counter.frame_count, "nothing was compiled"


def test_draws_belong_to_the_image_and_the_seed_whatever_the_batch(bridge: str) -> None:
    model = toy_captioner(bridge)
    features = random_features(model, NUM_IMAGES)
    together, _ = generated(model, features, [TOY_START], SAMPLE, 2)
    assert len(set(map(tuple, together))) > 4, "images that all say the same show nothing"
    assert generated(model, features, [TOY_START], SAMPLE.replace(seed=2), 2)[0] != together
    assert generated(model, features, [TOY_START], SAMPLE, 1)[0] == together[::2]
    backwards, _ = generated(model, features.flip(0), [TOY_START], SAMPLE, 2)
    for index, one in enumerate(features.split(1)):
        own = together[2 * index : 2 * index + 2]
        # Draws have no beams.
        assert generated(model, one, [TOY_START], SAMPLE.replace(num_beams=3), 2)[0] == own
        place = 2 * (NUM_IMAGES - 1 - index)
        assert backwards[place : place + 2] == own


def test_images_draw_different_numbers() -> None:
    model = toy_captioner("prefix")
    twins = random_features(model, 1).expand(NUM_IMAGES, -1, -1)
    same, _ = generated(model, twins, [TOY_START], SAMPLE)
    others, _ = generated(model, twins, [TOY_START], SAMPLE, keys=range(NUM_IMAGES))
    assert len(set(map(tuple, same))) == 1 < len(set(map(tuple, others)))


def test_min_new_tokens_and_no_repeats_hold(bridge: str) -> None:
    model = toy_captioner(bridge)
    features = random_features(model, NUM_IMAGES)
    longer, _ = generated(model, features, [TOY_START], BEAMS.replace(min_new_tokens=5))
    assert min(map(len, longer)) >= 5
    unrepeated, _ = generated(model, features, [TOY_START], BEAMS.replace(no_repeat_ngram_size=2))
    for ids in unrepeated:
        pairs = list(itertools.pairwise(ids))
        assert len(pairs) == len(set(pairs))


def test_files_are_encoded_once_and_captioned_alike_in_every_batch(
    bridge: str,
    tiny_vit_dir: Path,
    drawn_caption_folder: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(f"tiny_{SPEAKS_TO[bridge]}_dir")
    decode = {"num_beams": 3, "max_new_tokens": 8}
    recipe = tiny_recipe(tiny_vit_dir, folder, bridge, decode=decode)
    captioner = Captioner(tiny_captioner(recipe), recipe)
    paths = [image.path for image in CaptionFolder.open(drawn_caption_folder).split("test")]
    encoded: list[int] = []
    captioner.model.vision_encoder.register_forward_hook(lambda *a: encoded.append(len(a[2])))
    together = captioner.caption(paths, batch_size=5)
    assert (sum(encoded), len(encoded)) == (len(paths), -(-len(paths) // 5))
    assert [result.image for result in together] == [str(path) for path in paths]
    for settings in (None, SAMPLE):
        together = captioner.caption(paths, batch_size=5, decode=settings)
        alone = captioner.caption(paths[::-1], batch_size=1, decode=settings)[::-1]
        assert [r.caption for r in alone] == [r.caption for r in together]
        assert [r.score for r in alone] == pytest.approx([r.score for r in together], abs=1e-5)

    (broken := tmp_path / "broken.jpg").write_bytes(b"not an image")
    some = [broken, *paths[:2], broken, paths[2], broken]
    mixed = captioner.caption(some, batch_size=2, decode=SAMPLE)
    assert [r.caption for r in mixed if not r.error] == [r.caption for r in together[:3]]
    assert [bool(r.error) for r in mixed] == [True, False, False, True, False, True]

"""Generation: the same captions whatever the batch and the cache."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from captioners import (
    BRIDGES,
    SPEAKS_TO,
    SYSTEMS,
    TOY_EOS,
    TOY_START,
    generated,
    random_features,
    tiny_captioner,
    tiny_recipe,
    toy_captioner,
)
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture.attach import attach
from vlm_bridge.model_architecture.captioner import CaptionModel

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


@torch.inference_mode()
def every_caption(
    model: CaptionModel, one: torch.Tensor, limit: int
) -> dict[tuple[int, ...], float]:
    """Return the log-probability of each caption of at most ``limit`` tokens, with EOS or cut."""
    others = [token for token in range(model.language_model.vocab_size) if token != TOY_EOS]
    captions: dict[tuple[int, ...], float] = {}
    for length in range(limit):
        ended = [(*words, TOY_EOS) for words in itertools.product(others, repeat=length)]
        cut = list(itertools.product(others, repeat=limit)) if length == limit - 1 else []
        rows = torch.tensor([(TOY_START, *tokens) for tokens in ended + cut])
        log_probs = model(rows[:, :-1], model.image_inputs(one)).log_softmax(-1)
        totals = log_probs.gather(-1, rows[:, 1:, None]).sum((1, 2)).tolist()
        captions.update(zip(ended + cut, totals, strict=True))
    return captions


def test_beam_search_finds_the_best_of_all_captions(bridge: str) -> None:
    model, limit = toy_captioner(bridge, vocabulary=6), 4
    features = random_features(model, NUM_IMAGES)
    beats_greedy = 0
    for one, length_penalty in itertools.product(features.split(1), (0.5, 1.0, 2.0)):
        decode = DecodeSettings(num_beams=6**3, max_new_tokens=limit, length_penalty=length_penalty)
        captions = every_caption(model, one, limit)
        assert sum(map(math.exp, captions.values())) == pytest.approx(1, abs=1e-4)
        best = max(captions, key=lambda tokens: captions[tokens] / len(tokens) ** length_penalty)
        (found,), (score,) = generated(model, one, [TOY_START], decode)
        assert found == [token for token in best if token != TOY_EOS]
        assert score == pytest.approx(captions[best] / len(best), abs=1e-5)
        (greedy,), _ = generated(model, one, [TOY_START], decode.replace(num_beams=1))
        beats_greedy += greedy != found
    assert beats_greedy, "a search that never differs from greedy shows nothing"


@pytest.mark.parametrize("bridge", [bridge for bridge in BRIDGES if bridge != "projection"])
@pytest.mark.parametrize("num_beams", [1, 3])
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
    assert len(set(map(tuple, same))) == 1
    others, _ = generated(model, twins, [TOY_START], SAMPLE, keys=range(NUM_IMAGES))
    assert len(set(map(tuple, others))) > 1


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
    done: list[int] = []
    some = [broken, *paths[:2], broken, paths[2], broken]
    mixed = captioner.caption(some, batch_size=2, decode=SAMPLE, progress=done.append)
    assert [r.caption for r in mixed if not r.error] == [r.caption for r in together[:3]]
    assert [bool(r.error) for r in mixed] == [True, False, False, True, False, True]
    assert all(r.caption is None and r.score is None for r in mixed if r.error)
    assert done == [2, 4, 6]

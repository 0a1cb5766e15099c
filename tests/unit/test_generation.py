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
    CROSS_ATTENDING,
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
from vlm_bridge.captioning.pipeline import DECODE_AHEAD, Captioner
from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture.attach import attach
from vlm_bridge.model_architecture.captioner import CaptionModel

PROMPT = 1
GREEDY = DecodeSettings(num_beams=1, max_new_tokens=10)
BEAMS = DecodeSettings(num_beams=3, max_new_tokens=10)
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


@pytest.mark.parametrize(("bridge", "language_model"), SYSTEMS)
@pytest.mark.parametrize("num_beams", [1, 3])
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
    assert scores == pytest.approx(scores_read_again(model, features, prompt, cached, 14), abs=1e-5)


@pytest.mark.parametrize(("bridge", "language_model"), SYSTEMS)
@torch.inference_mode()
def test_greedy_takes_the_likeliest_token_of_the_training_path(
    tiny_vit_dir: Path, language_model: str, bridge: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{language_model}_dir")
    model = tiny_captioner(tiny_recipe(tiny_vit_dir, folder, bridge))
    features = random_features(model, 1)
    (ids,), _ = generated(model, features, [1], GREEDY.replace(max_new_tokens=14))
    row = torch.tensor([[1, *ids]])
    logits = model(row, model.image_inputs(features), segments=torch.ones_like(row))[0]
    assert ids == logits[: len(ids)].argmax(-1).tolist()


def test_the_n_best_are_the_best_beams_in_order(bridge: str) -> None:
    model = toy_captioner(bridge)
    features = random_features(model, NUM_IMAGES)
    best, scores = generated(model, features, [TOY_START], BEAMS)
    all_beams, all_scores = generated(model, features, [TOY_START], BEAMS, num_return_sequences=3)
    assert (all_beams[::3], all_scores[::3]) == (best, pytest.approx(scores, abs=1e-5))
    for start in range(0, 3 * NUM_IMAGES, 3):
        assert len(set(map(tuple, all_beams[start : start + 3]))) == 3
    # With a length penalty of 1, beams are ranked by the mean log-probability that their score is.
    for image in range(NUM_IMAGES):
        own = all_scores[3 * image : 3 * image + 3]
        assert own == sorted(own, reverse=True)


def test_several_draws_differ_and_a_search_gives_no_more_than_its_beams(bridge: str) -> None:
    model = toy_captioner(bridge)
    features = random_features(model, 2)
    draw = GREEDY.replace(do_sample=True, temperature=4.0)
    captions, scores = generated(model, features, [TOY_START], draw, num_return_sequences=6)
    assert len(captions) == len(scores) == 12
    assert len(set(map(tuple, captions[:6]))) > 1
    with pytest.raises(ConfigurationError, match=r"more than decode\.num_beams=3"):
        generated(model, features, [TOY_START], BEAMS, num_return_sequences=4)


@torch.inference_mode()
def every_caption(
    model: CaptionModel, one: torch.Tensor, limit: int
) -> dict[tuple[int, ...], float]:
    """Return the log-probability of each caption of at most ``limit`` tokens, with EOS or cut."""
    vocabulary = model.language_model.vocab_size
    others = [token for token in range(vocabulary) if token != TOY_EOS]
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
    for index, length_penalty in itertools.product(range(NUM_IMAGES), (0.5, 1.0, 2.0)):
        decode = DecodeSettings(num_beams=6**3, max_new_tokens=limit, length_penalty=length_penalty)
        one = features[index : index + 1]
        captions = every_caption(model, one, limit)
        assert sum(map(math.exp, captions.values())) == pytest.approx(1, abs=1e-4)
        normalised = {
            tokens: total / len(tokens) ** length_penalty for tokens, total in captions.items()
        }
        best = max(normalised, key=normalised.__getitem__)
        (found,), (score,) = generated(model, one, [TOY_START], decode)
        assert found == [token for token in best if token != TOY_EOS]
        assert score == pytest.approx(captions[best] / len(best), abs=1e-5)
        (greedy,), _ = generated(model, one, [TOY_START], decode.replace(num_beams=1))
        beats_greedy += greedy != found
    assert beats_greedy, "a search that never differs from greedy shows nothing"


@torch.inference_mode()
def scores_read_again(
    model: CaptionModel,
    features: torch.Tensor,
    prompt: list[int],
    captions: list[list[int]],
    limit: int,
) -> list[float]:
    """Return the mean log-probability per token of captions, by the training path."""
    scores = []
    for one, ids in zip(features.split(1), captions, strict=True):
        tokens = [*ids, model.language_model.eos_id] if len(ids) < limit else ids
        row = torch.tensor([[*prompt, *tokens]])
        log_probs = model(row[:, :-1], model.image_inputs(one)).log_softmax(-1)[
            :, len(prompt) - 1 :
        ]
        scores.append(log_probs.gather(-1, row[:, len(prompt) :, None]).mean().item())
    return scores


@torch.inference_mode()
def plainly_generated(
    model: CaptionModel,
    features: torch.Tensor,
    prompt: list[int],
    decode: DecodeSettings,
    **options: Any,
) -> list[list[int]]:
    """Captions by the language model's own `generate` alone, with its own options."""
    language_model = model.language_model
    eos = language_model.eos_id
    rows = torch.tensor([prompt] * len(features))
    with attach(language_model, model.image_inputs(features)) as attached:
        inputs = attached.inputs(rows)
        found = language_model.causal_lm.generate(
            **(inputs | {"input_ids": rows}),
            attention_mask=torch.ones(
                inputs.get("inputs_embeds", rows).shape[:2], dtype=torch.long
            ),
            num_beams=decode.num_beams,
            max_new_tokens=decode.max_new_tokens,
            pad_token_id=eos,
            eos_token_id=eos,
            **options,
        )
    ends = [[*row, eos] for row in found[:, len(prompt) :].tolist()]
    return [row[: row.index(eos)] for row in ends]


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_beams_read_the_prefix_of_their_image(
    tiny_vit_dir: Path, tiny_llama_dir: Path, attention: str, num_images: int
) -> None:
    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir, "deep_prefix")
    recipe = recipe.replace(language_model=recipe.language_model.replace(attention=attention))
    model = tiny_captioner(recipe)
    features = random_features(model, num_images)
    ids = torch.randint(3, 300, (3 * num_images, 5))
    with torch.no_grad():
        shared, repeated = map(model.image_inputs, (features, features.repeat_interleave(3, 0)))
        torch.testing.assert_close(model.text_states(ids, shared), model.text_states(ids, repeated))


@pytest.mark.parametrize(
    "bridge", [bridge for bridge in BRIDGES if SPEAKS_TO[bridge] not in CROSS_ATTENDING]
)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_static_cache_and_a_compiled_model_take_the_same_captions(
    bridge: str, num_beams: int
) -> None:
    model = toy_captioner(bridge)
    features, decode = random_features(model, NUM_IMAGES), BEAMS.replace(num_beams=num_beams)
    expected, _ = generated(model, features, [TOY_START], decode)
    causal_lm = model.language_model.causal_lm
    model.language_model.is_compiled = True
    torch._dynamo.reset()  # it compiles a function so many times, for all models together
    counter = (
        CompileCounter()
    )  # traces as always and runs the graphs as they are: no minutes in a compiler
    causal_lm.forward = torch.compile(causal_lm.forward, backend=counter)
    static = {"cache_implementation": "static"}
    for some in (features, features[:3]):
        found = plainly_generated(model, some, [TOY_START], decode, **static)
        assert found == expected[: len(some)]
    assert counter.frame_count, "nothing was compiled"


def test_compilation_is_refused_where_it_would_do_nothing() -> None:
    with pytest.raises(ModelError, match="caption without --compile"):
        toy_captioner("prefix").use_static_cache()


SAMPLE = DecodeSettings(num_beams=1, max_new_tokens=8, do_sample=True, temperature=1.5, seed=1)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_sampling_repeats_with_its_seed(bridge: str, num_beams: int) -> None:
    model = toy_captioner(bridge)
    features = random_features(model, NUM_IMAGES)

    def captions(seed: int) -> list[list[int]]:
        return generated(
            model, features, [TOY_START], SAMPLE.replace(num_beams=num_beams, seed=seed)
        )[0]

    assert captions(1) == captions(1)
    assert captions(1) != captions(2)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_draws_belong_to_the_image_whatever_the_batch_and_its_order(
    bridge: str, num_beams: int
) -> None:
    model = toy_captioner(bridge)
    features, decode = random_features(model, NUM_IMAGES), SAMPLE.replace(num_beams=num_beams)
    together, _ = generated(model, features, [TOY_START], decode, 2)
    assert len(set(map(tuple, together))) > 4, "images that all say the same show nothing"
    backwards, _ = generated(model, features.flip(0), [TOY_START], decode, 2)
    for index, one in enumerate(features.split(1)):
        own = together[2 * index : 2 * index + 2]
        assert generated(model, one, [TOY_START], decode, 2)[0] == own
        place = 2 * (NUM_IMAGES - 1 - index)
        assert backwards[place : place + 2] == own
    if num_beams == 1:
        assert generated(model, features, [TOY_START], decode, 1)[0] == together[::2]


def test_images_draw_different_numbers() -> None:
    model = toy_captioner("prefix")
    features = random_features(model, 1).expand(NUM_IMAGES, -1, -1)
    twins, _ = generated(model, features, [TOY_START], SAMPLE)
    assert len(set(map(tuple, twins))) == 1
    others, _ = generated(model, features, [TOY_START], SAMPLE, keys=range(NUM_IMAGES))
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


class TestCaptioner:
    """The pipeline from paths to captions."""

    @pytest.fixture
    def language_model_dir(self, bridge: str, request: pytest.FixtureRequest) -> Path:
        return request.getfixturevalue(f"tiny_{SPEAKS_TO[bridge]}_dir")

    @pytest.fixture
    def captioner(self, tiny_vit_dir: Path, language_model_dir: Path, bridge: str) -> Captioner:
        recipe = tiny_recipe(
            tiny_vit_dir, language_model_dir, bridge, decode={"num_beams": 3, "max_new_tokens": 8}
        )
        return Captioner(tiny_captioner(recipe), recipe)

    @pytest.fixture
    def pictures(self, drawn_caption_folder: Path) -> list[Path]:
        return [image.path for image in CaptionFolder.open(drawn_caption_folder).split("test")]

    def test_every_image_is_encoded_once(self, captioner: Captioner, pictures: list[Path]) -> None:
        encoded: list[int] = []
        bridged: list[int] = []
        captioner.model.vision_encoder.register_forward_hook(
            lambda *args: encoded.append(len(args[2]))
        )
        encode = captioner.model.bridge.encode
        captioner.model.bridge.encode = lambda x: bridged.append(len(x)) or encode(x)
        captioner.caption(pictures, batch_size=3)
        assert sum(encoded) == sum(bridged) == len(pictures)
        assert len(encoded) == -(-len(pictures) // 3)

    @pytest.mark.parametrize("do_sample", [False, True])
    def test_the_batch_size_changes_nothing(
        self, captioner: Captioner, pictures: list[Path], do_sample: bool
    ) -> None:
        decode = SAMPLE if do_sample else None
        one_by_one = captioner.caption(pictures, batch_size=1, decode=decode)
        together = captioner.caption(pictures, batch_size=5, decode=decode)
        assert [r.image for r in together] == [str(path) for path in pictures]
        assert [r.caption for r in one_by_one] == [r.caption for r in together]
        assert [r.score for r in one_by_one] == pytest.approx([r.score for r in together], abs=1e-5)
        backwards = captioner.caption(pictures[::-1], batch_size=5, decode=decode)
        assert [r.caption for r in backwards[::-1]] == [r.caption for r in together]

    def test_a_broken_picture_leaves_the_others_alone(
        self, captioner: Captioner, pictures: list[Path], tmp_path: Path
    ) -> None:
        broken = tmp_path / "broken.jpg"
        broken.write_bytes(b"not a picture")
        expected = captioner.caption(pictures[:3])
        done: list[int] = []
        mixed = captioner.caption(
            [broken, *pictures[:2], broken, pictures[2], broken], batch_size=2, progress=done.append
        )
        assert [r.caption for r in mixed if r.error is None] == [r.caption for r in expected]
        assert [r.error is not None for r in mixed] == [True, False, False, True, False, True]
        assert all(r.caption is None and r.score is None for r in mixed if r.error)
        assert done == [2, 4, 6]

    def test_pictures_are_read_ahead_but_not_all_at_once(
        self, captioner: Captioner, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoder: Any = captioner.model.vision_encoder
        preprocess, prepared = encoder.preprocess, []
        monkeypatch.setattr(
            encoder, "preprocess", lambda batch: prepared.append(len(batch)) or preprocess(batch)
        )
        ahead: list[int] = []
        captioner.caption(
            pictures * 3, batch_size=2, progress=lambda done: ahead.append(sum(prepared) - done)
        )
        assert sum(prepared) == 3 * len(pictures)
        assert max(ahead) <= 2 * (DECODE_AHEAD + 1)

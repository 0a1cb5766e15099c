"""Generation: the same captions whatever the batch, the cache or the number of steps it takes to get there."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
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
    random_features,
    tiny_captioner,
    tiny_recipe,
    toy_captioner,
)
from vlm_bridge.captioning.pipeline import DECODE_AHEAD, Captioner
from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture.captioner import CaptionerModel, generation_options

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
    together, scores = model.generate_captions(features, [TOY_START], decode)
    # The batch must be worth comparing: captions that end, and at different lengths.
    assert len({len(ids) for ids in together}) > 2
    assert min(len(ids) for ids in together) < decode.max_new_tokens
    for index in range(NUM_IMAGES):
        (alone,), (score,) = model.generate_captions(features[index : index + 1], [TOY_START], decode)
        assert alone == together[index]
        assert score == pytest.approx(scores[index], abs=1e-5)


@pytest.mark.parametrize(("bridge", "language_model"), SYSTEMS)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_cache_changes_nothing(
    tiny_vit_dir: Path, language_model: str, bridge: str, num_beams: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{language_model}_dir")
    model = tiny_captioner(tiny_recipe(tiny_vit_dir, folder, bridge))
    prompt = torch.tensor([[1, 40, 50]]).expand(3, -1)
    with torch.inference_mode():
        state = model.image_state(random_features(model, 3))
        cached, uncached = (
            model.generate(
                input_ids=prompt,
                image_state=state,
                attention_mask=torch.ones_like(prompt),
                num_beams=num_beams,
                # Longer than tiny Gemma 2's window.
                max_new_tokens=14,
                use_cache=use_cache,
            )
            for use_cache in (True, False)
        )
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize(("bridge", "language_model"), SYSTEMS)
@torch.inference_mode()
def test_greedy_takes_the_likeliest_token_of_the_training_path(
    tiny_vit_dir: Path, language_model: str, bridge: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{language_model}_dir")
    model = tiny_captioner(tiny_recipe(tiny_vit_dir, folder, bridge))
    features = random_features(model, 1)
    (ids,), _ = model.generate_captions(features, [1], replace(GREEDY, max_new_tokens=14))
    row = torch.tensor([[1, *ids]])
    logits = model(row, model.image_state(features), segments=torch.ones_like(row)).logits[0]
    assert ids == logits[: len(ids)].argmax(-1).tolist()


def test_greedy_is_a_beam_of_one_and_length_is_bounded(bridge: str) -> None:
    model = toy_captioner(bridge)
    features = random_features(model, NUM_IMAGES)
    for limit in (1, 4):
        captions, _ = model.generate_captions(features, [TOY_START], replace(GREEDY, max_new_tokens=limit))
        assert max(map(len, captions)) <= limit
        assert not any(TOY_EOS in ids for ids in captions)


def test_the_n_best_are_the_best_beams_in_order(bridge: str) -> None:
    model = toy_captioner(bridge)
    features = random_features(model, NUM_IMAGES)
    best, scores = model.generate_captions(features, [TOY_START], BEAMS)
    all_beams, all_scores = model.generate_captions(features, [TOY_START], BEAMS, num_return_sequences=3)
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
    draw = replace(GREEDY, do_sample=True, temperature=4.0)
    captions, scores = model.generate_captions(features, [TOY_START], draw, num_return_sequences=6)
    assert len(captions) == len(scores) == 12
    assert len(set(map(tuple, captions[:6]))) > 1
    with pytest.raises(ConfigurationError, match=r"more than decode\.num_beams=3"):
        model.generate_captions(features, [TOY_START], BEAMS, num_return_sequences=4)


@torch.inference_mode()
def every_caption(model: CaptionerModel, state: torch.Tensor, limit: int) -> dict[tuple[int, ...], float]:
    """The log-probability of each caption of at most ``limit`` tokens: ended by EOS, or cut at the limit."""
    vocabulary = model.language_model.vocab_size
    others = [token for token in range(vocabulary) if token != TOY_EOS]
    captions: dict[tuple[int, ...], float] = {}
    for length in range(limit):
        ended = [(*words, TOY_EOS) for words in itertools.product(others, repeat=length)]
        cut = list(itertools.product(others, repeat=limit)) if length == limit - 1 else []
        rows = torch.tensor([(TOY_START, *tokens) for tokens in ended + cut])
        log_probs = model(rows[:, :-1], state.expand(len(rows), *state.shape[1:])).logits.log_softmax(-1)
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
        captions = every_caption(model, model.image_state(one), limit)
        assert sum(map(math.exp, captions.values())) == pytest.approx(1, abs=1e-4)
        normalised = {tokens: total / len(tokens) ** length_penalty for tokens, total in captions.items()}
        best = max(normalised, key=normalised.__getitem__)
        (found,), (score,) = model.generate_captions(one, [TOY_START], decode)
        assert found == [token for token in best if token != TOY_EOS]
        assert score == pytest.approx(captions[best] / len(best), abs=1e-5)
        (greedy,), _ = model.generate_captions(one, [TOY_START], replace(decode, num_beams=1))
        beats_greedy += greedy != found
    assert beats_greedy, "a search that never differs from greedy shows nothing"


def test_score_is_the_mean_log_probability_with_the_end(bridge: str) -> None:
    model = toy_captioner(bridge)
    features = random_features(model, 2)
    captions, scores = model.generate_captions(features, [TOY_START], replace(BEAMS, max_new_tokens=4))
    for index, (ids, score) in enumerate(zip(captions, scores, strict=True)):
        table = every_caption(model, model.image_state(features[index : index + 1]), 4)
        tokens = (*ids, TOY_EOS) if len(ids) < 4 else tuple(ids)
        assert score == pytest.approx(table[tokens] / len(tokens), abs=1e-5)


@torch.inference_mode()
def scores_read_again(
    model: CaptionerModel, features: torch.Tensor, captions: list[list[int]], limit: int
) -> list[float]:
    """The mean log-probability per token of captions that the whole model reads once more, from their first token."""
    scores = []
    for one, ids in zip(features.split(1), captions, strict=True):
        tokens = [*ids, model.language_model.eos_id] if len(ids) < limit else ids
        row = torch.tensor([[PROMPT, *tokens]])
        log_probs = model(row[:, :-1], model.image_state(one)).logits.log_softmax(-1)
        scores.append(log_probs.gather(-1, row[:, 1:, None]).mean().item())
    return scores


@torch.inference_mode()
def plainly_generated(
    model: CaptionerModel, features: torch.Tensor, decode: DecodeSettings
) -> list[list[int]]:
    """Captions by transformers' `generate` alone: every beam with its own copy of everything, no cache of ours."""
    prompt = torch.full((len(features), 1), PROMPT)
    rows = model.generate(
        input_ids=prompt,
        image_state=model.image_state(features),
        attention_mask=torch.ones_like(prompt),
        **generation_options(decode),
    )
    ends = [[*row, model.language_model.eos_id] for row in rows[:, 1:].tolist()]
    return [row[: row.index(model.language_model.eos_id)] for row in ends]


DECODES = {
    "greedy": GREEDY,
    "beams": BEAMS,
    "constrained": replace(
        BEAMS, min_new_tokens=4, no_repeat_ngram_size=2, repetition_penalty=1.3, length_penalty=0.5
    ),
}


@pytest.mark.parametrize("decode", DECODES.values(), ids=DECODES)
@pytest.mark.parametrize(("bridge", "language_model"), SYSTEMS)
def test_sharing_an_image_among_beams_changes_nothing(
    tiny_vit_dir: Path,
    language_model: str,
    bridge: str,
    decode: DecodeSettings,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(f"tiny_{language_model}_dir")
    model = tiny_captioner(tiny_recipe(tiny_vit_dir, folder, bridge))
    features = random_features(model, 4)
    # Longer than tiny Gemma 2's window.
    decode = replace(decode, max_new_tokens=14)
    expected = plainly_generated(model, features, decode)
    found, scores = model.generate_captions(features, [PROMPT], decode)
    assert found == expected
    assert scores == pytest.approx(scores_read_again(model, features, expected, 14), abs=1e-5)

    if language_model in CROSS_ATTENDING:
        with pytest.raises(ModelError, match="cross-attends, and its cache cannot be of fixed size"):
            model.use_static_caches(compile_step=False)
        return
    model.use_static_caches(compile_step=False)
    for some in (features, features[:3], features):  # the smaller batch is filled up
        fixed, fixed_scores = model.generate_captions(some, [PROMPT], decode)
        assert fixed == expected[: len(some)]
        assert fixed_scores == pytest.approx(scores[: len(some)], abs=1e-5)


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_beams_read_the_prefix_of_their_image(
    tiny_vit_dir: Path, tiny_llama_dir: Path, attention: str, num_images: int
) -> None:
    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir, "deep_prefix")
    recipe = replace(recipe, language_model=replace(recipe.language_model, attention=attention))
    model = tiny_captioner(recipe)
    state = model.image_state(random_features(model, num_images))
    ids = torch.randint(3, 300, (3 * num_images, 5))
    with torch.no_grad():
        torch.testing.assert_close(
            model.text_states(ids, state), model.text_states(ids, state.repeat_interleave(3, 0))
        )


@pytest.mark.parametrize("bridge", [bridge for bridge in BRIDGES if SPEAKS_TO[bridge] not in CROSS_ATTENDING])
def test_a_compiled_step_takes_the_same_captions(bridge: str) -> None:
    model = toy_captioner(bridge)
    features = random_features(model, NUM_IMAGES)
    expected = model.generate_captions(features, [TOY_START], BEAMS)
    model.use_static_caches(compile_step=True)
    compiled = CompileCounter()  # traces as always and runs the graphs as they are: no minutes in a compiler
    model._decode_step = torch.compile(model.text_states, backend=compiled, dynamic=False)
    num_graphs = []
    for some in (features, features, features[:3]):
        captions, scores = model.generate_captions(some, [TOY_START], BEAMS)
        assert captions == expected[0][: len(some)]
        assert scores == pytest.approx(expected[1][: len(some)], abs=1e-5)
        num_graphs.append(compiled.frame_count)
    assert 1 <= num_graphs[0] < BEAMS.max_new_tokens - 1, "every length is compiled anew"
    assert num_graphs[0] == num_graphs[-1], "every batch is compiled anew"


def test_sampling_repeats_with_its_seed(bridge: str) -> None:
    model = toy_captioner(bridge)
    features = random_features(model, NUM_IMAGES)
    sample = DecodeSettings(num_beams=1, max_new_tokens=8, do_sample=True, temperature=1.5, seed=1)

    def captions(seed: int) -> list[list[int]]:
        return model.generate_captions(features, [TOY_START], replace(sample, seed=seed))[0]

    assert captions(1) == captions(1)
    assert captions(1) != captions(2)


def test_min_new_tokens_and_no_repeats_hold(bridge: str) -> None:
    model = toy_captioner(bridge)
    features = random_features(model, NUM_IMAGES)
    longer, _ = model.generate_captions(features, [TOY_START], replace(BEAMS, min_new_tokens=5))
    assert min(map(len, longer)) >= 5
    unrepeated, _ = model.generate_captions(features, [TOY_START], replace(BEAMS, no_repeat_ngram_size=2))
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
        captioner.model.vision_encoder.register_forward_hook(lambda *args: encoded.append(len(args[2])))
        encode_image = captioner.model.bridge.encode_image
        captioner.model.bridge.encode_image = lambda x: bridged.append(len(x)) or encode_image(x)
        captioner.caption(pictures, batch_size=3)
        assert sum(encoded) == sum(bridged) == len(pictures)
        assert len(encoded) == -(-len(pictures) // 3)

    def test_the_batch_size_changes_nothing(self, captioner: Captioner, pictures: list[Path]) -> None:
        one_by_one = captioner.caption(pictures, batch_size=1)
        together = captioner.caption(pictures, batch_size=5)
        assert [r.image for r in together] == [str(path) for path in pictures]
        assert [r.caption for r in one_by_one] == [r.caption for r in together]
        assert [r.score for r in one_by_one] == pytest.approx([r.score for r in together], abs=1e-5)

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

    def test_pictures_in_memory_are_captioned_as_files_are(
        self, captioner: Captioner, pictures: list[Path]
    ) -> None:
        from vlm_bridge.data_pipeline.images import open_image

        files = captioner.caption(pictures[:2])
        memory = captioner.caption([open_image(path).convert("RGBA") for path in pictures[:2]])
        assert [r.caption for r in files] == [r.caption for r in memory]
        assert captioner.caption([]) == []

    def test_the_prompt_stands_before_the_caption_and_not_in_it(
        self, tiny_vit_dir: Path, language_model_dir: Path, bridge: str, pictures: list[Path]
    ) -> None:
        recipe = tiny_recipe(
            tiny_vit_dir, language_model_dir, bridge, decode={"num_beams": 1, "max_new_tokens": 6}
        )
        prompted = replace(recipe, language_model=replace(recipe.language_model, prompt="The black dog"))
        bare, asked = (Captioner(tiny_captioner(r), r).caption(pictures[:1])[0] for r in (recipe, prompted))
        assert asked.score != bare.score
        assert asked.caption is not None
        assert "The black dog" not in asked.caption

"""Drawn scenes: objects, captions, and how captions are read back."""

from __future__ import annotations

import pickle
from itertools import combinations

import pytest

from vlm_bridge.data_pipeline.sources.scenes import (
    HELD_OUT_PAIRS,
    IMAGE_SIZE,
    INVERSE,
    SIZES,
    TRAINING_PAIRS,
    Kind,
    SceneFacts,
    Scenes,
    describe,
    judge_caption,
    make_scene,
    parse_caption,
)

SCENES = [make_scene(0, "train", index) for index in range(300)]


def test_every_caption_of_every_scene_states_its_facts() -> None:
    kinds = sorted(TRAINING_PAIRS | HELD_OUT_PAIRS)
    counted = ((kind, count, size) for kind in kinds for count in (1, 2, 3, 4) for size in SIZES)
    facts = [SceneFacts((kind,), count, size) for kind, count, size in counted]
    pairs = list(combinations(kinds, 2))[::7]
    facts += [SceneFacts(pair, 2, relation=name) for pair in pairs for name in INVERSE]
    for one in facts:
        assert [parse_caption(caption) for caption in describe(one)] == [one, one]


def test_captions_read_like_english() -> None:
    cross = SceneFacts((Kind("blue", "cross"),), 3, "small")
    assert describe(cross)[0] == "Three small blue crosses."
    relation = SceneFacts((Kind("green", "star"), Kind("orange", "heart")), 2, relation="above")
    assert describe(relation) == [
        "A green star above an orange heart.",
        "An orange heart below a green star.",
    ]


def test_parsing_is_tolerant_within_the_grammar() -> None:
    squares = SceneFacts((Kind("blue", "square"),), 3, "small")
    for text in ("There are three small blue squares!", "  THREE SMALL BLUE SQUARES . "):
        assert parse_caption(text) == squares
    for text in ("", "A dog.", "A large red.", "Blue squares.", "A red circle above."):
        assert parse_caption(text) is None


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_only_the_test_split_shows_held_out_pairs(split: str) -> None:
    shown = {item.kind for index in range(200) for item in make_scene(3, split, index).objects}
    assert shown == (HELD_OUT_PAIRS if split == "test" else TRAINING_PAIRS)


def test_objects_are_as_in_the_caption_inside_and_apart() -> None:
    for scene in SCENES:
        assert len(scene.objects) == scene.facts.count
        assert {item.kind for item in scene.objects} == set(scene.facts.kinds)
        for item in scene.objects:
            for coordinate in item.center:
                assert item.diameter / 2 < coordinate < IMAGE_SIZE - item.diameter / 2
        for first, second in combinations(scene.objects, 2):
            distance = max(abs(a - b) for a, b in zip(first.center, second.center, strict=True))
            assert distance > (first.diameter + second.diameter) / 2
        if scene.facts.relation is not None:
            (x1, y1), (x2, y2) = (item.center for item in scene.objects)
            expected = {"above": y2 - y1, "to the left of": x2 - x1}
            assert expected[scene.facts.relation] > 80
            assert min(abs(x2 - x1), abs(y2 - y1)) < 30  # no other relation could be meant
    diameters = {
        size: [i.diameter for s in SCENES for i in s.objects if s.facts.size == size]
        for size in SIZES
    }
    assert max(diameters["small"]) * 1.4 < min(diameters["large"])


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    item = Scenes(3, 0, 0, seed=5).items()[2]
    assert callable(item.image)
    drawn = item.image().tobytes()
    assert pickle.loads(pickle.dumps(item)).image().tobytes() == drawn
    assert make_scene(5, "train", 2).draw().tobytes() == drawn
    assert make_scene(6, "train", 2) != make_scene(5, "train", 2) != make_scene(5, "val", 2)


REFERENCE = "A green star above a red heart."
FACTS = ("color_shape", "color", "shape", "count", "size", "relation")


@pytest.mark.parametrize(
    ("hypothesis", "reference", "verdict"),
    [
        ("A green star above a red heart.", REFERENCE, (True, True, True, True, None, True)),
        ("a red heart below a green star", REFERENCE, (True, True, True, True, None, True)),
        ("A red heart above a green star.", REFERENCE, (True, True, True, True, None, False)),
        ("A red star above a green heart.", REFERENCE, (False, True, True, True, None, False)),
        ("A green star above a red circle.", REFERENCE, (False, True, False, True, None, False)),
        ("A green star.", REFERENCE, (False, False, False, False, None, False)),
        ("A dog on grass.", REFERENCE, (False, False, False, False, None, False)),
        ("There are three small blue squares.", "Three small blue squares.", (True,) * 5 + (None,)),
        ("Two large blue squares.", "Three small blue squares.",
         (True, True, True, False, False, None)),
    ],
)  # fmt: skip
def test_captions_are_judged_by_their_facts(
    hypothesis: str, reference: str, verdict: tuple[bool | None, ...]
) -> None:
    assert judge_caption(hypothesis, reference) == dict(zip(FACTS, verdict, strict=True))
    with pytest.raises(ValueError, match="not a scene caption"):
        judge_caption(reference, "A dog.")

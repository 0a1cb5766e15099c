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
    pair = SceneFacts((Kind("green", "star"), Kind("orange", "heart")), 2, relation="above")
    said = ["A green star above an orange heart.", "An orange heart below a green star."]
    assert describe(pair) == said


def test_parsing_is_tolerant_within_the_grammar() -> None:
    squares = SceneFacts((Kind("blue", "square"),), 3, "small")
    assert parse_caption("  There are THREE SMALL BLUE squares ! ") == squares
    for text in ("", "A dog.", "A large red.", "Blue squares.", "A red circle above."):
        assert parse_caption(text) is None


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_only_the_test_split_shows_held_out_pairs(split: str) -> None:
    shown = {kind for index in range(300) for kind in make_scene(3, split, index).facts.kinds}
    assert shown == (HELD_OUT_PAIRS if split == "test" else TRAINING_PAIRS)


def test_objects_are_as_in_the_caption_inside_and_apart() -> None:
    sizes: dict[str, list[float]] = {"small": [], "large": []}
    for scene in (make_scene(0, "train", index) for index in range(300)):
        assert len(scene.objects) == scene.facts.count
        boxes = []
        for corners, _ in scene.objects:
            xs, ys = zip(*((corner.real, corner.imag) for corner in corners), strict=True)
            boxes.append((min(xs), min(ys), max(xs), max(ys)))
            assert min(boxes[-1]) > -3 and max(boxes[-1]) < IMAGE_SIZE + 3  # but for the tips
            if scene.facts.size is not None:
                sizes[scene.facts.size].append(max(xs) - min(xs))
        for a, b in combinations(boxes, 2):
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
        if scene.facts.relation is not None:
            centers = [complex(x1 + x2, y1 + y2) / 2 for x1, y1, x2, y2 in boxes]
            apart = centers[1] - centers[0]
            if scene.facts.relation == "above":
                apart = complex(apart.imag, apart.real)
            along, across = apart.real, apart.imag
            assert along > 75 and abs(across) < 35  # no other relation could be meant
    assert max(sizes["small"]) < min(sizes["large"])


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    item = Scenes(3, 0, 0, seed=5).items()[2]
    assert callable(item.image)
    drawn = item.image().tobytes()
    assert pickle.loads(pickle.dumps(item)).image().tobytes() == drawn
    assert make_scene(5, "train", 2).draw().tobytes() == drawn
    assert make_scene(6, "train", 2) != make_scene(5, "train", 2) != make_scene(5, "val", 2)


REFERENCE = "A green star above a red heart."
FACTS = ("color_shape", "color", "shape", "count", "relation")


@pytest.mark.parametrize(
    ("hypothesis", "reference", "verdict"),
    [
        ("A green star above a red heart.", REFERENCE, (True, True, True, True, True)),
        ("a red heart below a green star", REFERENCE, (True, True, True, True, True)),
        ("A red heart above a green star.", REFERENCE, (True, True, True, True, False)),
        ("A red star above a green heart.", REFERENCE, (False, True, True, True, False)),
        ("A green star above a red circle.", REFERENCE, (False, True, False, True, False)),
        ("A green star.", REFERENCE, (False,) * 5),
        ("A dog on grass.", REFERENCE, (False,) * 5),
        ("There are three small blue squares.", "Three small blue squares.", (True,) * 4 + (None,)),
        ("Two large blue squares.", "Three small blue squares.", (True, True, True, False, None)),
    ],
)  # fmt: skip
def test_captions_are_judged_by_their_facts(
    hypothesis: str, reference: str, verdict: tuple[bool | None, ...]
) -> None:
    assert judge_caption(hypothesis, reference) == dict(zip(FACTS, verdict, strict=True))

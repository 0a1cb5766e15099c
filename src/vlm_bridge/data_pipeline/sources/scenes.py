"""Drawn scenes, captioned by a grammar that can be read back.

A scene shows one object, two to four equal objects, or two objects in a relation::

    caption  =  noun  |  noun relation noun  |  "There is/are" noun            closed by "."
    noun     =  ["A" | "Two" | "Three" | "Four"] [size] color shape[s]
    relation =  "above" | "below" | "to the left of" | "to the right of"

The test split shows only :data:`HELD_OUT_PAIRS`, color-shape pairs that training and validation
never show, though they show each of those colors and shapes.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw

from vlm_bridge.data_pipeline.sources import Source, SourceItem
from vlm_bridge.data_pipeline.splits import SplitName
from vlm_bridge.errors import UsageError

Point = tuple[float, float]
RGB = tuple[int, ...]

IMAGE_SIZE = 224
COLORS: dict[str, RGB] = {
    "red": (206, 24, 34), "green": (24, 140, 52), "blue": (28, 70, 208),
    "yellow": (255, 224, 24), "orange": (255, 128, 0), "purple": (126, 36, 156),
    "black": (14, 14, 16), "white": (253, 253, 253),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES = ("small", "large")
INVERSE = {"above": "below", "to the left of": "to the right of"}


class Kind(NamedTuple):
    """A color and a shape."""

    color: str
    shape: str


# A diagonal of the 8 x 6 table: 5 of the 6 shapes of each color stay for training.
HELD_OUT_PAIRS = frozenset(Kind(color, SHAPES[i % 6]) for i, color in enumerate(COLORS))
TRAINING_PAIRS = frozenset(Kind(c, s) for c in COLORS for s in SHAPES) - HELD_OUT_PAIRS

# Neutral and of middle lightness, so that black and white both stand out.
_BACKGROUNDS = (
    (158, 158, 158), (172, 168, 160), (160, 166, 174), (180, 172, 158), (148, 152, 148),
)  # fmt: skip
_SMALL, _LARGE, _LARGEST = (46, 54), (84, 94), (110, 145)  # diameters in pixels
_SUPERSAMPLING = 4


class SceneFacts(NamedTuple):
    """The content of a caption; in a relation, the first kind stands above or left."""

    kinds: tuple[Kind, ...]
    count: int = 1
    size: str | None = None
    relation: str | None = None


class SceneObject(NamedTuple):
    """A drawn object: center and diameter in pixels, rotation in degrees."""

    kind: Kind
    center: Point
    diameter: float
    rotation: float
    color: RGB

    def outline(self) -> list[Point]:
        """Return its corners in pixels of the enlarged image."""
        angle, scale = math.radians(self.rotation), _SUPERSAMPLING * self.diameter / 2
        turn = complex(math.cos(angle), math.sin(angle)) * scale
        middle = complex(*self.center) * _SUPERSAMPLING
        corners = (complex(*point) * turn + middle for point in _OUTLINES[self.kind.shape])
        return [(corner.real, corner.imag) for corner in corners]


@dataclass(frozen=True)
class Scene:
    """An image to draw, and its facts; the background grows lighter towards ``light`` (radians)."""

    facts: SceneFacts
    objects: tuple[SceneObject, ...]
    background: RGB
    light: float

    def draw(self) -> Image.Image:
        """Return the image, ``IMAGE_SIZE`` square, antialiased."""
        side, big = 8, IMAGE_SIZE * _SUPERSAMPLING
        slope = Image.new("RGB", (side, side))
        for x, y in ((x, y) for x in range(side) for y in range(side)):
            across = (x / (side - 1) - 0.5) * math.cos(self.light)
            across += (y / (side - 1) - 0.5) * math.sin(self.light)
            slope.putpixel((x, y), tuple(round(c + 16 * across) for c in self.background))
        image = slope.resize((big, big), Image.Resampling.BICUBIC)
        pen = ImageDraw.Draw(image)
        for item in self.objects:
            edge = tuple(int(channel * 0.72) for channel in item.color)
            pen.polygon(item.outline(), fill=item.color, outline=edge, width=_SUPERSAMPLING)
        return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def make_scene(seed: int, split: SplitName, index: int) -> Scene:
    """Return scene number ``index`` of a split; it depends on the three arguments alone."""
    # random hashes a text seed by SHA-512: the same in every process and on every platform.
    rng = random.Random(f"{seed}/{split}/{index}")
    pairs = sorted(HELD_OUT_PAIRS if split == "test" else TRAINING_PAIRS)
    background = _jitter(rng.choice(_BACKGROUNDS), rng, 3)
    light = rng.uniform(0, math.tau)
    kind_of_scene = rng.choices(("single", "counted", "relation"), (0.35, 0.35, 0.3))[0]
    if kind_of_scene == "relation":
        facts, objects = _relation_scene(rng, pairs)
    else:
        kind = rng.choice(pairs)
        count = 1 if kind_of_scene == "single" else rng.randint(2, 4)
        facts, objects = _equal_objects_scene(rng, kind, count)
    return Scene(facts, tuple(objects), background, light)


def _equal_objects_scene(
    rng: random.Random, kind: Kind, count: int
) -> tuple[SceneFacts, list[SceneObject]]:
    size = rng.choice(SIZES)
    large = _LARGEST if count == 1 else _LARGE
    diameter = rng.uniform(*(_SMALL if size == "small" else large))
    # One cell of a square grid each: nothing overlaps.
    cells_a_side = 1 if count == 1 else {"small": 3, "large": 2}[size]
    cell = IMAGE_SIZE / cells_a_side
    slack = (cell - diameter * 1.12) / 2
    objects = []
    for index in rng.sample(range(cells_a_side**2), count):
        row, column = divmod(index, cells_a_side)
        x = (column + 0.5) * cell + rng.uniform(-slack, slack)
        y = (row + 0.5) * cell + rng.uniform(-slack, slack)
        objects.append(_make_object(rng, kind, (x, y), diameter * rng.uniform(0.96, 1.04)))
    return SceneFacts((kind,), count, size), objects


def _relation_scene(rng: random.Random, pairs: list[Kind]) -> tuple[SceneFacts, list[SceneObject]]:
    kinds = rng.sample(pairs, 2)
    relation = rng.choice(tuple(INVERSE))
    # Well apart along the axis of the relation and nearly aligned across it: no other relation
    # could be meant.
    along = rng.uniform(46, 66), rng.uniform(158, 178)
    across, offset = rng.uniform(60, 164), rng.uniform(-12, 12)
    objects = []
    for kind, near, aside in zip(kinds, along, (across - offset, across + offset), strict=True):
        center = (aside, near) if relation == "above" else (near, aside)
        objects.append(_make_object(rng, kind, center, rng.uniform(58, 84)))
    return SceneFacts(tuple(kinds), 2, relation=relation), objects


def _make_object(rng: random.Random, kind: Kind, center: Point, diameter: float) -> SceneObject:
    # Rotated so little that a square is no diamond and a cross no "x".
    rotation = rng.uniform(-10, 10)
    return SceneObject(kind, center, diameter, rotation, _jitter(COLORS[kind.color], rng, 8))


def _jitter(color: RGB, rng: random.Random, amount: int) -> RGB:
    return tuple(min(255, max(0, channel + rng.randint(-amount, amount))) for channel in color)


def _shapes() -> dict[str, list[Point]]:
    """Return outlines about the origin that reach about one unit every way, y downwards."""
    turn = [math.tau * i / 90 for i in range(90)]
    star = [(r, math.tau * i / 10) for i, r in enumerate((1.1, 0.45) * 5)]
    quarters = ((1, 0), (0, 1), (-1, 0), (0, -1))  # cosines and sines
    arm = [(0.32, -1.0), (0.32, -0.32), (1.0, -0.32)]

    def height(t: float) -> float:
        return 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)

    return {
        "circle": [(math.cos(t), math.sin(t)) for t in turn],
        "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
        "triangle": [(0, -0.98), (1.02, 0.8), (-1.02, 0.8)],
        "star": [(r * math.sin(t), 0.08 - r * math.cos(t)) for r, t in star],
        "cross": [(x * c - y * s, x * s + y * c) for c, s in quarters for x, y in arm],
        "heart": [(math.sin(t) ** 3, (-height(t) - 2.5) / 15.5) for t in turn],
    }


_OUTLINES = _shapes()


def describe(facts: SceneFacts) -> list[str]:
    """Return two captions that state the same facts, the canonical one first."""
    nouns = [_noun(kind, 1 if facts.relation else facts.count, facts.size) for kind in facts.kinds]
    if facts.relation is not None:
        first, second = nouns
        inverse = f"{second} {INVERSE[facts.relation]} {first}"
        texts = [f"{first} {facts.relation} {second}", inverse]
    else:
        texts = [nouns[0], f"there {'is' if facts.count == 1 else 'are'} {nouns[0]}"]
    return [f"{text[0].upper()}{text[1:]}." for text in texts]


def _noun(kind: Kind, count: int, size: str | None) -> str:
    one = "an" if (size or kind.color)[0] in "aeiou" else "a"
    plural = "" if count == 1 else "es" if kind.shape.endswith("s") else "s"
    number = (one, "two", "three", "four")[count - 1]
    return " ".join(filter(None, (number, size, kind.color, kind.shape + plural)))


def parse_caption(text: str) -> SceneFacts | None:
    """Return the facts of a caption in any case and punctuation, None outside the grammar."""
    return _facts_by_words().get(_words(text))


@functools.cache
def _facts_by_words() -> dict[str, SceneFacts]:
    kinds = sorted(TRAINING_PAIRS | HELD_OUT_PAIRS)
    equal = itertools.product(kinds, (1, 2, 3, 4), (None, *SIZES))
    facts = [SceneFacts((kind,), count, size) for kind, count, size in equal]
    pairs = itertools.product(itertools.product(kinds, repeat=2), INVERSE)
    facts += [SceneFacts(pair, 2, relation=relation) for pair, relation in pairs]
    return {_words(caption): one for one in facts for caption in describe(one)}


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def judge_caption(hypothesis: str, reference: str) -> dict[str, bool | None]:
    """Compare the facts of two captions, not their words.

    Returns:
        Whether each fact is right; None for a size or relation that the reference does not state.
        A hypothesis outside the grammar is wrong throughout.

    Raises:
        ValueError: the reference does not follow the grammar.
    """
    truth, stated = _facts_of(reference), _facts_of(hypothesis)
    if not truth:
        raise ValueError(f"the reference is not a scene caption: {reference!r}")
    return {k: None if fact is None else stated.get(k) == fact for k, fact in truth.items()}


def _facts_of(caption: str) -> dict[str, object]:
    if (facts := parse_caption(caption)) is None:
        return {}
    kinds, count, size, relation = facts
    colors, shapes = (sorted(names) for names in zip(*kinds, strict=True))
    return {
        "color_shape": sorted(kinds), "color": colors, "shape": shapes,
        "count": count, "size": size, "relation": relation and (kinds, relation),
    }  # fmt: skip


@dataclass
class Scenes(Source):
    """Drawn scenes: so many images a split, each drawable alone from (seed, split, index)."""

    name = "scenes"
    description = "Drawn scenes of colored shapes; the test split shows unseen color-shape pairs"
    licence_note = "Drawn by this program: free of rights"
    default_caption_style = "raw"
    finds_near_duplicates = False
    needs_input_dir = False

    num_train: int
    num_val: int
    num_test: int
    seed: int = 0
    wordings: int = 2  # captions of an image

    def items(self) -> list[SourceItem]:
        """Return all scenes, train first; nothing is drawn yet."""
        if min(self.num_train, self.num_val, self.num_test) < 0 or self.wordings not in (1, 2):
            raise UsageError("scenes need counts of images from 0 on, and 1 or 2 wordings")
        self.split_rule = "test shows held-out color-shape pairs only, train and val never do"
        counts: dict[SplitName, int]
        counts = {"train": self.num_train, "val": self.num_val, "test": self.num_test}
        return [
            self._item(split, index) for split, count in counts.items() for index in range(count)
        ]

    def _item(self, split: SplitName, index: int) -> SourceItem:
        captions = describe(make_scene(self.seed, split, index).facts)[: self.wordings]
        draw = functools.partial(_draw_scene, self.seed, split, index)
        return SourceItem(f"{split}-{index:06d}", captions, split, draw)


def _draw_scene(seed: int, split: SplitName, index: int) -> Image.Image:
    return make_scene(seed, split, index).draw()

"""Drawn scenes, captioned by a grammar that can be read back.

A scene shows one object, two to four equal objects, or two objects in a relation::

    caption  =  noun  |  noun relation noun  |  "There is/are" noun            closed by "."
    noun     =  ["A" | "Two" | "Three" | "Four"] [size] color shape[s]
    relation =  "above" | "below" | "to the left of" | "to the right of"

The test split shows only :data:`HELD_OUT_PAIRS`, color-shape pairs that training and validation
never show, though they show each of those colors and shapes.
"""

from __future__ import annotations

import cmath
import functools
import itertools
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw

from vlm_bridge.data_pipeline.sources import Source, SourceItem
from vlm_bridge.data_pipeline.splits import SplitName

RGB = tuple[int, ...]
SceneObject = tuple[list[complex], RGB]
"""Corners x + iy of a polygon in pixels, y downwards, and its color."""

IMAGE_SIZE = 224
COLORS: dict[str, RGB] = {
    "red": (206, 24, 34), "green": (24, 140, 52), "blue": (28, 70, 208),
    "yellow": (255, 224, 24), "orange": (255, 128, 0), "purple": (126, 36, 156),
    "black": (14, 14, 16), "white": (253, 253, 253),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES = ("small", "large")
INVERSE = {"above": "below", "to the left of": "to the right of"}

# Neutral and of middle lightness, so that black and white both stand out.
_BACKGROUNDS = (
    (158, 158, 158), (172, 168, 160), (160, 166, 174), (180, 172, 158), (148, 152, 148),
)  # fmt: skip
_GRIDS = {  # diameters in pixels and cells a side, by size and whether there is one object
    ("small", True): ((46, 54), 1), ("small", False): ((46, 54), 3),
    ("large", True): ((110, 145), 1), ("large", False): ((84, 94), 2),
}  # fmt: skip
_SUPERSAMPLING = 4


class Kind(NamedTuple):
    """A color and a shape."""

    color: str
    shape: str


# A diagonal of the 8 x 6 table: 5 of the 6 shapes of each color stay for training.
HELD_OUT_PAIRS = frozenset(Kind(color, SHAPES[i % 6]) for i, color in enumerate(COLORS))
TRAINING_PAIRS = frozenset(Kind(c, s) for c in COLORS for s in SHAPES) - HELD_OUT_PAIRS


class SceneFacts(NamedTuple):
    """The content of a caption; in a relation, the first kind stands above or left."""

    kinds: tuple[Kind, ...]
    count: int = 1
    size: str | None = None
    relation: str | None = None


class Scene(NamedTuple):
    """An image to draw, and its facts; the background grows lighter towards ``light`` (radians)."""

    facts: SceneFacts
    objects: list[SceneObject]
    background: RGB
    light: float

    def draw(self) -> Image.Image:
        """Return the image, ``IMAGE_SIZE`` square, antialiased."""
        side, big = 8, IMAGE_SIZE * _SUPERSAMPLING
        slope = Image.new("RGB", (side, side))
        for x, y in itertools.product(range(side), repeat=2):
            across = (x / (side - 1) - 0.5) * math.cos(self.light)
            across += (y / (side - 1) - 0.5) * math.sin(self.light)
            slope.putpixel((x, y), tuple(round(c + 16 * across) for c in self.background))
        image = slope.resize((big, big), Image.Resampling.BICUBIC)
        pen = ImageDraw.Draw(image)
        for corners, color in self.objects:
            points = [(_SUPERSAMPLING * c.real, _SUPERSAMPLING * c.imag) for c in corners]
            edge = tuple(int(channel * 0.72) for channel in color)
            pen.polygon(points, fill=color, outline=edge, width=_SUPERSAMPLING)
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
        facts, objects = _related(rng, pairs)
    else:
        kind = rng.choice(pairs)
        count = 1 if kind_of_scene == "single" else rng.randint(2, 4)
        facts, objects = _equal(rng, kind, count)
    return Scene(facts, objects, background, light)


def _equal(rng: random.Random, kind: Kind, count: int) -> tuple[SceneFacts, list[SceneObject]]:
    """Place equal objects in cells of a grid, so that nothing overlaps."""
    size = rng.choice(SIZES)
    diameters, cells_a_side = _GRIDS[size, count == 1]
    diameter = rng.uniform(*diameters)
    cell = IMAGE_SIZE / cells_a_side
    slack = (cell - diameter * 1.12) / 2
    objects = []
    for index in rng.sample(range(cells_a_side**2), count):
        row, column = divmod(index, cells_a_side)
        x = (column + 0.5) * cell + rng.uniform(-slack, slack)
        y = (row + 0.5) * cell + rng.uniform(-slack, slack)
        objects.append(_object(rng, kind, x, y, diameter * rng.uniform(0.96, 1.04)))
    return SceneFacts((kind,), count, size), objects


def _related(rng: random.Random, pairs: list[Kind]) -> tuple[SceneFacts, list[SceneObject]]:
    kinds = rng.sample(pairs, 2)
    relation = rng.choice(tuple(INVERSE))
    # Well apart along the axis of the relation and nearly aligned across it: no other relation
    # could be meant.
    along = rng.uniform(46, 66), rng.uniform(158, 178)
    across, offset = rng.uniform(60, 164), rng.uniform(-12, 12)
    objects = []
    for kind, near, aside in zip(kinds, along, (across - offset, across + offset), strict=True):
        x, y = (aside, near) if relation == "above" else (near, aside)
        objects.append(_object(rng, kind, x, y, rng.uniform(58, 84)))
    return SceneFacts(tuple(kinds), 2, relation=relation), objects


def _object(rng: random.Random, kind: Kind, x: float, y: float, diameter: float) -> SceneObject:
    # Rotated so little that a square is no diamond and a cross no "x".
    turn = cmath.rect(diameter / 2, math.radians(rng.uniform(-10, 10)))
    corners = [complex(x, y) + corner * turn for corner in _OUTLINES[kind.shape]]
    return corners, _jitter(COLORS[kind.color], rng, 8)


def _jitter(color: RGB, rng: random.Random, amount: int) -> RGB:
    return tuple(min(255, max(0, channel + rng.randint(-amount, amount))) for channel in color)


def _heart(t: float) -> complex:
    height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return complex(math.sin(t) ** 3, (-height - 2.5) / 15.5)


_TURN = [math.tau * i / 90 for i in range(90)]
_OUTLINES = {  # about the origin, reaching about one unit every way
    "circle": [cmath.rect(1, t) for t in _TURN],
    "square": [-0.86 - 0.86j, 0.86 - 0.86j, 0.86 + 0.86j, -0.86 + 0.86j],
    "triangle": [-0.98j, 1.02 + 0.8j, -1.02 + 0.8j],
    "star": [0.08j - cmath.rect(r, math.tau * i / 10) * 1j for i, r in enumerate((1.1, 0.45) * 5)],
    "cross": [
        c * 1j**quarter for quarter in range(4) for c in (0.32 - 1j, 0.32 - 0.32j, 1 - 0.32j)
    ],
    "heart": [_heart(t) for t in _TURN],
}


def describe(facts: SceneFacts) -> list[str]:
    """Return two captions that state the same facts, the canonical one first."""
    nouns = [_noun(kind, 1 if facts.relation else facts.count, facts.size) for kind in facts.kinds]
    if facts.relation is not None:
        first, second = nouns
        texts = [
            f"{first} {facts.relation} {second}",
            f"{second} {INVERSE[facts.relation]} {first}",
        ]
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


_FACTS: dict[str, Callable[[SceneFacts], object]] = {
    "color_shape": lambda facts: sorted(facts.kinds),
    "color": lambda facts: sorted(kind.color for kind in facts.kinds),
    "shape": lambda facts: sorted(kind.shape for kind in facts.kinds),
    "count": lambda facts: facts.count,
    "relation": lambda facts: facts.relation and (facts.kinds, facts.relation),
}


def judge_caption(hypothesis: str, reference: str) -> dict[str, bool | None]:
    """Compare the facts of two captions, not their words; ``reference`` follows the grammar.

    Returns:
        Whether each fact is right; None for the relation where the reference states none.
        A hypothesis outside the grammar is wrong throughout.
    """
    truth, stated = parse_caption(reference), parse_caption(hypothesis)
    assert truth is not None, reference
    return {
        name: None if fact(truth) is None else stated is not None and fact(stated) == fact(truth)
        for name, fact in _FACTS.items()
    }


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
        self.split_rule = "test shows held-out color-shape pairs only, train and val never do"
        counts: dict[SplitName, int]
        counts = {"train": self.num_train, "val": self.num_val, "test": self.num_test}
        items: list[SourceItem] = []
        for split, count in counts.items():
            for index in range(count):
                captions = describe(make_scene(self.seed, split, index).facts)[: self.wordings]
                draw = functools.partial(_draw_scene, self.seed, split, index)
                items.append(SourceItem(f"{split}-{index:06d}", captions, split, draw))
        return items


def _draw_scene(seed: int, split: SplitName, index: int) -> Image.Image:
    return make_scene(seed, split, index).draw()

"""Pictures the project draws itself, described by a grammar that can be read back.

A scene shows one object, two to four equal objects, or two objects in a relation. Its captions follow the
grammar below (the first is the canonical one), and :func:`parse_caption` inverts it::

    caption  =  noun  |  noun relation noun  |  "There is/are" noun            closed by "."
    noun     =  ["A" | "Two" | "Three" | "Four"] [size] colour shape[s]
    relation =  "above" | "below" | "to the left of" | "to the right of"

The test split is made of :data:`HELD_OUT_PAIRS` only: colour-shape pairs that training and validation never
show, though they show each of those colours and shapes. Naming them takes seeing, not remembering.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from PIL import Image, ImageDraw

from vlm_bridge.data_pipeline.captions import CaptionStyle
from vlm_bridge.data_pipeline.sources.base import Rejected, SourceItem, SourceOptions
from vlm_bridge.data_pipeline.splits import SplitName, SplitRule
from vlm_bridge.errors import UsageError

Point = tuple[float, float]
RGB = tuple[int, int, int]

PICTURE_SIZE = 224
"""Pixels, both ways: what most vision encoders read."""

COLOURS: dict[str, RGB] = {
    "red": (206, 24, 34),
    "green": (24, 140, 52),
    "blue": (28, 70, 208),
    "yellow": (255, 224, 24),
    "orange": (255, 128, 0),
    "purple": (126, 36, 156),
    "black": (14, 14, 16),
    "white": (253, 253, 253),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES = ("small", "large")
RELATIONS = {  # each with its inverse
    "above": "below",
    "below": "above",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
}
COUNT_WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True, order=True)
class Kind:
    """A colour and a shape."""

    colour: str
    shape: str


ALL_PAIRS = tuple(Kind(colour, shape) for colour in COLOURS for shape in SHAPES)

HELD_OUT_PAIRS = frozenset(
    Kind(colour, SHAPES[i % len(SHAPES)]) for i, colour in enumerate(COLOURS)
)
"""A diagonal of the 8 x 6 table: one shape of each colour, so that 5 of its 6 shapes stay for training."""

TRAINING_PAIRS = frozenset(ALL_PAIRS) - HELD_OUT_PAIRS

# Neutral and of middle lightness, so that black and white both stand out.
_BACKGROUNDS: tuple[RGB, ...] = (
    (158, 158, 158),
    (172, 168, 160),
    (160, 166, 174),
    (180, 172, 158),
    (148, 152, 148),
)

# Diameters in pixels. Small and large stay far apart whatever the count: the size word is never a guess.
_DIAMETERS = {
    (1, "small"): (46, 54),
    (1, "large"): (110, 145),
    (2, "small"): (46, 54),
    (2, "large"): (84, 94),
}
_RELATION_DIAMETER = (58, 84)
_SCENE_KINDS = ("single", "counted", "relation")
_SCENE_WEIGHTS = (0.35, 0.35, 0.3)
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class SceneFacts:
    """What a caption says: one kind of object with its count and size, or two kinds in a relation.

    With a relation, ``kinds[0]`` stands in ``relation`` to ``kinds[1]``; ``count`` is the number of objects.
    """

    kinds: tuple[Kind, ...]
    count: int = 1
    size: str | None = None
    relation: str | None = None

    def canonical_relation(self) -> tuple[Kind, str, Kind] | None:
        """Return the relation read from above or from the left, so that equal facts compare equal."""
        if self.relation is None:
            return None
        first, second = self.kinds
        if self.relation in ("above", "to the left of"):
            return first, self.relation, second
        return second, RELATIONS[self.relation], first


@dataclass(frozen=True)
class SceneObject:
    """One drawn object: centre and diameter in pixels, rotation in degrees, its exact colour."""

    kind: Kind
    centre: Point
    diameter: float
    rotation: float
    colour: RGB


@dataclass(frozen=True)
class Scene:
    """A picture to draw, and the facts that its captions state."""

    facts: SceneFacts
    objects: tuple[SceneObject, ...]
    background: RGB
    light_direction: float
    """Radians: the background grows lighter that way."""

    def draw(self) -> Image.Image:
        """Return the picture, ``PICTURE_SIZE`` square, antialiased."""
        big = PICTURE_SIZE * _SUPERSAMPLING
        picture = _draw_background(self.background, self.light_direction).resize(
            (big, big), Image.Resampling.BICUBIC
        )
        pen = ImageDraw.Draw(picture)
        for item in self.objects:
            outline = [
                (x * _SUPERSAMPLING, y * _SUPERSAMPLING)
                for x, y in _place(
                    _OUTLINES[item.kind.shape], item.centre, item.diameter, item.rotation
                )
            ]
            pen.polygon(
                outline, fill=item.colour, outline=_darker(item.colour), width=_SUPERSAMPLING
            )
        return picture.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)


def make_scene(seed: int, split: SplitName, index: int) -> Scene:
    """Return scene number ``index`` of a split; it depends on the three arguments alone."""
    # A text seed is hashed by SHA-512: the same in every process and on every platform.
    rng = random.Random(f"{seed}/{split}/{index}")
    pairs = sorted(HELD_OUT_PAIRS if split == "test" else TRAINING_PAIRS)
    background: RGB = _jitter(rng.choice(_BACKGROUNDS), rng, 3)
    light = rng.uniform(0, math.tau)
    match rng.choices(_SCENE_KINDS, _SCENE_WEIGHTS)[0]:
        case "relation":
            facts, objects = _relation_scene(rng, pairs)
        case "counted":
            facts, objects = _equal_objects_scene(rng, rng.choice(pairs), count=rng.randint(2, 4))
        case _:
            facts, objects = _equal_objects_scene(rng, rng.choice(pairs), count=1)
    return Scene(facts, tuple(objects), background, light)


def describe(facts: SceneFacts) -> list[str]:
    """Return the captions of a scene, the canonical one first; all state the same facts."""
    if facts.relation is not None:
        first, second = (_noun(kind, 1, None) for kind in facts.kinds)
        inverse = RELATIONS[facts.relation]
        return [
            _sentence(f"{first} {facts.relation} {second}"),
            _sentence(f"{second} {inverse} {first}"),
        ]
    noun = _noun(facts.kinds[0], facts.count, facts.size)
    return [_sentence(noun), _sentence(f"there {'is' if facts.count == 1 else 'are'} {noun}")]


_SIDE = re.compile(
    r"(?:(?P<count>a|an|the|one|two|three|four|[1-4]) )?"
    rf"(?:(?P<size>{'|'.join(SIZES)}) )?"
    rf"(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})(?P<plural>s|es)?"
)
_OPENING = re.compile(r"^(?:there (?:is|are) |(?:a |the )?(?:picture|image|photo) of )")
_RELATION = re.compile(r" (?:is |are )?(?P<relation>above|below|to the (?:left|right) of) ")
_COUNTS = (
    {"a": 1, "an": 1, "the": 1}
    | {word: n for n, word in COUNT_WORDS.items()}
    | {str(n): n for n in COUNT_WORDS}
)


def parse_caption(text: str) -> SceneFacts | None:
    """Return what a caption states, None where it does not follow the grammar.

    Case, punctuation, articles, and number words or digits do not matter; a missing article counts as one, a
    bare plural is refused since it states no count.
    """
    words = " ".join(re.findall(r"[a-z0-9]+", text.lower()))
    words = _OPENING.sub("", words)
    parted = _RELATION.split(words)
    sides = [_parse_noun(side) for side in parted[::2]]
    if any(side is None for side in sides) or len(sides) > 2:
        return None
    facts = [side for side in sides if side is not None]
    if len(facts) == 1:
        return facts[0]
    if any(side.count != 1 for side in facts):
        return None
    return SceneFacts(kinds=(facts[0].kinds[0], facts[1].kinds[0]), count=2, relation=parted[1])


@dataclass(frozen=True)
class SceneVerdict:
    """What a caption gets right of another; None where the reference states nothing of the kind."""

    colour_shape: bool
    colour: bool
    shape: bool
    count: bool
    size: bool | None
    relation: bool | None


def judge_caption(hypothesis: str, reference: str) -> SceneVerdict:
    """Compare two captions by their facts, not by their words.

    ``colour_shape`` needs the same multiset of (colour, shape) kinds, ``colour`` and ``shape`` that of each
    alone; ``relation`` reads "a above b" and "b below a" alike. A hypothesis outside the grammar is
    wrong throughout.

    Raises:
        ValueError: the reference does not follow the grammar.
    """
    truth = parse_caption(reference)
    if truth is None:
        raise ValueError(f"the reference is not a scene caption: {reference!r}")
    said = parse_caption(hypothesis)

    def right(fact: Callable[[SceneFacts], object]) -> bool:
        return said is not None and fact(said) == fact(truth)

    return SceneVerdict(
        colour_shape=right(lambda facts: Counter(facts.kinds)),
        colour=right(lambda facts: Counter(kind.colour for kind in facts.kinds)),
        shape=right(lambda facts: Counter(kind.shape for kind in facts.kinds)),
        count=right(lambda facts: facts.count),
        size=None if truth.size is None else right(lambda facts: facts.size),
        relation=None if truth.relation is None else right(SceneFacts.canonical_relation),
    )


@dataclass
class Scenes:
    """Drawn scenes: ``num_*`` pictures a split, each drawable alone from (seed, split, index)."""

    name: ClassVar[str] = "scenes"
    description: ClassVar[str] = (
        "Drawn scenes of coloured shapes; the test split shows unseen colour-shape pairs"
    )
    licence_note: ClassVar[str] = "Drawn by this program: free of rights"
    default_caption_style: ClassVar[CaptionStyle] = "raw"
    finds_near_duplicates: ClassVar[bool] = False

    num_train: int
    num_val: int
    num_test: int
    seed: int = 0
    wordings: int = 2
    """Captions per picture: 1 is the canonical one alone."""
    split_rule: str | None = field(
        default="test shows held-out colour-shape pairs only, train and val never do", init=False
    )
    rejected: list[Rejected] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if min(self.num_train, self.num_val, self.num_test) < 0:
            raise UsageError("--num-train, --num-val and --num-test must not be negative")
        if self.wordings not in (1, 2):
            raise UsageError(f"--wordings must be 1 or 2, not {self.wordings}")

    @classmethod
    def from_options(cls, options: SourceOptions) -> Scenes:
        return cls(
            options.num_train, options.num_val, options.num_test, options.seed, options.wordings
        )

    @classmethod
    def recognize(cls, folder: Path) -> str | None:
        return None

    @property
    def default_split_rule(self) -> SplitRule:
        return SplitRule()

    def items(self) -> list[SourceItem]:
        """Return all scenes, train first; nothing is drawn yet."""
        counts: dict[SplitName, int] = {
            "train": self.num_train,
            "val": self.num_val,
            "test": self.num_test,
        }
        return [
            self._item(split, index) for split, count in counts.items() for index in range(count)
        ]

    def _item(self, split: SplitName, index: int) -> SourceItem:
        return SourceItem(
            image_id=f"{split}-{index:06d}",
            captions=describe(make_scene(self.seed, split, index).facts)[: self.wordings],
            split=split,
            draw=functools.partial(_draw_scene, self.seed, split, index),
        )


def _draw_scene(seed: int, split: SplitName, index: int) -> Image.Image:
    return make_scene(seed, split, index).draw()


# --- composing ---


def _equal_objects_scene(
    rng: random.Random, kind: Kind, count: int
) -> tuple[SceneFacts, list[SceneObject]]:
    size = rng.choice(SIZES)
    diameter = rng.uniform(*_DIAMETERS[min(count, 2), size])
    # One cell of a square grid each: nothing overlaps. A lone object has the whole picture.
    cells_a_side = 1 if count == 1 else {"small": 3, "large": 2}[size]
    cell = PICTURE_SIZE / cells_a_side
    slack = (cell - diameter * 1.12) / 2
    objects = []
    for index in rng.sample(range(cells_a_side**2), count):
        row, column = divmod(index, cells_a_side)
        centre = (
            (column + 0.5) * cell + rng.uniform(-slack, slack),
            (row + 0.5) * cell + rng.uniform(-slack, slack),
        )
        objects.append(_make_object(rng, kind, centre, diameter * rng.uniform(0.96, 1.04)))
    return SceneFacts(kinds=(kind,), count=count, size=size), objects


def _relation_scene(rng: random.Random, pairs: list[Kind]) -> tuple[SceneFacts, list[SceneObject]]:
    first, second = rng.sample(pairs, 2)
    # The upper or the left object comes first, so that the canonical caption follows from the picture alone.
    relation = rng.choice(("above", "to the left of"))
    # Along the axis of the relation the objects keep well apart; across it they nearly align, so that no
    # other relation could be meant.
    near, far = rng.uniform(46, 66), rng.uniform(158, 178)
    across = rng.uniform(60, 164)
    offset = rng.uniform(-12, 12)
    vertical = relation == "above"
    objects = []
    for kind, position, sideways in zip(
        (first, second), (near, far), (across - offset, across + offset), strict=True
    ):
        centre = (sideways, position) if vertical else (position, sideways)
        objects.append(_make_object(rng, kind, centre, rng.uniform(*_RELATION_DIAMETER)))
    return SceneFacts(kinds=(first, second), count=2, relation=relation), objects


def _make_object(rng: random.Random, kind: Kind, centre: Point, diameter: float) -> SceneObject:
    # Little enough that a square is no diamond and a cross no "x".
    rotation = rng.uniform(-10, 10)
    return SceneObject(kind, centre, diameter, rotation, _jitter(COLOURS[kind.colour], rng, 8))


def _jitter(colour: RGB, rng: random.Random, amount: int) -> RGB:
    red, green, blue = (
        min(255, max(0, channel + rng.randint(-amount, amount))) for channel in colour
    )
    return red, green, blue


def _darker(colour: RGB) -> RGB:
    red, green, blue = (int(channel * 0.72) for channel in colour)
    return red, green, blue


# --- drawing ---


def _draw_background(colour: RGB, direction: float) -> Image.Image:
    """Return a few pixels that, enlarged smoothly, make a gentle slope of light."""
    side = 8
    picture = Image.new("RGB", (side, side))
    for x in range(side):
        for y in range(side):
            across = (x / (side - 1) - 0.5) * math.cos(direction) + (
                y / (side - 1) - 0.5
            ) * math.sin(direction)
            red, green, blue = (round(channel + 16 * across) for channel in colour)
            picture.putpixel((x, y), (red, green, blue))
    return picture


def _circle() -> list[Point]:
    return [(math.cos(t), math.sin(t)) for t in _angles(90)]


def _square() -> list[Point]:
    return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]


def _triangle() -> list[Point]:
    return [(0, -0.98), (1.02, 0.8), (-1.02, 0.8)]


def _star() -> list[Point]:
    radii = (1.1, 0.45)
    return [
        (radii[i % 2] * math.sin(t), 0.08 - radii[i % 2] * math.cos(t))
        for i, t in enumerate(_angles(10))
    ]


def _cross() -> list[Point]:
    arm, reach = 0.32, 1.0
    quarter = [(arm, -reach), (arm, -arm), (reach, -arm)]
    turns: list[Callable[[Point], Point]] = [
        lambda p: p,
        lambda p: (-p[1], p[0]),
        lambda p: (-p[0], -p[1]),
        lambda p: (p[1], -p[0]),
    ]
    return [turn(point) for turn in turns for point in quarter]


def _heart() -> list[Point]:
    curve = [
        (
            16 * math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
        )
        for t in _angles(90)
    ]
    return [(x / 16, (y - 2.5) / 15.5) for x, y in curve]


def _angles(count: int) -> list[float]:
    return [math.tau * i / count for i in range(count)]


# Outlines about the origin that reach about one unit every way, y downwards.
_OUTLINES: dict[str, list[Point]] = {
    "circle": _circle(),
    "square": _square(),
    "triangle": _triangle(),
    "star": _star(),
    "cross": _cross(),
    "heart": _heart(),
}


def _place(outline: list[Point], centre: Point, diameter: float, rotation: float) -> list[Point]:
    cos, sin = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
    radius = diameter / 2
    return [
        (centre[0] + radius * (x * cos - y * sin), centre[1] + radius * (x * sin + y * cos))
        for x, y in outline
    ]


# --- wording ---


def _noun(kind: Kind, count: int, size: str | None) -> str:
    article = COUNT_WORDS[count]
    if count == 1:
        article = "an" if (size or kind.colour)[0] in "aeiou" else "a"
    shape = kind.shape if count == 1 else _plural(kind.shape)
    return " ".join(filter(None, (article, size, kind.colour, shape)))


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _parse_noun(text: str) -> SceneFacts | None:
    match = _SIDE.fullmatch(text)
    if match is None:
        return None
    if match["count"] is None and match["plural"]:
        return None
    count = _COUNTS[match["count"]] if match["count"] else 1
    return SceneFacts((Kind(match["colour"], match["shape"]),), count=count, size=match["size"])

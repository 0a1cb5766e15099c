"""Random views of pictures: a crop, perhaps mirrored, fixed by (seed, picture, view)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

CROP_AREA = (0.5, 1.0)
"""Share of a picture that a view shows: as BLIP's training (Li et al. 2022); smaller crops lose what captions name."""
CROP_ASPECT = (3 / 4, 4 / 3)
"""Width over height (Szegedy et al. 2015)."""
FLIP_PROBABILITY = 0.5


@dataclass(frozen=True)
class Views:
    """``count`` views of every picture, the same wherever and whenever they are made.

    Mirrored pictures contradict captions that say left or right.
    """

    count: int
    seed: int

    def view(self, image: Image.Image, index: int, number: int) -> Image.Image:
        """View ``number`` of picture ``index``."""
        random = np.random.default_rng([self.seed, index, number])
        area = random.uniform(*CROP_AREA) * image.width * image.height
        aspect = math.exp(random.uniform(*np.log(CROP_ASPECT)))
        width = min(image.width, max(1, round(math.sqrt(area * aspect))))
        height = min(image.height, max(1, round(math.sqrt(area / aspect))))
        left, top = (
            int(random.integers(room + 1)) for room in (image.width - width, image.height - height)
        )
        cropped = image.crop((left, top, left + width, top + height))
        return ImageOps.mirror(cropped) if random.random() < FLIP_PROBABILITY else cropped

    def of_epoch(self, num_images: int, epoch: int) -> np.ndarray:
        """The view [num_images] that each picture shows in an epoch: every view once in ``count`` epochs."""
        first = np.random.default_rng(self.seed).integers(self.count, size=num_images)
        return (first + epoch) % self.count

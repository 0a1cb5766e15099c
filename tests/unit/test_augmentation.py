"""Views of pictures are random crops, and the same ones every time."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlm_bridge.data_pipeline.augmentation import CROP_AREA, Views


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_view_is_fixed_by_seed_picture_and_number(picture: Image.Image) -> None:
    def view(seed: int = 3, index: int = 5, number: int = 1) -> bytes:
        shown = Views(4, seed).view(picture, index, number)
        return repr(shown.size).encode() + shown.tobytes()

    assert view() == view()
    assert len({view(), view(seed=4), view(index=6), view(number=2)}) == 4


def test_views_show_half_of_the_picture_or_more(picture: Image.Image) -> None:
    sizes = [Views(1, 0).view(picture, index, 0).size for index in range(50)]
    shares = [width * height / (picture.width * picture.height) for width, height in sizes]
    assert min(shares) > 0.8 * CROP_AREA[0]  # a long crop is cut where the picture ends
    assert max(shares) <= 1
    assert len(set(sizes)) > 20


def test_a_picture_of_one_pixel_has_views() -> None:
    assert Views(1, 0).view(Image.new("RGB", (1, 1)), 0, 0).size == (1, 1)


def test_epochs_take_turns_through_all_views() -> None:
    views = Views(3, seed=7)
    of_epochs = np.stack([views.of_epoch(20, epoch) for epoch in range(3)])
    assert all(sorted(column) == [0, 1, 2] for column in of_epochs.T)
    np.testing.assert_array_equal(views.of_epoch(20, 4), of_epochs[1])
    assert len(set(of_epochs[0])) == 3
    assert not np.array_equal(of_epochs[0], Views(3, seed=8).of_epoch(20, 0))

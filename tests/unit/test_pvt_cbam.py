"""PVT with CBAM: the published sizes and formulas, and an encoder like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vlm_bridge.configuration import VisionEncoderConfig
from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.pvt_cbam import PvtCbam, PvtCbamConfig
from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder, encoder_fingerprint


def load(folder: Path, **options: Any) -> Any:
    return build_vision_encoder(VisionEncoderConfig(name=str(folder), **options))


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


@torch.no_grad()
def test_a_folder_is_a_vision_encoder(tiny_pvt_cbam_dir: Path, tmp_path: Path) -> None:
    encoder = load(tiny_pvt_cbam_dir)
    random = np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((90, 40), (1, 1))
    ]
    pixels = encoder.preprocess(images)
    resized = [np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)) for image in images]
    by_hand = (np.stack(resized) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixels.permute(0, 2, 3, 1).numpy(), by_hand, atol=1e-5)
    features = encoder(pixels)
    assert features.shape == (2, 4, 64) == (2, encoder.num_tokens, encoder.embed_dim)
    assert encoder.grid == (2, 2) and encoder.seen_area((90, 40)) == (0, 0, 90, 40)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert torch.equal(features, encoder.model(pixels).flatten(2).transpose(1, 2))
    torch.testing.assert_close(features[:1], encoder(pixels[:1]), atol=1e-5, rtol=1e-5)

    larger = [
        load(tiny_pvt_cbam_dir, image_size=128, resample=how) for how in ("bilinear", "bicubic")
    ]
    assert larger[0].grid == (4, 4)
    bilinear, bicubic = (encoder.preprocess(images) for encoder in larger)
    assert bilinear.shape == (2, 3, 128, 128) and not torch.equal(bilinear, bicubic)
    assert len({encoder_fingerprint(encoder) for encoder in (encoder, *larger)}) == 3

    shutil.copy(tiny_pvt_cbam_dir / "config.json", tmp_path)
    meta: Any = build_vision_encoder(VisionEncoderConfig(name=str(tmp_path)), meta=True)
    assert {p.device.type for p in meta.parameters()} == {"meta"} and meta.num_tokens == 4


BREAKS = {
    "no weights": "No such file .*model.safetensors",
    "wider": r"size mismatch for \S+: .*\[8",
    "a tensor less": r"Missing key.*stage2\.1\.attn\.q\.bias",
}


@pytest.mark.parametrize("how", BREAKS)
def test_broken_folders_are_named(how: str, tiny_pvt_cbam_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_pvt_cbam_dir, tmp_path / "it"))
    config, weights = folder / "config.json", folder / "model.safetensors"
    if how == "wider":
        wider = {"hidden_sizes": [16, 32, 80, 128]}
        config.write_text(json.dumps(json.loads(config.read_bytes()) | wider))
    elif how == "a tensor less":
        kept = {n: x for n, x in load_file(weights).items() if n != "stage2.1.attn.q.bias"}
        save_file(kept, weights)
    else:
        weights.unlink()
    with pytest.raises(ModelError, match=BREAKS[how]) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_folders_of_earlier_versions_load(tiny_pvt_cbam_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_pvt_cbam_dir, tmp_path / "it"))
    earlier = {
        "num_attention_heads": [1, 2, 5, 8], "sr_ratios": [8, 4, 2, 1],
        "patch_sizes": [7, 3, 3, 3], "mlp_ratio": 4, "cbam_reduction": 8, "cbam_kernel": 7,
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | earlier))
    assert encoder_fingerprint(load(folder)) == encoder_fingerprint(load(tiny_pvt_cbam_dir))

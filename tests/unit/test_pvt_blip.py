"""The module that captions as BLIP does: BlipProcessor's pixels in, captions out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BlipProcessor

from captioners import tiny_captioner, tiny_recipe
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import load_recipe, override_recipe, recipe_from_dict, shipped_recipe
from vlm_bridge.errors import UsageError
from vlm_bridge.formats.pvt_blip import load_combined_model, to_combined, write_combined
from vlm_bridge.model_architecture.pvt_cbam import NO_REPEAT_NGRAM_SIZE, PROMPT, MapLinear

SIZE = {"height": 64, "width": 64}
RECIPE = (
    "language_model.prompt=a picture of",
    "vision_encoder.resample=bicubic",
    "decode.no_repeat_ngram_size=3",
    "decode.max_new_tokens=12",
)


@pytest.mark.parametrize("name", ["coco", "coco-small", "conceptual", "cpu", "flickr30k"])
def test_recipes_see_the_pixels_of_blips_processor(name: str) -> None:
    recipe = load_recipe(shipped_recipe(f"blip-pvt-{name}"))
    assert recipe.vision_encoder.resample == "bicubic" and recipe.vision_encoder.image_size == 384
    assert recipe.language_model.prompt == PROMPT
    assert recipe.decode.no_repeat_ngram_size == NO_REPEAT_NGRAM_SIZE
    assert recipe.learning_rate == (5e-5 if name in ("coco", "conceptual") else 1e-4)


def images() -> list[Image.Image]:
    torch.manual_seed(0)
    sizes = ((90, 40), (33, 64), (7, 5))
    return [
        Image.fromarray(torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy())
        for width, height in sizes
    ]


def captioner(pvt: Path, blip: Path, projection: str = "linear") -> Captioner:
    bridge = {"kind": "projection", "projection": projection, "standardize_features": False}
    tiny = tiny_recipe(pvt, blip, "projection").to_dict()
    recipe = override_recipe(recipe_from_dict({**tiny, "bridge": bridge}), RECIPE)
    return Captioner(tiny_captioner(recipe), recipe)


def loaded(captioner: Captioner, pvt: Path, blip: Path, folder: Path) -> Any:
    write_combined(folder / "c.pth", to_combined(captioner.model, "it"))
    cbam = "cbam" in pvt.name  # whose sizes are read from the tensors
    return load_combined_model(folder / "c.pth", "cpu", str(blip), None if cbam else str(pvt))


@torch.no_grad()
@pytest.mark.parametrize("projection", ["linear", "conv3x3"])
@pytest.mark.parametrize("encoder", ["pvt", "pvt_v2", "pvt_cbam"])
def test_it_captions_as_the_captioner_does(
    projection: str, encoder: str, tiny_blip_dir: Path, tmp_path: Path, request: Any
) -> None:
    pvt = request.getfixturevalue(f"tiny_{encoder}_dir")
    processor: Any = BlipProcessor.from_pretrained(tiny_blip_dir)
    ours = captioner(pvt, tiny_blip_dir, projection)
    blip = loaded(ours, pvt, tiny_blip_dir, tmp_path).blip
    pixels = processor(images=images(), return_tensors="pt", size=SIZE)["pixel_values"]
    features = ours.model.features(ours.model.vision_encoder.preprocess(images()))
    torch.testing.assert_close(
        blip.feature_map(pixels).flatten(2).transpose(1, 2), features, atol=1e-5, rtol=1e-5
    )
    for beams in (1, 3):
        ids = blip.generate(pixels, num_beams=beams, max_new_tokens=12)
        decode = ours.recipe.decode.replace(num_beams=beams)
        expected = [result.caption for result in ours.caption(images(), decode=decode)]
        assert [processor.decode(row, skip_special_tokens=True) for row in ids] == expected
        assert (ids[:, 0] == blip.text_decoder.config.bos_token_id).all()


def test_the_guides_training_step(
    tiny_pvt_cbam_dir: Path, tiny_blip_dir: Path, tmp_path: Path
) -> None:
    ours = captioner(tiny_pvt_cbam_dir, tiny_blip_dir)
    pvt, blip, proj = loaded(ours, tiny_pvt_cbam_dir, tiny_blip_dir, tmp_path)
    blip.train()
    assert blip.text_decoder.training and not pvt.training
    images = torch.randn(2, 3, 64, 64)
    tokens = torch.tensor([[320, 7, 9, 4], [320, 11, 0, 0]])
    states = proj(pvt(images))
    assert isinstance(proj, MapLinear) and states.shape == (2, 24, 2, 2)
    blip.eval()
    loss = blip(
        pixel_values=images, input_ids=tokens, labels=tokens, encoder_hidden_states=states
    ).loss
    as_tokens = states.flatten(2).transpose(1, 2)
    assert torch.equal(
        loss, blip(input_ids=tokens, labels=tokens, encoder_hidden_states=as_tokens).loss
    )
    logits = blip(input_ids=tokens, encoder_hidden_states=states).logits
    log_probs = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    by_hand = -log_probs[tokens[:, 1:] != 0].mean()
    torch.testing.assert_close(loss, by_hand, atol=1e-4, rtol=1e-4)
    loss.backward()
    assert proj.weight.grad.abs().sum() > 0 and all(p.grad is None for p in pvt.parameters())
    made = blip(pixel_values=images, input_ids=tokens).logits
    torch.testing.assert_close(
        made, blip(input_ids=tokens, encoder_hidden_states=blip.encode(images)).logits
    )
    with pytest.raises(UsageError, match="give pixel_values, or encoder_hidden_states"):
        blip(input_ids=tokens)

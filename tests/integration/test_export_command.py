"""`vlm-bridge export`: what training wrote, as others can use it; and what others wrote, as training can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from captioners import tiny_captioner, tiny_recipe
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.errors import CheckpointError
from vlm_bridge.quantization import GROUP
from vlm_bridge.training_strategy import checkpoint as checkpoints

FILES = {"config.json", "model.safetensors", "README.md"}
TOKEN = "hf_a-token-that-nobody-may-see"


@pytest.fixture
def recipe(
    tmp_path: Path, drawn_caption_folder: Path, tiny_dinov2_dir: Path, tiny_gemma2_dir: Path
) -> Recipe:
    recipe = tiny_recipe(
        tiny_dinov2_dir,
        tiny_gemma2_dir,
        "cross_attention",
        data_dir=str(drawn_caption_folder),
        checkpoint_dir=str(tmp_path / "secret-place"),
        log_dir=str(tmp_path / "logs"),
        feature_cache="off",
        max_steps=1,
        num_validation_samples=0,
        decode={"num_beams": 1, "max_new_tokens": 4},
    )
    return override_recipe(recipe, ["bridge.standardize_features=false"])


@pytest.fixture
def run(tmp_path: Path, recipe: Recipe) -> Path:
    """A run folder as training leaves it."""
    folder = tmp_path / "run"
    weights = checkpoints.in_bfloat16(tiny_captioner(recipe).trained_state_dict())
    checkpoints.save_checkpoint(folder / "checkpoints" / checkpoints.BEST_WEIGHTS, recipe, weights)
    return folder


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load_checkpoint(path)["weights"]


def export_as(dtype: str, run: Path, folder: Path, run_here) -> Path:
    result = run_here("export", run, "--output-dir", folder, "--dtype", dtype)
    assert result.returncode == 0, result.stderr
    return folder


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_folder_for_the_hub_captions_as_the_run_does(
    run: Path, recipe: Recipe, tmp_path: Path, drawn_caption_folder: Path, run_here
) -> None:
    picture = CaptionFolder.open(drawn_caption_folder).split("test")[0].path
    (run / "metrics.json").write_text(
        json.dumps({"CIDEr": 0.5, "num_images": 8, "decode": {"num_beams": 3}})
    )
    folder = tmp_path / "my-captioner"
    result = run_here(
        "export", run, "--output-dir", folder, "--license", "mit", "--dataset", "me/drawings"
    )
    assert result.returncode == 0, result.stderr
    assert f"wrote {folder / 'model.safetensors'}" in result.stdout
    assert {path.name for path in folder.iterdir()} == FILES
    assert_equal(weights_of(folder), weights_of(run))
    captions = [
        run_here("caption", picture, "--checkpoint", path, "--device", "cpu")
        for path in (run, folder)
    ]
    assert captions[0].stdout == captions[1].stdout
    assert captions[0].returncode == 0

    # Where things lay on this machine stays on it.
    config = json.loads((folder / "config.json").read_text())
    assert "secret-place" not in json.dumps(config)
    assert config["recipe"]["bridge"]["kind"] == "cross_attention"
    assert Captioner.from_pretrained(folder, "cpu").recipe.learning_rate == recipe.learning_rate

    _, metadata, card = (folder / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(metadata)
    assert (facts["license"], facts["datasets"]) == ("mit", ["me/drawings"])
    assert (facts["library_name"], facts["pipeline_tag"]) == ("vlm-bridge", "image-to-text")
    for mention in (
        "# my-captioner",
        "24 train",
        "| CIDEr | 0.5000 |",
        "On 8 images",
        "num_beams=3",
        "## Limits",
        "kind: cross_attention",
    ):
        assert mention in card
    assert "secret-place" not in card


def test_half_precision_is_what_the_captioner_computes_with(
    run: Path, tmp_path: Path, run_here
) -> None:
    folder = tmp_path / "half"
    terms = "non-commercial research use"
    result = run_here(
        "export",
        run,
        "--output-dir",
        folder,
        "--dtype",
        "float16",
        "--title",
        "See",
        "--license",
        terms,
    )
    assert result.returncode == 0, result.stderr
    stored, original = weights_of(folder), weights_of(run)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert_equal(stored, {name: tensor.half() for name, tensor in original.items()})
    restored = Captioner.from_pretrained(folder, "cpu").model.trained_state_dict()
    assert_equal(restored, {name: tensor.half().float() for name, tensor in original.items()})
    _, metadata, card = (folder / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(metadata)
    assert (facts["license"], facts["license_name"]) == ("other", "non-commercial-research-use")
    assert "# See\n" in card and f"The bridge: {terms}." in card


def test_int8_rounds_each_row_and_takes_half_the_room_of_float16(
    run: Path, tmp_path: Path, run_here
) -> None:
    half, small = (
        export_as(dtype, run, tmp_path / dtype, run_here) for dtype in ("float16", "int8")
    )
    original = {name: tensor.float() for name, tensor in weights_of(run).items()}
    restored = Captioner.from_pretrained(small, "cpu").model.trained_state_dict()
    assert restored.keys() == original.keys()
    for name, tensor in original.items():
        error = (restored[name] - tensor).abs()
        largest = tensor.abs().amax(-1, keepdim=True) if tensor.ndim > 1 else tensor.abs()
        assert (error <= largest / (254 if tensor.ndim > 1 else 2**11) + 1e-7).all(), name
    matrices = sum(t.numel() for t in original.values() if t.ndim > 1)
    assert (small / "model.safetensors").stat().st_mode == (
        small / "config.json"
    ).stat().st_mode  # for all to read
    saved = (half / "model.safetensors").stat().st_size - (
        small / "model.safetensors"
    ).stat().st_size
    assert saved > 0.7 * matrices  # one of two bytes of each, less the scales of very short rows


def test_int4_rounds_to_sixteen_levels_what_it_can_and_takes_less_room(
    run: Path, tmp_path: Path, run_here
) -> None:
    small, smaller = (
        export_as(dtype, run, tmp_path / dtype, run_here) for dtype in ("int8", "int4")
    )
    original = {name: tensor.float() for name, tensor in weights_of(run).items()}
    restored = Captioner.from_pretrained(smaller, "cpu").model.trained_state_dict()
    assert restored.keys() == original.keys()
    packed = 0
    for name, tensor in original.items():
        if tensor.ndim > 1 and tensor.shape[-1] % GROUP == 0:
            groups, error = (
                x.unflatten(-1, (-1, GROUP)) for x in (tensor, (restored[name] - tensor).abs())
            )
            assert (error <= groups.abs().amax(-1, keepdim=True) / 8 * 1.01).all(), name
            assert torch.cosine_similarity(restored[name], tensor, -1).mean() > 0.98, name
            packed += tensor.numel()
    saved = (small / "model.safetensors").stat().st_size - (
        smaller / "model.safetensors"
    ).stat().st_size
    assert packed and saved > 0.3 * packed
    size = sum(tensor.numel() for name, tensor in original.items() if name.startswith("bridge."))
    assert f"bridge of {size:,} parameters" in (smaller / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantised_weights_without_their_scales_are_refused(
    run: Path, tmp_path: Path, run_here, dtype: str
) -> None:
    folder = export_as(dtype, run, tmp_path / "small", run_here)
    stored = load_file(folder / "model.safetensors")
    prefix = f"{dtype}_scale_of."
    lost = next(name for name in stored if name.startswith(prefix))
    save_file(
        {name: tensor for name, tensor in stored.items() if name != lost},
        folder / "model.safetensors",
    )
    with pytest.raises(
        CheckpointError, match=f"levels or scales are missing: {lost.removeprefix(prefix)}"
    ):
        Captioner.from_pretrained(folder, "cpu")


def test_int4_scales_of_another_matrix_are_refused(run: Path, tmp_path: Path, run_here) -> None:
    folder = export_as("int4", run, tmp_path / "small", run_here)
    stored = load_file(folder / "model.safetensors")
    name = next(name for name in stored if name.startswith("int4_scale_of."))
    save_file({**stored, name: stored[name].repeat(1, 3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is damaged"):
        Captioner.from_pretrained(folder, "cpu")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_original_layout_has_no_quantised_weights(
    run: Path, tmp_path: Path, run_here, dtype: str
) -> None:
    result = run_here(
        "export", run, "--output-dir", tmp_path / "out", "--dtype", dtype, "--format", "original"
    )
    assert result.returncode == 2
    assert f"no {dtype}" in result.stderr


def test_weights_too_large_for_a_dtype_are_named(
    recipe: Recipe, run: Path, tmp_path: Path, run_here
) -> None:
    path = run / "checkpoints" / checkpoints.BEST_WEIGHTS
    weights = weights_of(path)
    name = next(iter(weights))
    checkpoints.save_checkpoint(path, recipe, {**weights, name: weights[name] + 1e5})
    result = run_here("export", run, "--output-dir", tmp_path / "out", "--dtype", "float16")
    assert result.returncode == 1
    assert result.stderr == f"error: {name} does not fit into float16\n"


def test_scores_come_from_the_runs_last_evaluation(run: Path, tmp_path: Path, run_here) -> None:
    (run / "val").mkdir()
    scores = {
        "CIDEr": 0.25,
        "num_images": 8,
        "decode": {"num_beams": 9},
        "data": {"name": "mine", "split": "val"},
    }
    (run / "val" / "metrics.json").write_text(json.dumps(scores))
    run_here("export", run, "--output-dir", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "On 8 images of mine val" in card and "| CIDEr | 0.2500 |" in card


def test_what_is_left_open_is_said(run: Path, tmp_path: Path, run_here) -> None:
    result = run_here("export", run, "--output-dir", tmp_path / "out")
    assert "note: the model card names no license: give --license" in result.stderr
    assert "is a folder of this machine" in result.stderr
    assert "the model card has no scores" in result.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "has not been chosen yet" in card
    assert "Not evaluated yet" in card


def test_the_original_layout_and_back(
    run: Path, tmp_path: Path, recipe: Recipe, drawn_caption_folder: Path, run_here
) -> None:
    picture = CaptionFolder.open(drawn_caption_folder).split("test")[0].path
    result = run_here("export", run, "--format", "original", "--output-dir", tmp_path / "original")
    assert result.returncode == 0, result.stderr
    assert "construct its FullModel with bridge_num_heads=4" in result.stderr
    path = tmp_path / "original" / checkpoints.BEST_WEIGHTS
    content = torch.load(path, weights_only=True)
    assert (
        content["model_state_dict"]["bridge_module.cross_attention.w_q.weight"].dtype
        == torch.bfloat16
    )
    assert_equal(weights_of(path), weights_of(run))

    # As the original project writes it, without our recipe.
    del content["recipe"]
    torch.save(content, path)
    refused = run_here("export", path, "--output-dir", tmp_path / "folder")
    assert refused.returncode == 1
    assert "names no recipe" in refused.stderr
    config = tmp_path / "recipe.yaml"
    config.write_text(recipe.to_yaml())
    result = run_here("export", path, "--config", config, "--output-dir", tmp_path / "folder")
    assert result.returncode == 0, result.stderr
    assert_equal(weights_of(tmp_path / "folder"), weights_of(run))
    assert run_here("caption", picture, "--checkpoint", path).returncode == 1
    captioned = run_here("caption", picture, "--checkpoint", path, "--config", config)
    assert captioned.stdout == run_here("caption", picture, "--checkpoint", run).stdout

    # Training takes its bridge and starts from it; without a recipe, by the file's own settings over the default ones.
    default = run_here("train", "--resume", path)
    assert default.returncode == 1
    assert "facebook/dinov2-large" in default.stderr
    trained = run_here(
        "train",
        "--config",
        config,
        "--resume",
        path,
        "learning_rate=0",
        "min_lr=0",
        "weight_decay=0",
    )
    assert "of the original project at epoch 1, step 0 of" in trained.stdout
    assert "with a new optimizer" in trained.stdout
    assert_equal(weights_of(Path(recipe.checkpoint_dir)), weights_of(run))


def test_mistakes_are_one_line_and_nothing_is_overwritten(
    run: Path, tmp_path: Path, run_here
) -> None:
    out = tmp_path / "out"
    assert run_here("export", run, "--output-dir", out).returncode == 0
    for arguments, code, mention in (
        (["--output-dir", out], 2, "replace it with --overwrite"),
        (["--output-dir", tmp_path, "--private"], 2, "--private needs --push-to-hub"),
        (
            ["--output-dir", tmp_path, "--format", "original", "--push-to-hub", "me/it"],
            2,
            "leave --format out",
        ),
        (
            ["--output-dir", tmp_path, "--metrics", tmp_path / "none.json"],
            1,
            "cannot read the scores",
        ),
    ):
        result = run_here("export", run, *arguments)
        assert result.returncode == code
        assert mention in result.stderr
        assert len(result.stderr.splitlines()) == 1
    missing = run_here("export", tmp_path / "nothing", "--output-dir", tmp_path)
    assert "no checkpoint at" in missing.stderr
    assert run_here("export", run, "--output-dir", out, "--overwrite").returncode == 0


class FakeHub:
    """Stands in for `huggingface_hub.HfApi`."""

    calls: list[dict[str, Any]]

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append({"repo_id": repo_id, **options})
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(
        self, *, folder_path: Path, allow_patterns: list[str], **options: Any
    ) -> None:
        self.calls.append(
            {"files": set(allow_patterns) & {path.name for path in Path(folder_path).iterdir()}}
        )


def test_pushing_uploads_the_folder_and_shows_no_token(
    run: Path, tmp_path: Path, run_here, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeHub.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    result = run_here(
        "export",
        run,
        "--output-dir",
        tmp_path / "out",
        "--push-to-hub",
        "me/captioner",
        "--private",
    )
    assert result.returncode == 0, result.stderr
    assert "pushed to https://huggingface.co/me/captioner" in result.stdout
    assert FakeHub.calls == [
        {"repo_id": "me/captioner", "private": True, "exist_ok": True},
        {"files": FILES},
    ]
    assert TOKEN not in result.stdout + result.stderr


def test_pushing_without_a_token_or_network_is_one_line(
    run: Path, tmp_path: Path, run_here, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = (
        "export",
        run,
        "--license",
        "mit",
        "--overwrite",
        "--output-dir",
        tmp_path / "out",
        "--push-to-hub",
    )
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    result = run_here(*push, "me/captioner")
    assert result.returncode == 1
    assert "pushing needs a token with write access" in result.stderr.splitlines()[-1]
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    result = run_here(*push, "me/captioner")
    assert result.returncode == 1
    assert "was not pushed to me/captioner" in result.stderr.splitlines()[-1]
    result = run_here(*push, "not a name")
    assert result.returncode == 2
    assert "is not the name of a repository" in result.stderr.splitlines()[-1]
    assert TOKEN not in result.stdout + result.stderr

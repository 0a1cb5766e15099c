"""`vlm-bridge export`: Hugging Face folders, and the original project's layout and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml

from captioners import tiny_captioner, tiny_recipe
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.formats import GROUP
from vlm_bridge.training_strategy import checkpoint as checkpoints

FILES = {"config.json", "model.safetensors", "README.md"}
TOKEN = "hf_a-token-that-nobody-may-see"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def recipe(
    tmp_path: Path, drawn_caption_folder: Path, tiny_dinov2_dir: Path, tiny_gemma2_dir: Path
) -> Recipe:
    recipe = tiny_recipe(
        tiny_dinov2_dir, tiny_gemma2_dir, "cross_attention", data_dir=str(drawn_caption_folder),
        checkpoint_dir=str(tmp_path / "secret-place"), log_dir=str(tmp_path / "logs"),
        feature_cache="off", max_steps=1, num_validation_samples=0,
        decode={"num_beams": 1, "max_new_tokens": 4},
    )  # fmt: skip
    return override_recipe(recipe, ["bridge.standardize_features=false"])


@pytest.fixture
def run(tmp_path: Path, recipe: Recipe) -> Path:
    """A run folder as training leaves it."""
    folder = tmp_path / "run"
    weights = checkpoints.stored_as(tiny_captioner(recipe).trained_state_dict(), "bfloat16")
    checkpoints.save_checkpoint(folder / "checkpoints" / checkpoints.BEST_WEIGHTS, recipe, weights)
    return folder


@pytest.fixture
def export(run: Path, tmp_path: Path, run_here: Callable) -> Callable[..., Path]:
    """Export the run with some options, and return the folder."""

    def export(*options: object) -> Path:
        folder = tmp_path / "my-captioner"
        result = run_here("export", run, "--output-dir", folder, "--overwrite", *options)
        assert result.returncode == 0, result.stderr
        return folder

    return export


def weights_of(path: Path) -> Tensors:
    return checkpoints.load_checkpoint(path)["weights"]


def restored_from(folder: Path) -> Tensors:
    return Captioner.from_pretrained(folder, "cpu").model.trained_state_dict()


def assert_equal(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the metadata and the text of a model card."""
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_folder_for_the_hub_captions_as_the_run_does(
    run: Path, recipe: Recipe, drawn_caption_folder: Path, export: Callable, run_here: Callable
) -> None:
    image = CaptionFolder.open(drawn_caption_folder).split("test")[0].path
    scores = {"CIDEr": 0.5, "BLEU-4": 0.12345, "perplexity": 9.0, "num_images": 8, "decode": {"num_beams": 3},
              "data": {"name": "mine", "split": "val"}}  # fmt: skip
    (run / "val").mkdir()
    (run / "val" / "metrics.json").write_text(json.dumps(scores))
    folder = export("--license", "mit", "--dataset", "me/drawings")
    assert {path.name for path in folder.iterdir()} == FILES
    assert_equal(weights_of(folder), weights_of(run))
    of_run, of_folder = (
        run_here("caption", image, "--checkpoint", path, "--device", "cpu")
        for path in (run, folder)
    )
    assert of_run.stdout == of_folder.stdout
    assert of_run.returncode == 0
    assert Captioner.from_pretrained(folder, "cpu").recipe.learning_rate == recipe.learning_rate

    metadata, card = card_of(folder)
    assert (metadata["license"], metadata["datasets"]) == ("mit", ["me/drawings"])
    assert metadata["library_name"] == "vlm-bridge"
    assert metadata["pipeline_tag"] == "image-to-text"
    (results,) = metadata["model-index"][0]["results"]
    assert metadata["model-index"][0]["name"] == "my-captioner"
    assert results["dataset"] == {"name": "mine", "type": "me/drawings", "split": "val"}
    assert [tuple(metric.values()) for metric in results["metrics"]] == [
        ("bleu", 0.1235, "BLEU-4"), ("cider", 0.5, "CIDEr"),
    ]  # fmt: skip
    for mention in ("# my-captioner", 'from_pretrained("OWNER/NAME")', "pip install vlm-bridge\n", "24 train", "| CIDEr | 0.5000 |", "On 8 images of mine val",
                    "num_beams=3", "## Limits", "kind: cross_attention"):  # fmt: skip
        assert mention in card
    # Paths of this machine stay on it.
    assert "secret-place" not in card + (folder / "config.json").read_text()


def test_half_precision_is_what_the_captioner_computes_with(run: Path, export: Callable) -> None:
    terms = "non-commercial research use"
    folder = export("--dtype", "float16", "--title", "See", "--license", terms)
    half = {name: tensor.half() for name, tensor in weights_of(run).items()}
    assert_equal(weights_of(folder), half)
    assert_equal(restored_from(folder), {name: x.float() for name, x in half.items()})
    metadata, card = card_of(folder)
    assert metadata["license"] == "other"
    assert metadata["license_name"] == "non-commercial-research-use"
    assert "# See\n" in card and f"The bridge: {terms}." in card


def test_quantized_weights_are_close_and_take_less_room(run: Path, export: Callable) -> None:
    original = {name: tensor.float() for name, tensor in weights_of(run).items()}
    sizes, restored = {}, {}
    for dtype in ("float16", "int8", "int4"):
        folder = export("--dtype", dtype)
        sizes[dtype] = (folder / "model.safetensors").stat().st_size
        restored[dtype] = restored_from(folder)
        assert restored[dtype].keys() == original.keys()
    matrices = {name: tensor for name, tensor in original.items() if tensor.ndim > 1}
    packed = [name for name, tensor in matrices.items() if tensor.shape[-1] % GROUP == 0]
    for name, tensor in matrices.items():
        error = (restored["int8"][name] - tensor).abs()
        assert (error <= tensor.abs().amax(-1, keepdim=True) / 254 + 1e-7).all(), name
    for name in packed:
        error = (restored["int4"][name] - original[name]).abs().unflatten(-1, (-1, GROUP))
        largest = original[name].unflatten(-1, (-1, GROUP)).abs().amax(-1, keepdim=True)
        assert (error <= largest / 8 * 1.01).all(), name
    # One of two bytes of each, less the scales of very short rows.
    assert sizes["float16"] - sizes["int8"] > 0.7 * sum(t.numel() for t in matrices.values())
    assert sizes["int8"] - sizes["int4"] > 0.3 * sum(original[n].numel() for n in packed) > 0
    size = sum(tensor.numel() for name, tensor in original.items() if name.startswith("bridge."))
    assert f"bridge of {size:,} parameters" in card_of(folder)[1]


def test_the_original_layout_and_back(
    run: Path, tmp_path: Path, recipe: Recipe, drawn_caption_folder: Path, run_here: Callable
) -> None:
    image = CaptionFolder.open(drawn_caption_folder).split("test")[0].path
    result = run_here("export", run, "--format", "original", "--output-dir", tmp_path / "original")
    assert result.returncode == 0, result.stderr
    assert "construct its FullModel with bridge_num_heads=4" in result.stderr
    path = tmp_path / "original" / checkpoints.BEST_WEIGHTS
    content = torch.load(path, weights_only=True)
    queries = content["model_state_dict"]["bridge_module.cross_attention.w_q.weight"]
    assert queries.dtype == torch.bfloat16
    assert_equal(weights_of(path), weights_of(run))

    # As the original project writes it, without our recipe.
    del content["recipe"]
    torch.save(content, path)
    config, folder = tmp_path / "recipe.yaml", tmp_path / "folder"
    config.write_text(recipe.to_yaml())
    refused = run_here("export", path, "--output-dir", folder)
    assert refused.returncode == 1
    assert "names no recipe" in refused.stderr
    result = run_here("export", path, "--config", config, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    assert_equal(weights_of(folder), weights_of(run))
    captioned = run_here("caption", image, "--checkpoint", path, "--config", config)
    assert captioned.stdout == run_here("caption", image, "--checkpoint", run).stdout

    # Training starts from its bridge.
    frozen = ("learning_rate=0", "min_lr=0", "weight_decay=0")
    trained = run_here("train", "--config", config, "--resume", path, *frozen)
    assert "of the original project at epoch 1, step 0 of" in trained.stdout
    assert "with a new optimizer" in trained.stdout
    assert_equal(weights_of(Path(recipe.checkpoint_dir)), weights_of(run))


def test_mistakes_and_gaps_are_one_line_each(run: Path, tmp_path: Path, run_here: Callable) -> None:
    out = tmp_path / "out"
    first = run_here("export", run, "--output-dir", out)
    assert first.returncode == 0
    for note in ("is a folder of this machine", "no license: give --license", "has no scores"):
        assert note in first.stderr
    # An exported folder does not say where its data were.
    again = run_here("export", out, "--output-dir", tmp_path / "again", "--dry-run")
    assert "no training data: give --dataset" in again.stderr
    card = card_of(out)[1]
    assert "has not been chosen yet" in card and "Not evaluated yet" in card
    original = ("--format", "original")
    for folder, arguments, code, message in (
        (out, [], 2, "or give --overwrite"),
        (tmp_path, ["--private"], 2, "--private needs --push-to-hub"),
        (tmp_path, [*original, "--push-to-hub", "a/b"], 2, "are for Hugging Face folders"),
        (tmp_path, [*original, "--dtype", "int4"], 2, "are for Hugging Face folders"),
        (tmp_path, ["--metrics", tmp_path / "none"], 1, "no scores at"),
    ):
        result = run_here("export", run, "--output-dir", folder, *arguments)
        assert result.returncode == code
        (line,) = result.stderr.splitlines()
        assert message in line
    missing = run_here("export", tmp_path / "nothing", "--output-dir", tmp_path)
    assert "no checkpoint at" in missing.stderr


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in for the hub, and a token for it."""
    folder = tmp_path / "hub"

    class Hub:
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
            (folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            (folder / repo_id / "private").write_text(str(private))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str]):
            for name in allow_patterns:
                shutil.copy(folder_path / name, folder / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: folder / name)
    monkeypatch.setattr(checkpoints, "reach_hub", lambda *_: None)
    return folder


def test_what_is_pushed_captions_by_its_name(
    run: Path, tmp_path: Path, drawn_caption_folder: Path, run_here: Callable, hub: Path
) -> None:
    image = CaptionFolder.open(drawn_caption_folder).split("test")[0].path
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
    captioner = Captioner.from_pretrained(run, "cpu")
    assert captioner.push_to_hub("me/see") == "https://huggingface.co/me/see"
    expected = captioner.caption([image])
    for name, is_private in (("captioner", "True"), ("see", "False")):
        pushed = hub / "me" / name
        assert {path.name for path in pushed.iterdir()} == {*FILES, "private"}
        assert (pushed / "private").read_text() == is_private
        card = card_of(pushed)[1]
        assert f'from_pretrained("me/{name}")' in card and f"--checkpoint me/{name}" in card
        assert Captioner.from_pretrained(f"me/{name}", "cpu").caption([image]) == expected
    assert card_of(hub / "me" / "see")[1].startswith("# see\n")


def test_a_dry_run_lists_what_would_be_written_and_pushed_and_writes_nothing(
    run: Path, tmp_path: Path, run_here: Callable, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export = ("export", run, "--output-dir", out)
    push = ("--push-to-hub", "me/captioner")
    planned = run_here(*export, *push, "--dry-run")
    assert planned.returncode == 0 and not out.exists() and not hub.exists()
    assert "no license: give --license" in planned.stderr
    *files, pushes = planned.stdout.splitlines()
    assert pushes == "would push them to https://huggingface.co/me/captioner, a public repository"
    done = run_here(*export, *push).stdout.splitlines()
    assert [line.replace("would write", "wrote") for line in files] == done[:3]
    assert all(f"({(out / name).stat().st_size:,} bytes)" in "".join(files) for name in FILES)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert run_here(*export, *push, "--dry-run", "--overwrite").returncode == 1
    original = run_here(*export, "--format", "original", "--dry-run")
    assert original.stdout.startswith(f"would write {out / checkpoints.BEST_WEIGHTS} (")


def test_failed_pushes_are_one_line_and_show_no_token(
    run: Path, tmp_path: Path, run_here: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = ("export", run, "--overwrite", "--output-dir", tmp_path / "out", "--push-to-hub")
    assert "pushing needs a token" in run_here(*push, "me/captioner").stderr
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    unreachable, misnamed = run_here(*push, "me/captioner"), run_here(*push, "not a name")
    assert unreachable.returncode == 1
    assert "was not pushed to me/captioner" in unreachable.stderr.splitlines()[-1]
    assert misnamed.returncode == 2
    assert "is not the name of a repository" in misnamed.stderr.splitlines()[-1]
    for output in (unreachable, misnamed):
        assert TOKEN not in output.stdout + output.stderr

"""Checkpoints: whole or refused, harmless to open, and nothing in them but what was trained."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from captioners import BRIDGES, SPEAKS_TO, tiny_captioner, tiny_recipe
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.errors import CheckpointError
from vlm_bridge.model_architecture.captioner import CaptionModel, build_captioner
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.resume import resumed_recipe
from vlm_bridge.training_strategy.state import TrainState
from vlm_bridge.training_strategy.trainer import train


@pytest.fixture(params=BRIDGES)
def recipe(request: pytest.FixtureRequest, tiny_vit_dir: Path) -> Recipe:
    language_model = request.getfixturevalue(f"tiny_{SPEAKS_TO[request.param]}_dir")
    return tiny_recipe(tiny_vit_dir, language_model, request.param)


@pytest.fixture
def model(recipe: Recipe) -> CaptionModel:
    return tiny_captioner(recipe)


@pytest.fixture
def saved(recipe: Recipe, model: CaptionModel, tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoints" / checkpoints.BEST_WEIGHTS
    checkpoints.save_checkpoint(path, recipe, model.trained_state_dict())
    return path


def test_weights_and_recipe_come_back(saved: Path, recipe: Recipe, model: CaptionModel) -> None:
    content = checkpoints.load_checkpoint(saved)
    assert checkpoints.recipe_of(content, saved) == recipe
    fresh = build_captioner(recipe)
    checkpoints.load_weights(fresh, content["weights"], saved)
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_half_the_bytes_hold_the_bridge_but_whole_the_feature_statistics(
    saved: Path, recipe: Recipe, model: CaptionModel
) -> None:
    trained = model.trained_state_dict()
    checkpoints.save_checkpoint(saved, recipe, checkpoints.in_bfloat16(trained))
    captioner = Captioner.from_pretrained(saved, "cpu")
    for name, tensor in captioner.model.trained_state_dict().items():
        assert tensor.dtype == torch.float32
        is_statistic = name.startswith("feature_scale.")
        assert torch.equal(
            tensor, trained[name] if is_statistic else trained[name].bfloat16().float()
        ), name


def test_frozen_weights_stay_out(saved: Path, model: CaptionModel) -> None:
    weights = checkpoints.load_checkpoint(saved)["weights"]
    assert {name.split(".")[0] for name in weights} == {"bridge", "feature_scale"}
    trained_bytes = sum(t.numel() * t.element_size() for t in model.trained_state_dict().values())
    assert saved.stat().st_size < trained_bytes + 50_000
    assert not any(tensor.requires_grad for tensor in weights.values())


def test_names_and_revisions_of_the_frozen_parts_are_kept(
    recipe: Recipe, model: CaptionModel, tmp_path: Path
) -> None:
    pinned = override_recipe(
        recipe, ["language_model.revision=abc123", "vision_encoder.revision=main"]
    )
    checkpoints.save_checkpoint(tmp_path / "c.pth", pinned, model.trained_state_dict())
    read = checkpoints.recipe_of(checkpoints.load_checkpoint(tmp_path / "c.pth"), "c.pth")
    assert (read.language_model.revision, read.vision_encoder.revision) == ("abc123", "main")


def test_folders_mean_their_best_checkpoint(saved: Path, tmp_path: Path) -> None:
    assert checkpoints.checkpoint_path(saved) == saved
    assert checkpoints.checkpoint_path(saved.parent) == saved
    assert checkpoints.checkpoint_path(tmp_path / "run") == saved
    latest = saved.with_name(checkpoints.LATEST)
    saved.rename(latest)
    assert checkpoints.checkpoint_path(tmp_path / "run") == latest
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoints.checkpoint_path(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
        checkpoints.checkpoint_path(tmp_path / "nowhere")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="is damaged or is not a checkpoint"):
        checkpoints.load_checkpoint(saved)


def test_a_flipped_bit_in_the_weights_is_refused(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.load_checkpoint(saved)


def test_a_tensor_that_is_marked_as_a_folder_is_refused(saved: Path) -> None:
    """torch skips folders, and would give uninitialised memory as weights."""
    content = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        directory = archive.start_dir
    external_attributes = content.rindex(b"PK\x01\x02", directory) + 38
    content[external_attributes] |= 0x10
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.load_checkpoint(saved)


def test_flipped_bytes_anywhere_never_give_a_traceback(saved: Path) -> None:
    whole = saved.read_bytes()
    reference = checkpoints.load_checkpoint(saved)["weights"]
    for position in range(0, len(whole), len(whole) // 60):
        content = bytearray(whole)
        content[position] ^= 0xFF
        saved.write_bytes(content)
        try:
            weights = checkpoints.load_checkpoint(saved)["weights"]
        except CheckpointError:
            continue
        # Padding between the zip's entries may change; weights may not.
        assert all(torch.equal(weights[name], tensor) for name, tensor in reference.items())


class _Payload:
    """What an attacker would put into a pickle."""

    def __init__(self, evidence: Path):
        self.evidence = evidence

    def __reduce__(self):
        return os.mkdir, (str(self.evidence),)


@pytest.mark.parametrize(
    "save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))]
)
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, save) -> None:
    evidence, path = tmp_path / "evidence", tmp_path / "evil.pth"
    save({"format": checkpoints.FORMAT, "format_version": 1, "weights": _Payload(evidence)}, path)
    with pytest.raises(CheckpointError):
        checkpoints.load_checkpoint(path)
    assert not evidence.exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    for content in (
        {"model": torch.zeros(3)},
        [1, 2],
        torch.zeros(2),
        {"format": checkpoints.FORMAT},
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError):
            checkpoints.load_checkpoint(path)
    path.write_text("words")
    with pytest.raises(CheckpointError):
        checkpoints.load_checkpoint(path)
    torch.save(
        {"format": checkpoints.FORMAT, "format_version": 99, "recipe": {}, "weights": {}}, path
    )
    with pytest.raises(CheckpointError, match="newer vlm-bridge"):
        checkpoints.load_checkpoint(path)


def test_another_architecture_is_refused_and_its_keys_are_named(
    saved: Path, recipe: Recipe
) -> None:
    weights = checkpoints.load_checkpoint(saved)["weights"]
    other = "cross_attention" if recipe.bridge.kind == "prefix" else "prefix"
    other_model = build_captioner(
        tiny_recipe(Path(recipe.vision_encoder.name), Path(recipe.language_model.name), other)
    )
    with pytest.raises(
        CheckpointError, match=r"another architecture: bridge\.\S+ (\(.*\) )?is .* and \d+ more"
    ):
        checkpoints.load_weights(other_model, weights, saved)
    before = {name: tensor.clone() for name, tensor in other_model.state_dict().items()}
    assert all(
        torch.equal(before[name], tensor) for name, tensor in other_model.state_dict().items()
    )


def test_other_sizes_and_missing_statistics_are_refused(saved: Path, recipe: Recipe) -> None:
    weights = checkpoints.load_checkpoint(saved)["weights"]
    plain = recipe.replace(bridge=recipe.bridge.replace(standardize_features=False))
    with pytest.raises(CheckpointError, match=r"feature_scale\.mean \(32,\) is unknown"):
        checkpoints.load_weights(build_captioner(plain), weights, saved)
    wider = {**weights, "feature_scale.mean": torch.zeros(99)}
    with pytest.raises(CheckpointError, match=r"feature_scale\.mean is \(99,\), not \(32,\)"):
        checkpoints.load_weights(build_captioner(recipe), wider, saved)


def test_an_encoder_of_another_width_is_refused_by_name(
    saved: Path, recipe: Recipe, model: CaptionModel
) -> None:
    sizes = checkpoints.captioner_sizes(model) | {"vision_encoder.embed_dim": 1024}
    checkpoints.save_checkpoint(saved, recipe, model.trained_state_dict(), sizes=sizes)
    with pytest.raises(
        CheckpointError, match=r"it has vision_encoder\.embed_dim=1024, wanted is 32"
    ):
        Captioner.from_pretrained(saved, "cpu")


@pytest.mark.parametrize(
    "override",
    [
        "vision_encoder.name=facebook/dinov2-base",
        "vision_encoder.image_size=96",
        "vision_encoder.layers=[-1]",
        "language_model.name=google/gemma-2-9b",
        "bridge.standardize_features=false",
    ],
)
def test_a_recipe_of_other_parts_is_refused_by_key(
    saved: Path, recipe: Recipe, override: str
) -> None:
    key, _, value = override.partition("=")
    content = checkpoints.load_checkpoint(saved)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.check_architecture(content, override_recipe(recipe, [override]), saved)
    assert f"it has {key}=" in str(caught.value)
    assert f"wanted is {'False' if value == 'false' else value}" in str(caught.value)
    assert str(caught.value).count("it has") == 1


def test_another_option_of_the_bridge_is_refused_by_key(saved: Path, recipe: Recipe) -> None:
    key, value = (
        ("projection", "linear") if recipe.bridge.kind == "projection" else ("num_heads", "2")
    )
    other = override_recipe(recipe, [f"bridge.{key}={value}"])
    with pytest.raises(CheckpointError, match=rf"it has bridge\.{key}=\w+, wanted is {value};"):
        checkpoints.check_architecture(checkpoints.load_checkpoint(saved), other, saved)


def test_moved_models_and_settings_of_training_are_no_other_architecture(
    saved: Path, recipe: Recipe
) -> None:
    moved = [
        f"vision_encoder.name=elsewhere/{Path(recipe.vision_encoder.name).name}",
        "language_model.revision=abc",
        "bridge.dropout=0.5",
        "learning_rate=1",
    ]
    checkpoints.check_architecture(
        checkpoints.load_checkpoint(saved), override_recipe(recipe, moved), saved
    )


def test_a_checkpoint_from_before_a_key_means_its_default(saved: Path, recipe: Recipe) -> None:
    content = checkpoints.load_checkpoint(saved)
    del content["recipe"]["vision_encoder"]["resample"]
    checkpoints.check_architecture(content, recipe, saved)
    with pytest.raises(
        CheckpointError, match=r"it has vision_encoder\.resample=None, wanted is bicubic"
    ):
        checkpoints.check_architecture(
            content, override_recipe(recipe, ["vision_encoder.resample=bicubic"]), saved
        )


def test_a_failed_save_leaves_the_previous_checkpoint(
    saved: Path, recipe: Recipe, model: CaptionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def disk_full(content: object, file) -> None:
        file.write(b"half a checkp")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*free some space"):
        checkpoints.save_checkpoint(saved, recipe, model.trained_state_dict())
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_killed_save_is_never_mistaken_for_a_checkpoint(
    saved: Path, recipe: Recipe, model: CaptionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "save", lambda content, file: file.write(b"half") and os._exit(9))
    latest = saved.with_name(checkpoints.LATEST)
    if (child := os.fork()) == 0:
        checkpoints.save_checkpoint(latest, recipe, model.trained_state_dict())
    os.waitpid(child, 0)
    assert not latest.exists()
    assert checkpoints.checkpoint_path(saved.parent) == saved


def test_captioners_load_from_a_run_folder(
    saved: Path, tmp_path: Path, recipe: Recipe, model: CaptionModel
) -> None:
    captioner = Captioner.from_pretrained(tmp_path / "run", device="cpu")
    assert captioner.recipe == recipe
    weights = captioner.model.trained_state_dict()
    assert all(
        torch.equal(weights[name], tensor) for name, tensor in model.trained_state_dict().items()
    )
    # The recipe a resumed run takes, and where it continues from.
    assert resumed_recipe(saved).resume_from_checkpoint == str(saved)


def test_a_checkpoint_that_says_the_wrong_architecture_is_one_clear_error(
    saved: Path, recipe: Recipe, model: CaptionModel
) -> None:
    content = checkpoints.load_checkpoint(saved)
    content["recipe"]["bridge"]["num_heads"] = "many"
    torch.save(content, saved)
    with pytest.raises(CheckpointError, match="its recipe cannot be understood"):
        Captioner.from_pretrained(saved)


def test_resuming_after_any_epoch_is_never_having_stopped(
    tmp_path: Path,
    drawn_caption_folder: Path,
    tiny_dinov2_dir: Path,
    tiny_gemma2_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The published system in small: dropout, a falling learning rate, clipping, early stopping and its counter."""

    def recipe(name: str) -> Recipe:
        plain = tiny_recipe(
            tiny_dinov2_dir,
            tiny_gemma2_dir,
            "cross_attention",
            data_dir=str(drawn_caption_folder),
            checkpoint_dir=str(tmp_path / name),
            log_dir=str(tmp_path / name / "logs"),
            feature_cache=str(tmp_path / "features"),
            learning_rate=1e-2,
            min_lr=1e-3,
            num_epochs=3,
            batch_size=8,
            early_stopping_patience=9,
            num_validation_samples=0,
        )
        return override_recipe(plain, ["bridge.dropout=0.1", "bridge.standardize_features=false"])

    after_epochs: list[Path] = []
    save = checkpoints.save_checkpoint

    def save_and_keep(path: Path, *arguments, **options) -> None:
        save(path, *arguments, **options)
        if path.name == checkpoints.LATEST:
            kept = tmp_path / f"after-{len(after_epochs) + 1}-epochs.pth"
            shutil.copy(path, kept)
            after_epochs.append(kept)

    watch = TrainState.watch
    monkeypatch.setattr(TrainState, "watch", lambda state, value: watch(state, value * math.inf))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save_checkpoint", save_and_keep)
        train(recipe("whole"))
    *earlier, last, whole = map(checkpoints.load_checkpoint, after_epochs)
    epochs = [content["training"]["progress"]["epoch"] for content in (*earlier, last, whole)]
    assert epochs == [1, 2, 3, 3]  # the last is saved again after its validation
    assert whole["training"]["early_stopping"]["bad_validations"] == 3
    for number, path in enumerate(after_epochs[:-2], start=1):
        caplog.clear()
        train(recipe(f"resumed-{number}"), resume=path)
        assert "another schedule" not in caplog.text
        resumed = checkpoints.load_checkpoint(tmp_path / f"resumed-{number}" / checkpoints.LATEST)
        assert_same(resumed["weights"], whole["weights"])
        for content in (resumed, whole):
            content["training"]["running"]["monitor"]["seconds"] = None
        assert_same(resumed["training"], whole["training"])


def assert_same(one: object, other: object) -> None:
    """Bit-equality of nested containers of tensors and plain values."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other

"""Recipes: every mistake is one line that names the place, and nothing is lost between YAML and dataclasses."""

from __future__ import annotations

import dataclasses
import pickle
import re
import typing
from pathlib import Path

import pytest
import yaml

from vlm_bridge.configuration import (
    DEFAULT_RECIPE,
    MAX_BEAMS,
    MAX_IMAGE_SIZE,
    MAX_NEW_TOKENS,
    DecodeSettings,
    Recipe,
    load_recipe,
    override_recipe,
    recipe_from_dict,
    shipped_recipe,
)
from vlm_bridge.data_pipeline.loader import EpochPlan
from vlm_bridge.errors import ConfigurationError, UsageError
from vlm_bridge.runtime import resolve_device
from vlm_bridge.training_strategy.schedule import learning_rate_at


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message_of(*overrides: str, recipe: Path | None = None) -> str:
    """The error of a recipe: one line, and exit code 2."""
    with pytest.raises(ConfigurationError) as caught:
        load_recipe(recipe, overrides)
    assert isinstance(caught.value, UsageError)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def test_defaults_are_the_published_ones() -> None:
    recipe = load_recipe(None)
    assert (recipe.learning_rate, recipe.min_lr, recipe.num_epochs, recipe.batch_size) == (
        1e-5,
        1e-6,
        12,
        8,
    )
    assert (recipe.gradient_clip_val, recipe.weight_decay, recipe.early_stopping_patience) == (
        0.3,
        0.01,
        3,
    )


@pytest.mark.parametrize(
    ("override", "mentions"),
    [
        ("learning_rat=1e-4", ["unknown key learning_rat", "did you mean 'learning_rate'?"]),
        ("bridge.num_querys=4", ["unknown key bridge.num_querys", "'num_queries'"]),
        (
            "bridge.standardise_features=true",
            ["bridge.standardise_features", "'standardize_features'"],
        ),
        ("decode.beams=4", ["unknown key decode.beams", "num_beams"]),
        ("language_model.xyz=1", ["unknown key language_model.xyz", "known: "]),
        ("bridge.kind=prefixx", ["bridge.kind='prefixx'", "did you mean 'prefix'?"]),
    ],
)
def test_unknown_keys_are_named_with_their_nearest_neighbour(
    override: str, mentions: list[str]
) -> None:
    message = message_of(override)
    for mention in mentions:
        assert mention in message


@pytest.mark.parametrize(
    ("override", "mentions"),
    [
        ("batch_size=many", ["batch_size='many'", "int"]),
        ("batch_size=2.5", ["batch_size=2.5", "int"]),
        ("batch_size=true", ["batch_size=True", "int"]),
        ("learning_rate=fast", ["learning_rate='fast'", "float"]),
        ("learning_rate=", ["learning_rate=None", "float"]),
        ("use_amp=1", ["use_amp=1", "bool"]),
        ("data_dir=[a, b]", ["data_dir=", "str"]),
        ("max_steps=ten", ["max_steps='ten'", "int"]),
        ("bridge.depth=deep", ["bridge.depth='deep'", "int"]),
        ("amp_dtype=float64", ["amp_dtype='float64'", "bfloat16, float16"]),
        ("quantize_language_model=int4", ["quantize_language_model='int4'", "none, int8, nf4"]),
        ("scheduler_type=[cosine]", ["scheduler_type=['cosine']", "cosine, linear, constant"]),
        ("bridge=prefix", ["bridge must be a mapping"]),
        ("vision_encoder.layers=3", ["vision_encoder.layers=3", "list"]),
        ("vision_encoder.layers=[1, last]", ["vision_encoder.layers[1]='last'", "int"]),
        ("decode=3", ["decode must be a mapping"]),
        ("language_model=gpt2", ["language_model must be a mapping"]),
    ],
)
def test_wrong_types_are_named(override: str, mentions: list[str]) -> None:
    message = message_of(override)
    for mention in mentions:
        assert mention in message


@pytest.mark.parametrize(
    "override",
    [
        "num_epochs=0",
        "batch_size=-8",
        "max_steps=0",
        "learning_rate=-1e-4",
        "learning_rate=.nan",
        "num_workers=-1",
        "warmup_steps=-5",
        "gradient_clip_val=0",
        "early_stopping_patience=0",
        "generate_samples_every_n_epochs=0",
        "max_validation_images=0",
        "seed=-1",
        "captions_per_image=3",  # does not divide the batch of 8
        "decode.num_beams=0",
        "decode.max_new_tokens=0",
        "decode.temperature=0",
        "decode.top_p=1.5",
        "vision_encoder.image_size=0",
        "bridge.num_queries=0",
        "bridge.dropout=1",
    ],
)
def test_impossible_values_are_refused(override: str) -> None:
    key = override.partition("=")[0]
    assert key in message_of(override)


def test_overrides_reach_every_depth() -> None:
    recipe = load_recipe(
        None,
        [
            "learning_rate=1e-4",
            "min_lr=1.0e-7",
            "num_epochs=3",
            "bridge.depth=4",
            "bridge.standardize_features=false",
            "language_model.prompt='A photo of'",
            "vision_encoder.image_size=256",
            "decode.num_beams=5",
            "max_steps=null",
        ],
    )
    assert recipe.learning_rate == 1e-4
    assert recipe.min_lr == 1e-7
    assert recipe.num_epochs == 3
    assert recipe.bridge.options.depth == 4
    assert recipe.bridge.standardize_features is False
    assert recipe.language_model.prompt == "A photo of"
    assert recipe.vision_encoder.image_size == 256
    assert recipe.decode.num_beams == 5
    assert recipe.max_steps is None


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    path = written(tmp_path, "num_epochs: 5\nbridge: {kind: prefix, depth: 3, width: 64}\n")
    recipe = load_recipe(path, ["bridge.depth=4", "num_epochs=6", "num_epochs=7"])
    assert recipe.num_epochs == 7
    assert (recipe.bridge.options.depth, recipe.bridge.options.width) == (4, 64)
    assert override_recipe(recipe, ["bridge.width=128"]).bridge.options.depth == 4


@pytest.mark.parametrize("override", ["learning_rate", "=3", "learning_rate:1e-4"])
def test_what_is_not_key_and_value_is_refused(override: str) -> None:
    assert "KEY=VALUE" in message_of(override)


def test_an_override_cannot_go_into_a_value(tmp_path: Path) -> None:
    path = written(tmp_path, "batch_size: 8\n")
    assert "batch_size is a value, not a section" in message_of("batch_size.large=1", recipe=path)
    assert "not valid YAML" in message_of("data_dir=[")


def test_another_kind_of_bridge_does_not_take_the_old_ones_options(tmp_path: Path) -> None:
    path = written(tmp_path, "bridge: {kind: prefix, num_queries: 8}\n")
    message = message_of("bridge.kind=cross_attention", recipe=path)
    assert "unknown key bridge.num_queries" in message
    assert "num_heads" in message
    # Without leftovers the switch is a matter of one override.
    assert (
        load_recipe(None, ["bridge.kind=cross_attention"]).bridge.options.feed_forward_multiplier
        == 4
    )


RATES = (
    "learning_rate", "min_lr", "weight_decay", "gradient_clip_val", "scst_temperature", "label_smoothing",
    "max_bad_samples", "weight_averaging", "early_stopping_min_delta", "save_every_n_minutes", "trainable.bridge.*",
    "decode.temperature", "decode.top_p", "decode.length_penalty", "decode.repetition_penalty", "decode.object_bonus",
    "bridge.dropout",
)  # fmt: skip


@pytest.mark.parametrize("key", RATES)
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e30", "-1e30"])
def test_a_rate_that_no_training_means_is_refused(key: str, value: str) -> None:
    message = message_of(f"{key}={value}")
    assert key.split(".")[0] in message
    assert "\n" not in message


COUNTS = [
    name
    for name, hint in typing.get_type_hints(Recipe).items()
    if hint in (int, int | None) and name != "seed"
] + [
    "decode.num_beams",
    "decode.max_new_tokens",
    "bridge.depth",
    "bridge.width",
    "vision_encoder.image_size",
]


@pytest.mark.parametrize("key", [*COUNTS, "seed", "decode.seed"])
def test_a_count_that_no_machine_holds_is_refused(key: str) -> None:
    for value in (2**63, 2**64, f"0x{'f' * 5000}", -1):
        message = message_of(f"{key}={value}")
        assert key in message
        assert len(message) < 300


def test_the_largest_seed_is_below_2_to_the_63() -> None:
    assert load_recipe(None, [f"seed={2**63 - 1}", f"decode.seed={2**63 - 1}"]).seed == 2**63 - 1


@pytest.mark.parametrize(
    ("override", "limit"),
    [
        ("decode.num_beams", MAX_BEAMS),
        ("decode.max_new_tokens", MAX_NEW_TOKENS),
        ("vision_encoder.image_size", MAX_IMAGE_SIZE),
    ],
)
def test_the_limits_themselves_are_allowed(override: str, limit: int) -> None:
    load_recipe(None, [f"{override}={limit}"])
    assert f"{override} must be at most {limit:,}" in message_of(f"{override}={limit + 1}")


@pytest.mark.parametrize("kind", ["prefix", "cross_attention"])
def test_a_recipe_survives_yaml(tmp_path: Path, kind: str) -> None:
    recipe = load_recipe(
        None,
        [
            f"bridge.kind={kind}",
            "bridge.num_heads=2",
            "learning_rate=3e-7",
            "feature_cache=off",
            "language_model.prompt='yes: no'",
            "data_dir='1e5'",
            "max_steps=7",
            "gradient_clip_val=1e6",
            "vision_encoder.layers=[4, -1]",
            "decode.known_objects=[dog, cup of coffee]",
        ],
    )
    assert recipe.vision_encoder.layers == (4, -1)
    assert recipe.decode.known_objects == ("dog", "cup of coffee")
    assert load_recipe(written(tmp_path, recipe.to_yaml())) == recipe
    assert recipe_from_dict(recipe.to_dict()) == recipe
    assert override_recipe(recipe, []) == recipe
    assert recipe.feature_cache == "off"
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_an_empty_recipe_is_the_default_one(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, "# nothing\n")) == load_recipe(None)


def test_unusable_files_are_named(tmp_path: Path) -> None:
    assert "no recipe at" in message_of(recipe=tmp_path / "missing.yaml")
    assert "cannot read" in message_of(recipe=tmp_path)
    for text in ("a: [1\nb: }\n", "a:\n\t- b\n", "key: 'open\n", "- a\n- b\n", "just words\n"):
        assert "recipe.yaml" in message_of(recipe=written(tmp_path, text))
    (tmp_path / "latin.yaml").write_bytes("data_dir: caf\xe9\n".encode("latin-1"))
    assert "latin.yaml" in message_of(recipe=tmp_path / "latin.yaml")


def test_odd_keys_are_errors_not_accidents(tmp_path: Path) -> None:
    assert "unknown key" in message_of(recipe=written(tmp_path, "1: 2\n"))
    assert "bridge.kind" in message_of(recipe=written(tmp_path, "bridge: {kind: [prefix]}\n"))
    assert "unknown key bridge.options" in message_of(
        recipe=written(tmp_path, "bridge: {options: {depth: 1}}\n")
    )


def test_shipped_recipes_are_found_by_name() -> None:
    path = shipped_recipe("quickstart")
    assert isinstance(load_recipe(path), Recipe)
    with pytest.raises(ConfigurationError, match="no recipe named 'nothing'"):
        shipped_recipe("nothing")


class TestTrainingDefault:
    """The published recipe of the DINOv2 + Gemma-2 system."""

    recipe = load_recipe(shipped_recipe(DEFAULT_RECIPE))

    def test_its_values_are_the_published_ones(self) -> None:
        recipe = self.recipe
        assert recipe.vision_encoder.name == "facebook/dinov2-large"
        assert recipe.language_model.name == "google/gemma-2-2b"
        assert (recipe.bridge.kind, recipe.bridge.options.dropout) == ("cross_attention", 0.1)
        assert (recipe.use_amp, recipe.amp_dtype, recipe.gradient_clip_val) == (
            True,
            "bfloat16",
            0.3,
        )
        assert (recipe.use_early_stopping, recipe.early_stopping_patience) == (True, 3)
        assert (recipe.early_stopping_min_delta, recipe.weight_decay) == (0.0, 0.01)
        assert (recipe.val_every_n_epochs, recipe.save_every_n_epochs) == (1, 1)
        assert recipe.data_dir == "data/groundcap"

    def test_its_schedule_is_twelve_epochs_of_5235_steps(self) -> None:
        recipe = self.recipe
        plan = EpochPlan(
            [1] * 41_880,
            row_captions=recipe.captions_per_image,
            batch_captions=recipe.batch_size,
            seed=recipe.seed,
        )
        total = plan.num_batches(0) * recipe.num_epochs
        assert (plan.num_batches(0), total) == (5_235, 62_820)
        rates = [
            learning_rate_at(
                step,
                total_steps=total,
                warmup_steps=recipe.warmup_steps,
                learning_rate=recipe.learning_rate,
                min_lr=recipe.min_lr,
                kind=recipe.scheduler_type,
            )
            for step in (0, total // 2, total)
        ]
        assert rates == pytest.approx([1e-5, 5.5e-6, 1e-6])

    def test_every_key_is_there_with_a_comment(self) -> None:
        text = shipped_recipe(DEFAULT_RECIPE).read_text(encoding="utf-8")
        left_out = {
            "max_steps",
            "max_validation_images",
        }  # limits that a whole training does without
        assert (
            yaml.safe_load(text).keys() == {f.name for f in dataclasses.fields(Recipe)} - left_out
        )
        commented = {
            line.split(":")[0].strip()
            for line in text.splitlines()
            if re.search(r": +[^ #].* # ", line)
        }
        keys = {
            line.split(":")[0].strip()
            for line in text.splitlines()
            if re.match(r" *[\w.*]+: +[^ #]", line)
        }
        assert keys == commented


ORIGINAL_PROJECT = """\
amp_dtype: bfloat16
batch_size: 16
checkpoint_dir: checkpoints/experiment
data_dir: data/groundcap
device: null
early_stopping_min_delta: 0.01
early_stopping_patience: 4
generate_samples_every_n_epochs: 5
gradient_clip_val: 0.3
learning_rate: 2.0e-05
log_dir: logs/experiment
log_every_n_steps: 10
min_lr: 1.0e-06
num_epochs: 12
num_validation_samples: 3
num_workers: 4
resume_from_checkpoint: null
save_every_n_epochs: 1
scheduler_type: cosine
use_amp: true
use_early_stopping: true
use_scheduler: true
val_every_n_epochs: 1
weight_decay: 0.01
"""
"""Every key of the original project's configuration file, in its layout."""


class TestOriginalLayout:
    def test_a_file_of_the_original_project_loads_unchanged(self, tmp_path: Path) -> None:
        said: list[str] = []
        recipe = load_recipe(written(tmp_path, ORIGINAL_PROJECT), say=said.append)
        default = load_recipe(shipped_recipe(DEFAULT_RECIPE))
        for key, value in yaml.safe_load(ORIGINAL_PROJECT).items():
            means = {"device": "auto", "early_stopping_min_delta": 0.0}.get(key, value)
            assert getattr(recipe, key) == means
        for section in ("vision_encoder", "language_model", "bridge", "max_caption_tokens"):
            assert getattr(recipe, section) == getattr(default, section)
        assert len(said) == 1
        assert "facebook/dinov2-large + cross_attention + google/gemma-2-2b" in said[0]
        assert said[0].endswith("without meaning here: early_stopping_min_delta")

    @pytest.mark.parametrize("off", ["use_amp: false", "amp_dtype: float32"])
    def test_without_mixed_precision_all_is_float32_as_there(
        self, tmp_path: Path, off: str
    ) -> None:
        recipe = load_recipe(written(tmp_path, f"batch_size: 8\n{off}\n"))
        assert recipe.autocast_dtype is None
        assert (recipe.language_model.dtype, recipe.feature_cache_dtype) == ("float32", "float32")
        half = load_recipe(written(tmp_path, "batch_size: 8\n"), ["use_amp=false"])
        assert half.language_model.dtype == "bfloat16"  # an override says what it says

    def test_its_names_of_the_models_are_understood(self, tmp_path: Path) -> None:
        flat = (
            "vision_model_name: some/encoder\nlanguage_model_name: some/model\nbridge_num_heads: 4\n"
            "bridge_dropout: 0.2\nmax_length: 64\npin_memory: true\n"
        )
        said: list[str] = []
        recipe = load_recipe(written(tmp_path, flat), ["bridge.dropout=0.3"], say=said.append)
        assert (recipe.vision_encoder.name, recipe.language_model.name) == (
            "some/encoder",
            "some/model",
        )
        assert (recipe.bridge.options.num_heads, recipe.bridge.options.dropout) == (4, 0.3)
        assert recipe.max_caption_tokens == 64
        assert said[0].endswith("without meaning here: pin_memory")

    def test_a_mistake_in_it_is_still_told(self, tmp_path: Path) -> None:
        message = message_of(recipe=written(tmp_path, ORIGINAL_PROJECT + "learning_rat: 1\n"))
        assert "unknown key learning_rat; did you mean 'learning_rate'?" in message

    def test_a_recipe_that_names_a_model_is_not_taken_for_it(self, tmp_path: Path) -> None:
        said: list[str] = []
        recipe = load_recipe(
            written(tmp_path, "vision_encoder: {name: x}\nbatch_size: 4\n"), say=said.append
        )
        assert not said
        assert recipe.language_model == load_recipe(None).language_model
        assert "unknown key max_length" in message_of(
            recipe=written(tmp_path, "bridge: {kind: prefix}\nmax_length: 3\n")
        )


def test_decode_settings_are_stored_whole() -> None:
    settings = DecodeSettings(num_beams=2, length_penalty=0.8, known_objects=("dog", "ice cream"))
    assert DecodeSettings(**yaml.safe_load(yaml.safe_dump(settings.to_dict()))) == settings


def test_devices_that_are_not_there_are_named() -> None:
    import torch

    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigurationError, match="device='abacus' is unknown"):
        resolve_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match="no CUDA GPU"):
            resolve_device("cuda")
        assert resolve_device("auto").type in ("cpu", "mps")

"""Recipes: every mistake is one line with its place, and YAML keeps every value."""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from vlm_bridge.configuration import (
    DEFAULT_RECIPE,
    BridgeOptions,
    Recipe,
    load_recipe,
    override_recipe,
    recipe_from_dict,
    shipped_recipe,
)
from vlm_bridge.data_pipeline.loader import EpochPlan
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.bridges import BRIDGES


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message_of(*overrides: str, recipe: Path | None = None) -> str:
    """Return the error of a recipe: one line, and exit code 2."""
    with pytest.raises(ConfigurationError) as caught:
        load_recipe(recipe, overrides)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert message and "\n" not in message
    return message


IMPOSSIBLE = """
    num_epochs=0 batch_size=-8 max_steps=0 learning_rate=-1e-4 num_workers=-1 warmup_steps=-5
    seed=-1 gradient_clip_val=0 early_stopping_patience=0 max_validation_images=0
    label_smoothing=1 weight_averaging=1 max_bad_samples=1.1 decode.num_beams=0
    decode.num_beams=1001 decode.temperature=0 decode.top_p=1.5 bridge.num_queries=0
    vision_encoder.image_size=2049 bridge.dropout=1 save_every=now
"""


@pytest.mark.parametrize(
    ("override", "mentions"),
    [
        ("learning_rat=1e-4", ["unknown key learning_rat", "did you mean 'learning_rate'?"]),
        ("bridge.num_querys=4", ["unknown key bridge.num_querys", "'num_queries'"]),
        ("language_model.xyz=1", ["unknown key language_model.xyz", "known: "]),
        ("bridge.kind=prefixx", ["bridge.kind='prefixx'", "should be one of", "'prefix'"]),
        ("batch_size=2.5", ["batch_size=2.5", "integer"]),
        ("learning_rate=fast", ["learning_rate='fast'", "number"]),
        ("compile=1", ["compile=1", "boolean"]),
        ("data_dir=[a, b]", ["data_dir=", "string"]),
        ("amp_dtype=float64", ["amp_dtype='float64'", "bfloat16", "float16"]),
        ("bridge=prefix", ["bridge='prefix'", "dictionary"]),
        ("vision_encoder.layers=[1, last]", ["vision_encoder.layers", "'last'", "int"]),
        ('language_model.name="a\\u0007"', ["language_model.name", "pattern"]),
        ("captions_per_image=3", ["batch_size", "captions_per_image=3"]),  # 8 is no multiple of 3
        ("learning_rate:1e-4", ["KEY=VALUE"]),
        ("data_dir=[", ["not valid YAML"]),
        ("1=2", ["unknown key"]),
        ("num_epochs.x=1", ["num_epochs={", "integer"]),
        *[(override, [override.partition("=")[0]]) for override in IMPOSSIBLE.split()],
    ],
)
def test_a_mistake_is_named(override: str, mentions: list[str]) -> None:
    message = message_of(override)
    for mention in mentions:
        assert mention in message


NUMBERS = [
    key
    for key, field in Recipe.model_fields.items()
    if {int, float} & {field.annotation, *get_args(field.annotation)}
]
INNER_NUMBERS = """
    trainable.bridge.* decode.num_beams decode.max_new_tokens decode.temperature decode.top_p
    decode.length_penalty decode.repetition_penalty decode.object_threshold decode.seed bridge.depth
    bridge.width bridge.dropout vision_encoder.image_size
"""


@pytest.mark.parametrize("key", [*NUMBERS, *INNER_NUMBERS.split()])
def test_a_number_that_no_training_means_is_refused(key: str) -> None:
    for value in (".inf", ".nan", "1e30", "-1e30", 2**63, f"0x{'f' * 5000}", "-3e9"):
        message = message_of(f"{key}={value}")
        assert key in message
        assert len(message) < 300


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    path = written(tmp_path, "num_epochs: 5\nbridge: {depth: 3, width: 64}\n")
    overrides = [
        "bridge.depth=4", "num_epochs=6", "num_epochs=7", f"seed={2**63 - 1}", "max_steps=null",
        "language_model.prompt='A photo of'", "trainable.bridge.*=1e-5",
    ]  # fmt: skip
    recipe = load_recipe(path, overrides)
    assert (recipe.num_epochs, recipe.seed, recipe.max_steps) == (7, 2**63 - 1, None)
    assert (recipe.language_model.prompt, recipe.trainable) == ("A photo of", {"bridge.*": 1e-5})
    again = override_recipe(recipe, ["bridge.num_heads=2"]).bridge
    assert (again.kind, again.depth, again.width, again.num_heads) == ("prefix", 4, 64, 2)
    assert "num_epochs is a value, not a section" in message_of("num_epochs.x=1", recipe=path)


@pytest.mark.parametrize("kind", BRIDGES)
def test_every_kind_of_bridge_has_its_own_options(kind: str) -> None:
    bridge = recipe_from_dict({"bridge": {"kind": kind}}).bridge
    assert bridge.kind == kind
    assert BridgeOptions.build(bridge.to_dict()) == bridge
    assert bridge.to_dict().get("enter_at_layer") == (0 if kind == "cross_attention" else None)
    assert ("enter_at_layer" in bridge.to_dict()) == (kind in ("deep_prefix", "cross_attention"))
    other = "projection=mlp" if kind != "projection" else "num_queries=8"
    message = message_of(f"bridge.kind={kind}", f"bridge.{other}")
    assert f"bridge.{other.partition('=')[0]} is no option of kind={kind}" in message


@pytest.mark.parametrize("kind", ["prefix", "cross_attention"])
def test_a_recipe_survives_yaml(tmp_path: Path, kind: str) -> None:
    overrides = [
        f"bridge.kind={kind}", "bridge.num_heads=2", "learning_rate=3e-7", "feature_cache=off",
        "max_steps=7", "language_model.prompt='yes: no'", "data_dir='1e5'",
        "vision_encoder.layers=[4, -1]", "confidence.weights=[1, 2.5, 3]",
    ]  # fmt: skip
    recipe = load_recipe(None, overrides)
    assert recipe.vision_encoder.layers == (4, -1)
    assert recipe.confidence is not None and recipe.confidence.weights == (1, 2.5, 3)
    assert recipe.feature_cache == "off"
    assert load_recipe(written(tmp_path, recipe.to_yaml())) == recipe
    assert recipe_from_dict(recipe.to_dict()) == override_recipe(recipe, []) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_unusable_files_are_named(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, "# nothing\n")) == load_recipe(None)
    assert "no recipe at" in message_of(recipe=tmp_path / "missing.yaml")
    assert "cannot read" in message_of(recipe=tmp_path)
    for text in ("a: [1\nb: }\n", "a:\n\t- b\n", "key: 'open\n", "- a\n- b\n", "just words\n"):
        assert "recipe.yaml" in message_of(recipe=written(tmp_path, text))
    (tmp_path / "latin.yaml").write_bytes("data_dir: caf\xe9\n".encode("latin-1"))
    assert "latin.yaml" in message_of(recipe=tmp_path / "latin.yaml")


def test_recipes_that_ship_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lite = load_recipe(shipped_recipe("lite-flickr8k"))
    monkeypatch.chdir(tmp_path)
    assert load_recipe("lite-flickr8k") == load_recipe("lite-flickr8k.yaml") == lite
    assert message_of(recipe=Path("lite-flickr8")).endswith("did you mean lite-flickr8k?")
    assert "did you mean lite-flickr8k?" in message_of(recipe=Path("confg/lite-flickr8k.yaml"))
    assert "shipped: " in message_of(recipe=Path("nothing-like-it"))
    own = tmp_path / "lite-flickr8k"
    own.write_text("seed: 5\nbridge: {}\n")
    assert load_recipe("lite-flickr8k").seed == 5
    own.rename(tmp_path / "mine.yaml")
    assert "did you mean mine.yaml?" in message_of(recipe=Path("mime.yaml"))


@pytest.mark.parametrize("layout", ["bridge: {}\n", ""])  # the second is the published one
def test_output_dir_places_a_run_unless_single_folders_are_given(
    tmp_path: Path, layout: str
) -> None:
    def folders(text: str, *overrides: str) -> tuple[str, str]:
        recipe = load_recipe(written(tmp_path, layout + text), overrides)
        return recipe.checkpoint_dir, recipe.log_dir

    placed, single = "output_dir: a\n", "checkpoint_dir: b\n"
    assert folders(placed) == ("a/checkpoints", "a/logs")
    assert folders(placed + single) == ("b", "a/logs")
    assert folders(placed, "checkpoint_dir=c") == ("c", "a/logs")
    assert folders(single, "output_dir=d") == ("d/checkpoints", "d/logs")
    assert folders(placed, "log_dir=c", "output_dir=d") == ("d/checkpoints", "c")
    assert "output_dir=5 should be a folder" in message_of("output_dir=5")


def test_a_credential_in_a_recipe_is_refused_and_not_repeated() -> None:
    message = message_of("language_model.name=https://me:hf_abcdefghijklmnopqrstuvwxyz@host/x")
    assert "language_model.name holds a token or a password" in message and "hf_abc" not in message


class TestTrainingDefault:
    """The published recipe of the DINOv2 + Gemma-2 system."""

    recipe = load_recipe(shipped_recipe(DEFAULT_RECIPE))

    def test_its_values_are_the_published_ones(self) -> None:
        recipe, default = self.recipe, load_recipe(None)
        assert recipe.vision_encoder.name == "facebook/dinov2-large"
        assert recipe.language_model.name == "google/gemma-2-2b"
        assert (recipe.bridge.kind, recipe.bridge.dropout) == ("cross_attention", 0.1)
        assert (recipe.autocast_dtype, recipe.gradient_clip_val) == ("bfloat16", 0.3)
        assert (recipe.learning_rate, recipe.num_epochs, recipe.batch_size) == (1e-5, 12, 8)
        assert (recipe.early_stopping_patience, recipe.weight_decay) == (3, 0.01)
        for key in ("learning_rate", "min_lr", "num_epochs", "batch_size", "gradient_clip_val"):
            assert getattr(default, key) == getattr(recipe, key)

    def test_an_epoch_of_it_is_5235_steps(self) -> None:
        size = self.recipe.batch_size
        plan = EpochPlan([1] * 41_880, row_captions=1, batch_rows=size, seed=0)
        assert plan.num_batches(0) == 5_235

    def test_every_key_is_there_with_a_comment(self) -> None:
        text = shipped_recipe(DEFAULT_RECIPE).read_text(encoding="utf-8")
        left_out = {"max_steps", "max_validation_images"}  # a whole training has no limits
        assert yaml.safe_load(text).keys() == Recipe.model_fields.keys() - left_out
        with_value = re.findall(r"^ *([\w.*]+): +[^ #].*$", text, re.MULTILINE)
        with_comment = re.findall(r"^ *([\w.*]+): +[^ #].* # .*$", text, re.MULTILINE)
        assert with_value == with_comment


def test_mixed_precision_of_the_original_layout_is_overridden_alone(tmp_path: Path) -> None:
    half = load_recipe(written(tmp_path, "batch_size: 8\n"), ["use_amp=false"])
    assert half.language_model.dtype == "bfloat16"
    assert half.autocast_dtype is None


class TestEarlierRecipes:
    """Recipes with the keys of earlier versions, in files and in checkpoints."""

    @pytest.mark.parametrize(
        ("old", "today"),
        [
            ({"use_scheduler": True, "use_amp": True, "save_every_n_steps": None}, {}),
            ({"use_scheduler": False}, {"scheduler_type": "constant"}),
            ({"use_amp": False, "amp_dtype": "bfloat16"}, {"amp_dtype": "float32"}),
            ({"use_early_stopping": False}, {"early_stopping_patience": None}),
            ({"val_every_n_epochs": 3}, {"validate_every": "3 epochs"}),
            ({"decode_every_n_steps": 500}, {"validate_every": "500 steps"}),
            ({"decode_every_n_steps": None, "num_decoded_images": 9, "monitor": "loss"}, {}),
            ({"save_every_n_epochs": 2}, {"save_every": "2 epochs"}),
            ({"save_every_n_minutes": 7.5}, {"save_every": "7.5 minutes"}),
            ({"save_every_n_steps": 4, "save_every_n_epochs": 2}, {"save_every": "4 steps"}),
            ({"quantize_language_model": "nf4"}, {"language_model": {"dtype": "nf4"}}),
        ],
    )
    def test_renamed_keys_keep_their_meaning(
        self, old: dict[str, Any], today: dict[str, Any]
    ) -> None:
        assert recipe_from_dict(old) == recipe_from_dict(today)

    @pytest.mark.parametrize(
        "override",
        [
            "early_stopping_min_delta=0.01", "generate_samples_every_n_epochs=5", "loss_kernel=own",
            "pin_memory=false", "feature_cache_pooling=2", "text_state_cache=true",
            "scst_baseline=greedy", "halve_batch_on_oom=true", "max_skipped_steps=3",
            "keep_step_checkpoints=9", "shuffle_buffer=16",
            "distillation={teacher: x}",
        ],
    )  # fmt: skip
    def test_removed_keys_are_ignored_and_named(
        self, override: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "vlm_bridge")
        assert load_recipe(None, [override]) == load_recipe(None)
        assert f"no longer supported: {override.partition('=')[0]}" in caplog.text

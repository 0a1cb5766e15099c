"""Bridges and encoders in code of the user's own, and checkpoints that name code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from captioners import tiny_captioner, tiny_recipe
from readme import code_blocks
from same import assert_same_checkpoints
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import Recipe, load_recipe, override_recipe
from vlm_bridge.errors import CheckpointError, ConfigurationError, VLMBridgeError
from vlm_bridge.finetuning.combined import combine_checkpoint
from vlm_bridge.formats import dinov2_gemma
from vlm_bridge.model_architecture.captioner import build_captioner
from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder, encoder_fingerprint
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.resume import resumed_recipe
from vlm_bridge.training_strategy.trainer import train

EVIL = "from pathlib import Path\nPath('was_imported').touch()\nclass Evil: ...\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder where a command runs; modules imported from it are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in sys.modules.keys() - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def own(here: Path, repository: Path, make_recipe: Any, tiny_llama_dir: Path) -> Path:
    """The recipe of the documentation, with a tiny language model, beside its module."""
    page = (repository / "docs" / "choosing.md").read_text(encoding="utf-8")
    blocks = [code for code in code_blocks(page, "python") if "my_parts.py" in code]
    assert [len(code.splitlines()) <= 25 for code in blocks] == [True, True]
    (here / "my_parts.py").write_text("\n".join(blocks), encoding="utf-8")
    (documented,) = (code for code in code_blocks(page, "yaml") if "my_parts" in code)
    recipe = {**make_recipe("own", "max_steps=4").to_dict(), **yaml.safe_load(documented)}
    recipe["data_dir"] = make_recipe("own").data_dir
    (here / "mine.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return here / "mine.yaml"


def test_the_parts_of_the_documentation_train_caption_and_resume(
    own: Path, run_here: Callable[..., Any], drawn_caption_folder: Path
) -> None:
    image = next((drawn_caption_folder / "test" / "images").iterdir())
    done = run_here("train", "--config", own, "save_every=2 steps")
    assert done.returncode == 0, done.stderr
    captioned = run_here("caption", image, "--checkpoint", "runs/mine", "--config", own)
    assert captioned.returncode == 0, captioned.stderr
    alone = run_here("caption", image, "--checkpoint", "runs/mine")
    assert alone.returncode == 1 and alone.stderr.count("\n") == 1
    assert "needs my_parts:ColorGrid and my_parts:MeanBridge: code is imported" in alone.stderr

    again = ("checkpoint_dir=again/checkpoints", "log_dir=again/logs", "save_every=2 steps")
    middle = "runs/mine/checkpoints/step_00000002.pth"
    resumed = run_here("train", "--config", own, "--resume", middle, *again)
    assert resumed.returncode == 0, resumed.stderr
    latest = Path("checkpoints", checkpoints.LATEST)
    assert_same_checkpoints("runs/mine" / latest, "again" / latest)
    exported = run_here("export", "runs/mine", "--output-dir", "exported")
    assert exported.returncode == 0 and "my_parts:MeanBridge is code of yours" in exported.stderr
    recipe = load_recipe(own)
    one, two = (Captioner.from_pretrained(p, "cpu", recipe=recipe) for p in ("exported", middle))
    assert one.model.bridge.num_soft_tokens == two.model.bridge.num_soft_tokens == 1


def test_features_of_changed_code_are_made_anew(own: Path) -> None:
    recipe = load_recipe(own).vision_encoder
    before = encoder_fingerprint(build_vision_encoder(recipe))
    del sys.modules["my_parts"]
    module = own.parent / "my_parts.py"
    module.write_text(module.read_text(encoding="utf-8").replace("/ 255", "/ 128"))
    assert encoder_fingerprint(build_vision_encoder(recipe)) != before


@pytest.mark.parametrize(
    ("code", "override", "message"),
    [
        ("", "bridge.kind=nowhere:Bridge", "cannot import nowhere:Bridge: No module named"),
        ("", "bridge.kind=parts:Bridge", "module 'parts' has no attribute 'Bridge'"),
        ("import nowhere", "vision_encoder.name=parts:E", "cannot import parts:E: No module named"),
        ("class B: ...", "bridge.kind=parts:B", "parts:B must be a subclass of .*Bridge"),
        ("", "bridge.kind=os:system", "os:system must be a subclass of .*Bridge"),
        ("", "vision_encoder.name=os:system", "os:system must be a subclass of .*Module"),
        (
            "from torch import nn\nclass E(nn.Module):\n load = lambda config, meta: E()",
            "vision_encoder.name=parts:E",
            "the vision encoder parts:E has no embed_dim, num_tokens, grid, image_size, layers, pre",
        ),
        (
            "from vlm_bridge.model_architecture.bridges import *\nclass B(PrefixBridge):\n"
            " output = 'edit'",
            "bridge.kind=parts:B",
            "B has output='edit' and num_soft_tokens=3, but its encode returned 3 soft tokens",
        ),
        ("", "bridge.kind=parts", "bridge.kind='parts' should be one of 'cross_attention', "),
        ("", "bridge.kind=parts:B.C", "bridge.kind='parts:B.C' should be one of"),
    ],
)
def test_code_that_cannot_be_used_is_one_line(
    here: Path, tiny_vit_dir: Path, tiny_llama_dir: Path, code: str, override: str, message: str
) -> None:
    (here / "parts.py").write_text(code, encoding="utf-8")
    with pytest.raises(VLMBridgeError, match=message) as refusal:
        recipe = override_recipe(tiny_recipe(tiny_vit_dir, tiny_llama_dir), [override])
        model = build_captioner(recipe)
        model.image_inputs(torch.zeros(1, model.vision_encoder.num_tokens, 32))
    assert "\n" not in str(refusal.value)


NAMES = [
    ("bridge", "kind", "evil:Evil"),
    ("bridge", "kind", "os:system"),
    ("vision_encoder", "name", "evil:Evil"),
    ("vision_encoder", "name", "efficientnet-lite0 + evil:Evil"),
]


@pytest.fixture
def hostile(here: Path, tiny_vit_dir: Path, tiny_llama_dir: Path) -> Callable[..., Path]:
    """Write a sound checkpoint whose recipe names code; the module lies beside the command."""
    (here / "evil.py").write_text(EVIL, encoding="utf-8")

    def make(section: str, key: str, name: str) -> Path:
        recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir)
        weights = tiny_captioner(recipe).trained_state_dict()
        plain: Any = recipe.to_dict()
        if section == "bridge":  # a kind of one's own has all options
            plain["bridge"] = {"kind": name}
        plain[section][key] = name
        content = {**checkpoints.header(plain), "weights": weights, "training": {}}
        path = here / "run" / "checkpoints" / checkpoints.LATEST
        path.parent.mkdir(parents=True)
        torch.save(content, path)
        return path

    return make


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_never_imports_what_it_names(
    hostile: Callable[..., Path], name: tuple[str, str, str], make_recipe: Any,
    run_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    imported: list[str] = []
    for place in ("bridges", "vision_encoder"):
        function = f"vlm_bridge.model_architecture.{place}.import_own"
        monkeypatch.setattr(function, lambda name, _: imported.append(name))
    path, mine = hostile(*name), make_recipe("mine")
    opened: list[Callable[[], object]] = [
        lambda: Captioner.from_pretrained(path, "cpu"),
        lambda: Captioner.from_pretrained(path.parents[1], "cpu", recipe=mine),
        lambda: Captioner.from_pretrained("exported", "cpu"),
        lambda: resumed_recipe(path),
        lambda: train(mine, resume=path),
        lambda: train(mine, resume=path, force=True),
        lambda: train(override_recipe(mine, [f"start_from={path}"])),
        lambda: combine_checkpoint(path),
    ]
    # What builds no captioner may be done.
    assert run_here("export", path, "--output-dir", "exported").returncode == 0
    assert run_here("average", path, path, "--output-dir", "averaged").returncode == 0
    assert run_here("report", path.parents[1]).returncode == 0
    for action in opened:
        with pytest.raises(CheckpointError, match=r"needs .*:|another architecture") as refusal:
            action()
        assert "\n" not in str(refusal.value)
    data = ("--data-dir", mine.data_dir)
    for command in (
        ("train", "--resume", path),
        ("train", "--resume", path, "seed=1"),
        ("evaluate", "--checkpoint", path, *data),
        ("evaluate", "--checkpoint", "averaged", *data),
    ):
        refused = run_here(*command)
        assert (
            refused.returncode == 1
            and "code is imported for a recipe of your own" in refused.stderr
        )
    assert imported == [] and not Path("was_imported").exists() and "evil" not in sys.modules


def test_the_settings_of_an_original_checkpoint_import_nothing(here: Path) -> None:
    (here / "evil.py").write_text(EVIL, encoding="utf-8")
    state = {name: torch.ones(2, 2) for name in dinov2_gemma.ORIGINAL_NAMES.values()}
    config = {"num_epochs": 1, "bridge": {"kind": "evil:Evil"}}
    torch.save({"model_state_dict": state, "config": config}, here / "original.pth")
    with pytest.raises(CheckpointError, match="code is imported for a recipe of your own"):
        resumed_recipe(here / "original.pth")
    with pytest.raises(ConfigurationError, match="must be a subclass"):  # of the user's own
        build_captioner(Recipe.build({"bridge": {"kind": "evil:Evil"}}), meta=True)
    assert Path("was_imported").exists()

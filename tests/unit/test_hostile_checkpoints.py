"""Checkpoints made to cost memory or time are refused by one line."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from captioners import tiny_captioner, tiny_recipe
from vlm_bridge import formats
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.errors import CheckpointError
from vlm_bridge.formats import (
    MAX_PICKLE_BYTES,
    check_content,
    dinov2_gemma,
)
from vlm_bridge.training_strategy import checkpoint as checkpoints

QUERIES = "bridge.resampler.queries"
Content = dict[str, Any]


@pytest.fixture
def sound(tmp_path: Path, tiny_vit_dir: Path, tiny_llama_dir: Path) -> Path:
    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir)
    weights = tiny_captioner(recipe).trained_state_dict()
    checkpoints.save_checkpoint(tmp_path / "sound.pth", recipe, weights)
    return tmp_path / "sound.pth"


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        Captioner.from_pretrained(path, "cpu")
    assert "\n" not in str(error.value)


def laughs() -> Any:
    """Ten lists of ten lists of ... : 10**30 values in 300 references."""
    value: list[Any] = [1]
    for _ in range(30):
        value = [value] * 10
    return value


def itself() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def weight(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Content], None]:
    """Return a change of one of a checkpoint's weights."""

    def change(content: Content) -> None:
        content["weights"][QUERIES] = make(content["weights"][QUERIES])

    return change


def recipe(section: str, **values: Any) -> Callable[[Content], None]:
    return lambda content: content["recipe"][section].update(values)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(training=laughs()), "more than 50 levels or 300,000 values"),
        (lambda c: c.update(training={"itself": itself()}), "more than 50 levels"),
        (lambda c: c.update(training={"x": {1, 2}}), "holds a set"),
        (weight(lambda tensor: tensor[:1, :1].expand(10**7, 10**5)), "larger than what is stored"),
        (weight(lambda tensor: tensor.to("meta")), "dense and on the CPU"),
        (weight(lambda tensor: tensor.int()), f"{QUERIES} is of type torch.int32"),
        (weight(lambda tensor: tensor * torch.nan), f"{QUERIES} is not finite"),
        (weight(lambda tensor: tensor[:1]), "another architecture"),
        (recipe("bridge", depth=10**7), "bridge.depth=.* less than"),
        (recipe("bridge", num_heads=3), "cannot be built: bridge.num_heads=3 does not divide"),
        (recipe("language_model", name="x" * 2000), "language_model.name=.* at most 1000 char"),
        (lambda c: c.update(format_version=True), "format_version is True"),
        (lambda c: c.update(format_version=99), "newer vlm-bridge"),
    ],
)
def test_a_hostile_checkpoint_is_one_line(
    sound: Path, change: Callable[[Content], object], match: str
) -> None:
    content = torch.load(sound, weights_only=True)
    change(content)
    torch.save(content, sound)
    refused(sound, match)


def test_tied_and_cut_tensors_are_sound(tmp_path: Path) -> None:
    whole = torch.arange(5000.0).reshape(50, 100)
    path = tmp_path / "tied.pth"
    torch.save({"a": whole, "b": whole, "c": whole[3:, ::2].T, "d": torch.ones(0, 7)}, path)
    check_content(torch.load(path, weights_only=True), path.stat().st_size)


@pytest.mark.parametrize(
    ("pickled", "match"),
    [
        (b"]" * 100_000 + b"a" * 99_999 + b".", "more than 50 levels"),
        (b"]" + b"]a" * (MAX_PICKLE_BYTES // 2) + b".", "parts are too large"),
        (b"cbuiltins\nbytearray\nJ\x00\x00\x00\x10\x85R.", "it holds a bytearray"),
    ],
    ids=["deep", "long", "bytearray"],
)
def test_a_pickle_made_by_hand_is_one_line(tmp_path: Path, pickled: bytes, match: str) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    refused(path, match)


def test_the_original_layout_is_refused_alike(tmp_path: Path) -> None:
    names = list(dinov2_gemma.ORIGINAL_NAMES.values())
    path = tmp_path / "original.pth"
    torch.save({"model_state_dict": {name: torch.ones(1).expand(10**12) for name in names}}, path)
    refused(path, "larger than what is stored")


@pytest.mark.parametrize("bits", [8, 4])
def test_an_exported_folder_is_refused_alike(sound: Path, tmp_path: Path, bits: int) -> None:
    content = checkpoints.load_checkpoint(sound)
    folder = tmp_path / "folder"
    config = checkpoints.header(content["recipe"])
    formats.write_folder(folder, config, content["weights"])
    Captioner.from_pretrained(folder, "cpu")
    path = folder / formats.WEIGHTS_NAME
    weights = load_file(path)

    def put(value: torch.Tensor, **others: torch.Tensor) -> None:
        save_file({**weights, QUERIES: value, **others}, path)

    put(weights[QUERIES] * torch.nan)
    refused(folder, "is not finite")
    put(weights[QUERIES].int())
    refused(folder, "is of type torch.int32")
    # A row and a column of scales, multiplied, would be 10**12 numbers.
    levels = {8: torch.ones(1, 10**6).char(), 4: torch.ones(1, 32).byte()}[bits]
    put(levels, **{f"int{bits}_scale_of.{QUERIES}": torch.ones(10**6, 1)})
    refused(folder, "scales .* do not fit their levels")

    formats.write_folder(folder, config, content["weights"])
    deep = {**config["recipe"], "bridge": {"kind": "prefix", "depth": 10**7}}
    for damage, match in (
        ({"format_version": True}, "format_version is True"),
        ({"recipe": deep}, "bridge.depth"),
        ({"x": "x" * formats.MAX_CONFIG_BYTES}, "more than"),
    ):
        (folder / formats.CONFIG_NAME).write_text(json.dumps({**config, **damage}))
        refused(path, match)

"""Any write of a checkpoint or a cache may fail: no old file is lost, and no damaged one loaded."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
from pathlib import Path

import pytest
import torch

from faulty_disk import FAULTS, FaultyDisk, PowerCut
from vlm_bridge.configuration import Recipe
from vlm_bridge.errors import CheckpointError
from vlm_bridge.files import append_line
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.checkpoint import BEST, BEST_WEIGHTS, LATEST, STEP

SIZE = 6_000  # numbers in the weights: several times what Python buffers


def save(path: Path, value: int) -> None:
    weights = {"bridge.weight": torch.full((SIZE,), float(value))}
    checkpoints.save_checkpoint(path, Recipe(), weights, {"progress": {"step": value}})


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, which must be whole."""
    content = checkpoints.load_checkpoint(path)
    step = content["training"]["progress"]["step"]
    assert torch.equal(content["weights"]["bridge.weight"], torch.full((SIZE,), float(step)))
    return step


def test_a_checkpoint_survives_every_fault_of_every_write(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    save(saved / LATEST, 1)
    with FaultyDisk(counted := shutil.copytree(saved, tmp_path / "counted")).plugged_in() as disk:
        save(counted / LATEST, 2)
    # The file is on disk before it has its name.
    kinds = [kind for kind in disk.operations if kind != "write"]
    assert kinds == ["open", "fsync", "rename", "fsync", "unlink"]
    every = [(n, fault) for n, kind in enumerate(disk.operations) for fault in FAULTS[kind]]
    for number, fault in every:
        folder = shutil.copytree(saved, tmp_path / f"{number}-{fault}")
        error: BaseException | None = None
        with FaultyDisk(folder, number, fault).plugged_in():
            try:
                save(folder / LATEST, 2)
            except (CheckpointError, PowerCut) as caught:
                error = caught
        where = f"operation {number}, {fault}"
        # Where the name was changed, an error means no more than that the disk may not have it.
        is_open = isinstance(error, PowerCut) or (error and "rename" in disk.operations[:number])
        assert step_of(folder / LATEST) in ({1, 2} if is_open else {1 if error else 2}), where
        save(folder / LATEST, 3)
        checkpoints.discard_unfinished(folder)
        assert step_of(folder / LATEST) == 3, where
        assert [path.name for path in folder.iterdir()] == [LATEST], where
        shutil.rmtree(folder)


def test_the_newest_sound_one_is_found_and_broken_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vlm_bridge")
    names = (BEST, STEP.format(2), STEP.format(10), LATEST)
    for step, name in enumerate(names, start=1):
        save(tmp_path / name, step)
    weights = {"bridge.weight": torch.ones(SIZE)}
    checkpoints.save_checkpoint(tmp_path / BEST_WEIGHTS, Recipe(), weights)
    for step, name in reversed(list(enumerate(names, start=1))):
        newest = checkpoints.newest_sound(tmp_path)
        assert newest is not None and step_of(newest[0]) == step
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-30])
    caplog.clear()
    assert checkpoints.newest_sound(tmp_path) is None
    assert all(any(name in line for line in caplog.messages) for name in names)
    assert all("\n" not in line for line in caplog.messages)
    assert checkpoints.newest_sound(tmp_path / "nowhere") is None


@pytest.mark.parametrize("before", [b"", b"one\n"])
def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path, before: bytes) -> None:
    for at, fault in itertools.product((0, 1), ("ENOSPC", "EIO")):
        path = tmp_path / f"{at}-{fault}.jsonl"
        if before:
            path.write_bytes(before)
        with FaultyDisk(tmp_path, at, fault).plugged_in(), contextlib.suppress(OSError):
            append_line(path, b"another\n")
        after = path.read_bytes() if path.exists() else b""
        assert after in (before, before + b"another\n"), (at, fault)

"""Any write of a checkpoint or a cache may fail: no old file is lost, and no damaged one loaded."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from faulty_disk import FAULTS, FaultyDisk, PowerCut
from vlm_bridge.configuration import Recipe
from vlm_bridge.errors import CheckpointError
from vlm_bridge.files import append_line, write_atomically
from vlm_bridge.training_strategy import checkpoint as checkpoints

RECIPE = Recipe()
SIZE = 6_000  # numbers in the weights: several times what Python buffers


def faults(operations: list[str]) -> Iterator[tuple[int, str]]:
    """Yield all that can go wrong in these operations: (which, how)."""
    for number, kind in enumerate(operations):
        for fault in FAULTS[kind]:
            yield number, fault


def save(folder: Path, value: int) -> None:
    checkpoints.save_checkpoint(
        folder / checkpoints.LATEST,
        RECIPE,
        {"bridge.weight": torch.full((SIZE,), float(value))},
        {"progress": {"step": value}},
    )


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, which must be whole."""
    content = checkpoints.load_checkpoint(path)
    step = content["training"]["progress"]["step"]
    assert torch.equal(content["weights"]["bridge.weight"], torch.full((SIZE,), float(step)))
    return step


def test_a_checkpoint_survives_every_fault_of_every_write(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    with FaultyDisk(tmp_path).plugged_in():
        save(saved, 1)
    with FaultyDisk(counted := shutil.copytree(saved, tmp_path / "counted")).plugged_in() as disk:
        save(counted, 2)
    assert disk.operations[0] == "open"
    # The file is on disk before it has its name.
    assert [kind for kind in disk.operations[1:] if kind != "write"] == [
        "fsync", "rename", "fsync", "unlink",
    ]  # fmt: skip
    for number, fault in faults(disk.operations):
        folder = shutil.copytree(saved, tmp_path / f"{number}-{fault}")
        error: BaseException | None = None
        with FaultyDisk(folder, number, fault).plugged_in():
            try:
                save(folder, 2)
            except (CheckpointError, PowerCut) as caught:
                error = caught
        where = f"operation {number}, {fault}"
        # Where the name was changed, an error means no more than that the disk may not have it.
        renamed = "rename" in disk.operations[:number]
        steps = (
            {1, 2} if isinstance(error, PowerCut) or (error and renamed) else {1 if error else 2}
        )
        assert step_of(folder / checkpoints.LATEST) in steps, where
        with FaultyDisk(folder).plugged_in():
            save(folder, 3)
            checkpoints.discard_unfinished(folder)
        assert step_of(folder / checkpoints.LATEST) == 3, where
        assert [path.name for path in folder.iterdir()] == [checkpoints.LATEST], where
        shutil.rmtree(folder)


def test_the_newest_sound_one_is_found_and_broken_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vlm_bridge")
    names = (
        checkpoints.BEST,
        checkpoints.STEP.format(2),
        checkpoints.STEP.format(10),
        checkpoints.LATEST,
    )
    for step, name in enumerate(names, start=1):
        save(tmp_path, step)
        if name != checkpoints.LATEST:
            (tmp_path / checkpoints.LATEST).rename(tmp_path / name)
    for name in names:  # a copy without times
        os.utime(tmp_path / name, (1000, 1000))
    checkpoints.save_checkpoint(
        tmp_path / checkpoints.BEST_WEIGHTS, RECIPE, {"bridge.weight": torch.ones(SIZE)}
    )
    found: list[int] = []
    for name in reversed(names):
        newest = checkpoints.newest_sound(tmp_path)
        assert newest is not None
        found.append(step_of(newest[0]))
        content = bytearray((tmp_path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / name).write_bytes(content[:-30])
    assert found == [4, 3, 2, 1]
    caplog.clear()
    assert checkpoints.newest_sound(tmp_path) is None
    assert [any(name in line for line in caplog.messages) for name in names] == [True] * 4
    assert all("\n" not in line for line in caplog.messages)
    assert checkpoints.newest_sound(tmp_path / "nowhere") is None


def test_small_files_survive_every_fault_of_every_write(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    with FaultyDisk(tmp_path).plugged_in() as disk:
        write_atomically(path, b"old")
    for number, fault in faults(disk.operations):
        path.write_bytes(b"old")
        with FaultyDisk(tmp_path, number, fault).plugged_in():
            try:
                write_atomically(path, b"new content")
                expected = [b"new content"]
            except (OSError, PowerCut):
                expected = [b"old", b"new content"]
        assert path.read_bytes() in expected, (number, fault)


@pytest.mark.parametrize("before", [None, b"one\n"])
def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "history.jsonl"
    for fault in ("ENOSPC", "EIO"):
        for at in (0, 1):
            path.unlink(missing_ok=True)
            if before is not None:
                path.write_bytes(before)
            with FaultyDisk(tmp_path, at, fault).plugged_in(), contextlib.suppress(OSError):
                append_line(path, b"another\n")
            whole = [before, (before or b"") + b"another\n"]
            assert (path.read_bytes() if path.exists() else None) in whole


def test_the_error_of_a_full_disk_names_the_file(tmp_path: Path) -> None:
    for number in (0, 1, 2):
        with FaultyDisk(tmp_path, number, "ENOSPC").plugged_in(), pytest.raises(OSError) as error:
            write_atomically(tmp_path / "report.html", b"x")
        assert error.value.filename == str(tmp_path / "report.html")
        assert list(tmp_path.iterdir()) == []

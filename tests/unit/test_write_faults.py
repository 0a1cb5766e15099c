"""Any write of a checkpoint or a cache may fail: what was there is never lost, what is damaged is never loaded."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from faulty_disk import DIES, FAULTS, FaultyDisk, PowerCut
from logs import log_lines
from vlm_bridge.configuration import Recipe
from vlm_bridge.durable_files import append_line, previous_of, write_bytes_durably
from vlm_bridge.errors import CheckpointError
from vlm_bridge.model_architecture.interchange import write_folder
from vlm_bridge.training_strategy import checkpoint as checkpoints

RECIPE = Recipe()
SIZE = 6_000
"""Numbers in the weights: several times what Python buffers."""


def faults(operations: list[str], but: tuple[str, ...] = ()) -> Iterator[tuple[int, str]]:
    """Everything that can go wrong in these operations: (which, how)."""
    for number, kind in enumerate(operations):
        for fault in FAULTS[kind]:
            if fault not in but:
                yield number, fault


def save(folder: Path, value: int) -> None:
    """Save a checkpoint of step ``value``, with weights to match."""
    checkpoints.save_checkpoint(
        folder / checkpoints.LATEST,
        RECIPE,
        {"bridge.weight": torch.full((SIZE,), float(value))},
        {"progress": {"step": value}},
    )


def step_of(path: Path) -> int:
    """The step of a checkpoint, which must be whole."""
    content = checkpoints.load_checkpoint(path)
    step = content["training"]["progress"]["step"]
    assert torch.equal(content["weights"]["bridge.weight"], torch.full((SIZE,), float(step)))
    return step


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a checkpoint of step 1."""
    folder = tmp_path / "saved"
    with FaultyDisk(tmp_path).plugged_in():
        save(folder, 1)
    return folder


def operations_of(saved: Path, scratch: Path) -> list[str]:
    folder = shutil.copytree(saved, scratch / "counted")
    with FaultyDisk(folder).plugged_in() as disk:
        save(folder, 2)
    assert {path.name for path in folder.iterdir()} == {checkpoints.LATEST}
    return disk.operations


def test_saving_writes_syncs_and_renames_in_this_order(saved: Path, tmp_path: Path) -> None:
    operations = operations_of(saved, tmp_path)
    assert operations[0] == "open"
    assert operations[1:-6] == ["write"] * len(operations[1:-6])
    assert len(operations) > 9
    # The file is on disk before it has its name, its name before the old file's second one goes.
    assert operations[-6:] == ["fsync", "link", "rename", "fsync", "unlink", "unlink"]


def test_a_checkpoint_survives_every_fault_of_every_write(saved: Path, tmp_path: Path) -> None:
    tried = 0
    for number, fault in faults(operations_of(saved, tmp_path)):
        folder = shutil.copytree(saved, tmp_path / f"{number}-{fault}")
        error: BaseException | None = None
        with FaultyDisk(folder, number, fault).plugged_in():
            try:
                save(folder, 2)
            except (CheckpointError, PowerCut) as caught:
                error = caught
        where = f"operation {number}, {fault}"
        lines = log_lines()
        found = checkpoints.newest_sound(folder)
        assert found is not None, where
        if isinstance(error, PowerCut):
            assert step_of(found[0]) in (1, 2), where
        else:  # under its own name, there is what the save said
            assert step_of(folder / checkpoints.LATEST) == (1 if error else 2), where
            assert step_of(found[0]) == (1 if error else 2), where
            assert not lines, where
        # And saving goes on from there.
        with FaultyDisk(folder).plugged_in():
            save(folder, 3)
            checkpoints.discard_unfinished(folder)
        assert step_of(folder / checkpoints.LATEST) == 3, where
        assert {path.name for path in folder.iterdir()} <= {
            checkpoints.LATEST,
            previous_of(folder / checkpoints.LATEST).name,
        }, where
        shutil.rmtree(folder)
        tried += 1
    assert tried > 40


def test_what_a_kill_left_half_written_is_deleted_once(saved: Path) -> None:
    left = saved / f".{checkpoints.LATEST}.123.tmp"
    left.write_bytes(b"half")
    checkpoints.discard_unfinished(saved)
    assert not left.exists()
    assert step_of(saved / checkpoints.LATEST) == 1


def test_a_file_system_that_tears_what_it_renames_leaves_the_previous_one(saved: Path) -> None:
    """The process is killed between the torn rename and its notice: the old file has its second name."""
    latest = saved / checkpoints.LATEST
    os.link(latest, previous_of(latest))
    torn = latest.read_bytes()[:100]
    latest.unlink()
    latest.write_bytes(torn)
    for _ in range(2):  # it stays for as long as it is needed
        lines = log_lines()
        found = checkpoints.newest_sound(saved)
        assert found is not None
        assert step_of(found[0]) == 1
        assert len(lines) == 1
        assert "is damaged" in lines[0]
    save(saved, 2)
    assert step_of(latest) == 2
    assert not previous_of(latest).exists()


def test_the_hash_is_over_everything(saved: Path) -> None:
    content = checkpoints.load_checkpoint(saved / checkpoints.LATEST)
    assert content["content_hash"] == checkpoints.content_hash(content)

    def changed(change: Callable[[], object]) -> bool:
        change()
        return checkpoints.content_hash(content) != content["content_hash"]

    assert changed(lambda: content["training"]["progress"].update(step=2))
    content["training"]["progress"]["step"] = 1
    assert changed(lambda: content["weights"].update({"bridge.weight": torch.ones(SIZE + 1)}))
    content["weights"]["bridge.weight"] = torch.ones(SIZE)
    assert not changed(lambda: None)
    assert changed(lambda: content["weights"]["bridge.weight"].view(torch.uint8)[7].bitwise_xor_(1))
    path = saved / "changed.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="its content is not what its hash says"):
        checkpoints.load_checkpoint(path)


def test_the_newest_sound_one_is_found_and_broken_ones_are_named(tmp_path: Path) -> None:
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
    lines = log_lines()
    for name in reversed(names):
        newest = checkpoints.newest_sound(tmp_path)
        assert newest is not None
        found.append(step_of(newest[0]))
        content = bytearray((tmp_path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / name).write_bytes(content[:-30])
    assert found == [4, 3, 2, 1]
    lines.clear()
    assert checkpoints.newest_sound(tmp_path) is None
    assert [any(name in line for line in lines) for name in names] == [True] * 4
    assert all("\n" not in line for line in lines)
    assert checkpoints.newest_sound(tmp_path / "nowhere") is None


def test_small_files_survive_every_fault_of_every_write(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_bytes(b"old")
    with FaultyDisk(tmp_path).plugged_in() as disk:
        write_bytes_durably(path, b"old")
    for number, fault in faults(disk.operations, but=("truncated",)):
        path.write_bytes(b"old")
        with FaultyDisk(tmp_path, number, fault).plugged_in():
            try:
                write_bytes_durably(path, b"new content")
                expected = [b"new content"]
            except PowerCut:
                expected = [b"old", b"new content"]
            except OSError:
                # The name may have changed before its folder could be brought to disk.
                expected = [
                    b"old",
                    *([b"new content"] if disk.operations[number - 1] == "rename" else []),
                ]
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


def test_an_export_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    with FaultyDisk(tmp_path).plugged_in() as disk:
        write_folder(tmp_path / "counted", {"x": 1}, {"w": torch.ones(3)})
    assert len(disk.operations) > 3
    for number, fault in faults(disk.operations, but=("truncated", *DIES)):
        folder = tmp_path / "a" / f"{number}-{fault}"
        with FaultyDisk(tmp_path, number, fault).plugged_in():
            try:
                write_folder(folder, {"x": 1}, {"w": torch.ones(3)})
            except OSError:
                assert not folder.exists(), (number, fault)


def test_the_error_of_a_full_disk_names_the_file(tmp_path: Path) -> None:
    for number in (0, 1, 2):
        with FaultyDisk(tmp_path, number, "ENOSPC").plugged_in(), pytest.raises(OSError) as error:
            write_bytes_durably(tmp_path / "report.html", b"x")
        assert error.value.filename == str(tmp_path / "report.html")
        assert list(tmp_path.iterdir()) == []


def test_a_name_that_another_process_takes_at_once_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that finish a cache together write its index, each its own."""
    replace = Path.replace

    def overtaken(self: Path, target: Path) -> Path:
        result = replace(self, target)
        other = tmp_path / "of-another"
        other.write_bytes(b"longer than ours")
        replace(other, target)
        return result

    monkeypatch.setattr(Path, "replace", overtaken)
    write_bytes_durably(tmp_path / "index.json", b"ours")
    assert (tmp_path / "index.json").read_bytes() == b"longer than ours"

"""Facts about the machine, and how batches reach a device."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest
import torch

from vlm_bridge import device
from vlm_bridge.errors import ConfigurationError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("limit", "cores"), [("max 100000", 8), ("250000 100000", 3), ("10000 100000", 1)]
)
def test_a_container_has_no_more_cores_than_it_is_given(
    limit: str, cores: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(device, "Path", lambda path: tmp_path / "cpu.max")
    assert device.usable_cores() == cores


def test_threads_are_those_of_the_environment_or_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(device, "usable_cores", lambda: 7)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    device.set_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    device.set_threads()
    assert used == [7]


def test_a_missing_compiler_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.shutil, "which", lambda name: name if name == "g++" else None)
    assert device.has_compiler()
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert not device.has_compiler()


def test_nothing_is_copied_to_the_cpu() -> None:
    tensors = [torch.arange(3), torch.ones(2, 2)]
    copies = device.to_device(tensors, CPU)
    assert all(copied is tensor for copied, tensor in zip(copies, tensors, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_arrive_whole_at_a_gpu() -> None:
    tensors = [torch.randn(1 << 22) for _ in range(4)]
    for copied, tensor in zip(
        device.to_device(tensors, torch.device("cuda")), tensors, strict=True
    ):
        assert torch.equal(copied.double().cpu(), tensor.double())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_between_tensors_that_stay_is_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    tensors = [torch.ones(2**14) for _ in range(4000)]  # 64 KiB each
    del tensors[::2]
    held = resident()
    device.return_freed_memory()
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("not glibc")
    assert held - resident() > 64 * 2**20


def test_devices_that_are_not_there_are_named() -> None:
    assert device.resolve_device("cpu") == CPU
    for unknown in ("abacus", "cuda:x"):
        with pytest.raises(ConfigurationError, match=f"device='{unknown}' is unknown"):
            device.resolve_device(unknown)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match="no CUDA GPU"):
            device.resolve_device("cuda")
        assert device.resolve_device("auto").type in ("cpu", "mps")

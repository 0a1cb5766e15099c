"""What is known of the machine, and how batches reach a device."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest
import torch

from vlm_bridge import runtime
from vlm_bridge.errors import ConfigurationError

CPU = torch.device("cpu")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux tells its affinity")
def test_hyper_threads_are_not_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = len(os.sched_getaffinity(0))
    assert 1 <= runtime.usable_cores() <= allowed
    monkeypatch.setattr(runtime, "_siblings", lambda cpu: "0-99")
    assert runtime.usable_cores() == 1


@pytest.mark.parametrize(
    ("limit", "cores"), [("max 100000", 8), ("250000 100000", 3), ("10000 100000", 1)]
)
def test_a_container_has_no_more_cores_than_it_is_given(
    limit: str, cores: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(runtime, "_siblings", str)
    monkeypatch.setattr(runtime, "Path", lambda path: tmp_path / "cpu.max")
    assert runtime.usable_cores() == cores


def test_threads_are_those_of_the_environment_or_the_cores(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(runtime, "usable_cores", lambda: threads + 1)
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    assert runtime.set_threads() == threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert runtime.set_threads() == torch.get_num_threads() == threads + 1


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        runtime.shutil, "which", lambda name: "/usr/bin/c++" if name == "c++" else None
    )
    monkeypatch.delenv("CXX", raising=False)
    assert runtime.missing_compiler(CPU) is None
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    assert "triton" in (runtime.missing_compiler(torch.device("cuda")) or "")
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    assert "C++ compiler" in (runtime.missing_compiler(CPU) or "")


def test_nothing_is_copied_to_the_cpu() -> None:
    tensors = [torch.arange(3), torch.ones(2, 2)]
    copy = runtime.DeviceCopy(tensors, CPU)
    assert all(copied is tensor for copied, tensor in zip(copy.wait(), tensors, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_arrive_whole_at_a_gpu() -> None:
    device = torch.device("cuda")
    tensors = [torch.randn(1 << 22) for _ in range(4)]
    copies = [runtime.DeviceCopy([tensor], device) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        (copied,) = copy.wait()
        assert torch.equal(copied.double().cpu(), tensor.double())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_between_tensors_that_stay_is_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    tensors = [
        torch.ones(2**14) for _ in range(4000)
    ]  # 64 KiB each, of which every other one stays
    del tensors[::2]
    held = resident()
    runtime.return_freed_memory()
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("not glibc")
    assert held - resident() > 64 * 2**20


def test_devices_that_are_not_there_are_named() -> None:
    assert runtime.resolve_device("cpu") == CPU
    with pytest.raises(ConfigurationError, match="device='abacus' is unknown"):
        runtime.resolve_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match="no CUDA GPU"):
            runtime.resolve_device("cuda")
        assert runtime.resolve_device("auto").type in ("cpu", "mps")

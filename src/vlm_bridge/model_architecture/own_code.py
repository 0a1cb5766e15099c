"""Bridges and encoders in code of the user's own, named `module:Class` in a recipe."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import nn

from vlm_bridge.errors import ConfigurationError


def import_own(name: str, base: type[nn.Module]) -> Any:
    """Import a class: of an installed module, or of a file in the folder of the command.

    This runs code. A recipe that a checkpoint holds never gets here (`checkpoint.recipe_of`).

    Raises:
        ConfigurationError: there is no such module or class, or it is no ``base``.
    """
    module_name, class_name = name.split(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"cannot import {name}: {error} (looked for in {here}, and among what is installed)"
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigurationError(f"{name} must be a subclass of {base.__module__}.{base.__name__}")
    return found

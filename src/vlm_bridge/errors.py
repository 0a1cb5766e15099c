"""Errors a user can mend: one line each with what, where and how to mend it."""

from __future__ import annotations

import re

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def on_one_line(text: str) -> str:
    """Escape what breaks a line or steers a terminal, such as in names of files."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class VLMBridgeError(Exception):
    """Base class; the command line prints the message and exits with ``exit_code``."""

    exit_code = 1

    def __str__(self) -> str:
        return on_one_line(super().__str__())


class UsageError(VLMBridgeError):
    """The command, the recipe or an option is wrong."""

    exit_code = 2


class ConfigurationError(UsageError):
    """A recipe has an unknown key, a wrong type or an impossible value."""


class DataError(VLMBridgeError):
    """A dataset, caption folder or caption file cannot be used."""


class ImageError(DataError):
    """One image cannot be decoded; callers may skip it, with ``reason``."""

    def __init__(self, path: object, reason: str):
        self.path = str(path)
        self.reason = reason
        super().__init__(f"cannot read image {self.path}: {reason}")

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return type(self), (self.path, self.reason)  # as processes exchange it


class ModelError(VLMBridgeError):
    """A vision encoder, language model or bridge cannot be loaded or does not fit the others."""


class CheckpointError(VLMBridgeError):
    """A checkpoint is missing, damaged, or of another architecture."""


class TrainingError(VLMBridgeError):
    """A training cannot continue."""

"""Errors a user can mend: one clear line each, no traceback (the CLI prints it and exits)."""

from __future__ import annotations

import re

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def on_one_line(text: str) -> str:
    """Text for a message, where what breaks a line or steers a terminal is escaped: names of files may hold it."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class VLMBridgeError(Exception):
    """Something failed that the user can act on. The message says what, where and how to mend it (exit code 1)."""

    exit_code = 1

    def __str__(self) -> str:
        return on_one_line(super().__str__())


class UsageError(VLMBridgeError):
    """The command, recipe or an option is wrong (exit code 2)."""

    exit_code = 2


class ConfigurationError(UsageError):
    """A recipe has an unknown key, a wrong type or an impossible value."""


class DataError(VLMBridgeError):
    """A dataset, caption folder or caption file cannot be used."""


class ImageError(DataError):
    """One picture cannot be decoded; ``path`` and ``reason`` let callers set it aside and go on."""

    def __init__(self, path: object, reason: str):
        self.path = str(path)
        self.reason = reason
        super().__init__(f"cannot read picture {self.path}: {reason}")


class ModelError(VLMBridgeError):
    """A vision encoder, language model or bridge cannot be loaded or does not fit its neighbours."""


class CheckpointError(VLMBridgeError):
    """A checkpoint is missing, damaged, or belongs to another architecture."""


class TrainingError(VLMBridgeError):
    """A training cannot go on, or did what it must not do."""

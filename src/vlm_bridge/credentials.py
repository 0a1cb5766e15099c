"""Keep tokens and passwords out of messages, checkpoints, reports and logs."""

from __future__ import annotations

import os
import re

HIDDEN = "***"
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
SHORTEST_TOKEN = 8  # hiding shorter values would garble text that has them by chance
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_USER_OF_ADDRESS = re.compile(r"(:/{1,2})[^/\s@]+@")  # Path turns two slashes into one


def holds_credential(text: str) -> bool:
    return redact(text) != text


def redact(text: str) -> str:
    """Hide the hub's token, what looks like one, and users and passwords of addresses."""
    for variable in TOKEN_VARIABLES:
        token = os.environ.get(variable, "").strip()
        if len(token) >= SHORTEST_TOKEN:
            text = text.replace(token, HIDDEN)
    return _USER_OF_ADDRESS.sub(rf"\1{HIDDEN}@", _HUB_TOKEN.sub(HIDDEN, text))

"""Tokens and passwords, which belong into no message, checkpoint, report or log."""

from __future__ import annotations

import os
import re

HIDDEN = "***"
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Where huggingface_hub looks for the hub's token."""
SHORTEST_TOKEN = 8
"""Characters. The value of a variable that is shorter is no token, and hiding it would garble what has it by chance."""
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_USER_OF_ADDRESS = re.compile(r"(:/{1,2})[^/\s@]+@")
"""With password or token. A path that was made of an address has one slash."""


def holds_credential(text: str) -> bool:
    return redact(text) != text


def redact(text: str) -> str:
    """``text`` without the hub's token, whatever looks like one, and the users and passwords of addresses."""
    for variable in TOKEN_VARIABLES:
        token = os.environ.get(variable, "").strip()
        if len(token) >= SHORTEST_TOKEN:
            text = text.replace(token, HIDDEN)
    return _USER_OF_ADDRESS.sub(rf"\1{HIDDEN}@", _HUB_TOKEN.sub(HIDDEN, text))

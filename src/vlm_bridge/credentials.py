"""Access to the Hugging Face hub: hidden tokens, and one plain line when a download fails."""

from __future__ import annotations

import os
import re
from typing import Literal

SITE = "https://huggingface.co"
HIDDEN = "***"
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_USER_OF_ADDRESS = re.compile(r"(:/{1,2})[^/\s@]+@")  # Path turns two slashes into one


def holds_credential(text: str) -> bool:
    return redact(text) != text


def redact(text: str) -> str:
    """Hide the hub's token, what looks like one, and users and passwords of addresses."""
    for variable in TOKEN_VARIABLES:
        token = os.environ.get(variable, "").strip()
        if len(token) >= 8:  # shorter ones stand in other text by chance
            text = text.replace(token, HIDDEN)
    return _USER_OF_ADDRESS.sub(rf"\1{HIDDEN}@", _HUB_TOKEN.sub(HIDDEN, text))


def hub_problem(
    error: BaseException, name: str, kind: Literal["model", "dataset"] = "model"
) -> str | None:
    """Explain on one line why the hub did not give ``name``, and how to mend it.

    The chain of causes is searched; None where the hub has no part in it. No message of the hub
    is repeated, since it may quote a request with its token.
    """
    from huggingface_hub import constants, errors

    is_model = kind == "model"
    if is_model and os.path.exists(name):  # noqa: PTH110 (Path raises for a long name)
        return None
    page = f"{SITE}/{name}" if is_model else f"{SITE}/datasets/{name}"
    token = f"set HF_TOKEN (export HF_TOKEN=hf_...; tokens are made on {SITE}/settings/tokens)"
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(errors.GatedRepoError):
        return f"access is gated: accept its terms on {page} and {token}"
    if caused_by(errors.RevisionNotFoundError):
        return f"it has no such revision; {page}/commits/main lists them"
    if caused_by(errors.RepositoryNotFoundError):
        return f"it is no folder here and no public {kind} on {SITE}; if private, {token}"
    for cause in causes:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            fault = "the token is missing, wrong or expired"
            return f"the hub refused access to {page} ({status}): {fault}; {token}"
    offline = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)
    # The hub's client is httpx or httpx2, whose errors share no base class with others.
    names = {base.__name__ for cause in causes for base in type(cause).__mro__}
    if "TransportError" in names or caused_by(*offline, ConnectionError, TimeoutError):
        mend = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "check the network"
        folder = ", or give a folder made by save_pretrained" if is_model else ""
        return f"it is not cached, and {constants.ENDPOINT} cannot be reached: {mend}{folder}"
    return None


def reach_hub(name: str, revision: str | None = None) -> None:
    """Raise ConnectionError without an answer, before a download retries for half a minute.

    Nothing is asked for a folder or a model in the hub's cache, nor with HF_HUB_OFFLINE.
    """
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or os.path.exists(name):  # noqa: PTH110
        return
    try:
        is_cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no name of a repository
        return
    if isinstance(is_cached, str):
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whichever client the hub's library uses
        raise ConnectionError(f"{constants.ENDPOINT} does not answer") from None

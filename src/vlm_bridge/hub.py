"""Downloads from the Hugging Face hub, and one plain line when one fails."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from vlm_bridge.credentials import TOKEN_VARIABLES

SITE = "https://huggingface.co"
PROBE_SECONDS = 5.0
_REACHED: set[tuple[str, int]] = set()
"""Hosts and ports that answered; one that did not is asked again."""


def hub_problem(
    error: BaseException, name: str, kind: Literal["model", "dataset"] = "model"
) -> str | None:
    """Say why the hub did not give ``name`` and how to mend it.

    Libraries wrap the hub's errors in errors of their own, so the whole chain of causes is searched. No message
    of the hub is repeated: nothing of a request can leak into a log.

    Args:
        error: what the download raised.
        name: the repository, OWNER/NAME, or a folder.
        kind: of the repository.

    Returns:
        One line without a period; None where the hub has no part in the error.
    """
    from huggingface_hub import constants, errors

    if kind == "model" and os.path.exists(name):  # noqa: PTH110 (Path raises where a name is too long)
        return None
    page = f"{SITE}/{name}" if kind == "model" else f"{SITE}/datasets/{name}"
    causes = list(_causes(error))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(errors.GatedRepoError):
        return (
            f"access is gated: accept its terms on {page} and set HF_TOKEN to a read token of the same "
            f"account (export HF_TOKEN=hf_...; tokens are made on {SITE}/settings/tokens)"
        )
    if caused_by(errors.RevisionNotFoundError):
        return f"it has no such revision; {page}/commits/main lists them"
    status = next((s for cause in causes if (s := _status(cause)) in (401, 403)), None)
    token = _token_in_use() if status == 401 else None
    if token and not caused_by(errors.RepositoryNotFoundError):
        return (
            f"the hub refused {token} (401): it is wrong or has expired; set HF_TOKEN to a valid one "
            f"(export HF_TOKEN=hf_...; tokens are made on {SITE}/settings/tokens)"
        )
    if caused_by(errors.RepositoryNotFoundError):
        return (
            f"it is no folder here and no public {kind} on {SITE}; check the name, or for a private one set HF_TOKEN "
            "to a token that may read it" + (f" ({token} may not, or has expired)" if token else "")
        )
    if status:
        return (
            f"the hub refused access ({status}): set HF_TOKEN to a valid token that may read {page} "
            f"(export HF_TOKEN=hf_...; tokens are made on {SITE}/settings/tokens)"
        )
    unreachable = (
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        ConnectionError,
        TimeoutError,
    )
    if caused_by(*unreachable) or any(map(_is_transport_error, causes)):
        mend = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "check the network"
        if kind == "dataset":
            return (
                f"it is not in the hub's cache, and {constants.ENDPOINT} cannot be reached: {mend}"
            )
        return (
            f"it is neither a folder here nor in the hub's cache, and {constants.ENDPOINT} cannot be reached: {mend}, "
            "or give a folder made by save_pretrained"
        )
    return None


def reach_hub(name: str, revision: str | None = None) -> None:
    """Ask once, before a download that its client would retry for half a minute, whether the hub can be reached.

    Nothing is asked for a folder or what is in the hub's cache, nor with HF_HUB_OFFLINE.

    Args:
        name: what will be loaded: a folder or OWNER/NAME.
        revision: of the repository.

    Raises:
        ConnectionError: no answer; `hub_problem` turns it into one line.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or os.path.exists(name):  # noqa: PTH110
        return
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
    except ValueError:  # no name of a repository
        return
    host, port = _address_of(constants.ENDPOINT)
    if (host, port) not in _REACHED:
        # In a thread: looking a name up has no time limit of its own.
        attempt = threading.Thread(target=_connect, args=(host, port), daemon=True)
        attempt.start()
        attempt.join(PROBE_SECONDS)
        if (host, port) not in _REACHED:
            raise ConnectionError(f"{host} does not answer")


def _address_of(endpoint: str) -> tuple[str, int]:
    """Host and port of a site, or of the proxy that leads to it."""
    site = urlsplit(endpoint)
    proxies = {} if proxy_bypass(site.hostname or "") else getproxies()
    proxy = proxies.get(site.scheme) or proxies.get("all")
    if proxy:
        site = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return site.hostname or "", site.port or {"http": 80, "socks5": 1080}.get(site.scheme, 443)


def _connect(host: str, port: int) -> None:
    with suppress(OSError), socket.create_connection((host, port), PROBE_SECONDS):
        _REACHED.add((host, port))


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _token_in_use() -> str | None:
    """Name the place of the token that huggingface_hub sends; None where it sends none."""
    from huggingface_hub import get_token

    for variable in TOKEN_VARIABLES:
        if os.environ.get(variable, "").strip():
            return f"the token in {variable}"
    return "the token that `hf auth login` stored" if get_token() else None


def _is_transport_error(error: BaseException) -> bool:
    """By name: the hub's client library is httpx or httpx2, depending on its version."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)

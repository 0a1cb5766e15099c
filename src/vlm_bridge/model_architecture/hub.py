"""Downloads from the Hugging Face hub, and one plain line when one fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

SITE = "https://huggingface.co"


def hub_problem(error: BaseException, name: str) -> str | None:
    """Why the hub did not give ``name``, and how to mend it; None where the hub has no part in the error.

    Libraries wrap what the hub said in errors of their own: the whole chain of causes is searched. No message
    of the hub is repeated, so that nothing of a request can leak into a log.
    """
    from huggingface_hub import constants, errors

    if Path(name).exists():
        return None
    causes = list(_causes(error))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(errors.GatedRepoError):
        return (
            f"access is gated: accept its terms on {SITE}/{name} and set HF_TOKEN to a read token of the same "
            f"account (export HF_TOKEN=hf_...; tokens are made on {SITE}/settings/tokens)"
        )
    if caused_by(errors.RevisionNotFoundError):
        return f"it has no such revision; {SITE}/{name}/commits/main lists them"
    if caused_by(errors.RepositoryNotFoundError):
        return (
            f"it is no folder here and no public model on {SITE}; check the name, or for a private one set HF_TOKEN "
            "to a token that may read it"
        )
    if status := next((s for cause in causes if (s := _status(cause)) in (401, 403)), None):
        return (
            f"the hub refused access ({status}): set HF_TOKEN to a valid token that may read {SITE}/{name} "
            f"(export HF_TOKEN=hf_...; tokens are made on {SITE}/settings/tokens)"
        )
    unreachable = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    if caused_by(*unreachable) or any(map(_is_transport_error, causes)):
        mend = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "check the network"
        return (
            f"it is neither a folder here nor in the hub's cache, and {SITE} cannot be reached: {mend}, or give a "
            "folder made by save_pretrained"
        )
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _is_transport_error(error: BaseException) -> bool:
    """By name: the hub's client library is httpx or httpx2, depending on its version."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)

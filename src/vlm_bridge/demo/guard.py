"""Limit requests to the demo's server: to known hosts and paths, to its own page, and to bodies of bounded size."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm_bridge.demo.service import MAX_UPLOAD, MEGABYTE

PAGE_PATHS = (
    "/api/caption", "/assets/", "/config", "/favicon.ico", "/gradio_api/cancel", "/gradio_api/file=",
    "/gradio_api/heartbeat/", "/gradio_api/queue/", "/gradio_api/reset", "/gradio_api/startup-events",
    "/gradio_api/upload", "/manifest.json", "/pwa_icon", "/static/", "/svelte/", "/theme.css",
)  # fmt: skip
"""Beginnings of what the page asks for, besides `/`. Gradio has more, such as a proxy and an editor of its code."""
UPLOAD_PATHS = ("/api/caption", "/gradio_api/upload")
FILES_TOGETHER = 10
"""Images of the largest size that one request may carry."""
FORM_ALLOWANCE = 64 * 1024
"""Bytes of a multipart request around the images."""
MAX_JSON = MEGABYTE
"""Bytes of a request that carries no image."""
MAX_STORED = 1_073_741_824
"""Bytes of uploads that are kept at a time, of all clients together."""
BODY_SECONDS = 60
"""A request that has not arrived after so long is given up."""
IDLE_SECONDS = 20
"""A connection on which nothing is asked for so long is closed."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERY_INTERFACE = ("0.0.0.0", "::", "")
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
"""The browser itself then refuses whatever the page might fetch from another host."""
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Refused(Exception):
    """A request that is answered with a status and one line."""

    def __init__(self, status: int, message: str):
        self.status, self.message = status, message
        super().__init__(message)


class Guard:
    """ASGI middleware in front of everything that the demo serves.

    Args:
        host: that the server listens on, as `--host` gives it.
        uploads: where files of clients are kept.
        active: counts the requests that are being answered, by the address of the client.
    """

    def __init__(self, app: ASGIApp, host: str, uploads: Path, active: Counter[Any]):
        self.app = app
        self.host = host
        self.uploads = uploads
        self.active = active

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check(scope, headers)
            receive = self._bounded(scope["path"], headers, receive)
        except Refused as refused:
            await self._answer(refused)(scope, receive, send)
            return
        client = scope.get("client")
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        self.active[client] += 1
        try:
            await self.app(scope, receive, send_with_headers)
        except Refused as refused:
            if started:
                raise
            await self._answer(refused)(scope, receive, send)
        finally:
            self.active[client] -= 1
            if not self.active[client]:
                del self.active[client]

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise Refused where a request is not of this server's own page, or of a program that names it."""
        host = headers.get("host", "")
        if not is_trusted(host, self.host):
            raise Refused(
                400,
                f"this server is not {host[:100]!r}: open it by its address, or start it with --host",
            )
        path = scope["path"]
        if path != "/" and not path.startswith(PAGE_PATHS):
            raise Refused(404, "nothing is here")
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != host:
                raise Refused(403, "requests of other pages are refused")
            if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
                raise Refused(403, "requests of other pages are refused")

    def _bounded(self, path: str, headers: Headers, receive: Receive) -> Receive:
        """Return a ``receive`` that raises Refused for a body that is too large or too slow."""
        limit = MAX_JSON
        if path.startswith(UPLOAD_PATHS):
            limit = FORM_ALLOWANCE + MAX_UPLOAD * (1 if path == "/api/caption" else FILES_TOGETHER)
        length = headers.get("content-length", "0")
        if not length.isdigit() or len(length) > 15:
            raise Refused(400, "the Content-Length is no number")
        self._check_size(path, int(length), limit)
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS
        size, is_whole = 0, False

        async def bounded() -> Message:
            nonlocal size, is_whole
            if is_whole:  # what comes now is that the client went away, whenever that is
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise Refused(
                    408, f"the request took longer than {BODY_SECONDS} s to arrive"
                ) from None
            size += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            self._check_size(path, size, limit)
            return message

        return bounded

    def _check_size(self, path: str, size: int, limit: int) -> None:
        if size > limit:
            megabytes = max(limit // MEGABYTE, 1)
            raise Refused(
                413, f"the request has {size / MEGABYTE:.0f} MB: send at most {megabytes} MB"
            )
        if (
            path.startswith(UPLOAD_PATHS)
            and size
            and stored_bytes(self.uploads) + size > MAX_STORED
        ):
            raise Refused(503, "too many images are waiting here: come back later")

    @staticmethod
    def _answer(refused: Refused) -> JSONResponse:
        return JSONResponse(
            {"error": refused.message}, refused.status, {**HEADERS, "Connection": "close"}
        )


def is_trusted(host: str, listens_on: str) -> bool:
    """Whether a Host header names this server.

    A name of somebody else may be made to lead here by who owns it (DNS rebinding), an address may not: where the
    server listens to the network, it is known by any address and by its machine's name, else by its own names alone.
    """
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    if name is None:
        return False
    if name in (*LOOPBACK, listens_on.lower().strip("[]")):
        return True
    if listens_on not in EVERY_INTERFACE:
        return False
    with suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name in (socket.gethostname().lower(), socket.getfqdn().lower())


def stored_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_size
    return total


async def close_idle(active: Mapping[Any, int], connections: Callable[[], Iterable[Any]]) -> None:
    """Close connections on which nothing was asked at two looks in a row, for ever.

    Args:
        active: requests that are being answered, by the address of the client.
        connections: gives the server's connections.
    """
    idle_before: set[int] = set()
    while True:
        await asyncio.sleep(IDLE_SECONDS / 2)
        idle = {
            id(connection): connection.transport
            for connection in connections()
            if not active.get(tuple(connection.transport.get_extra_info("peername") or ())[:2])
        }
        for key in idle_before & idle.keys():
            idle[key].close()
        idle_before = idle.keys() - idle_before

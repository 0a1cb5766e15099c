"""Serve the page at `/` and a JSON endpoint at `/api/caption`. Needs the extra `demo`."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gradio.themes import Default
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.middleware import Middleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm_bridge.demo.page import CSS, Examples, build_page
from vlm_bridge.demo.service import MAX_UPLOAD_MB, MEGABYTE, CaptionService, UploadError
from vlm_bridge.errors import UsageError, VLMBridgeError

UPLOAD_PATHS = ("/api/caption", "/gradio_api/upload")
MAX_UPLOAD_REQUEST_MB = 200
MAX_REQUEST_MB = 1  # of a request that carries no image
QUEUE_SIZE = 100
HEADERS = {
    # The browser then refuses to fetch anything from another host.
    "Content-Security-Policy": "default-src 'self' data: blob:; frame-ancestors 'self'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Guard:
    """ASGI middleware: refuse foreign hosts (DNS rebinding), foreign pages, and large bodies."""

    def __init__(self, app: ASGIApp, listens_on: str):
        self.app = app
        self.listens_on = listens_on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if refused := self._refusal(scope):
            status, message = refused
            headers = {**HEADERS, "Connection": "close"}
            await JSONResponse({"error": message}, status, headers)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return the status and message of a refused request."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if scope["type"] != "http" or not is_own_name(host, self.listens_on):
            return 400, f"this server is not {host[:100]!r}: open it by its address, or use --host"
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "requests of other pages are refused"
        if "transfer-encoding" in headers:
            return 411, "send a Content-Length: the size is checked before the body is read"
        most = MAX_UPLOAD_REQUEST_MB if scope["path"].startswith(UPLOAD_PATHS) else MAX_REQUEST_MB
        if int(headers.get("content-length", 0)) > most * MEGABYTE:
            return 413, f"the request is too large: send at most {most} MB"
        return None


def is_own_name(host: str, listens_on: str) -> bool:
    """Return whether a Host header names this server.

    Anyone can make a domain lead here (DNS rebinding), but not an address or this machine's name.
    """
    with suppress(ValueError):
        name = urlsplit(f"//{host}").hostname or ""
        own = {"localhost", listens_on.lower(), socket.gethostname().lower(), socket.getfqdn()}
        return name in own or bool(ipaddress.ip_address(name))
    return False


@contextmanager
def serving(
    service: CaptionService,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    run: Path | None = None,
    examples: Examples = (),
) -> Iterator[str]:
    """Serve until the block ends, and yield the address. What clients sent is deleted then.

    Args:
        host: address to listen on.
        port: 0 takes a free one.
        run: a training run to show in a second tab.
        examples: (name, image) that a visitor may caption with a click.

    Raises:
        UsageError: the address is taken or does not exist.
    """

    async def caption(request: HTTPRequest) -> JSONResponse:
        try:
            return JSONResponse(await _answer_form(service, request))
        except VLMBridgeError as error:
            status = error.status if isinstance(error, UploadError) else 422
            return JSONResponse({"error": str(error)}, status)

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as probe:
            port = probe.getsockname()[1]
    except OSError as error:
        raise UsageError(
            f"cannot serve on {host}:{port}: {error.strerror}; give another --port or --host"
        ) from error
    with tempfile.TemporaryDirectory(prefix="vlm-bridge-demo-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build_page(service, run=run, examples=examples)
        page.queue(default_concurrency_limit=1, max_size=QUEUE_SIZE, api_open=False)
        page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            max_file_size=MAX_UPLOAD_MB * MEGABYTE,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=["settings"],  # light or dark
            theme=Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css_paths=CSS,
            app_kwargs={
                "middleware": [Middleware(Guard, listens_on=host)],
                "routes": [Route("/api/caption", caption, methods=["POST"])],
                "docs_url": None,  # these pages load scripts from elsewhere
                "redoc_url": None,
                "openapi_url": None,
            },
        )
        try:
            yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
        finally:
            page.close(verbose=False)


async def _answer_form(service: CaptionService, request: HTTPRequest) -> dict[str, Any]:
    """Caption the image in a multipart form: file `image`, and any field of `Request`."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise UploadError("send multipart/form-data with the image as the file `image`", 415)
    async with request.form(max_files=1, max_fields=10) as form:
        upload = form.get("image")
        if not isinstance(upload, UploadFile):
            raise UploadError("the form has no file `image`", 422)
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        chosen = service.default_request.updated(fields)
        name = upload.filename or "the upload"
        answer = await run_in_threadpool(service.answer, await upload.read(), name, chosen)
    alternatives = [dataclasses.asdict(candidate) for candidate in answer.alternatives]
    seconds = round(answer.seconds, 3)
    return {"caption": answer.caption, "alternatives": alternatives, "seconds": seconds}

"""Serve the page, `/api/caption` and `/health`; the page loads nothing from elsewhere."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from gradio.themes import Default
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vlm_bridge import __version__
from vlm_bridge.demo.page import build_page
from vlm_bridge.demo.service import MAX_UPLOAD_MB, MEGABYTE, CaptionService
from vlm_bridge.errors import DataError, UsageError, VLMBridgeError

UPLOAD_PATHS = ("/api/caption", "/gradio_api/upload")
MAX_UPLOAD_REQUEST_MB = 200
MAX_REQUEST_MB = 1  # of a request that carries no image
HEADERS = {
    # The browser then refuses to fetch anything from another host.
    "Content-Security-Policy": "default-src 'self' data: blob:; frame-ancestors 'self'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
Examples = Sequence[tuple[str, Image.Image]]


@contextmanager
def serving(
    service: CaptionService,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    run: Path | None = None,
    examples: Examples = (),
    root_path: str = "",
) -> Iterator[str]:
    """Serve until the block ends, and yield the address. Uploads are deleted then.

    Args:
        port: 0 takes a free one.
        run: a training run to show in a second tab.
        examples: (name, image) that a visitor may caption with a click.
        root_path: public address of the page behind a proxy; its path alone, such as `/demo`, does
            for a proxy on this machine that sends `X-Forwarded-Host`.

    Raises:
        UsageError: the address is taken or does not exist.
    """
    try:
        with socket.create_server((host, port)) as probe:
            port = probe.getsockname()[1]
    except OSError as error:
        raise UsageError(
            f"cannot serve on {host}:{port}: {error.strerror}; give another --port or --host"
        ) from error
    with tempfile.TemporaryDirectory(prefix="vlm-bridge-demo-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        files = {name: Path(uploads, f"{name}.png") for name, _ in examples}
        for name, image in examples:
            image.save(files[name])
        page = build_page(service, run, files)
        page.queue(default_concurrency_limit=1, max_size=100, api_open=False)
        page.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False,
            max_file_size=MAX_UPLOAD_MB * MEGABYTE, ssr_mode=False, enable_monitoring=False,
            footer_links=[], css_paths=Path(__file__).with_name("page.css"), root_path=root_path,
            theme=Default(
                primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]
            ),
            app_kwargs=_app_options(service, host, urlsplit(root_path)),
        )  # fmt: skip
        try:
            yield f"http://{host}:{port}"
        finally:
            page.close(verbose=False)


def _app_options(service: CaptionService, host: str, public: SplitResult) -> dict[str, Any]:
    """Return the routes beside the page, and what stands before all of them."""

    async def caption(request: HTTPRequest) -> JSONResponse:
        try:
            return JSONResponse(await _answer_form(service, request))
        except VLMBridgeError as error:
            return JSONResponse({"error": str(error)}, 422)

    async def health(request: HTTPRequest) -> JSONResponse:
        return JSONResponse({"status": "ok", "model": service.summary, "version": __version__})

    # A domain of somebody else may lead here (DNS rebinding).
    named = [host, "localhost", "127.0.0.1", *filter(None, [public.hostname])]
    own_names = ["*"] if host == "0.0.0.0" else named
    return {
        "middleware": [
            Middleware(TrustedHostMiddleware, allowed_hosts=own_names),
            Middleware(BaseHTTPMiddleware, dispatch=partial(guard, public=public)),
        ],
        "routes": [
            Route("/api/caption", caption, methods=["POST"]),
            Route("/health", health),
        ],
        # Pages that load scripts from elsewhere.
        **dict.fromkeys(("docs_url", "redoc_url", "openapi_url")),
    }


async def guard(
    request: HTTPRequest, answer: RequestResponseEndpoint, public: SplitResult
) -> Response:
    """Refuse requests of other pages and large bodies; add headers to all answers.

    Behind a proxy `Host` may be another than the visitor's. Pages cannot set `Sec-Fetch-Site`, but
    they can set `X-Forwarded-Host`, so that is not looked at.

    Args:
        public: the address behind a proxy, split; without a name if that is unknown.
    """
    headers, origin = request.headers, request.headers.get("origin")
    request.scope["root_path"] = public.path  # proxies may leave it in the path or take it away
    path = request.scope["path"].removeprefix(public.path)
    most = MAX_UPLOAD_REQUEST_MB if path in UPLOAD_PATHS else MAX_REQUEST_MB
    own = origin is None or headers.get("sec-fetch-site") == "same-origin"
    own = own or urlsplit(origin).netloc in {headers.get("host"), public.netloc} - {""}
    response: Response
    if not own:
        response = JSONResponse({"error": "requests of other pages are refused"}, 403)
    elif "transfer-encoding" in headers:  # its size cannot be checked before it is read
        response = JSONResponse({"error": "send a Content-Length"}, 411)
    elif int(headers.get("content-length", 0)) > most * MEGABYTE:
        error = f"the request is too large: send at most {most} MB"
        response = JSONResponse({"error": error}, 413, {"Connection": "close"})
    else:
        response = await answer(request)
    response.headers.update(HEADERS)
    return response


async def _answer_form(service: CaptionService, request: HTTPRequest) -> dict[str, Any]:
    """Caption the image in a multipart form: file `image`, and any field of `Request`."""
    async with request.form(max_files=1, max_fields=10) as form:
        upload = form.get("image")
        if not isinstance(upload, UploadFile):
            raise DataError("send multipart/form-data with the image as the file `image`")
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        chosen = service.default_request.updated(fields)
        name = upload.filename or "the upload"
        answer = await run_in_threadpool(service.answer, await upload.read(), name, chosen)
    best = answer.captions[0]
    return {
        "caption": best.caption,
        **best.sureness(),
        "alternatives": [{"caption": x.caption, "score": x.score} for x in answer.captions],
        "seconds": round(answer.seconds, 3),
    }

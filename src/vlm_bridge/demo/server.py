"""The demo's server: the page at `/` and a JSON endpoint. Needs the extra `demo`."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.middleware import Middleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse
from starlette.routing import Route

from vlm_bridge.demo.guard import Guard, close_idle
from vlm_bridge.demo.page import CSS, Examples, build_page, theme
from vlm_bridge.demo.service import MAX_UPLOAD, Answer, CaptionService, UploadError
from vlm_bridge.errors import UsageError, VLMBridgeError

QUEUE_SIZE = 100


class Demo:
    """The page at `/` and the endpoint at `/api/caption`, served by threads of their own until closed.

    One worker is on the model for both. Gradio launches the page itself: files that clients name are then read from
    where their uploads are kept and from nowhere else. `Guard` stands before it.

    Args:
        host: address to listen on.
        port: 0 takes a free one.
        run: a training run to show in a second tab.
        examples: (name, image) that a visitor may caption with a click.

    Raises:
        UsageError: the address cannot be had.
    """

    def __init__(
        self,
        service: CaptionService,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        run: Path | None = None,
        examples: Examples = (),
    ):
        self.service = service
        self._uploads = tempfile.TemporaryDirectory(prefix="vlm-bridge-demo-")
        os.environ["GRADIO_TEMP_DIR"] = self._uploads.name
        active: Counter[Any] = Counter()

        @asynccontextmanager
        async def lifespan(_: object) -> AsyncIterator[None]:
            sweeping = asyncio.create_task(close_idle(active, self._connections))
            yield
            sweeping.cancel()

        self.page = build_page(service, Path(self._uploads.name), run=run, examples=examples)
        self.page.queue(default_concurrency_limit=1, max_size=QUEUE_SIZE, api_open=False)
        port = port or free_port(host)
        try:
            self.page.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                inbrowser=False,
                max_file_size=MAX_UPLOAD,
                ssr_mode=False,
                footer_links=["settings"],  # light or dark
                theme=theme(),
                css=CSS,
                app_kwargs={
                    "lifespan": lifespan,
                    "middleware": [
                        Middleware(Guard, host=host, uploads=Path(self._uploads.name), active=active)
                    ],
                    "routes": [Route("/api/caption", self._caption, methods=["POST"])],
                    # Its own pages load scripts from elsewhere.
                    "docs_url": None, "redoc_url": None, "openapi_url": None,
                },
            )  # fmt: skip
        except (OSError, RuntimeError) as error:
            self._uploads.cleanup()
            raise UsageError(
                f"cannot serve on {host}:{port}: {error}; give another --port or --host"
            ) from error
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def close(self) -> None:
        """Stop serving, within seconds whatever is being computed, and delete what clients sent."""
        self.page.close(verbose=False)
        self._uploads.cleanup()

    def _connections(self) -> Iterable[Any]:
        return list(self.page.server.server_state.connections)

    async def _caption(self, request: HTTPRequest) -> JSONResponse:
        try:
            answer = await _answer_form(self.service, request)
        except VLMBridgeError as error:
            status = error.status if isinstance(error, UploadError) else 422
            return JSONResponse({"error": str(error)}, status_code=status)
        return JSONResponse(answer.to_json())


async def _answer_form(service: CaptionService, request: HTTPRequest) -> Answer:
    """Caption the picture in a multipart form: field `image`, and any field of `Request`."""
    length = request.headers.get("content-length", "")
    if not length.isdigit():
        raise UploadError(
            "send a Content-Length: the size of a picture is checked before it is read", 411
        )
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise UploadError("send multipart/form-data with the picture as the file `image`", 415)
    async with request.form(max_files=1, max_fields=10) as form:
        upload = form.get("image")
        if not isinstance(upload, UploadFile):
            raise UploadError("the form has no file `image`", 422)
        given = {name: value for name, value in form.items() if isinstance(value, str)}
        chosen = service.default_request.updated(given)
        content = await upload.read()
        return await run_in_threadpool(
            service.answer, content, upload.filename or "the upload", chosen
        )


def serve(demo: Demo) -> None:
    """Serve until interrupted; then end within seconds, whatever a request is computing."""
    print(f"serving on {demo.address} (Ctrl-C stops)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        demo.close()
        print("stopped", flush=True)
        os._exit(130)  # a thread on the model would keep the process until its caption is done


def free_port(host: str) -> int:
    """A port that nobody listens on. Raises UsageError where the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        raise UsageError(
            f"cannot serve on {host}: {error.strerror or error}; give another --host"
        ) from error

"""Serve the demo page at `/` and a JSON endpoint at `/api/caption`; nothing else is loaded."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from gradio.themes import Default
from PIL import Image, ImageOps
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vlm_bridge.demo import service as bounds
from vlm_bridge.demo.service import MAX_UPLOAD_MB, MEGABYTE, Answer, CaptionService, Request
from vlm_bridge.errors import DataError, UsageError, VLMBridgeError
from vlm_bridge.evaluation.report import draw_curves
from vlm_bridge.evaluation.run_folder import HISTORY_NAME, ReportedRun, read_curves

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
THUMBNAIL = 480
REFRESH_SECONDS = 5
FORGET_SECONDS = 3600  # uploads are deleted after this long
LEGEND = (
    "The score is the mean log-probability of a token, in nats: 0 is certain. Below each word: "
    "its highest attention as a multiple of an even spread; bright is where the word looked most."
)
SAMPLES_SHOWN = 12
Examples = Sequence[tuple[str, Image.Image]]


@contextmanager
def serving(
    service: CaptionService,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    run: Path | None = None,
    examples: Examples = (),
) -> Iterator[str]:
    """Serve until the block ends, and yield the address. Uploads are deleted then.

    Args:
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
            return JSONResponse({"error": str(error)}, 422)

    try:
        with socket.create_server((host, port)) as probe:
            port = probe.getsockname()[1]
    except OSError as error:
        raise UsageError(
            f"cannot serve on {host}:{port}: {error.strerror}; give another --port or --host"
        ) from error
    # A domain of somebody else may lead here (DNS rebinding).
    own_names = ["*"] if host == "0.0.0.0" else [host, "localhost", "127.0.0.1"]
    app_options = {
        "middleware": [
            Middleware(TrustedHostMiddleware, allowed_hosts=own_names),
            Middleware(BaseHTTPMiddleware, dispatch=guard),
        ],
        "routes": [Route("/api/caption", caption, methods=["POST"])],
        # Pages that load scripts from elsewhere.
        **dict.fromkeys(("docs_url", "redoc_url", "openapi_url")),
    }
    with tempfile.TemporaryDirectory(prefix="vlm-bridge-demo-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build_page(service, run, examples)
        page.queue(default_concurrency_limit=1, max_size=100, api_open=False)
        page.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False,
            max_file_size=MAX_UPLOAD_MB * MEGABYTE, ssr_mode=False, enable_monitoring=False,
            footer_links=["settings"], css_paths=Path(__file__).with_name("page.css"),
            theme=Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            app_kwargs=app_options,
        )  # fmt: skip
        try:
            yield f"http://{host}:{port}"
        finally:
            page.close(verbose=False)


async def guard(request: HTTPRequest, answer: RequestResponseEndpoint) -> Response:
    """Refuse requests of other pages and large bodies; add headers to all answers."""
    headers, origin = request.headers, request.headers.get("origin")
    most = MAX_UPLOAD_REQUEST_MB if request.url.path in UPLOAD_PATHS else MAX_REQUEST_MB
    response: Response
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
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
    return {
        "caption": answer.captions[0].caption,
        "alternatives": [{"caption": x.caption, "score": x.score} for x in answer.captions],
        "seconds": round(answer.seconds, 3),
    }


def build_page(service: CaptionService, run: Path | None, examples: Examples) -> gr.Blocks:
    """Build the page, with a tab that follows a training run if one is given."""

    def respond(chosen: list[tuple[str, Any]] | None, *settings: float) -> Iterator[str]:
        cards = "" if chosen else _error_card("no image: drop one into the box above, or paste it")
        yield cards
        fields = dict(zip(Request.model_fields, settings, strict=True))
        for file in (Path(path) for path, _ in chosen or []):
            try:
                request = service.default_request.updated(fields)
                cards += _card(service.answer(file.read_bytes(), file.name, request, overlays=True))
            except VLMBridgeError as error:
                cards += _error_card(str(error))
            yield cards + f'<p class="vb-note"><small>{LEGEND}</small></p>'

    def take(event: gr.SelectData) -> list[Image.Image]:
        return [examples[event.index][1]]

    with gr.Blocks(
        title="vlm-bridge", analytics_enabled=False, delete_cache=(FORGET_SECONDS, FORGET_SECONDS)
    ) as page:
        gr.Markdown(f"# vlm-bridge\n{service.summary}")
        with gr.Tab("Caption"), gr.Row():
            with gr.Column(scale=3, min_width=300):
                images = gr.Gallery(
                    label=f"Images, {MAX_UPLOAD_MB} MB at most", type="filepath",
                    sources=["upload", "clipboard"], interactive=True, columns=4,
                    fit_columns=False, height=270, elem_id="images",
                )  # fmt: skip
                button = gr.Button("Caption", variant="primary", elem_id="caption")
                answers = gr.HTML(elem_id="answers")
                shown = gr.Gallery(
                    [(image, name) for name, image in examples], label="Examples: click one",
                    columns=max(len(examples), 1), fit_columns=False, allow_preview=False,
                    interactive=False, object_fit="cover", visible=bool(examples),
                    elem_id="examples",
                )  # fmt: skip
            with gr.Column(scale=1, min_width=280):
                settings = _sliders(service.default_request)
        taken = shown.select(take, None, images, api_visibility="private")
        for event in (button.click, images.upload, taken.then):
            event(respond, [images, *settings], answers, api_visibility="private")
        if run is not None:
            with gr.Tab("Training"):
                live = gr.HTML(elem_id="live")
                events = [page.load, gr.Timer(REFRESH_SECONDS).tick]
                gr.on(events, lambda: live_html(run), None, live, api_visibility="private")
    return page


def _sliders(start: Request) -> list[gr.Slider]:
    """Return the settings of the page in the order of the fields of `Request`."""
    most = bounds.MOST_ALTERNATIVES
    return [
        gr.Slider(1, bounds.MOST_BEAMS, start.num_beams, step=1, label="Beams", elem_id="beams"),
        gr.Slider(0, 2, start.temperature, step=0.05, label="Temperature (0 searches with beams)"),
        gr.Slider(-2, 4, start.length_penalty, step=0.1, label="Length penalty"),
        gr.Slider(1, bounds.LONGEST, start.max_new_tokens, step=1, label="Most tokens"),
        gr.Slider(1, most, start.num_alternatives, step=1, label="Alternatives (one a beam)"),
    ]


def _card(answer: Answer) -> str:
    """Return an image with its caption, the alternatives and the overlays of its words."""
    alternatives = "".join(
        f"<li>{escape(other.caption)}<data>{other.score:.3f}</data></li>"
        for other in answer.captions
    )
    words = "".join(
        f'<figure><img src="{_data_uri(image)}" alt=""><figcaption>{escape(word.word)} '
        f"<small>{word.peak:.1f}x</small></figcaption></figure>"
        for word, image in answer.overlays
    )
    caption = escape(answer.captions[0].caption) or "(no caption)"
    thumbnail = ImageOps.contain(answer.image, (THUMBNAIL, THUMBNAIL))
    return (
        f'<article class="vb-card"><img src="{_data_uri(thumbnail)}" alt="{caption}">'
        f'<div><p class="vb-caption">{caption}</p><p class="vb-note">{answer.seconds:.1f} s</p>'
        f'<ol class="vb-alternatives">{alternatives}</ol><div class="vb-words">{words}</div>'
        "</div></article>"
    )


def _error_card(message: str) -> str:
    return f'<article class="vb-error" role="alert">{escape(message)}</article>'


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def live_html(run: Path) -> str:
    """Return charts and samples of a training run's folder or log folder, or why there are none."""
    folder = run / "logs" if (run / "logs" / HISTORY_NAME).is_file() else run
    try:
        curves = read_curves(folder)
    except (VLMBridgeError, OSError) as error:
        return _error_card(str(error))
    if not curves:
        return _error_card(f"no training log in {run} yet: is it the folder of a training run?")
    charts = "".join(draw_curves([ReportedRun(run.name, curves=curves)]))
    lines = (folder / HISTORY_NAME).read_text(encoding="utf-8").splitlines()
    # The last line may be half written.
    events = [json.loads(line) for line in lines if '"samples"' in line and line.endswith("}")]
    samples = ""
    for event in events[: -SAMPLES_SHOWN - 1 : -1]:
        rows = (f"<li>{escape(c)} <small>{escape(r)}</small></li>" for c, r in event["captions"])
        samples += f"<h4>Step {event['step']:,}</h4><ul>{''.join(rows)}</ul>"
    step = max(curve[-1][0] for curve in curves.values())
    return (
        f'<p class="vb-status">Step {step:,}</p><div class="vb-charts">{charts}</div>'
        f'<div class="vb-samples"><h3>Sample captions, each with a reference</h3>{samples}</div>'
    )

"""The demo page and its JSON endpoint. Needs the extra `demo`; nothing on the page comes from elsewhere."""

from __future__ import annotations

import base64
import io
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

# Read while gradio is imported: it would look for newer versions of itself.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from PIL import Image, ImageOps
from starlette.datastructures import UploadFile
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from vlm_bridge.captioning.live_run import read_live_run, to_html
from vlm_bridge.captioning.service import (
    LONGEST,
    MAX_UPLOAD,
    MAX_UPLOAD_MB,
    MOST_ALTERNATIVES,
    MOST_BEAMS,
    Answer,
    CaptionService,
    Request,
    UploadError,
    too_large,
)
from vlm_bridge.errors import UsageError, VLMBridgeError

THUMBNAIL = 480
REFRESH_SECONDS = 5
FORGET_SECONDS = 3600
"""Uploads are deleted after this long."""
FORM_ALLOWANCE = 64 * 1024
"""Bytes of a multipart request around the picture."""
QUEUE_SIZE = 100
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'"
)
"""The browser itself then refuses whatever the page might fetch from another host."""

SYSTEM_FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]
CSS = """
.gradio-container { --soft: #66707b; --line: #dde1e6;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9; }
.dark .gradio-container, .gradio-container.dark { --soft: #98a2ad; --line: #2b323a;
  --c0: #56b4e9; --c1: #e69f00; --c2: #009e73; --c3: #cc79a7; --c4: #d55e00; --c5: #f0e442; }
#pictures .grid-wrap, #examples .grid-wrap { overflow-y: auto; padding-top: 2.2rem; } /* below the label */
#examples .fixed-height { min-height: 0; }
#examples .thumbnail-item { aspect-ratio: 4 / 3; }
.vb-card { display: grid; grid-template-columns: minmax(0, 13rem) minmax(0, 1fr); gap: 1rem; padding: 1rem 0;
  border-bottom: 1px solid var(--line); }
.vb-card > img { width: 100%; border-radius: 8px; }
.vb-caption { font-size: 1.35rem; line-height: 1.35; margin: 0 0 .25rem; overflow-wrap: anywhere; }
.vb-note, .vb-status, .vb-samples small, .vb-words figcaption small { color: var(--soft); }
.vb-error { border-left: 4px solid #d55e00; padding: .75rem 1rem; margin: .75rem 0; overflow-wrap: anywhere; }
.vb-alternatives { margin: .5rem 0; padding-left: 1.4rem; list-style: decimal; }
.vb-alternatives data { color: var(--soft); font-variant-numeric: tabular-nums; margin-left: .5rem; }
.vb-words { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.75rem, 1fr)); gap: .6rem; }
.vb-words figure { margin: 0; } .vb-words img { width: 100%; border-radius: 4px; }
.vb-words figcaption { text-align: center; overflow-wrap: anywhere; }
.vb-charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
.vb-charts svg { width: 100%; height: auto; }
.vb-samples small { display: block; } .vb-samples ul { list-style: disc; padding-left: 1.4rem; }
.vb-facts dt { color: var(--soft); font-size: .85em; margin-top: .5rem; }
.vb-facts dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) { .vb-card { grid-template-columns: minmax(0, 1fr); } }
"""
LEGEND = (
    "The score is the mean log-probability of a token, in nats: 0 is certain. Below each word: how many times an "
    "even spread its highest attention is; bright is where the word looked most."
)

Examples = Sequence[tuple[str, Image.Image]]


def build_app(
    service: CaptionService, *, run: Path | None = None, any_run: bool = False, examples: Examples = ()
) -> FastAPI:
    """The page at `/` and the endpoint at `/api/caption`, with one worker on the model for both.

    Args:
        run: the training run that the page's second tab shows.
        any_run: let visitors name another folder of this machine.
        examples: (name, picture) that a visitor may caption with a click.
    """
    app = FastAPI(
        docs_url=None, redoc_url=None, openapi_url=None
    )  # its own pages load scripts from elsewhere

    @app.middleware("http")
    async def stay_here(request: HTTPRequest, call_next: Callable[..., Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @app.post("/api/caption")
    async def caption(request: HTTPRequest) -> JSONResponse:
        try:
            answer = await _answer_form(service, request)
        except VLMBridgeError as error:
            status = error.status if isinstance(error, UploadError) else 422
            return JSONResponse({"error": str(error)}, status_code=status)
        return JSONResponse(answer.to_json())

    page = build_page(service, run=run, any_run=any_run, examples=examples)
    page.queue(default_concurrency_limit=1, max_size=QUEUE_SIZE, api_open=False)
    return gr.mount_gradio_app(
        app,
        page,
        "/",
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        footer_links=["settings"],  # light or dark
        theme=gr.themes.Default(  # type: ignore[reportPrivateImportUsage]
            font=SYSTEM_FONTS, font_mono=["ui-monospace", "monospace"]
        ).set(
            # Gradio's own greys are too pale to be read on white (WCAG asks for a contrast of 4.5).
            block_info_text_color="*neutral_500",
            block_info_text_color_dark="*neutral_400",
        ),
        css=CSS,
    )


async def _answer_form(service: CaptionService, request: HTTPRequest) -> Answer:
    """Caption the picture in a multipart form: field `image`, and any field of `Request`."""
    length = request.headers.get("content-length", "")
    if not length.isdigit():
        raise UploadError("send a Content-Length: the size of a picture is checked before it is read", 411)
    if int(length) > MAX_UPLOAD + FORM_ALLOWANCE:
        raise too_large("the upload", int(length))
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise UploadError("send multipart/form-data with the picture as the file `image`", 415)
    async with request.form(max_files=1, max_fields=10) as form:
        upload = form.get("image")
        if not isinstance(upload, UploadFile):
            raise UploadError("the form has no file `image`", 422)
        given = {name: value for name, value in form.items() if isinstance(value, str)}
        chosen = service.default_request.updated(given)
        content = await upload.read()
        return await run_in_threadpool(service.answer, content, upload.filename or "the upload", chosen)


def build_page(service: CaptionService, *, run: Path | None, any_run: bool, examples: Examples) -> gr.Blocks:
    """The page alone, for `build_app` to mount."""
    start = service.default_request
    with gr.Blocks(
        title="vlm-bridge", analytics_enabled=False, delete_cache=(FORGET_SECONDS, FORGET_SECONDS)
    ) as page:
        gr.Markdown(f"# vlm-bridge\n{service.summary()}")
        with gr.Tab("Caption"), gr.Row():
            with gr.Column(scale=3, min_width=300):
                pictures = gr.Gallery(
                    label=f"Pictures, {MAX_UPLOAD_MB} MB at most",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    interactive=True,
                    columns=4,
                    fit_columns=False,
                    height=270,
                    elem_id="pictures",
                )
                button = gr.Button("Caption", variant="primary", elem_id="caption")
                answers = gr.HTML(elem_id="answers")
                shown = gr.Gallery(
                    [(picture, name) for name, picture in examples],
                    label="Examples: click one",
                    columns=max(len(examples), 1),
                    fit_columns=False,
                    allow_preview=False,
                    interactive=False,
                    object_fit="cover",
                    visible=bool(examples),
                    elem_id="examples",
                )
            with gr.Column(scale=1, min_width=280):
                beams = gr.Slider(1, MOST_BEAMS, start.num_beams, step=1, label="Beams", elem_id="beams")
                temperature = gr.Slider(
                    0, 2, start.temperature, step=0.05, label="Temperature", info="0 searches with beams"
                )
                length_penalty = gr.Slider(
                    -2, 4, start.length_penalty, step=0.1, label="Length penalty", info="higher: longer"
                )
                longest = gr.Slider(
                    1, LONGEST, start.max_new_tokens, step=1, label="Longest caption, in tokens"
                )
                alternatives = gr.Slider(
                    1,
                    MOST_ALTERNATIVES,
                    start.num_alternatives,
                    step=1,
                    label="Alternatives",
                    info="a search gives at most as many as it has beams",
                )
                gr.HTML(_facts(service.facts()))
                with gr.Accordion("JSON endpoint", open=False):
                    gr.Markdown(_endpoint_help(start))
            controls = [pictures, beams, temperature, length_penalty, longest, alternatives]

            def respond(chosen: Any, *settings: float) -> Iterator[str]:
                yield from caption_all(service, chosen, *settings)

            def take(event: gr.SelectData) -> list[Image.Image]:
                return [examples[event.index][1]]

            taken = shown.select(take, None, pictures, api_visibility="private")
            for event in (button.click, pictures.upload, taken.then):
                event(
                    respond,
                    controls,
                    answers,
                    concurrency_limit=1,
                    concurrency_id="model",
                    api_visibility="private",
                )
        with gr.Tab("Training"):
            folder = gr.Textbox(
                str(run or ""), label="Folder of a training run", visible=any_run, elem_id="run-folder"
            )
            live = gr.HTML(elem_id="live")

            def refresh(named: str) -> str:
                return live_html(Path(named) if any_run and named else run)

            gr.on(
                [page.load, gr.Timer(REFRESH_SECONDS).tick, folder.submit],
                refresh,
                folder,
                live,
                show_progress="hidden",
                api_visibility="private",
            )
    return page


def caption_all(
    service: CaptionService,
    chosen: Sequence[tuple[str, Any]] | None,
    beams: float,
    temperature: float,
    length_penalty: float,
    longest: float,
    alternatives: float,
) -> Iterator[str]:
    """The page's answers to the chosen pictures, (path, ...) each: again after every picture, one card longer."""
    if not chosen:
        yield _error_card("no picture: drop one into the box above, or paste it")
        return
    cards: list[str] = []
    for path, *_ in chosen:
        try:
            request = Request(int(beams), temperature, length_penalty, int(longest), int(alternatives))
            cards.append(_card(service.answer(Path(path), Path(path).name, request, overlays=True)))
        except VLMBridgeError as error:
            cards.append(_error_card(str(error)))
        yield "".join(cards) + f'<p class="vb-note"><small>{LEGEND}</small></p>'


def live_html(run: Path | None) -> str:
    """What the training tab shows of a run."""
    if run is None:
        return '<p class="vb-status">Start the demo with <code>--run RUN</code> to watch a training here.</p>'
    try:
        return to_html(read_live_run(run))
    except (VLMBridgeError, OSError) as error:
        return _error_card(str(error))


def serve(app: FastAPI, host: str, port: int, *, say: Callable[[str], None]) -> None:
    """Serve until interrupted.

    Raises:
        UsageError: the address cannot be had.
    """
    with listen(host, port) as listening:
        say(f"serving on http://{host}:{listening.getsockname()[1]} (Ctrl-C stops)")
        server(app).run(sockets=[listening])


def server(app: FastAPI) -> uvicorn.Server:
    """The server of an app, to run on sockets that listen already."""
    return uvicorn.Server(uvicorn.Config(app, log_level="warning"))


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes a free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        raise UsageError(
            f"cannot serve on {host}:{port}: {error.strerror or error}; give another --port or --host"
        ) from error
    return listening


def _card(answer: Answer) -> str:
    """A picture with its caption, the alternatives and the overlays of its words."""
    alternatives = "".join(
        f"<li>{escape(other.caption)}<data>{other.score:.3f}</data></li>" for other in answer.alternatives
    )
    words = "".join(
        f'<figure><img src="{_data_uri(image)}" alt=""><figcaption>{escape(word.word)} '
        f"<small>{word.peak:.1f}x</small></figcaption></figure>"
        for word, image in answer.overlays
    )
    looks = f'<details open><summary>Where each word looked</summary><div class="vb-words">{words}</div></details>'
    caption = escape(answer.caption) or "(no caption)"
    thumbnail = ImageOps.contain(answer.picture, (THUMBNAIL, THUMBNAIL))
    return (
        f'<article class="vb-card"><img src="{_data_uri(thumbnail)}" alt="{caption}">'
        f'<div><p class="vb-caption">{caption}</p><p class="vb-note">{answer.seconds:.1f} s</p>'
        f'<ol class="vb-alternatives">{alternatives}</ol>{looks if words else ""}</div></article>'
    )


def _error_card(message: str) -> str:
    return f'<article class="vb-error" role="alert">{escape(message)}</article>'


def _facts(facts: dict[str, str]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f'<details open><summary>What answers here</summary><dl class="vb-facts">{rows}</dl></details>'


def _endpoint_help(start: Request) -> str:
    fields = ", ".join(f"`{name}` ({value})" for name, value in vars(start).items())
    return (
        "`curl -F image=@photo.jpg -F num_beams=5 http://HOST:PORT/api/caption` answers "
        '`{"caption", "alternatives": [{"caption", "score"}], "seconds"}`, or `{"error"}` with a status of 4xx. '
        f"Fields beside `image`, and what they are when not given: {fields}."
    )


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"

"""The demo page and its JSON endpoint. Needs the extra `demo`; nothing on the page comes from elsewhere."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from html import escape
from pathlib import Path
from typing import Any

# Read while gradio is imported: it would look for newer versions of itself.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from PIL import Image, ImageOps
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.middleware import Middleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse
from starlette.routing import Route

from vlm_bridge.captioning.guard import Guard, close_idle
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
)
from vlm_bridge.errors import UsageError, VLMBridgeError

THUMBNAIL = 480
REFRESH_SECONDS = 5
FORGET_SECONDS = 3600
"""Uploads are deleted after this long."""
QUEUE_SIZE = 100
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


class Demo:
    """The page at `/` and the endpoint at `/api/caption`, served by threads of their own until closed.

    One worker is on the model for both. Gradio launches the page itself: files that clients name are then read from
    where their uploads are kept and from nowhere else. `Guard` stands before it.

    Args:
        host: address to listen on.
        port: 0 takes a free one.
        run: the training run that the page's second tab shows.
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


def theme() -> gr.themes.Base:  # type: ignore[reportPrivateImportUsage]
    """Gradio's own with the system's fonts, and greys that can be read on white (WCAG asks for a contrast of 4.5)."""
    fonts = {"font": SYSTEM_FONTS, "font_mono": ["ui-monospace", "monospace"]}
    plain = gr.themes.Default(**fonts)  # type: ignore[reportPrivateImportUsage]
    return plain.set(
        block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400"
    )


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


def build_page(
    service: CaptionService, uploads: Path, *, run: Path | None = None, examples: Examples = ()
) -> gr.Blocks:
    """The page alone, for `Demo` to serve; images are read from the folder ``uploads`` and from nowhere else."""
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
                beams = gr.Slider(
                    1, MOST_BEAMS, start.num_beams, step=1, label="Beams", elem_id="beams"
                )
                temperature = gr.Slider(
                    0,
                    2,
                    start.temperature,
                    step=0.05,
                    label="Temperature",
                    info="0 searches with beams",
                )
                length_penalty = gr.Slider(
                    -2,
                    4,
                    start.length_penalty,
                    step=0.1,
                    label="Length penalty",
                    info="higher: longer",
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
                yield from caption_all(service, uploads, chosen, *settings)

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
            live = gr.HTML(elem_id="live")
            gr.on(
                [page.load, gr.Timer(REFRESH_SECONDS).tick],
                lambda: live_html(run),
                None,
                live,
                show_progress="hidden",
                api_visibility="private",
            )
    return page


def caption_all(
    service: CaptionService,
    uploads: Path,
    chosen: Sequence[tuple[str, Any]] | None,
    beams: float,
    temperature: float,
    length_penalty: float,
    longest: float,
    alternatives: float,
) -> Iterator[str]:
    """The page's answers to the chosen images, (path, ...) each: again after every image, one card longer."""
    if not chosen:
        yield _error_card("no picture: drop one into the box above, or paste it")
        return
    cards: list[str] = []
    for path, *_ in chosen:
        try:
            request = Request(
                int(beams), temperature, length_penalty, int(longest), int(alternatives)
            )
            file = uploaded(path, uploads)
            cards.append(_card(service.answer(file, file.name, request, overlays=True)))
        except VLMBridgeError as error:
            cards.append(_error_card(str(error)))
        yield "".join(cards) + f'<p class="vb-note"><small>{LEGEND}</small></p>'


def uploaded(path: Any, uploads: Path) -> Path:
    """Return the file of a client's upload.

    Raises:
        UploadError: it is no regular file in the folder of uploads.
    """
    file = Path(path).resolve() if isinstance(path, str) else Path()
    if not file.is_relative_to(uploads.resolve()) or not file.is_file():
        raise UploadError("this is no image that was uploaded here: send it again", 422)
    return file


def live_html(run: Path | None) -> str:
    """What the training tab shows of a run."""
    if run is None:
        return '<p class="vb-status">Start the demo with <code>--run RUN</code> to watch a training here.</p>'
    try:
        return to_html(read_live_run(run))
    except (VLMBridgeError, OSError) as error:
        return _error_card(str(error))


def serve(demo: Demo, *, say: Callable[[str], None]) -> None:
    """Serve until interrupted; then end within seconds, whatever a request is computing."""
    say(f"serving on {demo.address} (Ctrl-C stops)")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        demo.close()
        say("stopped")
        sys.stdout.flush()
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


def _card(answer: Answer) -> str:
    """A picture with its caption, the alternatives and the overlays of its words."""
    alternatives = "".join(
        f"<li>{escape(other.caption)}<data>{other.score:.3f}</data></li>"
        for other in answer.alternatives
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
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()
    )
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

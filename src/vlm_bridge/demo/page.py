"""The demo page. Nothing on it comes from elsewhere."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

# Gradio reads it at its import, and would look for newer versions of itself.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from PIL import Image, ImageOps

from vlm_bridge.demo.live_run import live_html
from vlm_bridge.demo.service import (
    LONGEST,
    MAX_UPLOAD_MB,
    MOST_ALTERNATIVES,
    MOST_BEAMS,
    Answer,
    CaptionService,
    Request,
    UploadError,
)
from vlm_bridge.errors import VLMBridgeError

THUMBNAIL = 480
REFRESH_SECONDS = 5
FORGET_SECONDS = 3600
"""Uploads are deleted after this long."""
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


def theme() -> gr.themes.Base:  # type: ignore[reportPrivateImportUsage]
    """Gradio's own with the system's fonts, and greys that can be read on white (WCAG asks for a contrast of 4.5)."""
    fonts = {"font": SYSTEM_FONTS, "font_mono": ["ui-monospace", "monospace"]}
    plain = gr.themes.Default(**fonts)  # type: ignore[reportPrivateImportUsage]
    return plain.set(
        block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400"
    )


def build_page(
    service: CaptionService, uploads: Path, *, run: Path | None = None, examples: Examples = ()
) -> gr.Blocks:
    """Build the page for `Demo` to serve; images are read from the folder ``uploads`` only."""
    with gr.Blocks(
        title="vlm-bridge", analytics_enabled=False, delete_cache=(FORGET_SECONDS, FORGET_SECONDS)
    ) as page:
        gr.Markdown(f"# vlm-bridge\n{service.summary()}")
        with gr.Tab("Caption"), gr.Row():
            with gr.Column(scale=3, min_width=300):
                images = gr.Gallery(
                    label=f"Images, {MAX_UPLOAD_MB} MB at most", type="filepath",
                    sources=["upload", "clipboard"], interactive=True, columns=4,
                    fit_columns=False, height=270, elem_id="pictures",
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
                settings = _settings(service.default_request)
                gr.HTML(_facts(service.facts()))
                with gr.Accordion("JSON endpoint", open=False):
                    gr.Markdown(_endpoint_help(service.default_request))

        def respond(chosen: Any, *values: float) -> Iterator[str]:
            yield from caption_all(service, uploads, chosen, *values)

        def take(event: gr.SelectData) -> list[Image.Image]:
            return [examples[event.index][1]]

        taken = shown.select(take, None, images, api_visibility="private")
        for event in (button.click, images.upload, taken.then):
            event(
                respond, [images, *settings], answers,
                concurrency_limit=1, concurrency_id="model", api_visibility="private",
            )  # fmt: skip
        if run is not None:
            _training_tab(page, run)
    return page


def _settings(start: Request) -> list[gr.Slider]:
    """Build a slider for each field of `Request`, in their order."""
    most = "a search gives at most as many as it has beams"
    return [
        gr.Slider(1, MOST_BEAMS, start.num_beams, step=1, label="Beams", elem_id="beams"),
        gr.Slider(
            0, 2, start.temperature, step=0.05, label="Temperature", info="0 searches with beams"
        ),
        gr.Slider(
            -2, 4, start.length_penalty, step=0.1, label="Length penalty", info="higher: longer"
        ),
        gr.Slider(1, LONGEST, start.max_new_tokens, step=1, label="Longest caption, in tokens"),
        gr.Slider(
            1, MOST_ALTERNATIVES, start.num_alternatives, step=1, label="Alternatives", info=most
        ),
    ]


def _training_tab(page: gr.Blocks, run: Path) -> None:
    def show() -> str:
        try:
            return live_html(run)
        except (VLMBridgeError, OSError) as error:
            return _error_card(str(error))

    with gr.Tab("Training"):
        live = gr.HTML(elem_id="live")
        tick = gr.Timer(REFRESH_SECONDS).tick
        gr.on([page.load, tick], show, None, live, show_progress="hidden", api_visibility="private")


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
    """Yield the cards of the chosen images, (path, ...) each, again after every image."""
    if not chosen:
        yield _error_card("no image: drop one into the box above, or paste it")
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

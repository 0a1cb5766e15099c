"""The demo page. It loads nothing from other hosts."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageOps

from vlm_bridge.demo.service import (
    LONGEST,
    MAX_UPLOAD_MB,
    MOST_ALTERNATIVES,
    MOST_BEAMS,
    Answer,
    CaptionService,
    Request,
)
from vlm_bridge.errors import VLMBridgeError
from vlm_bridge.evaluation.charts import line_chart
from vlm_bridge.evaluation.run_folder import HISTORY_NAME, read_curves

THUMBNAIL = 480
REFRESH_SECONDS = 5
FORGET_SECONDS = 3600  # uploads are deleted after this long
LEGEND = (
    "The score is the mean log-probability of a token, in nats: 0 is certain. Below each word: "
    "its highest attention as a multiple of an even spread; bright is where the word looked most."
)
CHARTS = {
    "Loss (nats per token)": ("train/loss", "validation/loss"),
    "Visual gain (nats per token): the loss without the right image": ("validation/visual_gain",),
    "Learning rate": ("train/learning_rate",),
    "CIDEr while training": ("validation/cider",),
}
SAMPLES_SHOWN = 12

Examples = Sequence[tuple[str, Image.Image]]


def build_page(
    service: CaptionService, *, run: Path | None = None, examples: Examples = ()
) -> gr.Blocks:
    """Build the page, with a tab that follows a training run if one is given."""

    def respond(chosen: list[tuple[str, Any]] | None, *settings: float) -> Iterator[str]:
        yield from caption_all(service, [Path(path) for path, _ in chosen or []], settings)

    def take(event: gr.SelectData) -> list[Image.Image]:
        return [examples[event.index][1]]

    start = service.default_request
    with gr.Blocks(
        title="vlm-bridge", analytics_enabled=False, delete_cache=(FORGET_SECONDS, FORGET_SECONDS)
    ) as page:
        gr.Markdown(f"# vlm-bridge\n{service.summary()}")
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
                settings = [  # in the order of the fields of `Request`
                    gr.Slider(1, MOST_BEAMS, start.num_beams, step=1, label="Beams",
                              elem_id="beams"),
                    gr.Slider(0, 2, start.temperature, step=0.05, label="Temperature",
                              info="0 searches with beams"),
                    gr.Slider(-2, 4, start.length_penalty, step=0.1, label="Length penalty"),
                    gr.Slider(1, LONGEST, start.max_new_tokens, step=1, label="Most tokens"),
                    gr.Slider(1, MOST_ALTERNATIVES, start.num_alternatives, step=1,
                              label="Alternatives", info="a search gives one per beam at most"),
                ]  # fmt: skip
        taken = shown.select(take, None, images, api_visibility="private")
        for event in (button.click, images.upload, taken.then):
            event(respond, [images, *settings], answers, api_visibility="private")
        if run is not None:
            with gr.Tab("Training"):
                live = gr.HTML(elem_id="live")
                events = [page.load, gr.Timer(REFRESH_SECONDS).tick]
                gr.on(events, lambda: live_html(run), None, live, api_visibility="private")
    return page


def caption_all(
    service: CaptionService, files: Sequence[Path], settings: Sequence[float]
) -> Iterator[str]:
    """Yield the cards of uploaded images, again after every image."""
    if not files:
        yield _error_card("no image: drop one into the box above, or paste it")
    cards: list[str] = []
    for file in files:
        try:
            given = dict(zip(Request.model_fields, settings, strict=True))
            request = service.default_request.updated(given)
            cards.append(
                _card(service.answer(file.read_bytes(), file.name, request, overlays=True))
            )
        except VLMBridgeError as error:
            cards.append(_error_card(str(error)))
        yield "".join(cards) + f'<p class="vb-note"><small>{LEGEND}</small></p>'


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
    """Return charts of a training run and its newest sample captions, or why there are none.

    Args:
        run: its folder, or the folder of its log.
    """
    folder = run / "logs" if (run / "logs" / HISTORY_NAME).is_file() else run
    try:
        curves = read_curves(folder)
    except (VLMBridgeError, OSError) as error:
        return _error_card(str(error))
    if not curves:
        return _error_card(f"no training log in {run} yet: is it the folder of a training run?")
    charts = ""
    for title, names in CHARTS.items():
        drawn = {name: curves[name] for name in names if name in curves}
        if drawn:
            charts += line_chart(title, drawn, x_label="training step", legend=len(names) > 1)
    samples = ""
    lines = (folder / HISTORY_NAME).read_text(encoding="utf-8").splitlines()
    # The last line may be half written.
    events = [json.loads(line) for line in lines if '"samples"' in line and line.endswith("}")]
    for event in events[: -SAMPLES_SHOWN - 1 : -1]:
        rows = (f"<li>{escape(c)} <small>{escape(r)}</small></li>" for c, r in event["captions"])
        samples += f"<h4>Step {event['step']:,}</h4><ul>{''.join(rows)}</ul>"
    step = max(curve[-1][0] for curve in curves.values())
    return (
        f'<p class="vb-status">Step {step:,}</p><div class="vb-charts">{charts}</div>'
        f'<div class="vb-samples"><h3>Sample captions, each with a reference</h3>{samples}</div>'
    )

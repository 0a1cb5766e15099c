"""The page: drop images, read captions, and follow a training run."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageOps

from vlm_bridge.captioning.pipeline import Candidate
from vlm_bridge.data_pipeline.images import IMAGE_SUFFIXES
from vlm_bridge.demo import service as bounds
from vlm_bridge.demo.service import Answer, CaptionService, Request
from vlm_bridge.errors import VLMBridgeError
from vlm_bridge.evaluation.report import draw_curves
from vlm_bridge.evaluation.run_folder import HISTORY_NAME, ReportedRun, read_curves

TITLE = "Describe your pictures"
PROMISE = (
    "A sentence for each photo. Photos stay on the machine that serves this page, "
    "and are deleted within two hours."
)
TILE = (320, 240)  # pixels of an example
THUMBNAIL = 640  # pixels of the longer side
REFRESH_SECONDS = 5
FORGET_SECONDS = 3600  # uploads are deleted after this long
SAMPLES_SHOWN = 12
# Least mean probabilities of a caption's tokens. The bundled captioner's mean CIDEr below, between
# and above them: 0.24, 0.37, 0.67 on 113 images of Flickr8k val; 0.25, 0.32, 0.37 on 128 of COCO.
FAIRLY_SURE, NOT_SURE = 0.6, 0.5
UNSURE = "A guess: unlike the training images"
RULE = (
    f"The mean probability of the tokens: from {FAIRLY_SURE:.0%} fairly sure, from "
    f"{NOT_SURE:.0%} not very sure, below that a guess. It is no sign that a caption is right."
)
LIMITS = (
    "Counts, colors and who does what are often wrong, also where it is sure. "
    "Not for decisions about people."
)
# Only pages with https or on this machine may write to the clipboard: elsewhere the visitor copies
# the caption that is selected. Images are pasted anywhere on the page.
SCRIPT = """
element.setAttribute("aria-live", "polite");
element.addEventListener("click", (event) => {
  const button = event.target.closest(".vb-copy");
  if (!button) return;
  const caption = button.closest("article").querySelector(".vb-caption");
  getSelection().selectAllChildren(caption);
  navigator.clipboard?.writeText(caption.textContent).then(() => (button.textContent = "Copied"));
});
document.addEventListener("paste", (event) => {
  const input = document.querySelector("#images input[type=file]");
  if (!input || !event.clipboardData.files.length) return;
  input.files = event.clipboardData.files;
  input.dispatchEvent(new Event("change", {bubbles: true}));
});
"""
CHOOSE = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("click", {name: button.value});
});
"""


def build_page(
    service: CaptionService, run: Path | None = None, examples: Mapping[str, Path] | None = None
) -> gr.Blocks:
    """Build the page, with a tab that follows a training run if one is given.

    Args:
        examples: image files by the name under which the page offers them.
    """
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=(FORGET_SECONDS, FORGET_SECONDS)
    ) as page:
        if run is None:
            _add_captioning(service, examples or {})
        else:
            with gr.Tab("Captions"):
                _add_captioning(service, examples or {})
            with gr.Tab("Training"):
                live = gr.HTML(elem_id="live")
                events = [page.load, gr.Timer(REFRESH_SECONDS).tick]
                gr.on(events, lambda: live_html(run), None, live, api_visibility="private")
    return page


def _add_captioning(service: CaptionService, examples: Mapping[str, Path]) -> None:
    """Add the upload box, the captions below it, examples and settings."""

    def respond(files: list[tuple[str, Any]] | None, *settings: float) -> Iterator[dict[Any, Any]]:
        if not files:
            yield {answers: _error_card("no image yet: drop one into the box above")}
            return
        cards, rows = "", []
        fields = dict(zip(Request.model_fields, settings, strict=True))
        for path, name in [(Path(file), Path(file).name) for file, _ in files]:
            waiting = f'<p class="vb-waiting">Looking at {escape(name)} …</p>'
            # The box is emptied for the next images.
            yield {images: None, chosen: files, answers: cards + waiting}
            try:
                request = service.default_request.updated(fields)
                answer = service.answer(path.read_bytes(), name, request, overlays=True)
                rows.append((name, answer.captions[0].caption, f"{answer.captions[0].score:.4f}"))
                cards += _card(answer, name)
            except FileNotFoundError:
                cards += _error_card(f"{name} is deleted by now: upload it again")
            except VLMBridgeError as error:
                cards += _error_card(str(error))
        yield {answers: cards + (_download(rows) if rows else "")}

    def take(event: gr.EventData) -> list[tuple[str, None]]:
        return [(str(examples[event.name]), None)]

    gr.HTML(f"<header><h1>{TITLE}</h1><p>{PROMISE}</p></header>")
    chosen = gr.State()
    images = gr.Gallery(
        label="Your pictures", type="filepath", file_types=sorted(IMAGE_SUFFIXES), height=130,
        interactive=True, elem_id="images",
    )  # fmt: skip
    answers = gr.HTML(elem_id="answers", js_on_load=SCRIPT)
    tiles = "".join(map(_example, examples, examples.values()))
    shown = gr.HTML(
        f"<h2>Or try one of these</h2>{tiles}", js_on_load=CHOOSE, visible=bool(examples),
        elem_id="examples",
    )  # fmt: skip
    # An accordion of gradio does not tell screen readers whether it is open.
    gr.HTML("<details><summary>Advanced</summary></details>", elem_id="advanced")
    with gr.Column(elem_id="settings"):
        settings = _sliders(service.default_request)
        again = gr.Button("Describe again", elem_id="again")
        gr.HTML(f'<p class="vb-note">{escape(service.summary)}</p>')
    gr.HTML(f'<footer class="vb-note">{escape(service.license)} {LIMITS}</footer>')
    taken = shown.click(take, None, chosen, api_visibility="private")
    for event, files in ((images.upload, images), (again.click, chosen), (taken.then, chosen)):
        event(
            respond, [files, *settings], [images, chosen, answers],
            api_visibility="private", show_progress="minimal", show_progress_on=answers,
        )  # fmt: skip


def _example(name: str, path: Path) -> str:
    """Return a button with the image, which gradio's galleries would name by its number."""
    thumbnail = _data_uri(ImageOps.fit(Image.open(path).convert("RGB"), TILE))
    name = escape(name)
    return f'<button type="button" value="{name}"><img src="{thumbnail}" alt="">{name}</button>'


def _sliders(start: Request) -> list[gr.Slider]:
    """Return the settings of the page in the order of the fields of `Request`."""
    most = bounds.MOST_ALTERNATIVES
    return [
        gr.Slider(1, bounds.MOST_BEAMS, start.num_beams, step=1, label="Beams", elem_id="beams"),
        gr.Slider(0, 2, start.temperature, step=0.05, label="Temperature (0 searches with beams)"),
        gr.Slider(-2, 4, start.length_penalty, step=0.1, label="Length penalty"),
        gr.Slider(1, bounds.LONGEST, start.max_new_tokens, step=1, label="Most tokens"),
        gr.Slider(1, most, start.num_alternatives, step=1, label="Captions (at most one a beam)"),
    ]


def confidence(best: Candidate) -> str:
    """Put a caption's confidence, or else the mean log-probability of its tokens, into words."""
    if best.unsure:
        return UNSURE
    probability = math.exp(best.score)
    if probability >= FAIRLY_SURE:
        return "Fairly sure"
    return "Not very sure" if probability >= NOT_SURE else "A guess"


def _card(answer: Answer, name: str) -> str:
    """Return an image with its caption, and closed, the other captions and the words' attention."""
    best = answer.captions[0]
    others = "".join(
        f"<li>{escape(other.caption)} <data>{math.exp(other.score):.0%}</data></li>"
        for other in answer.captions
    )
    words = "".join(
        f'<figure><img src="{_data_uri(image)}" alt=""><figcaption>{escape(word.word)} '
        f"<small>{word.peak:.1f}x</small></figcaption></figure>"
        for word, image in answer.overlays
    )
    caption, sure = escape(best.caption) or "(no caption)", confidence(best)
    thumbnail = ImageOps.contain(answer.image, (THUMBNAIL, THUMBNAIL))
    return (
        f'<article class="vb-card"><img src="{_data_uri(thumbnail)}" alt="{escape(name)}">'
        f'<div><p class="vb-caption">{caption}</p><p class="vb-actions">'
        f'<span class="vb-sure" data-sure="{sure}">{sure}</span>'
        '<button type="button" class="vb-copy">Copy</button></p>'
        "<details><summary>Where each word looked</summary>"
        f'<div class="vb-words">{words}</div><p class="vb-note">Bright is where the word looked '
        "most; the number is how many times an even spread that is.</p></details>"
        f'<details><summary>How sure it is</summary><ol class="vb-alternatives">{others}</ol>'
        f'<p class="vb-note">{RULE} Computed in {answer.seconds:.1f} s.</p></details>'
        "</div></article>"
    )


def _download(rows: list[tuple[str, str, str]]) -> str:
    """Return a link that saves the captions as CSV."""
    table = io.StringIO()
    csv.writer(table).writerows([("image", "caption", "score"), *rows])
    data = base64.b64encode(table.getvalue().encode("utf-8-sig")).decode("ascii")
    return (
        '<p class="vb-download"><a download="captions.csv" '
        f'href="data:text/csv;charset=utf-8;base64,{data}">Download captions</a></p>'
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

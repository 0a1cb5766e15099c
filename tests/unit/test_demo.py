"""What stands behind the demo page: uploads, requests, answers, and a training run as it goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from demo_server import noise, png, tiny_service
from vlm_bridge.demo.live_run import live_html
from vlm_bridge.demo.service import (
    MAX_UPLOAD,
    CaptionService,
    Request,
    UploadError,
    open_upload,
)
from vlm_bridge.errors import ConfigurationError, DataError


@pytest.fixture(scope="module")
def service(tiny_vit_dir: Path, tiny_llama_dir: Path) -> CaptionService:
    return tiny_service(tiny_vit_dir, tiny_llama_dir)


# Uploads.


def test_an_upload_is_upright_rgb_from_a_file_or_bytes(tmp_path: Path) -> None:
    turned = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "turned.jpg", exif=exif)
    for upload in (tmp_path / "turned.jpg", (tmp_path / "turned.jpg").read_bytes()):
        assert open_upload(upload, "turned.jpg").size == (2, 4)


def test_a_large_upload_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    with path.open("wb") as file:
        file.truncate(MAX_UPLOAD + 1)
    with pytest.raises(UploadError, match=r"large\.jpg has 21 MB: send at most 20 MB") as refused:
        open_upload(path, "large.jpg")
    assert refused.value.status == 413


# Requests.


def test_a_request_begins_with_the_recipe_and_takes_what_a_form_says(
    service: CaptionService,
) -> None:
    start = service.default_request
    assert start.max_new_tokens == 6
    changed = start.updated({"num_beams": "5", "temperature": "0.7"})
    assert (changed.num_beams, changed.temperature, changed.max_new_tokens) == (5, 0.7, 6)


@pytest.mark.parametrize(
    "given", [{"num_beams": "0"}, {"temperature": "-1"}, {"max_new_tokens": "1e3"}, {"x": "1"}]
)
def test_a_form_with_impossible_fields_is_refused(
    service: CaptionService, given: dict[str, str]
) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(given))):
        service.default_request.updated(given)


# Answers.


def test_an_answer_is_the_captioners(service: CaptionService) -> None:
    picture = noise(1)
    answer = service.answer(png(picture), "a.png", service.default_request)
    (result,) = service.captioner.caption([picture])
    assert answer.caption == result.caption
    assert answer.alternatives[0].score == pytest.approx(result.score, abs=1e-5)
    assert not answer.overlays
    assert set(answer.to_json()) == {"caption", "alternatives", "seconds"}


def test_alternatives_are_distinct_and_the_likeliest_draw_comes_first(
    service: CaptionService,
) -> None:
    request = Request(
        num_beams=1, temperature=1.5, length_penalty=1, max_new_tokens=6, num_alternatives=5
    )
    answer = service.answer(png(noise(2)), "a.png", request)
    captions = [other.caption for other in answer.alternatives]
    assert len(set(captions)) == len(captions) > 1
    scores = [other.score for other in answer.alternatives]
    assert scores == sorted(scores, reverse=True)


def test_a_search_gives_no_more_alternatives_than_beams(service: CaptionService) -> None:
    request = Request(
        num_beams=2, temperature=0, length_penalty=1, max_new_tokens=6, num_alternatives=5
    )
    assert len(service.answer(png(noise(2)), "a.png", request).alternatives) <= 2


def test_every_word_has_an_overlay(service: CaptionService) -> None:
    pictures = (
        png(noise(seed)) for seed in range(20)
    )  # a tiny captioner has nothing to say of some
    answers = (
        service.answer(picture, "a.png", service.default_request, overlays=True)
        for picture in pictures
    )
    answer = next(answer for answer in answers if len(answer.caption.split()) > 1)
    assert answer.overlays
    assert all(word.word in answer.caption for word, _ in answer.overlays)
    assert all(max(image.size) == 160 for _, image in answer.overlays)


def test_the_facts_name_all_parts(
    service: CaptionService, tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    facts = service.facts()
    assert facts["Vision encoder"] == tiny_vit_dir.name
    assert facts["Language model"] == tiny_llama_dir.name
    assert facts["Bridge"].startswith("prefix bridge of ")
    assert facts["Checkpoint"] == "runs/tiny"
    assert all(
        facts[part] in service.summary() for part in ("Vision encoder", "Bridge", "Language model")
    )


# A training run.


def write_log(folder: Path, *events: dict[str, object], tail: str = "") -> Path:
    (folder / "logs").mkdir(exist_ok=True)
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "logs" / "history.jsonl").write_text(lines + tail)
    return folder


TRAIN = {"event": "train", "step": 10, "loss": 3.0, "learning_rate": 1e-3, "gradient_norm": 1.0}
VALIDATION = {
    "event": "validation",
    "step": 20,
    "epoch": 0,
    "loss": 2.5,
    "perplexity": 12.2,
    "visual_gain": 0.4,
}
SAMPLES = {
    "event": "samples",
    "step": 20,
    "captions": [["a <b> dog", "A dog & a cat."]],
    "mean_length": 3.0,
}


def test_a_run_is_shown_with_curves_samples_and_visual_gain(tmp_path: Path) -> None:
    html = live_html(write_log(tmp_path, TRAIN, VALIDATION, SAMPLES, tail='{"event": "tra'))
    assert "Step 20, visual gain +0.400" in html
    assert "a &lt;b&gt; dog" in html and "A dog &amp; a cat." in html
    assert html.count("<svg") == 3
    assert "train/loss" in html and "validation/loss" in html
    assert live_html(tmp_path / "logs") == html


def test_samples_of_before_a_resume_are_replaced(tmp_path: Path) -> None:
    again = {**SAMPLES, "captions": [["a cat", "A cat."]]}
    html = live_html(write_log(tmp_path, TRAIN, SAMPLES, {**SAMPLES, "step": 30}, again))
    assert "<h4>Step 20</h4><ul><li>a cat <small>A cat.</small></li></ul></div>" in html
    assert "Step 30</h4>" not in html and "dog" not in html


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give the folder of a training run"):
        live_html(tmp_path)
    with pytest.raises(DataError, match="nothing yet"):
        live_html(write_log(tmp_path))


# The command.


def test_the_command_says_what_to_install(run_here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_bridge.cli.demo.find_spec", lambda name: None)
    result = run_here("demo")
    assert result.returncode == 2
    assert result.stderr == "error: the demo page needs gradio: pip install 'vlm-bridge[demo]'\n"

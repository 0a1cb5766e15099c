"""The parts behind the demo page: requests, answers, and a training run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo_server import noise, png, tiny_service
from vlm_bridge.demo.service import CaptionService
from vlm_bridge.errors import ConfigurationError


@pytest.fixture(scope="module")
def service(tiny_vit_dir: Path, tiny_llama_dir: Path) -> CaptionService:
    return tiny_service(tiny_vit_dir, tiny_llama_dir)


def test_a_form_changes_the_settings_of_the_recipe(service: CaptionService) -> None:
    start = service.default_request
    changed = start.updated({"num_beams": "5", "temperature": "0.7"})
    assert start.max_new_tokens == 6
    assert (changed.num_beams, changed.temperature, changed.max_new_tokens) == (5, 0.7, 6)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_beams", "0"), ("num_beams", "9" * 5000), ("temperature", "-1"), ("temperature", "nan"),
     ("max_new_tokens", "1e3"), ("num_alternatives", "6"), ("x", "1")],
)  # fmt: skip
def test_impossible_settings_are_refused(service: CaptionService, field: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=field):
        service.default_request.updated({field: value})


def test_an_answer_is_the_captioners(service: CaptionService) -> None:
    answer = service.answer(png(noise(1)), "a.png", service.default_request)
    (result,) = service.captioner.caption([noise(1)])
    assert answer.captions[0].caption == result.caption
    assert answer.captions[0].score == pytest.approx(result.score, abs=1e-5)
    assert not answer.overlays


def test_alternatives_are_distinct_and_the_likeliest_draw_comes_first(
    service: CaptionService,
) -> None:
    request = service.default_request.updated({"temperature": 1.5, "num_alternatives": 5})
    answer = service.answer(png(noise(2)), "a.png", request)
    captions = [other.caption for other in answer.captions]
    assert len(set(captions)) == len(captions) > 1
    scores = [other.score for other in answer.captions]
    assert scores == sorted(scores, reverse=True)


def test_a_search_gives_no_more_alternatives_than_beams(service: CaptionService) -> None:
    request = service.default_request.updated({"num_beams": 2, "num_alternatives": 5})
    assert len(service.answer(png(noise(2)), "a.png", request).captions) <= 2


def test_every_word_has_an_overlay(service: CaptionService) -> None:
    images = (png(noise(seed)) for seed in range(20))  # some captions have one word
    answers = (
        service.answer(image, "a.png", service.default_request, overlays=True) for image in images
    )
    answer = next(answer for answer in answers if len(answer.captions[0].caption.split()) > 1)
    assert answer.overlays
    assert all(word.word in answer.captions[0].caption for word, _ in answer.overlays)
    assert all(max(image.size) == 160 for _, image in answer.overlays)


def test_the_summary_names_all_parts(
    service: CaptionService, tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    for part in (tiny_vit_dir.name, tiny_llama_dir.name, "prefix", "runs/tiny"):
        assert part in service.summary()


def test_a_run_is_shown_with_curves_and_samples(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from vlm_bridge.demo.page import live_html

    assert "no training log" in live_html(tmp_path)
    events = [
        {"event": "train", "step": 10, "loss": 3.0, "learning_rate": 1e-3},
        {"event": "validation", "step": 20, "loss": 2.5, "visual_gain": 0.4},
        {"event": "samples", "step": 20, "captions": [["a <b> dog", "A dog & a cat."]]},
    ]
    (tmp_path / "logs").mkdir()
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (tmp_path / "logs" / "history.jsonl").write_text(lines + '{"event": "samples", "st')
    html = live_html(tmp_path)
    assert "Step 20" in html
    assert "a &lt;b&gt; dog" in html and "A dog &amp; a cat." in html
    assert html.count("<svg") == 3
    assert "train/loss" in html and "validation/loss" in html
    assert live_html(tmp_path / "logs") == html


def test_the_command_names_the_missing_package(run_here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_bridge.cli.demo.find_spec", lambda name: None)
    result = run_here("demo")
    assert result.returncode == 2
    assert result.stderr == "error: the demo page needs gradio: pip install 'vlm-bridge[demo]'\n"

"""The parts behind the demo page: requests, answers, and a training run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from demo_server import noise, png, tiny_service
from vlm_bridge.captioning.pipeline import Candidate
from vlm_bridge.demo.service import CaptionService
from vlm_bridge.errors import ConfigurationError


@pytest.fixture(scope="module")
def service(tiny_vit_dir: Path, tiny_llama_dir: Path) -> CaptionService:
    return tiny_service(tiny_vit_dir, tiny_llama_dir)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_beams", "0"), ("num_beams", "9" * 5000), ("temperature", "-1"), ("temperature", "nan"),
     ("max_new_tokens", "1e3"), ("num_alternatives", "6"), ("x", "1")],
)  # fmt: skip
def test_impossible_settings_are_refused(service: CaptionService, field: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=field):
        service.default_request.updated({field: value})


def test_an_answer_is_the_captioners(service: CaptionService) -> None:
    images = [noise(seed) for seed in range(20)]
    results = service.captioner.caption(images)
    several = [len((result.caption or "").split()) > 1 for result in results]
    number = several.index(True)  # some captions have one word
    request = service.default_request
    answer = service.answer(png(images[number]), "a.png", request, overlays=True)
    caption, score, *_ = answer.captions[0]
    assert caption == results[number].caption
    assert score == pytest.approx(results[number].score, abs=1e-5)
    assert answer.overlays
    assert all(word.word in caption for word, _ in answer.overlays)
    assert all(max(image.size) == 160 for _, image in answer.overlays)


def test_alternatives_are_distinct_and_the_likeliest_comes_first(service: CaptionService) -> None:
    request = service.default_request.updated({"temperature": 1.5, "num_alternatives": 5})
    drawn = service.answer(png(noise(2)), "a.png", request).captions
    assert len({other.caption for other in drawn}) == len(drawn) > 1
    assert [x.score for x in drawn] == sorted((x.score for x in drawn), reverse=True)
    request = request.updated({"temperature": 0, "num_beams": 2})
    assert len(service.answer(png(noise(2)), "a.png", request).captions) <= 2
    for part in ("tiny-vit", "tiny-llama", "prefix", "runs/tiny"):
        assert part in service.summary


def test_confidence_is_told_in_words_by_the_mean_probability_of_tokens() -> None:
    pytest.importorskip("gradio")
    from vlm_bridge.demo.page import UNSURE, confidence

    scores = [math.log(probability) for probability in (0.99, 0.61, 0.59, 0.51, 0.49)]
    told = [confidence(Candidate("A dog.", score, True)) for score in scores]
    assert told == ["Fairly sure"] * 2 + ["Not very sure"] * 2 + ["A guess"]
    assert confidence(Candidate("A dog.", scores[0], True, 0.2, True)) == UNSURE


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
    assert ">train</text>" in html and ">validation</text>" in html
    assert live_html(tmp_path / "logs") == html


def test_the_command_names_the_missing_package(run_here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_bridge.cli.caption.find_spec", lambda name: None)
    result = run_here("demo")
    assert result.returncode == 2
    assert result.stderr == "error: the demo page needs gradio: pip install 'vlm-bridge[demo]'\n"

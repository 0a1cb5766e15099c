"""Caption metrics: hand-computed values, pycocoevalcap's own values, and Java missing, broken or hanging."""

from __future__ import annotations

import math
import shutil
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from vlm_bridge.errors import DataError
from vlm_bridge.metrics import (
    CaptionScores,
    coco,
    ptb_tokenize,
    score_captions,
    simple_tokenize,
)

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")

REFERENCES = {
    "a": ["A dog runs fast.", "The dog is running\n in a park!"],
    "b": ["A café, naïve as it's", "It is — well — a café"],
    "c": ["Two men in red shirts.", "Men (two) wear red"],
    "d": ["A bird"],
}
HYPOTHESES = {
    "a": "A dog runs in the park.",
    "b": "a café\u2028by the ||| sea",
    "c": "Two men wear red shirts",
    "d": " ",
}


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def fake_java(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    java = folder / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return java


def flat(score: float) -> pytest.approx:
    return pytest.approx(score, abs=1e-6)


class TestWithoutJava:
    """The scorers need no Java: their arithmetic is checked on tokens of the simple rule."""

    @pytest.fixture(autouse=True)
    def _no_java(self, no_java: None) -> None: ...

    def test_bleu_and_rouge_by_hand(self) -> None:
        # 3 of 4 words and 1 of 3 bigrams match; the caption is as long as the reference: no brevity penalty.
        scores = score_captions({"x": ["the small dog runs"]}, {"x": "the dog quickly runs"})
        assert scores.corpus["BLEU-1"] == flat(3 / 4)
        assert scores.corpus["BLEU-4"] < 1e-3
        # Longest common subsequence "the dog runs": precision = recall = 3/4, hence any F measure too.
        assert scores.corpus["ROUGE-L"] == flat(3 / 4)

    def test_brevity_penalty_by_hand(self) -> None:
        scores = score_captions({"x": ["the small dog runs"]}, {"x": "the dog"})
        assert scores.corpus["BLEU-1"] == flat(math.exp(1 - 4 / 2))

    def test_corpus_bleu_sums_counts_over_images(self) -> None:
        scores = score_captions({"x": ["a b"], "y": ["c d e f"]}, {"x": "a b", "y": "c x x x"})
        assert scores.corpus["BLEU-1"] == flat((2 + 1) / (2 + 4))
        assert [scores.per_image[i]["BLEU-1"] for i in "xy"] == [flat(1), flat(1 / 4)]

    def test_cider_of_captions_equal_to_their_only_reference_is_ten(self) -> None:
        captions = {"x": "a dog runs in the park", "y": "two men ride one big wave"}
        scores = score_captions({k: [v] for k, v in captions.items()}, captions)
        assert scores.corpus["CIDEr"] == flat(10)

    def test_says_what_is_skipped_and_how_to_get_it(self) -> None:
        scores = score_captions(REFERENCES, HYPOTHESES, spice=True)
        assert scores.tokenizer == "regex"
        assert set(scores.skipped) == {"METEOR", "SPICE"}
        assert {"BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"} <= set(scores.corpus)
        assert not {"METEOR", "SPICE"} & set(scores.corpus)
        skipped, comparable = scores.notes()
        assert "METEOR and SPICE skipped: no Java found" in skipped and "install" in skipped
        assert "do not compare" in comparable

    def test_empty_captions_score_zero(self) -> None:
        references = {"x": ["a dog runs"], "y": ["two men in red shirts"], "z": ["a cat", "..."]}
        scores = score_captions(references, {"x": "a dog runs", "y": " \n", "z": "..."})
        for image_id in "yz":
            assert set(scores.per_image[image_id].values()) == {0.0}
        assert scores.per_image["x"]["BLEU-1"] == flat(1)

    def test_all_captions_empty(self) -> None:
        assert set(score_captions({"x": ["a dog"]}, {"x": ""}).corpus.values()) == {0.0}

    @pytest.mark.parametrize(
        ("references", "hypotheses", "words"),
        [
            ({}, {}, "empty"),
            ({"x": ["a"], "lost": ["b"]}, {"x": "a"}, "lost"),
            ({"x": ["a"]}, {"x": "a", "extra": "b"}, "extra"),
            ({"x": ["a"], "bare": []}, {"x": "a", "bare": "b"}, "bare"),
            ({"x": ["a"], "dots": [".", " "]}, {"x": "a", "dots": "b"}, "dots"),
        ],
    )
    def test_ids_that_do_not_match_are_named(
        self, references: dict, hypotheses: dict, words: str
    ) -> None:
        with pytest.raises(DataError, match=words):
            score_captions(references, hypotheses)


def test_simple_tokens() -> None:
    assert simple_tokenize(["A man's T-shirt, (red)!", "Café\n2 dogs", "..."]) == [
        "a man 's t-shirt red",
        "café 2 dogs",
        "",
    ]


@needs_java
def test_ptb_tokens_equal_pycocoevalcap(capfd: pytest.CaptureFixture[str]) -> None:
    sentences = [
        "A dog, runs.",
        "It's a (test) -- a/b 1/2",
        "can't; $5.00 {x} [y]",
        "...",
        "café—naïve",
        "Mr. X",
    ]
    ours = ptb_tokenize(sentences)
    assert capfd.readouterr() == ("", "")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    theirs = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(sentences)})
    assert ours == [theirs[i][0] for i in range(len(sentences))]


@needs_java
def test_line_breaks_and_empty_captions_do_not_shift_ptb_lines() -> None:
    assert ptb_tokenize(["a\nb\r\nc", "", "d\u2028e\x85f", " ", "g"]) == [
        "a b c",
        "",
        "d e f",
        "",
        "g",
    ]


@pytest.fixture(scope="module")
def scores() -> CaptionScores:
    return score_captions(REFERENCES, HYPOTHESES, spice=True)


@needs_java
def test_scores_equal_pycocoevalcap(scores: CaptionScores) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    gts = {image_id: ptb_tokenize(refs) for image_id, refs in REFERENCES.items()}
    res = {image_id: ptb_tokenize([text]) for image_id, text in HYPOTHESES.items()}
    assert scores.tokenizer == "ptb"
    bleus, bleus_per_image = Bleu(4).compute_score(gts, res, verbose=0)
    expected = {
        f"BLEU-{n}": pair
        for n, pair in enumerate(zip(bleus, bleus_per_image, strict=True), start=1)
    }
    expected |= {
        name: scorer.compute_score(gts, res)
        for name, scorer in {"METEOR": Meteor(), "ROUGE-L": Rouge(), "CIDEr": Cider()}.items()
    }
    assert set(scores.corpus) == set(expected)
    for name, (corpus, per_image) in expected.items():
        assert scores.corpus[name] == corpus
        assert [scores.per_image[image_id][name] for image_id in gts] == list(per_image)


@needs_java
def test_spice_without_its_models_is_skipped_with_the_command(scores: CaptionScores) -> None:
    if "SPICE" in scores.corpus:
        pytest.skip("the CoreNLP models are installed here")
    assert "-m pycocoevalcap.spice.get_stanford_models" in scores.skipped["SPICE"]


@needs_java
def test_empty_caption_scores_zero_in_every_metric(scores: CaptionScores) -> None:
    assert set(scores.per_image["d"].values()) == {0.0}


@needs_java
def test_meteor_that_hangs_is_stopped_with_its_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, pid_file = shutil.which("java"), tmp_path / "pid"
    hang = f'case "$*" in *meteor*) sleep 300 & echo $! > {pid_file}; wait;; *) exec {real} "$@";; esac'
    fake_java(tmp_path, monkeypatch, hang)
    started = time.monotonic()
    monkeypatch.setattr(coco, "METEOR_TIMEOUT_S", 1)
    scores = score_captions(REFERENCES, HYPOTHESES)
    assert time.monotonic() - started < 30
    assert scores.skipped == {"METEOR": "Java gave no answer within 1 s and was stopped"}
    assert scores.tokenizer == "ptb" and "CIDEr" in scores.corpus
    # A signal is delivered when the process next runs, and a killed orphan may stay a zombie until init reaps it.
    with suppress(psutil.NoSuchProcess):
        child = psutil.Process(int(pid_file.read_text()))
        while child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() - started < 30
            time.sleep(0.05)


def test_java_that_breaks_is_reported_with_its_own_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_java(tmp_path, monkeypatch, "echo 'Error: no runtime here' >&2; exit 1")
    scores = score_captions(REFERENCES, HYPOTHESES)
    assert scores.skipped == {"METEOR": "Java failed: Error: no runtime here"}
    assert scores.tokenizer == "regex"

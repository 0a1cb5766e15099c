"""Caption metrics: hand-computed values, pycocoevalcap's own, and Java missing, broken, hanging."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from vlm_bridge.errors import DataError
from vlm_bridge.metrics import JavaError, coco, score_captions, score_notes
from vlm_bridge.metrics.cider import CiderD
from vlm_bridge.metrics.coco import ptb_tokenize, simple_tokenize

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


def flat(score: float) -> pytest.approx:
    return pytest.approx(score, abs=1e-6)


class TestWithoutJava:
    """The scorers need no Java: their arithmetic is checked on tokens of the simple rule."""

    @pytest.fixture(autouse=True)
    def _no_java(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))

    def test_values_by_hand(self) -> None:
        # 3 of 4 words and 1 of 3 bigrams match; lengths are equal: no brevity penalty.
        scores = score_captions({"x": ["the small dog runs"]}, {"x": "the dog quickly runs"})
        assert scores.corpus["BLEU-1"] == flat(3 / 4)
        assert scores.corpus["BLEU-4"] < 1e-3
        # Longest common subsequence "the dog runs": precision = recall = 3/4.
        assert scores.corpus["ROUGE-L"] == flat(3 / 4)
        short = score_captions({"x": ["the small dog runs"]}, {"x": "the dog"})
        assert short.corpus["BLEU-1"] == flat(math.exp(1 - 4 / 2))
        # BLEU of the corpus sums counts over images.
        scores = score_captions({"x": ["a b"], "y": ["c d e f"]}, {"x": "a b", "y": "c x x x"})
        assert scores.corpus["BLEU-1"] == flat((2 + 1) / (2 + 4))
        assert [scores.per_image[i]["BLEU-1"] for i in "xy"] == [flat(1), flat(1 / 4)]
        captions = {"x": "a dog runs in the park", "y": "two men ride one big wave"}
        scores = score_captions({k: [v] for k, v in captions.items()}, captions)
        assert scores.corpus["CIDEr"] == flat(10)

    def test_skipped_metrics_have_a_reason(self) -> None:
        scores = score_captions(REFERENCES, HYPOTHESES, spice=True)
        assert scores.tokenizer == "regex" and set(scores.skipped) == {"METEOR", "SPICE"}
        assert set(scores.corpus) == {f"BLEU-{n}" for n in range(1, 5)} | {"ROUGE-L", "CIDEr"}
        skipped, _, comparable = score_notes(scores.skipped, scores.tokenizer)
        assert "METEOR skipped: no Java found" in skipped and "install" in skipped
        assert "do not compare" in comparable

    def test_empty_captions_score_zero(self) -> None:
        references = {"x": ["a dog runs"], "y": ["two men in red shirts"], "z": ["a cat", "..."]}
        scores = score_captions(references, {"x": "a dog runs", "y": " \n", "z": "..."})
        assert {value for i in "yz" for value in scores.per_image[i].values()} == {0.0}
        assert scores.per_image["x"]["BLEU-1"] == flat(1)
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
    def test_other_ids_are_named(self, references: dict, hypotheses: dict, words: str) -> None:
        with pytest.raises(DataError, match=words):
            score_captions(references, hypotheses)


@pytest.mark.parametrize(
    ("sentence", "tokens"),
    [
        ("A dog runs .", "a dog runs"),
        ("Two men (one old) don't look at the dog's T-shirt!",
         "two men one old do n't look at the dog 's t-shirt"),
        ('They\u2019re at 10:30, in the "park" ...', "they 're at 10:30 in the park"),
        ("A girl can't stop; it isn't 1,000 people.", "a girl ca n't stop it is n't 1,000 people"),
        ("Café\n2 dogs", "café 2 dogs"),
        ("...", ""),
    ],
)  # fmt: skip
def test_the_simple_rule_gives_the_tokens_of_ptb(sentence: str, tokens: str) -> None:
    assert simple_tokenize([sentence]) == [tokens]
    try:
        (by_ptb,) = ptb_tokenize([sentence])
    except JavaError as error:
        pytest.skip(f"the comparison with PTB needs Java: {error}")
    if "(" not in sentence:  # its brackets stay, as `-lrb-`
        assert by_ptb == tokens


@needs_java
def test_ptb_tokens_equal_pycocoevalcap(capfd: pytest.CaptureFixture[str]) -> None:
    sentences = ["It's a (test) -- a/b 1/2", "can't; $5.00 {x} [y]", "...", "café—naïve", "Mr. X"]
    ours = ptb_tokenize(sentences)
    assert capfd.readouterr() == ("", "")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    theirs = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(sentences)})
    assert ours == [theirs[i][0] for i in range(len(sentences))]
    assert ptb_tokenize(["a\nb\r\nc", "", "d\u2028e\x85f", " "]) == ["a b c", "", "d e f", ""]


@needs_java
def test_scores_equal_pycocoevalcap() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    with coco.started_meteor() as meteor:
        scores = score_captions(REFERENCES, HYPOTHESES, spice=True, meteor=meteor)
    tokens = iter(ptb_tokenize([*chain(*REFERENCES.values()), *HYPOTHESES.values()]))
    gts = {image_id: [next(tokens) for _ in refs] for image_id, refs in REFERENCES.items()}
    res = {image_id: [next(tokens)] for image_id in HYPOTHESES}
    bleus = zip(*Bleu(4).compute_score(gts, res, verbose=0), strict=True)
    expected = {f"BLEU-{n}": pair for n, pair in enumerate(bleus, start=1)}
    for name, scorer in {"ROUGE-L": Rouge(), "CIDEr": Cider()}.items():
        expected[name] = scorer.compute_score(gts, res)
    # Of pycocoevalcap's own wrapper, whose Java takes 20 s to start.
    meteor = [0.35228013986476026, 0.184606632665633, 0.42271651506400487, 0.0]
    expected["METEOR"] = (0.2909882374750596, meteor)
    assert scores.tokenizer == "ptb" and set(scores.corpus) - {"SPICE"} == set(expected)
    for name, (corpus, per_image) in expected.items():
        ours = [scores.per_image[image_id][name] for image_id in gts]
        assert (scores.corpus[name], ours) == (corpus, list(per_image))
    assert set(scores.per_image["d"].values()) == {0.0}
    if "SPICE" not in scores.corpus:
        assert "-m pycocoevalcap.spice.get_stanford_models" in scores.skipped["SPICE"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exec sleep 300", "Java gave no answer within 1 s and was stopped"),
        ("echo 'Error: no runtime here' >&2; exit 1", "Java failed: Error: no runtime here"),
    ],
)
def test_java_that_hangs_or_breaks_is_reported(
    script: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(coco, "TIMEOUT_S", 1)
    scores = score_captions(REFERENCES, HYPOTHESES)
    assert scores.skipped == {"METEOR": reason}
    assert scores.tokenizer == "regex" and "CIDEr" in scores.corpus


# Reads a line, and answers one of METEOR's or dies.
ANSWERS = "echo $$ > {pid}; read line; echo 1; exec sleep 300"
DIES = "echo $$ > {pid}; read line; echo 'Error: out of memory' >&2; exit 3"


@pytest.fixture
def fake_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Put a script in the place of Java; it writes its process id into the file returned."""

    def install(script: str) -> Path:
        java, pid = tmp_path / "java", tmp_path / "pid"
        java.write_text(f"#!/bin/sh\n{script.format(pid=pid)}\n")
        java.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return pid

    return install


def is_gone(pid: Path) -> bool:
    try:
        os.kill(int(pid.read_text()), 0)  # a zombie would still be there
    except ProcessLookupError:
        return True
    return False


def wait_for(path: Path) -> None:
    for _ in range(1000):
        if path.exists() and path.read_text().strip():
            return
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("script", "reason"),
    [(ANSWERS, "Java gave no answer within 1 s and was stopped"),
     (DIES, "Java failed: Error: out of memory"),
     ("echo $$ > {pid}; exec true", "Java failed: exit code 0")],
)  # fmt: skip
def test_a_started_meteor_that_dies_or_hangs_is_skipped(
    script: str, reason: str, fake_java, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = fake_java(script)
    monkeypatch.setattr(coco, "TIMEOUT_S", 1)
    tokens = {str(n): ["a dog runs"] * 5 for n in range(2000)}
    with coco.started_meteor() as meteor:
        wait_for(pid)
        monkeypatch.setenv("PATH", "")  # the tokenizer needs no answer
        scores = score_captions(tokens, dict.fromkeys(tokens, "a dog"), meteor=meteor)
    assert scores.skipped == {"METEOR": reason} and "CIDEr" in scores.corpus
    assert is_gone(pid)


@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError])
def test_a_started_meteor_is_gone_after_an_error(error: type[BaseException], fake_java) -> None:
    pid = fake_java(ANSWERS)
    with pytest.raises(error), coco.started_meteor():
        wait_for(pid)
        assert not is_gone(pid)
        raise error
    assert is_gone(pid)


def test_a_meteor_that_cannot_start_says_so_when_scores_are_asked_for(fake_java) -> None:
    fake_java("")
    Path(shutil.which("java") or "").write_text("#!/no/such/interpreter\n")
    with coco.started_meteor() as meteor, pytest.raises(JavaError, match="Java failed: "):
        meteor({"a": ["a dog"]}, {"a": ["a dog"]})


def test_cider_of_single_captions_equals_the_reference_implementation() -> None:
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    random = np.random.default_rng(0)
    words = [chr(ord("a") + number) * 3 for number in range(20)]

    def drawn(count: int) -> list[str]:
        return [" ".join(random.choice(words, size=random.integers(1, 14))) for _ in range(count)]

    references = [drawn(count) for count in [5, 3, 1] * 6]
    captions = [references[0][0], "", "words that nobody wrote", *drawn(15)]
    scorer = CiderScorer()
    for caption, of_image in zip(captions, references, strict=True):
        scorer += (caption, of_image)
    _, expected = scorer.compute_score()
    cider = CiderD(references)
    ours = [cider.scores(image, [caption])[0] for image, caption in enumerate(captions)]
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert ours[0] > 1 and ours[1] == ours[2] == 0
    assert cider.scores(7, captions) == [cider.scores(7, [text])[0] for text in captions]

"""The scorers of pycocoevalcap, one function a metric."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import SupportsFloat

from vlm_bridge.metrics.java import JavaError, find_java, java, run_java

METEOR_TIMEOUT_S = 300.0
SPICE_TIMEOUT_S = 3600.0

Tokens = dict[str, list[str]]
"""Image id -> sentences as tokens joined by spaces, the form that pycocoevalcap takes."""
Scores = Mapping[str, tuple[SupportsFloat, Iterable[SupportsFloat]]]
"""Metric -> (score of the corpus, scores of the images in the order given)."""


def bleu(gts: Tokens, res: Tokens) -> Scores:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002)."""
    from pycocoevalcap.bleu.bleu import Bleu

    corpus, per_image = Bleu(4).compute_score(gts, res, verbose=0)
    return {f"BLEU-{n}": pair for n, pair in enumerate(zip(corpus, per_image, strict=True), 1)}


def rouge(gts: Tokens, res: Tokens) -> Scores:
    """ROUGE-L (Lin 2004)."""
    from pycocoevalcap.rouge.rouge import Rouge

    return {"ROUGE-L": Rouge().compute_score(gts, res)}


def cider(gts: Tokens, res: Tokens) -> Scores:
    """CIDEr-D (Vedantam et al. 2015)."""
    from pycocoevalcap.cider.cider import Cider

    return {"CIDEr": Cider().compute_score(gts, res)}


def meteor(gts: Tokens, res: Tokens) -> Scores:
    """METEOR 1.5 (Denkowski and Lavie 2014).

    It answers statistics to a SCORE line per image, and all scores to one EVAL line.
    """
    from pycocoevalcap.meteor import meteor as package

    jar = Path(package.__file__).with_name(package.METEOR_JAR)
    arguments = ["-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    with java(arguments, timeout_s=METEOR_TIMEOUT_S) as process:
        statistics = [_ask(process, "SCORE", *gts[image], *res[image]) for image in gts]
        scores = [float(_ask(process, "EVAL", *statistics)), *(float(_read(process)) for _ in gts)]
    return {"METEOR": (scores[-1], scores[:-1])}


def spice(gts: Tokens, res: Tokens) -> Scores:
    """SPICE (Anderson et al. 2016)."""
    from pycocoevalcap.spice import get_stanford_models as models
    from pycocoevalcap.spice import spice as package

    find_java()
    folder = Path(package.__file__).parent
    if not (folder / models.SPICELIB / f"{models.JAR}-models.jar").is_file():
        raise JavaError(
            "it needs the Stanford CoreNLP models, fetched once (about 400 MB) by: "
            "python -m pycocoevalcap.spice.get_stanford_models"
        )
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "in.json"), Path(scratch, "out.json")
        entries = [{"image_id": i, "test": res[i][0], "refs": refs} for i, refs in gts.items()]
        asked.write_text(json.dumps(entries), encoding="utf-8")
        program = ["-Xmx8G", "-jar", str(folder / package.SPICE_JAR), str(asked)]
        arguments = [*program, "-out", str(answered), "-silent"]
        run_java(arguments, timeout_s=SPICE_TIMEOUT_S, cwd=folder)
        results = json.loads(answered.read_text(encoding="utf-8"))
    by_image = {entry["image_id"]: float(entry["scores"]["All"]["f"]) for entry in results}
    scores = [by_image[image] for image in gts]
    return {"SPICE": (sum(scores) / len(scores), scores)}


def _ask(process: subprocess.Popen[str], *fields: str) -> str:
    """Send one line of METEOR's protocol; its separator inside a field would split the field."""
    assert process.stdin is not None
    line = " ||| ".join(field.replace("|||", "").replace("  ", " ") for field in fields)
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return _read(process)


def _read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise EOFError("Java ended before it answered")
    return line.strip()

"""Caption metrics: strings in, scores out.

Every score comes from pycocoevalcap, the reference implementation of the field. A metric is one
function and one line in `METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vlm_bridge.errors import DataError
from vlm_bridge.metrics import coco
from vlm_bridge.metrics.coco import JavaError, Metric, ptb_tokenize, simple_tokenize

# The scores that each function returns, in the order in which they are shown.
METRICS: dict[tuple[str, ...], Metric] = {
    ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"): coco.bleu,
    ("METEOR",): coco.meteor,
    ("ROUGE-L",): coco.rouge,
    ("CIDEr",): coco.cider,
    ("SPICE",): coco.spice,
}
SCORES = tuple(name for names in METRICS for name in names)


@dataclass(frozen=True)
class CaptionScores:
    """Scores as fractions, as pycocoevalcap returns them. Papers print a CIDEr of 1.0 as 100.

    Attributes:
        corpus: metric -> score of all captions.
        per_image: image id -> metric -> score.
        skipped: metric -> why it was not computed, and how to get it.
        tokenizer: ``ptb`` compares with papers; ``regex`` is the fallback without Java.
    """

    corpus: dict[str, float]
    per_image: dict[str, dict[str, float]]
    skipped: dict[str, str]
    tokenizer: Literal["ptb", "regex"]


def score_notes(skipped: Mapping[str, str], tokenizer: str | None) -> list[str]:
    """Return one line for each thing that a reader of the scores must know."""
    notes = [f"{metric} skipped: {reason}" for metric, reason in skipped.items()]
    if tokenizer == "regex":
        notes.append("tokenized by a simple rule, not by PTB: do not compare with published scores")
    return notes


def score_captions(
    references: Mapping[str, Sequence[str]],
    hypotheses: Mapping[str, str],
    *,
    spice: bool = False,
    meteor: Metric | None = None,
) -> CaptionScores:
    """Score one caption per image against all its references.

    BLEU and METEOR of the corpus come from summed counts; the others are means over images. An
    empty caption scores 0. CIDEr weighs words by their document frequency in this collection, so
    it is 0 for a single image and does not compare between collections.

    Args:
        references: image id -> human captions, at least one with a word in it.
        hypotheses: image id -> generated caption, for the same ids.
        spice: also compute SPICE, which takes minutes per thousand images.
        meteor: from `coco.started_meteor`, when it was started before.

    Raises:
        DataError: there are no images, the ids differ, or an image has no usable reference.
    """
    if not references:
        raise DataError("no captions to score: the references are empty")
    if lone := sorted(references.keys() ^ hypotheses.keys()):
        raise DataError(f"cannot score captions: no caption or no reference for {lone[:5]}")
    try:
        tokenizer, (gts, res) = "ptb", _tokenize(references, hypotheses, ptb_tokenize)
    except JavaError:
        tokenizer, (gts, res) = "regex", _tokenize(references, hypotheses, simple_tokenize)
    corpus: dict[str, float] = {}
    skipped: dict[str, str] = {}
    per_image: dict[str, dict[str, float]] = {image_id: {} for image_id in gts}
    started: dict[tuple[str, ...], Metric] = {("METEOR",): meteor} if meteor else {}
    for names, scorer in (METRICS | started).items():
        if "SPICE" in names and not spice:
            continue
        try:
            scores = scorer(gts, res)
        except JavaError as error:
            skipped |= dict.fromkeys(names, str(error))
            continue
        for metric, (score, by_image) in scores.items():
            corpus[metric] = float(score)
            for image_id, value in zip(gts, by_image, strict=True):
                per_image[image_id][metric] = float(value)
    return CaptionScores(corpus, per_image, skipped, tokenizer)


def score_without_java(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str]
) -> dict[str, float]:
    """Return ``bleu4`` and ``cider`` with simple tokens: quick, and not comparable with papers."""
    gts = {str(index): simple_tokenize(captions) for index, captions in enumerate(references)}
    res = {str(index): simple_tokenize([caption]) for index, caption in enumerate(hypotheses)}
    bleu, cider = coco.bleu(gts, res)["BLEU-4"], coco.cider(gts, res)["CIDEr"]
    return {"bleu4": float(bleu[0]), "cider": float(cider[0])}


def _tokenize(
    references: Mapping[str, Sequence[str]],
    hypotheses: Mapping[str, str],
    tokenize: Callable[[Sequence[str]], list[str]],
) -> tuple[coco.Tokens, coco.Tokens]:
    """Tokenize all captions in one call, and drop references without a token.

    ROUGE-L would give an empty caption full marks for them.
    """
    tokens = iter(tokenize([text for i in references for text in (hypotheses[i], *references[i])]))
    gts, res = {}, {}
    for image_id, captions in references.items():
        res[image_id] = [next(tokens)]
        gts[image_id] = list(filter(None, [next(tokens) for _ in captions]))
        if not gts[image_id]:
            raise DataError(
                f"cannot score captions: no words in any reference caption for image {image_id}"
            )
    return gts, res

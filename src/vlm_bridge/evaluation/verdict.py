"""Say in sentences what the numbers of a run mean, and what to try next."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import yaml

from vlm_bridge.evaluation.run_folder import ReportedRun
from vlm_bridge.metrics import simple_tokenize
from vlm_bridge.training_strategy.monitor import BLIND_BELOW

LOOKS_LITTLE_BELOW = 0.3  # nats per token; reached after about 80 of 3,000 steps on Flickr8k
CHANGED = 0.02  # relative change of a loss that is more than noise
CUT_OFF = 0.05  # share of captions that end at the longest length allowed
FEWEST_COMPARED = 500  # images; on few of them, CIDEr and BLEU are of another size
COMPARED = ("CIDEr", "METEOR", "BLEU-4")  # with published systems, by the first that both have
WORDS_COME_FIRST = (
    "Check that captions and images belong together (vlm-data inspect-loader), then train longer: "
    "a captioner learns how captions are worded before it learns to look."
)


def verdict(run: ReportedRun) -> list[str]:
    """Say whether a captioner looks at its images, how it compares, and what to try next.

    Returns:
        A sentence or two for each finding, the most important first; empty without numbers.
    """
    gain = run.scores.get("visual_gain")
    if gain is None and (curve := _curve(run, "validation/visual_gain")):
        gain = curve[-1][1]
    findings, advice = [], [*_on_training(run), *_on_captions(run)]
    if gain is not None:
        measured = f"its images: visual gain {gain:.3f} nats per token"
        if gain < BLIND_BELOW:
            findings = [f"The captioner ignores {measured}, below {BLIND_BELOW}."]
            advice = [WORDS_COME_FIRST, *advice]
        elif gain < LOOKS_LITTLE_BELOW:
            findings = [f"The captioner begins to look at {measured}, below {LOOKS_LITTLE_BELOW}."]
            advice = advice or ["Train longer."]
        else:
            findings = [f"The captioner looks at {measured}."]
            advice = advice or ["No problem stands out: more images or larger parts may help."]
    return findings + _beside_published(run) + advice


def ranking(runs: Sequence[ReportedRun]) -> str | None:
    """Name the run with the highest CIDEr, and the next; None with fewer than two scores."""
    ranked = sorted((r for r in runs if "CIDEr" in r.scores), key=lambda r: -r.scores["CIDEr"])
    if len(ranked) < 2:
        return None
    first, second = ranked[:2]
    scores = [f"{run.scores['CIDEr']:.3f}" for run in (first, second)]
    if scores[0] == scores[1]:
        return f"{first.name} and {second.name} have the same CIDEr, {scores[0]}."
    return (
        f"{first.name} has the highest CIDEr: {scores[0]}, before {second.name} with {scores[1]}."
    )


def published_on(dataset: str) -> list[dict[str, Any]]:
    """Return published systems on a dataset whose name begins like `dataset` (Flickr8k-clean)."""
    file = resources.files("vlm_bridge.evaluation") / "published.yaml"
    name = re.sub(r"[^a-z0-9]", "", dataset.lower())
    published = yaml.safe_load(file.read_text(encoding="utf-8"))
    return [system for key, of in published.items() if name.startswith(key) for system in of]


def _beside_published(run: ReportedRun) -> list[str]:
    if run.scores.get("num_images", 0) < FEWEST_COMPARED:
        return []
    systems = published_on(run.data.get("name") or "")
    for metric in COMPARED:
        known = [system for system in systems if metric in system["scores"]]
        if known and metric in run.scores:
            best = max(known, key=lambda system: system["scores"][metric])
            own, theirs = run.scores[metric], best["scores"][metric]
            return [
                f"{metric} is {own:.3f}, {own / theirs:.0%} of the {theirs:.3f} that "
                f"{best['system']} has in its paper: a rough guide, as images and splits differ."
            ]
    return []


def _curve(run: ReportedRun, name: str) -> list[tuple[int, float]]:
    return [point for point in run.curves.get(name, ()) if math.isfinite(point[1])]


def _on_training(run: ReportedRun) -> Iterator[str]:
    validation = _curve(run, "validation/loss")
    if len(validation) < 2:
        return
    (best_step, best), (step, last) = min(validation, key=lambda point: point[1]), validation[-1]
    trained = [loss for at, loss in _curve(run, "train/loss") if at >= best_step]
    if last > best * (1 + CHANGED) and trained and trained[-1] < trained[0]:
        yield (
            f"It overfits: validation loss rose from {best:.3f} at step {best_step} to {last:.3f}, "
            "while training loss fell. Train fewer steps (max_steps), stop early "
            "(early_stopping_patience), or add images."
        )
    earlier = [loss for at, loss in validation[:-1] if at <= 0.75 * step] or [validation[0][1]]
    if last == best < earlier[-1] * (1 - CHANGED):
        yield (
            f"Validation loss was still falling at the end, from {earlier[-1]:.3f} to {last:.3f}: "
            "train longer (max_steps or num_epochs)."
        )


def _on_captions(run: ReportedRun) -> Iterator[str]:
    ends = [p.finished for p in run.predictions if p.finished is not None]
    if ends and (share := ends.count(False) / len(ends)) > CUT_OFF:
        longest = (run.metrics.get("decode") or {}).get("max_new_tokens", "")
        yield f"{share:.0%} of the captions are cut off: raise max_new_tokens ({longest})."
    captions = len(set(simple_tokenize([p.caption for p in run.predictions])))
    human = len(set(simple_tokenize([p.image.captions[0] for p in run.predictions])))
    if captions < human / 2:
        yield (
            f"Captions repeat: {captions} different ones for {len(run.predictions)} images, where "
            f"people wrote {human}. Train longer, or caption with fewer beams."
        )

"""Evaluate a captioner on captioned images: generate, score, and record all that the scores depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlm_bridge.data_pipeline.caption_folder import CaptionedImage, write_atomically
from vlm_bridge.data_pipeline.tar_picture import PictureFile
from vlm_bridge.errors import DataError
from vlm_bridge.evaluation.contact_sheet import contact_sheet
from vlm_bridge.evaluation.history import Curve
from vlm_bridge.evaluation.predictions import (
    PREDICTIONS_NAME,
    Prediction,
    best,
    worst,
    write_predictions,
)
from vlm_bridge.evaluation.report import METRICS, SHOWN, ReportedRun, write_report
from vlm_bridge.metrics import CaptionScores, score_captions

if TYPE_CHECKING:
    from vlm_bridge.configuration import DecodeSettings

METRICS_NAME = "metrics.json"
REPORT_NAME = "report.html"


class Captioned(Protocol):
    """One picture's caption, its mean log-probability per token and whether it ended, or why there is none."""

    @property
    def caption(self) -> str | None: ...
    @property
    def score(self) -> float | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def finished(self) -> bool | None: ...


class Validated(Protocol):
    """What the captioner makes of the reference captions."""

    @property
    def perplexity(self) -> float: ...
    @property
    def visual_gain(self) -> float: ...


class EvaluableCaptioner(Protocol):
    """All that an evaluation needs of a captioner, our own or another's."""

    def caption(
        self,
        images: Sequence[PictureFile],
        *,
        decode: DecodeSettings,
        batch_size: int,
        progress: Callable[[int], None],
    ) -> Sequence[Captioned]: ...

    def validate(self, images: Sequence[CaptionedImage], *, batch_size: int) -> Validated:
        """Perplexity and visual gain; NotMeasurable where this model cannot give them honestly."""
        ...


class NotMeasurable(Exception):
    """A captioner cannot give perplexity and visual gain; the message is the reason."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a captioner on a set of images, with the settings they depend on.

    ``perplexity`` is per token of the reference captions; ``visual_gain`` is in nats per token: the loss with
    the images shuffled among the captions minus the loss with the right ones. Both are None where the captioner
    cannot give them; ``scores.skipped`` has the reason.
    """

    predictions: tuple[Prediction, ...]
    scores: CaptionScores
    perplexity: float | None
    visual_gain: float | None
    decode: DecodeSettings
    versions: Mapping[str, str]
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failures(self) -> list[Prediction]:
        return [prediction for prediction in self.predictions if prediction.error]

    def to_json(self) -> dict[str, Any]:
        """The scores for machines; a metric that was skipped is null, with the reason under ``skipped``.

        ``model`` and ``data`` say what was scored on what, so that scores can be compared later.
        """
        metrics = {name: self.scores.corpus.get(name) for name in METRICS}
        if "SPICE" in self.scores.corpus:
            metrics["SPICE"] = self.scores.corpus["SPICE"]
        return {
            **metrics,
            "perplexity": _finite(self.perplexity),
            "visual_gain": _finite(self.visual_gain),
            "num_images": len(self.predictions),
            "num_failures": len(self.failures),
            "decode": self.decode.to_dict(),
            "tokenizer": self.scores.tokenizer,
            "skipped": self.scores.skipped,
            "versions": dict(self.versions),
            "model": dict(self.model),
            "data": {
                **self.data,
                "references": references_digest(
                    [prediction.image for prediction in self.predictions]
                ),
            },
        }


def caption_and_validate(
    captioner: EvaluableCaptioner,
    images: Sequence[CaptionedImage],
    *,
    decode: DecodeSettings,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Sequence[Captioned], Validated | NotMeasurable]:
    """The part of an evaluation that needs the captioner. Arguments and errors are those of `evaluate_captioner`."""
    if not images:
        raise DataError("there are no images to evaluate on")
    results = captioner.caption(
        [image.path for image in images], decode=decode, batch_size=batch_size, progress=progress
    )
    readable = [
        image for image, result in zip(images, results, strict=True) if result.error is None
    ]
    if not readable:
        raise DataError(
            f"none of the {len(images)} pictures can be captioned; the first: {results[0].error}"
        )
    try:
        return results, captioner.validate(readable, batch_size=batch_size)
    except NotMeasurable as reason:
        return results, reason


def evaluate_captioner(
    captioner: EvaluableCaptioner,
    images: Sequence[CaptionedImage],
    *,
    decode: DecodeSettings,
    batch_size: int = 32,
    spice: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Caption every image, score the captions against all references, and measure perplexity and visual gain.

    An image that fails counts as an empty caption; perplexity and visual gain are measured on the others.

    Args:
        progress: called with the number of images captioned so far.
        model: what is evaluated, for the record: ``name`` and whatever tells it from others.
        data: what it is evaluated on, for the record: ``name``, ``fingerprint`` and ``split``.

    Raises:
        DataError: there are no images, or none of them can be captioned.
    """
    from vlm_bridge.environment import environment

    results, validation = caption_and_validate(
        captioner, images, decode=decode, batch_size=batch_size, progress=progress
    )
    perplexity = visual_gain = None
    not_measured: dict[str, str] = {}
    if isinstance(validation, NotMeasurable):
        not_measured = dict.fromkeys(("perplexity", "visual_gain"), str(validation))
    else:
        perplexity, visual_gain = validation.perplexity, validation.visual_gain

    # Paths, not original ids, tell images apart: pictures from several folders may share an id.
    scores = score_captions(
        {str(image.path): image.captions for image in images},
        {
            str(image.path): result.caption or ""
            for image, result in zip(images, results, strict=True)
        },
        spice=spice,
    )
    scores = dataclasses.replace(scores, skipped={**scores.skipped, **not_measured})
    predictions = tuple(
        Prediction(
            image,
            result.caption or "",
            result.score,
            result.error,
            scores.per_image[str(image.path)],
            result.finished,
        )
        for image, result in zip(images, results, strict=True)
    )
    return Evaluation(
        predictions, scores, perplexity, visual_gain, decode, environment(), model or {}, data or {}
    )


def write_evaluation(
    evaluation: Evaluation,
    folder: Path,
    *,
    title: str,
    recipe_yaml: str = "",
    curves: Mapping[str, Curve] | None = None,
) -> None:
    """Write ``metrics.json``, ``predictions.jsonl`` (with the scores of each image), ``contact_sheet.png``
    (best and worst) and ``report.html`` into ``folder``, which is made if need be.

    Raises:
        OSError: something cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metrics, predictions = evaluation.to_json(), evaluation.predictions
    write_json(folder / METRICS_NAME, metrics)
    write_predictions(folder / PREDICTIONS_NAME, predictions)

    half = min(SHOWN, len(predictions) // 2)
    chosen = [*best(predictions, min(SHOWN, len(predictions) - half)), *worst(predictions, half)]
    sheet = [prediction.sheet_item() for prediction in chosen]
    contact_sheet(sheet, folder / "contact_sheet.png", title=f"{title}: best and worst by CIDEr")
    run = ReportedRun(
        str(evaluation.model.get("name") or "this evaluation"),
        dataset=str(evaluation.data.get("name") or ""),
        metrics=metrics,
        predictions=predictions,
        curves=curves or {},
        recipe_yaml=recipe_yaml,
    )
    write_report(folder / REPORT_NAME, [run], title=title)


def references_digest(images: Sequence[CaptionedImage]) -> str:
    """Hash over the ids of images and all their reference captions, whatever their order."""
    lines = sorted(json.dumps([image.original_id, *sorted(image.captions)]) for image in images)
    return f"sha256:{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON (no NaN), whole or not at all."""
    write_atomically(
        path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

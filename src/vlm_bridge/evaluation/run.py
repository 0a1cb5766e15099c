"""Evaluate a captioner on captioned images: generate, score, and record the settings."""

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
from vlm_bridge.data_pipeline.samples import ImageFile
from vlm_bridge.errors import DataError
from vlm_bridge.evaluation.contact_sheet import contact_sheet
from vlm_bridge.evaluation.predictions import (
    PREDICTIONS_NAME,
    Prediction,
    best,
    worst,
    write_predictions,
)
from vlm_bridge.evaluation.report import METRICS, SHOWN, ReportedRun, write_report
from vlm_bridge.evaluation.run_folder import METRICS_NAME, Curve
from vlm_bridge.metrics import CaptionScores, score_captions

if TYPE_CHECKING:
    from vlm_bridge.configuration import DecodeSettings

REPORT_NAME = "report.html"
NOT_MEASURED = "only measured for captioners of vlm-bridge"


class Captioned(Protocol):
    """Caption of an image with its mean log-probability per token, or an error."""

    @property
    def caption(self) -> str | None: ...
    @property
    def score(self) -> float | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def finished(self) -> bool | None: ...


class Validated(Protocol):
    """Teacher-forced loss on reference captions."""

    @property
    def perplexity(self) -> float: ...
    @property
    def visual_gain(self) -> float: ...


class EvaluableCaptioner(Protocol):
    """Contract of a captioner under evaluation, our own or a published one."""

    def caption(
        self,
        images: Sequence[ImageFile],
        *,
        decode: DecodeSettings,
        batch_size: int,
        progress: Callable[[int], None],
    ) -> Sequence[Captioned]: ...


Validate = Callable[..., Validated]
"""``validate(images, batch_size=...)`` measures perplexity and visual gain."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a captioner on a set of images, with the settings that they depend on.

    Attributes:
        perplexity: per token of the reference captions; None for published captioners.
        visual_gain: loss with shuffled images minus loss with the right ones, in nats per token.
        model: name and identity of the captioner.
        data: name, fingerprint and split of the images.
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
        """Return the content of ``metrics.json``. A skipped metric is null."""
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
    validate: Validate | None = None,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Sequence[Captioned], Validated | None]:
    """Run the part of an evaluation that several processes share. See `evaluate_captioner`."""
    if not images:
        raise DataError("there are no images to evaluate on")
    results = captioner.caption(
        [image.path for image in images], decode=decode, batch_size=batch_size, progress=progress
    )
    readable = [i for i, result in zip(images, results, strict=True) if result.error is None]
    if not readable:
        raise DataError(
            f"none of the {len(images)} images can be captioned; the first: {results[0].error}"
        )
    return results, validate(readable, batch_size=batch_size) if validate else None


def evaluate_captioner(
    captioner: EvaluableCaptioner,
    images: Sequence[CaptionedImage],
    *,
    decode: DecodeSettings,
    validate: Validate | None = None,
    batch_size: int = 32,
    spice: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Caption every image, score the captions, and measure perplexity and visual gain.

    A failed image counts as an empty caption. Perplexity and visual gain are measured on the others.

    Args:
        validate: measures perplexity and visual gain; None leaves them out.
        progress: called with the number of images captioned so far.
        model: identity of the captioner for the record, with a ``name``.
        data: ``name``, ``fingerprint`` and ``split`` for the record.

    Raises:
        DataError: there are no images, or none of them can be captioned.
    """
    from vlm_bridge.environment import environment

    results, validation = caption_and_validate(
        captioner,
        images,
        decode=decode,
        validate=validate,
        batch_size=batch_size,
        progress=progress,
    )
    # Paths, not original ids, tell images apart: images from several folders may share an id.
    scores = score_captions(
        {str(image.path): image.captions for image in images},
        {
            str(image.path): result.caption or ""
            for image, result in zip(images, results, strict=True)
        },
        spice=spice,
    )
    if validation is None:
        reasons = dict.fromkeys(("perplexity", "visual_gain"), NOT_MEASURED)
        scores = dataclasses.replace(scores, skipped={**scores.skipped, **reasons})
    return Evaluation(
        _predictions(images, results, scores),
        scores,
        validation.perplexity if validation else None,
        validation.visual_gain if validation else None,
        decode,
        environment(),
        model or {},
        data or {},
    )


def _predictions(
    images: Sequence[CaptionedImage], results: Sequence[Captioned], scores: CaptionScores
) -> tuple[Prediction, ...]:
    return tuple(
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


def write_evaluation(
    evaluation: Evaluation,
    folder: Path,
    *,
    title: str,
    recipe_yaml: str = "",
    curves: Mapping[str, Curve] | None = None,
) -> None:
    """Write metrics.json, predictions.jsonl, contact_sheet.png and report.html into a folder.

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
    """Hash ids and reference captions, independent of their order."""
    lines = sorted(json.dumps([image.original_id, *sorted(image.captions)]) for image in images)
    return f"sha256:{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON, without NaN."""
    write_atomically(
        path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

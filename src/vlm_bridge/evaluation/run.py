"""Evaluate a captioner on captioned images: generate, score, and record the settings."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.data_pipeline.loader import in_batches
from vlm_bridge.data_pipeline.samples import ImageFile
from vlm_bridge.errors import DataError
from vlm_bridge.evaluation.contact_sheet import SheetItem, contact_sheet
from vlm_bridge.evaluation.predictions import PREDICTIONS_NAME, Prediction, write_predictions
from vlm_bridge.evaluation.report import METRICS, SHOWN, ReportedRun, by_cider, write_report
from vlm_bridge.evaluation.run_folder import METRICS_NAME, REPORT_NAME, Curve
from vlm_bridge.files import write_atomically
from vlm_bridge.metrics import CaptionScores, score_captions
from vlm_bridge.version import environment

if TYPE_CHECKING:
    from vlm_bridge.captioning.pipeline import CaptionResult
    from vlm_bridge.configuration import DecodeSettings
    from vlm_bridge.training_strategy.distributed import World
    from vlm_bridge.training_strategy.validation import Validation

Progress = Callable[[int], None]


NOT_MEASURED = "only measured for captioners of vlm-bridge"


class EvaluableCaptioner(Protocol):
    """Contract of a captioner under evaluation, our own or a published one."""

    def caption(
        self,
        images: Sequence[ImageFile],
        *,
        decode: DecodeSettings,
        batch_size: int,
        progress: Progress,
    ) -> list[CaptionResult]: ...


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
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failures(self) -> list[Prediction]:
        return [prediction for prediction in self.predictions if prediction.error]

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``metrics.json``. A skipped metric is null."""
        images = [prediction.image for prediction in self.predictions]
        return {
            **dict.fromkeys(METRICS),
            **self.scores.corpus,
            "perplexity": _finite(self.perplexity),
            "visual_gain": _finite(self.visual_gain),
            "num_images": len(images),
            "num_failures": len(self.failures),
            "decode": self.decode.to_dict(),
            "tokenizer": self.scores.tokenizer,
            "skipped": self.scores.skipped,
            "versions": environment(),
            "model": dict(self.model),
            "data": {**self.data, "references": references_digest(images)},
        }


def evaluate_captioner(
    captioner: EvaluableCaptioner,
    images: Sequence[CaptionedImage],
    *,
    decode: DecodeSettings,
    validate: Callable[..., Validation] | None = None,
    batch_size: int = 32,
    spice: bool = False,
    progress: Progress = lambda done: None,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    world: World | None = None,
) -> Evaluation:
    """Caption every image, score the captions, and measure perplexity and visual gain.

    A failed image counts as an empty caption. Perplexity and visual gain are measured on the
    others.

    Args:
        validate: a captioner's `validate`; None leaves perplexity and visual gain out.
        progress: called with the number of images captioned so far.
        model: identity of the captioner for the record, with a ``name``.
        data: ``name``, ``fingerprint`` and ``split`` for the record.
        world: processes that share the work; the first one scores.

    Raises:
        DataError: there are no images, or none of them can be captioned.
    """
    if not images:
        raise DataError("there are no images to evaluate on")
    paths = [image.path for image in images]
    results = (
        caption_together(captioner, paths, decode, batch_size, world, progress)
        if world
        else captioner.caption(paths, decode=decode, batch_size=batch_size, progress=progress)
    )
    readable = [i for i, result in zip(images, results, strict=True) if result.error is None]
    if not readable:
        raise DataError(
            f"none of the {len(images)} images can be captioned; the first: {results[0].error}"
        )
    validation = validate(readable, batch_size=batch_size, world=world) if validate else None

    def scored() -> CaptionScores:
        # Paths, not original ids, tell images apart: images of several folders may share an id.
        references = {str(image.path): image.captions for image in images}
        captions = [result.caption or "" for result in results]
        return score_captions(
            references, dict(zip(map(str, paths), captions, strict=True)), spice=spice
        )

    scores = world.from_first(scored) if world else scored()
    if validation is None:
        scores.skipped.update(dict.fromkeys(("perplexity", "visual_gain"), NOT_MEASURED))
    return Evaluation(
        tuple(
            Prediction(
                i, r.caption or "", r.score, r.error, scores.per_image[str(i.path)], r.finished
            )
            for i, r in zip(images, results, strict=True)
        ),
        scores,
        validation.perplexity if validation else None,
        validation.visual_gain if validation else None,
        decode,
        model or {},
        data or {},
    )


def caption_together(
    captioner: EvaluableCaptioner,
    images: Sequence[ImageFile],
    decode: DecodeSettings,
    batch_size: int,
    world: World,
    progress: Progress = lambda done: None,
) -> list[CaptionResult]:
    """Split the batches among processes; each gets the captions of a single one, to the bit."""
    results = captioner.caption(
        list(chain.from_iterable(world.share(in_batches(images, batch_size)))),
        decode=decode,
        batch_size=batch_size,
        progress=lambda done: progress(min(done * world.size, len(images))),
    )
    return list(chain.from_iterable(world.interleave(in_batches(results, batch_size))))


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
    ranked = by_cider(predictions)
    half = min(SHOWN, len(ranked) // 2)
    chosen = [*ranked[: -1 - min(SHOWN, len(ranked) - half) : -1], *ranked[:half]]
    sheet = [SheetItem(p.image.path, p.caption, p.image.captions[0], p.cider) for p in chosen]
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
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

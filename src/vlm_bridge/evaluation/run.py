"""Evaluate a captioner on captioned images: generate, score, and record the settings."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm_bridge.captioning.explain import SheetItem, draw_sheet
from vlm_bridge.captioning.pipeline import Captioner, CaptionResult
from vlm_bridge.configuration import DecodeSettings, Recipe
from vlm_bridge.data_pipeline.caption_folder import open_data_folder, readable_split
from vlm_bridge.data_pipeline.loader import in_batches
from vlm_bridge.data_pipeline.samples import CaptionedImage
from vlm_bridge.data_pipeline.splits import SplitName
from vlm_bridge.errors import DataError
from vlm_bridge.evaluation import run_folder
from vlm_bridge.evaluation.report import SHOWN, write_report
from vlm_bridge.evaluation.run_folder import MEASURED, Prediction, ReportedRun
from vlm_bridge.files import write_atomically
from vlm_bridge.metrics import SCORES, score_captions
from vlm_bridge.metrics.coco import java_version, started_meteor
from vlm_bridge.training_strategy.checkpoint import BUNDLED
from vlm_bridge.training_strategy.distributed import World, joined
from vlm_bridge.training_strategy.validation import StreamedValidation, Validation, shuffled

if TYPE_CHECKING:
    from vlm_bridge.evaluation.baseline import BaselineCaptioner

logger = logging.getLogger(__name__)

PACKAGES = ("vlm-bridge", "torch", "transformers", "accelerate", "pillow", "pycocoevalcap")
NOT_OURS = "only measured for captioners of vlm-bridge"


def evaluate(
    checkpoint: str | Path | None = None,
    *,
    data_dir: str | Path,
    split: SplitName = "val",
    limit: int | None = None,
    model: str | None = None,
    recipe: Recipe | None = None,
    revision: str | None = None,
    prompt: str | None = None,
    batch_size: int = 32,
    spice: bool = False,
    output_dir: str | Path | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
    **settings: Any,
) -> ReportedRun:
    """Score a captioner on captioned images: see the ``scores`` of what is returned.

    Args:
        checkpoint: as in `Captioner.from_pretrained`; None is the bundled captioner.
        data_dir: caption folder, or folder of shards.
        limit: only the first images.
        model: a published captioner instead, with its ``revision`` on the hub and the ``prompt``
            that it continues.
        recipe: of a checkpoint without one.
        output_dir: where scores, captions, a contact sheet and report.html go.
        progress: called with the images captioned and all images.
        settings: changes of how the captioner generates, such as ``num_beams=5``.

    Raises:
        VLMBridgeError: data or captioner cannot be used.
    """
    folder = open_data_folder(data_dir)
    images, skipped = readable_split(folder, split)
    images = images[:limit]
    if output_dir:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    data = {"name": folder.root.resolve().name, "split": split, "fingerprint": folder.fingerprint}
    with joined(device) as world:
        device = str(world.device)
        if model is None:
            captioner, facts = _open_checkpoint(checkpoint or BUNDLED, device, recipe)
            decode, recipe = captioner.recipe.decode, captioner.recipe
        else:
            captioner, facts = _open_model(model, device, revision, prompt)
            decode, recipe = DecodeSettings(), None
        run = evaluate_captioner(
            captioner, images, decode=decode.replace(**settings), batch_size=batch_size,
            spice=spice, model=facts, data=data, world=world,
            progress=lambda done: progress(done, len(images)) if world.is_first else None,
        )  # fmt: skip
    run = replace(run, recipe_yaml=recipe.to_yaml() if recipe else "")
    if output_dir and world.is_first:
        title = f"{facts['name']} on {data['name']}, {split}"
        write_evaluation(run, Path(output_dir), title=title)
    if len(skipped):
        share = f"{len(skipped):,} of {skipped.total:,} {skipped.kind}"
        logger.info(f"skipped {share}: {skipped.summary()}")
    return run


def _open_checkpoint(
    checkpoint: str | Path, device: str, recipe: Recipe | None
) -> tuple[Captioner, dict[str, Any]]:
    """Return a captioner and its identity in reports."""
    captioner, path = Captioner.from_pretrained(checkpoint, device, recipe=recipe), Path(checkpoint)
    run = run_folder.run_of(path) if path.exists() else path  # else bundled, or on the hub
    return captioner, {"name": run.resolve().name} | (
        {"checkpoint": path.name} if path.is_file() else {}
    )


def _open_model(
    name: str, device: str, revision: str | None, prompt: str | None
) -> tuple[BaselineCaptioner, dict[str, Any]]:
    """Return a published captioner and its identity in reports."""
    from vlm_bridge.evaluation.baseline import BaselineCaptioner

    captioner = BaselineCaptioner.from_pretrained(name, device, revision=revision, prompt=prompt)
    return captioner, {
        "name": Path(name).resolve().name if Path(name).is_dir() else name,
        "class": type(captioner.model).__name__,
        "revision": revision,
        "prompt": captioner.prompt,
    }


def evaluate_captioner(
    captioner: Captioner | BaselineCaptioner,
    images: Sequence[CaptionedImage],
    *,
    decode: DecodeSettings,
    batch_size: int = 32,
    spice: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    world: World | None = None,
) -> ReportedRun:
    """Caption every image, score the captions, and measure perplexity and visual gain.

    A failed image counts as an empty caption, and takes no part in perplexity and visual gain. The
    metrics record the settings that scores depend on; a skipped metric is None.

    Args:
        model: identity of the captioner for the record, with a ``name``.
        data: ``name``, ``fingerprint`` and ``split`` for the record.
        world: processes that share the work and all get the result; the first one scores.

    Raises:
        DataError: there are no images, or none of them can be captioned.
    """
    world = world or World(torch.device("cpu"))
    losses = captioner.validation(images) if images else None
    with started_meteor() if world.is_first else nullcontext() as meteor:
        results = _caption(captioner, images, decode, batch_size, world, progress, losses)
        num_failures = sum(result.error is not None for result in results)
        if num_failures == len(images):
            why = results[0].error if results else "there are none"
            raise DataError(f"none of the {len(images)} images can be captioned: {why}")
        measured = _measured(losses.result(world) if losses else None)
        # By path: images of several folders may share an id.
        references = {str(image.path): image.captions for image in images}
        captions = {p: r.caption or "" for p, r in zip(references, results, strict=True)}
        scores = world.from_first(
            lambda: score_captions(references, captions, spice=spice, meteor=meteor)
        )
    rows = zip(images, captions.values(), results, scores.per_image.values(), strict=True)
    predictions = tuple(
        Prediction(image, text, result.score, result.error, of_image, result.finished)
        for image, text, result, of_image in rows
    )
    metrics = {
        **dict.fromkeys(name for name in SCORES if name != "SPICE"),
        **scores.corpus,
        **measured,
        "num_images": len(images),
        "num_failures": num_failures,
        "decode": decode.to_dict(),
        "tokenizer": scores.tokenizer,
        "skipped": scores.skipped | ({} if losses else dict.fromkeys(MEASURED, NOT_OURS)),
        "versions": versions(),
        "model": dict(model or {}),
        "data": {**(data or {}), "references": references_digest(images)},
    }
    return ReportedRun(metrics["model"].get("name") or "this evaluation", metrics, predictions)


def _measured(found: Validation | None) -> dict[str, float | None]:
    """Return perplexity and visual gain; None for one that is unknown or not finite."""
    values = {name: getattr(found, name, math.nan) for name in MEASURED}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def versions() -> dict[str, str]:
    """Return installed versions and the system; no names or paths of the machine."""
    system = f"{platform.system()} {platform.machine()}"
    installed = {found.name.lower(): found.version for found in metadata.distributions()}
    packages = {name: installed[name] for name in PACKAGES if name in installed}
    java = {"java": version} if (version := java_version()) else {}
    return {"python": platform.python_version(), "platform": system, **packages, **java}


def _caption(
    captioner: Captioner | BaselineCaptioner,
    images: Sequence[CaptionedImage],
    decode: DecodeSettings,
    batch_size: int,
    world: World,
    progress: Callable[[int], None],
    losses: StreamedValidation | None,
) -> list[CaptionResult]:
    """Split the batches among processes; each gets the captions of a single one, to the bit."""
    order = shuffled(len(images)).tolist()
    batches = in_batches([images[index].path for index in order], batch_size)
    start, end = (len(batches) * rank // world.size for rank in (world.rank, world.rank + 1))
    measured = {"with_features": losses.add} if losses else {}
    results = captioner.caption(
        list(chain.from_iterable(batches[start:end])),
        decode=decode,
        batch_size=batch_size,
        progress=lambda done: progress(min(done * world.size, len(images))),
        **measured,
    )
    found = dict(zip(order, chain.from_iterable(world.gather(results)), strict=True))
    return [found[index] for index in range(len(images))]


def write_evaluation(run: ReportedRun, folder: Path, *, title: str) -> None:
    """Write metrics.json, predictions.jsonl, contact_sheet.png and report.html into a folder.

    Raises:
        OSError: something cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / run_folder.METRICS_NAME, run.metrics)
    run_folder.write_predictions(folder / run_folder.PREDICTIONS_NAME, run.predictions)
    ranked = sorted(run.predictions, key=lambda prediction: prediction.cider)
    half = min(SHOWN, len(ranked) // 2)
    chosen = [*ranked[half:][: -1 - SHOWN : -1], *ranked[:half]]
    sheet = [SheetItem(p.image.path, p.caption, p.image.captions[0], p.cider) for p in chosen]
    best_and_worst = draw_sheet(sheet, title=f"{title}: best and worst by CIDEr")
    best_and_worst.save(folder / "contact_sheet.png")
    write_report(folder / run_folder.REPORT_NAME, [run], title=title)


def references_digest(images: Sequence[CaptionedImage]) -> str:
    """Hash ids and reference captions, independent of their order."""
    lines = sorted(json.dumps([image.original_id, *sorted(image.captions)]) for image in images)
    return f"sha256:{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON, without NaN."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())

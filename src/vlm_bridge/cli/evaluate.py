"""``vlm-bridge evaluate``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vlm_bridge.cli import options
from vlm_bridge.cli.compare import print_rows
from vlm_bridge.cli.progress import note, show_progress
from vlm_bridge.cli.quiet import quiet_transformers
from vlm_bridge.errors import UsageError

if TYPE_CHECKING:
    from vlm_bridge.configuration import DecodeSettings
    from vlm_bridge.data_pipeline.samples import CaptionedImage

logger = logging.getLogger(__name__)


class Split(StrEnum):
    train = "train"
    val = "val"
    test = "test"


def evaluate(
    data_dir: Path = typer.Option(..., help="Caption folder, or folder of shards."),
    checkpoint: Path = typer.Option(None, help="Trained bridge: a checkpoint file or folder."),
    model: str = typer.Option(None, help="Instead: a BLIP, GIT or vision-encoder-decoder model."),
    config: options.Config = None,
    revision: str = typer.Option(None, help="Branch, tag or commit of a --model on the hub."),
    prompt: str = typer.Option(None, help="Text that a --model continues. (default: its own)"),
    split: Split = typer.Option(Split.val, help="Which images to caption."),
    limit: int = typer.Option(None, min=1, help="Only the first N images."),
    batch_size: options.BatchSize = 32,
    num_beams: options.NumBeams = None,
    max_new_tokens: options.MaxNewTokens = None,
    min_new_tokens: options.MinNewTokens = None,
    length_penalty: options.LengthPenalty = None,
    repetition_penalty: options.RepetitionPenalty = None,
    no_repeat_ngram_size: options.NoRepeatNgramSize = None,
    object_bonus: options.ObjectBonus = None,
    spice: bool = typer.Option(False, "--spice", help="Also SPICE: slow, needs Java and models."),
    json_file: Path = typer.Option(None, "--json", help="Write the scores to this JSON file."),
    output_dir: Path = typer.Option(None, help="Write scores, captions and report.html here."),
    device: options.Device = "auto",
) -> None:
    """Score a captioner with BLEU, METEOR, ROUGE-L, CIDEr, perplexity and visual gain.

    Our own (--checkpoint) or a published one (--model), with the same data, decoding and metrics.
    """
    if (checkpoint is None) == (model is None):
        raise UsageError("give either --checkpoint (a trained bridge) or --model (a published one)")
    if model and config:
        raise UsageError("--config is the recipe of a --checkpoint; a --model has none")
    if checkpoint and (revision, prompt) != (None, None):
        raise UsageError("--revision and --prompt are for a --model")
    decode = {
        "num_beams": num_beams, "max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens,
        "length_penalty": length_penalty, "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size, "object_bonus": object_bonus,
    }  # fmt: skip

    from vlm_bridge.data_pipeline.caption_folder import open_data_folder, readable_split

    # Wrong paths are found before minutes of captioning.
    folder = open_data_folder(data_dir)
    images, skipped = readable_split(folder, split.value)
    for place in filter(None, (json_file and json_file.parent, output_dir)):
        place.mkdir(parents=True, exist_ok=True)
    name = data_dir.resolve().name
    data = {"name": name, "split": split.value, "fingerprint": folder.fingerprint}
    subject = partial(_open_model, model, revision, prompt)
    if checkpoint:
        subject = partial(_open_checkpoint, checkpoint, config)
    _evaluate(
        subject, images[:limit], decode, batch_size, spice, data, device, json_file, output_dir
    )
    if len(skipped):
        logger.info(
            f"skipped {len(skipped):,} of {skipped.total:,} {skipped.kind}: {skipped.summary()}"
        )


Subject = tuple[Any, "DecodeSettings", dict[str, Any], str, Any]
"""Captioner, its decoding settings, its identity, its recipe, and what validates it."""


def _open_checkpoint(checkpoint: Path, config: Path | None, device: str) -> Subject:
    from vlm_bridge.captioning.pipeline import Captioner
    from vlm_bridge.configuration import load_recipe

    recipe = load_recipe(config) if config else None
    captioner = Captioner.from_pretrained(checkpoint, device, recipe=recipe)
    run = checkpoint.resolve()
    facts: dict[str, Any] = {"name": run.name}
    if checkpoint.is_file():
        # RUN/checkpoints/best_model.pth and RUN/best_model.pth both have the name of the run.
        run = run.parent.parent if run.parent.name == "checkpoints" else run.parent
        facts = {"name": run.name, "checkpoint": checkpoint.name}
    recipe = captioner.recipe
    return captioner, recipe.decode, facts, recipe.to_yaml(), captioner.validate


def _open_model(name: str, revision: str | None, prompt: str | None, device: str) -> Subject:
    from vlm_bridge.configuration import DecodeSettings
    from vlm_bridge.evaluation.baseline import BaselineCaptioner

    captioner = BaselineCaptioner.from_pretrained(name, device, revision=revision, prompt=prompt)
    facts = {
        "name": Path(name).resolve().name if Path(name).is_dir() else name,
        "class": type(captioner.model).__name__,
        "revision": revision,
        "prompt": captioner.prompt,
    }
    return captioner, DecodeSettings(), facts, "", None


def _evaluate(
    open_subject: Callable[[str], Subject],
    images: Sequence[CaptionedImage],
    decode: Mapping[str, Any],
    batch_size: int,
    spice: bool,
    data: Mapping[str, Any],
    device: str,
    json_file: Path | None,
    output_dir: Path | None,
) -> None:
    """Evaluate, write files and print scores; in processes other than the first, help with it."""
    from vlm_bridge.evaluation.run import evaluate_captioner, write_evaluation, write_json
    from vlm_bridge.metrics import score_notes
    from vlm_bridge.training_strategy.distributed import joined

    quiet_transformers()
    given = {name: value for name, value in decode.items() if value is not None}
    with joined(device) as world, show_progress("captioned") as report:
        captioner, settings, facts, recipe_yaml, validate = open_subject(str(world.device))
        evaluation = evaluate_captioner(
            captioner,
            images,
            decode=settings.replace(**given),
            validate=validate,
            batch_size=batch_size,
            spice=spice,
            progress=lambda done: report(done, len(images)) if world.is_first else None,
            model=facts,
            data=data,
            world=world,
        )
    if not world.is_first:
        return
    metrics = evaluation.metrics
    if json_file:
        write_json(json_file, metrics)
    if output_dir:
        title = f"{facts['name']} on {data['name']}, {data['split']}"
        write_evaluation(evaluation, output_dir, title=title, recipe_yaml=recipe_yaml)
    for prediction in evaluation.predictions:
        if prediction.error:
            note(f"failed: {prediction.image.path}: {prediction.error}")
    for line in score_notes(metrics["skipped"], metrics["tokenizer"]):
        note(f"note: {line}")
    _print_scores(metrics)
    if output_dir:
        print(f"report: {output_dir / 'report.html'}")


def _print_scores(metrics: Mapping[str, Any]) -> None:
    from vlm_bridge.evaluation.run_folder import METRICS

    names = [name for name in (*METRICS, "SPICE") if metrics.get(name) is not None]
    rows = [(name, f"{metrics[name]:.4f}") for name in names]
    for name, digits in (("perplexity", 3), ("visual_gain", 4)):
        rows.append((name, "-" if metrics[name] is None else f"{metrics[name]:.{digits}f}"))
    rows.append(("num_images", str(metrics["num_images"])))
    decode = metrics["decode"]
    print_rows(rows, note=f"{decode['num_beams']} beams, {decode['max_new_tokens']} tokens; ")

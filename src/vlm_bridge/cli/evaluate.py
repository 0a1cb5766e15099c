"""`vlm-bridge evaluate`, `compare` and `report`."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vlm_bridge.cli import options
from vlm_bridge.cli.options import note
from vlm_bridge.errors import UsageError

if TYPE_CHECKING:
    from vlm_bridge.configuration import DecodeSettings
    from vlm_bridge.data_pipeline.samples import CaptionedImage

logger = logging.getLogger(__name__)

Split = StrEnum("Split", ["train", "val", "test"])
SETTINGS = (
    "num_beams", "max_new_tokens", "min_new_tokens", "length_penalty", "repetition_penalty",
    "no_repeat_ngram_size", "object_bonus",
)  # fmt: skip


def evaluate(
    context: typer.Context,
    data_dir: Path = typer.Option(..., help="Caption folder, or folder of shards."),
    checkpoint: Path = typer.Option(None, help="Trained bridge: a checkpoint file or folder."),
    model: str = typer.Option(None, help="Instead: a BLIP, GIT or vision-encoder-decoder model."),
    config: options.Config = None,
    revision: str = typer.Option(None, help="Branch, tag or commit of a --model on the hub."),
    prompt: str = typer.Option(None, help="Text that a --model continues. (default: its own)"),
    split: Split = typer.Option("val", help="Which images to caption."),
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

    from vlm_bridge.data_pipeline.caption_folder import open_data_folder, readable_split

    # Wrong paths are found before minutes of captioning.
    folder = open_data_folder(data_dir)
    images, skipped = readable_split(folder, split.name)
    for place in filter(None, (json_file and json_file.parent, output_dir)):
        place.mkdir(parents=True, exist_ok=True)
    name = data_dir.resolve().name
    data = {"name": name, "split": split.name, "fingerprint": folder.fingerprint}
    _evaluate(context.params, images[:limit], data)
    if len(skipped):
        logger.info(
            f"skipped {len(skipped):,} of {skipped.total:,} {skipped.kind}: {skipped.summary()}"
        )


def _evaluate(
    given: Mapping[str, Any], images: Sequence[CaptionedImage], data: Mapping[str, Any]
) -> None:
    """Evaluate, write files and print scores; in processes other than the first, help with it.

    Args:
        given: the options of `evaluate` by name.
    """
    from vlm_bridge.evaluation.run import evaluate_captioner, write_evaluation, write_json
    from vlm_bridge.metrics import score_notes
    from vlm_bridge.training_strategy.distributed import joined

    options.quiet_transformers()
    open_subject = _open_checkpoint if given["checkpoint"] else _open_model
    decode = {name: given[name] for name in SETTINGS if given[name] is not None}
    with joined(given["device"]) as world, options.show_progress("captioned") as report:
        captioner, settings, facts, recipe_yaml, validate = open_subject(given, str(world.device))
        evaluation = evaluate_captioner(
            captioner,
            images,
            decode=settings.replace(**decode),
            validate=validate,
            batch_size=given["batch_size"],
            spice=given["spice"],
            progress=lambda done: report(done, len(images)) if world.is_first else None,
            model=facts,
            data=data,
            world=world,
        )
    if not world.is_first:
        return
    metrics, output_dir = evaluation.metrics, given["output_dir"]
    if given["json_file"]:
        write_json(given["json_file"], metrics)
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


Subject = tuple[Any, "DecodeSettings", dict[str, Any], str, Any]
"""Captioner, its decoding settings, its identity, its recipe, and what validates it."""


def _open_checkpoint(given: Mapping[str, Any], device: str) -> Subject:
    from vlm_bridge.captioning.pipeline import Captioner
    from vlm_bridge.configuration import load_recipe

    checkpoint, config = given["checkpoint"], given["config"]
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


def _open_model(given: Mapping[str, Any], device: str) -> Subject:
    from vlm_bridge.configuration import DecodeSettings
    from vlm_bridge.evaluation.baseline import BaselineCaptioner

    name, revision = given["model"], given["revision"]
    captioner = BaselineCaptioner.from_pretrained(
        name, device, revision=revision, prompt=given["prompt"]
    )
    facts = {
        "name": Path(name).resolve().name if Path(name).is_dir() else name,
        "class": type(captioner.model).__name__,
        "revision": revision,
        "prompt": captioner.prompt,
    }
    return captioner, DecodeSettings(), facts, "", None


def _print_scores(metrics: Mapping[str, Any]) -> None:
    from vlm_bridge.metrics import SCORES

    names = [name for name in SCORES if metrics.get(name) is not None]
    rows = [(name, f"{metrics[name]:.4f}") for name in names]
    for name, digits in (("perplexity", 3), ("visual_gain", 4)):
        rows.append((name, "-" if metrics[name] is None else f"{metrics[name]:.{digits}f}"))
    rows.append(("num_images", str(metrics["num_images"])))
    decode = metrics["decode"]
    print_rows(rows, note=f"{decode['num_beams']} beams, {decode['max_new_tokens']} tokens; ")


def compare(
    scores: list[Path] = typer.Argument(
        ..., help="Run folders with an evaluation, or files or folders that `evaluate` wrote."
    ),
    reference: str = typer.Option(
        None, help="What the others are a share of: a name or path of these. (default: the first)"
    ),
    force: bool = typer.Option(False, "--force", help="Compare different data all the same."),
    as_json: options.AsJson = False,
    html: Path = typer.Option(None, help="Also write a report of all of them to this HTML file."),
) -> None:
    """Print scores side by side, and each as a share of a reference; refuse those of other data."""
    from vlm_bridge.evaluation.compare import compare as compare_scores
    from vlm_bridge.evaluation.compare import write_comparison

    comparison = compare_scores(scores, reference=reference, force=force)
    if html:
        html.parent.mkdir(parents=True, exist_ok=True)
        write_comparison(html, comparison)
    if as_json:
        typer.echo(json.dumps(comparison.to_json(), indent=2, ensure_ascii=False))
        return
    for line in comparison.notes:
        note(f"note: {line}")
    name = comparison.reference.name
    others = [run for run in comparison.runs if run is not comparison.reference]
    header = ["metric", name]
    for run in others:
        header += [run.name, f"% of {name}"]
    rows = []
    for metric in comparison.metrics:
        row = [metric, _number(comparison.reference.scores.get(metric))]
        for run in others:
            share = comparison.share(run, metric)
            row += [_number(run.scores.get(metric)), "-" if share is None else f"{100 * share:.1f}"]
        rows.append(row)
    print_rows(rows, header)
    if html:
        note(f"report: {html}")


def print_rows(rows: Sequence[Sequence[str]], header: Sequence[str] = (), note: str = "") -> None:
    """Print a table of scores on a terminal, tab-separated lines on a pipe."""
    if not sys.stdout.isatty():
        print("\n".join("\t".join(row) for row in (header, *rows) if row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=bool(header), caption=f"{note}scores are fractions, not percent")
    for index, title in enumerate(header or rows[0]):
        table.add_column(Text(title), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def report(
    run: Path = typer.Argument(
        ..., help="Run folder, an evaluation's folder, or a JSON file of scores."
    ),
    output: Path = typer.Option(
        None, "-o", "--output", help="HTML file. (default: report.html in the run's folder)"
    ),
) -> None:
    """Write one HTML file about a run: curves, scores, images, captions, recipe, environment."""
    from vlm_bridge.evaluation.report import write_report
    from vlm_bridge.evaluation.run_folder import REPORT_NAME, read_run

    reported = read_run(run)
    path = output or (run if run.is_dir() else run.parent) / REPORT_NAME
    on = f" on {reported.data['name']}" if reported.data.get("name") else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(path, [reported], title=f"{reported.name}{on}")
    for line in reported.missing:
        note(f"note: {line}")
    print(f"report: {path}")

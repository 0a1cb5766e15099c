"""`vlm-bridge evaluate`, `compare` and `report`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlm_bridge.cli import options
from vlm_bridge.cli.options import Option, note
from vlm_bridge.errors import UsageError

if TYPE_CHECKING:
    from vlm_bridge.data_pipeline.samples import CaptionedImage

logger = logging.getLogger(__name__)

Split = StrEnum("Split", ["train", "val", "test"])
Format = Literal["table", "md", "latex", "csv"]


def evaluate(
    data_dir: Annotated[Path, Option(help="Caption folder, or folder of shards.")],
    checkpoint: Annotated[Path | None, Option(help="A checkpoint, or the folder of a run.")] = None,
    model: Annotated[str | None, Option(help="Instead: a published captioner.")] = None,
    config: options.Config = None,
    revision: Annotated[str | None, Option(help="Of a --model on the hub.")] = None,
    prompt: Annotated[str | None, Option(help="Text that a --model continues.")] = None,
    split: Annotated[Split, Option(help="Which images to caption.")] = Split.val,
    limit: Annotated[int | None, Option(min=1, help="Only the first N images.")] = None,
    batch_size: options.BatchSize = 32,
    num_beams: options.NumBeams = None,
    max_new_tokens: options.MaxNewTokens = None,
    min_new_tokens: options.MinNewTokens = None,
    length_penalty: options.LengthPenalty = None,
    repetition_penalty: options.RepetitionPenalty = None,
    no_repeat_ngram_size: options.NoRepeatNgramSize = None,
    object_bonus: options.ObjectBonus = None,
    spice: Annotated[bool, Option("--spice", help="Also SPICE: slow, needs models.")] = False,
    output_dir: Annotated[Path | None, Option(help="Write all, with report.html, here.")] = None,
    as_json: options.AsJson = False,
    device: options.Device = "auto",
    stray: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
) -> None:
    """Score a captioner with BLEU, METEOR, ROUGE-L, CIDEr, perplexity and visual gain.

    Our own (--checkpoint) or a published one (--model), with the same data, decoding and metrics.
    Settings of generation that are not given are those of the checkpoint's recipe.
    """
    given = dict(locals())
    if (checkpoint is None) == (model is None):
        raise UsageError("give either --checkpoint (a trained bridge) or --model (a published one)")
    if stray:
        raise UsageError(
            f"--json prints the scores and takes no file ({stray[0]}); --output-dir FOLDER "
            "writes them"
        )
    if model and config:
        raise UsageError("--config is the recipe of a --checkpoint; a --model has none")
    if checkpoint and (revision, prompt) != (None, None):
        raise UsageError("--revision and --prompt are for a --model")

    from vlm_bridge.data_pipeline.caption_folder import open_data_folder, readable_split

    # Wrong paths are found before minutes of captioning.
    folder = open_data_folder(data_dir)
    images, skipped = readable_split(folder, split.name)
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
    name = data_dir.resolve().name
    data = {"name": name, "split": split.name, "fingerprint": folder.fingerprint}
    _evaluate(given, images[:limit], data)
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
    from vlm_bridge.configuration import DecodeSettings
    from vlm_bridge.evaluation import run_folder
    from vlm_bridge.evaluation.run import evaluate_captioner, write_evaluation
    from vlm_bridge.metrics import score_notes
    from vlm_bridge.training_strategy.distributed import joined

    options.quiet_transformers()
    changes = options.given_settings(given)
    with joined(given["device"]) as world, options.show_progress("captioned") as report:
        recipe = validate = None
        if given["checkpoint"]:
            captioner, facts = _open_checkpoint(given, str(world.device))
            recipe, validate = captioner.recipe, captioner.validate
        else:
            captioner, facts = _open_model(given, str(world.device))
        evaluation = evaluate_captioner(
            captioner,
            images,
            decode=(recipe.decode if recipe else DecodeSettings()).replace(**changes),
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
    if output_dir:
        title = f"{facts['name']} on {data['name']}, {data['split']}"
        recipe_yaml = recipe.to_yaml() if recipe else ""
        write_evaluation(replace(evaluation, recipe_yaml=recipe_yaml), output_dir, title=title)
    for prediction in evaluation.predictions:
        if prediction.error:
            note(f"failed: {prediction.image.path}: {prediction.error}", always=True)
    for line in score_notes(metrics["skipped"], metrics["tokenizer"]):
        note(f"note: {line}")
    if given["as_json"]:
        options.print_json(metrics)
    else:
        _print_scores(metrics)
    if output_dir:
        note(f"report: {output_dir / run_folder.REPORT_NAME}")


def _open_checkpoint(given: Mapping[str, Any], device: str) -> tuple[Any, dict[str, Any]]:
    """Return a captioner and its identity in reports."""
    from vlm_bridge.captioning.pipeline import Captioner
    from vlm_bridge.configuration import load_recipe
    from vlm_bridge.evaluation.run_folder import run_of

    checkpoint: Path = given["checkpoint"]
    recipe = load_recipe(given["config"]) if given["config"] else None
    captioner = Captioner.from_pretrained(checkpoint, device, recipe=recipe)
    run = run_of(checkpoint) if checkpoint.exists() else checkpoint  # else on the hub
    facts = {"name": run.resolve().name}
    return captioner, facts | ({"checkpoint": checkpoint.name} if checkpoint.is_file() else {})


def _open_model(given: Mapping[str, Any], device: str) -> tuple[Any, dict[str, Any]]:
    """Return a published captioner and its identity in reports."""
    from vlm_bridge.evaluation.baseline import BaselineCaptioner

    name, revision = given["model"], given["revision"]
    captioner = BaselineCaptioner.from_pretrained(
        name, device, revision=revision, prompt=given["prompt"]
    )
    return captioner, {
        "name": Path(name).resolve().name if Path(name).is_dir() else name,
        "class": type(captioner.model).__name__,
        "revision": revision,
        "prompt": captioner.prompt,
    }


def _print_scores(metrics: Mapping[str, Any]) -> None:
    from vlm_bridge.metrics import SCORES

    rows = [[name, _number(metrics[name])] for name in SCORES if metrics.get(name) is not None]
    rows += [[name, _number(metrics[name])] for name in ("perplexity", "visual_gain")]
    rows.append(["num_images", str(metrics["num_images"])])
    options.print_rows(rows)


def compare(
    scores: Annotated[list[Path], typer.Argument(help="Runs, evaluations or files of scores.")],
    reference: Annotated[str | None, Option(help="Name or path. (default: the first)")] = None,
    force: Annotated[bool, Option("--force", help="Compare different data all the same.")] = False,
    format: Annotated[Format, Option(help="table also has shares of the reference.")] = "table",
    output_dir: Annotated[Path | None, Option(help="Also write report.html here.")] = None,
    as_json: options.AsJson = False,
    html: Annotated[Path | None, Option(hidden=True, callback=options.refuse_file)] = None,
) -> None:
    """Print scores side by side, and each as a share of a reference; refuse those of other data.

    Runs whose recipes differ in their seed alone are joined: mean ± sample standard deviation.
    """
    from vlm_bridge.evaluation.compare import compare as compare_scores
    from vlm_bridge.evaluation.compare import write_comparison
    from vlm_bridge.evaluation.run_folder import REPORT_NAME

    comparison = compare_scores(scores, reference=reference, force=force)
    if output_dir:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_comparison(output_dir / REPORT_NAME, comparison)
    if as_json:
        options.print_json(comparison.to_json())
        return
    for line in comparison.notes:
        note(f"note: {line}")
    if format == "table":
        options.print_rows(comparison.shares_table())
    else:
        print(comparison.table(format))
    if output_dir:
        note(f"report: {output_dir / REPORT_NAME}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run or evaluation, or its scores.")],
    output_dir: Annotated[Path | None, Option(help="(default: in the run)")] = None,
    output: Annotated[
        Path | None, Option("-o", "--output", hidden=True, callback=options.refuse_file)
    ] = None,
) -> None:
    """Write one HTML file about a run: curves, scores, images, captions, recipe, environment."""
    from vlm_bridge.evaluation.report import write_report
    from vlm_bridge.evaluation.run_folder import REPORT_NAME, read_run

    reported = read_run(run)
    path = (output_dir or (run if run.is_dir() else run.parent)) / REPORT_NAME
    on = f" on {reported.data['name']}" if reported.data.get("name") else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(path, [reported], title=f"{reported.name}{on}")
    for line in reported.missing:
        note(f"note: {line}")
    print(f"report: {path}")

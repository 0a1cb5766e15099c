"""`vlm-bridge evaluate`, `compare` and `report`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlm_bridge.cli import options
from vlm_bridge.cli.options import Option, note
from vlm_bridge.errors import UsageError

if TYPE_CHECKING:
    from vlm_bridge.evaluation.run_folder import ReportedRun

Split = StrEnum("Split", ["train", "val", "test"])
Format = Literal["table", "md", "latex", "csv"]


def evaluate(
    data_dir: Annotated[Path, Option(help="Caption folder, or folder of shards.")],
    checkpoint: options.Checkpoint = None,
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
    object_threshold: options.ObjectThreshold = None,
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
    if checkpoint and model:
        raise UsageError("give either --checkpoint (a trained bridge) or --model (a published one)")
    if stray:
        raise UsageError(
            f"--json prints the scores and takes no file ({stray[0]}); --output-dir FOLDER "
            "writes them"
        )
    if model and config:
        raise UsageError("--config is the recipe of a --checkpoint; a --model has none")
    if model is None and (revision, prompt) != (None, None):
        raise UsageError("--revision and --prompt are for a --model")

    from vlm_bridge.configuration import load_recipe
    from vlm_bridge.device import process_rank
    from vlm_bridge.evaluation.run import evaluate as run_evaluation
    from vlm_bridge.evaluation.run_folder import REPORT_NAME

    options.quiet_transformers()
    with options.show_progress("captioned") as report:
        evaluation = run_evaluation(
            checkpoint, data_dir=data_dir, split=split.name, limit=limit, model=model,
            recipe=load_recipe(config) if config else None, revision=revision, prompt=prompt,
            batch_size=batch_size, spice=spice, output_dir=output_dir, device=device,
            progress=report, **options.given_settings(given),
        )  # fmt: skip
    if process_rank() > 0:  # of several processes
        return
    _print_evaluation(evaluation, as_json)
    if output_dir:
        note(f"report: {output_dir / REPORT_NAME}")


def _print_evaluation(evaluation: ReportedRun, as_json: bool) -> None:
    """Print scores, and what failed or was left out to stderr."""
    from vlm_bridge.metrics import SCORES, score_notes

    metrics = evaluation.metrics
    for prediction in evaluation.predictions:
        if prediction.error:
            note(f"failed: {prediction.image.path}: {prediction.error}", always=True)
    for line in score_notes(metrics["skipped"], metrics["tokenizer"]):
        note(f"note: {line}")
    if as_json:
        options.print_json(metrics)
        return
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

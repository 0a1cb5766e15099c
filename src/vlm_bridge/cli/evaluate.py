"""``vlm-bridge evaluate``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from vlm_bridge.configuration import DecodeSettings
    from vlm_bridge.evaluation.run import EvaluableCaptioner, Evaluation, Validate
    from vlm_bridge.training_strategy.distributed import World


class Split(StrEnum):
    """Splits of a caption folder."""

    train = "train"
    val = "val"
    test = "test"


def evaluate(
    checkpoint: Path | None = typer.Option(
        None, help="Trained bridge: a checkpoint file or folder."
    ),
    model: str | None = typer.Option(
        None,
        metavar="NAME_OR_FOLDER",
        help="Instead: a BLIP, GIT or vision-encoder-decoder captioner, on the hub or in a folder.",
    ),
    data_dir: Path = typer.Option(
        ..., help="Caption folder, as `vlm-data transform` writes it, or shards."
    ),
    config: Path | None = typer.Option(
        None,
        "--config",
        "-c",
        help="Recipe of a checkpoint that names none (the original project's).",
    ),
    revision: str | None = typer.Option(
        None, help="Branch, tag or commit of a --model on the hub."
    ),
    prompt: str | None = typer.Option(
        None, help="Text that a --model continues. (default: BLIP 'a picture of', others none)"
    ),
    split: Split = typer.Option(Split.val, help="Which images to caption."),
    limit: int | None = typer.Option(None, min=1, help="Only the first N images."),
    batch_size: int = typer.Option(32, min=1, help="Images captioned together."),
    num_beams: int | None = typer.Option(
        None, min=1, help="Beams; 1 is greedy. (default: the recipe's)"
    ),
    max_new_tokens: int | None = typer.Option(
        None, min=1, help="Longest caption, in tokens. (default: the recipe's)"
    ),
    min_new_tokens: int | None = typer.Option(
        None, min=0, help="Shortest caption, in tokens. (default: the recipe's)"
    ),
    length_penalty: float | None = typer.Option(
        None, help="Above 0 favours long captions among beams. (default: the recipe's)"
    ),
    repetition_penalty: float | None = typer.Option(
        None, help="Above 1 discourages repeated tokens. (default: the recipe's)"
    ),
    no_repeat_ngram_size: int | None = typer.Option(
        None, min=0, help="Never repeat n-grams of this size; 0 is off. (default: the recipe's)"
    ),
    object_bonus: float | None = typer.Option(
        None,
        min=0,
        help="Nats for naming what the encoder's classifier recognises; 0 is off. (default: the recipe's)",
    ),
    spice: bool = typer.Option(
        False, "--spice", help="Also SPICE: slow, needs Java and the CoreNLP models."
    ),
    json_file: Path | None = typer.Option(
        None, "--json", help="Write the scores to this JSON file."
    ),
    output_dir: Path | None = typer.Option(
        None, help="Write predictions with their scores, a contact sheet and report.html here."
    ),
    device: str = typer.Option("auto", help="auto, cpu, cuda, cuda:1, mps."),
) -> None:
    """Score a captioner with BLEU, METEOR, ROUGE-L, CIDEr, perplexity and visual gain.

    Our own (--checkpoint) or a published one (--model), on the same data with the same decoding and metrics.
    """
    from vlm_bridge.cli.progress import note
    from vlm_bridge.data_pipeline.caption_folder import open_data_folder, readable_split
    from vlm_bridge.errors import UsageError

    if (checkpoint is None) == (model is None):
        raise UsageError(
            "give either --checkpoint (a trained bridge) or --model (a published captioner)"
        )
    if model is not None and config is not None:
        raise UsageError("--config is the recipe of a --checkpoint; a --model has none")
    if model is None and (revision is not None or prompt is not None):
        raise UsageError("--revision and --prompt are for a --model")

    # Everything that can be wrong with the paths is found before minutes of captioning.
    folder = open_data_folder(data_dir)
    images, skipped = readable_split(folder, split.value)
    images = images[:limit]
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
    if output_dir:
        output_dir.mkdir(parents=True, exist_ok=True)

    from vlm_bridge.cli.quiet import quiet_transformers
    from vlm_bridge.evaluation.run import (
        caption_and_validate,
        evaluate_captioner,
        write_evaluation,
        write_json,
    )
    from vlm_bridge.evaluation.shared import SharedCaptioner
    from vlm_bridge.training_strategy.distributed import joined

    quiet_transformers()
    asked = {
        "num_beams": num_beams, "max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens,
        "length_penalty": length_penalty, "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size, "object_bonus": object_bonus,
    }  # fmt: skip
    given = {name: value for name, value in asked.items() if value is not None}
    with joined(device) as world:
        subject = (
            _open_checkpoint(checkpoint, config, world)
            if checkpoint
            else _open_model(str(model), str(world.device), revision, prompt)
        )
        captioner, decode = (
            SharedCaptioner(subject.captioner, world),
            subject.decode.replace(**given),
        )
        if not world.is_first:  # the first process scores and writes
            caption_and_validate(
                captioner, images, decode=decode, validate=subject.validate, batch_size=batch_size
            )
            return
        with _progress(len(images)) as advance:
            evaluation = evaluate_captioner(
                captioner,
                images,
                decode=decode,
                validate=subject.validate,
                batch_size=batch_size,
                spice=spice,
                progress=advance,
                model=subject.facts,
                data={
                    "name": data_dir.resolve().name,
                    "split": split.value,
                    "fingerprint": folder.fingerprint,
                },
            )
    if json_file:
        write_json(json_file, evaluation.to_json())
    if output_dir:
        title = f"{subject.facts['name']} on {data_dir.resolve().name}, {split.value}"
        write_evaluation(evaluation, output_dir, title=title, recipe_yaml=subject.recipe_yaml)
    for failure in evaluation.failures:
        print(f"failed: {failure.image.path}: {failure.error}", file=sys.stderr)
    if len(skipped):
        count = f"{len(skipped):,} of {skipped.total:,} {skipped.kind}"
        note(f"skipped {count}: {skipped.summary()}")
    for line in evaluation.scores.notes():
        note(f"note: {line}")
    _print_scores(evaluation)
    if output_dir:
        print(f"report: {output_dir / 'report.html'}")


@dataclasses.dataclass(frozen=True)
class _Subject:
    """The captioner under evaluation, its decoding settings and its identity."""

    captioner: EvaluableCaptioner
    decode: DecodeSettings
    facts: dict[str, Any]
    recipe_yaml: str = ""
    validate: Validate | None = None


def _open_checkpoint(checkpoint: Path, config: Path | None, world: World) -> _Subject:
    from vlm_bridge.captioning.pipeline import Captioner
    from vlm_bridge.configuration import load_recipe

    recipe = load_recipe(config) if config else None
    captioner = Captioner.from_pretrained(checkpoint, str(world.device), recipe=recipe)
    run = checkpoint.resolve()
    facts: dict[str, Any] = {"name": run.name}
    if checkpoint.is_file():
        # RUN/checkpoints/best_model.pth and RUN/best_model.pth both have the name of the run.
        run = run.parent.parent if run.parent.name == "checkpoints" else run.parent
        facts = {"name": run.name, "checkpoint": checkpoint.name}
    return _Subject(
        captioner,
        captioner.recipe.decode,
        facts,
        captioner.recipe.to_yaml(),
        partial(captioner.validate, world=world),
    )


def _open_model(name: str, device: str, revision: str | None, prompt: str | None) -> _Subject:
    from vlm_bridge.configuration import DecodeSettings
    from vlm_bridge.evaluation.baseline import BaselineCaptioner

    captioner = BaselineCaptioner.from_pretrained(name, device, revision=revision, prompt=prompt)
    facts = {
        "name": Path(name).resolve().name if Path(name).is_dir() else name,
        "class": type(captioner.model).__name__,
        "revision": revision,
        "prompt": captioner.prompt,
    }
    return _Subject(captioner, DecodeSettings(), facts)


def _print_scores(evaluation: Evaluation) -> None:
    """A table on a terminal, ``name<TAB>value`` lines on a pipe."""
    rows = [
        *((name, f"{score:.4f}") for name, score in evaluation.scores.corpus.items()),
        ("perplexity", "-" if evaluation.perplexity is None else f"{evaluation.perplexity:.3f}"),
        ("visual_gain", "-" if evaluation.visual_gain is None else f"{evaluation.visual_gain:.4f}"),
        ("num_images", str(len(evaluation.predictions))),
    ]
    if not sys.stdout.isatty():
        print("\n".join("\t".join(row) for row in rows))
        return
    from rich.console import Console
    from rich.table import Table

    settings = evaluation.decode
    caption = f"{settings.num_beams} beams, up to {settings.max_new_tokens} tokens; fractions, not percent"
    table = Table("metric", caption=caption)
    table.add_column("score", justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show the number of captioned images: a bar on a terminal, plain lines elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(console=console) as bar:
            task = bar.add_task("captioning", total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    tenths = 0

    def report(done: int) -> None:
        nonlocal tenths
        if done * 10 // total > tenths:
            tenths = done * 10 // total
            print(f"captioned {done} of {total} images", file=sys.stderr, flush=True)

    yield report

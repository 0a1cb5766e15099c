"""`vlm-bridge caption`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlm_bridge.credentials import redact
from vlm_bridge.errors import on_one_line

if TYPE_CHECKING:
    from vlm_bridge.captioning.pipeline import Captioner, CaptionResult
    from vlm_bridge.data_pipeline.isolated import ImageReader


def caption(
    paths: list[str] = typer.Argument(..., help="Pictures, folders of pictures, or globs."),
    checkpoint: Path = typer.Option(
        None,
        "--checkpoint",
        help="A checkpoint, or the folder of a training run. (default: the bundled captioner)",
    ),
    config: Path = typer.Option(
        None,
        "--config",
        "-c",
        help="Recipe of a checkpoint that names none (the original project's).",
    ),
    num_beams: int = typer.Option(None, min=1, help="Beams; 1 is greedy. Default: the recipe's."),
    max_new_tokens: int = typer.Option(
        None, min=1, help="Longest caption, in tokens. Default: the recipe's."
    ),
    length_penalty: float = typer.Option(None, help="Above 0 favours long captions among beams."),
    object_bonus: float = typer.Option(
        None, min=0, help="Nats for naming what the encoder's classifier recognises; 0 is off."
    ),
    do_sample: bool = typer.Option(False, "--do-sample", help="Sample instead of searching."),
    temperature: float = typer.Option(None, help="Temperature of sampling."),
    seed: int = typer.Option(None, help="Seed of sampling."),
    batch_size: int = typer.Option(32, min=1, help="Pictures captioned together."),
    device: str = typer.Option("auto", help="auto, cpu, cuda, cuda:1, mps."),
    compile: bool = typer.Option(
        False,
        "--compile",
        help="Compile the step that makes a token: for NVIDIA GPUs and many pictures.",
    ),
    explain: Path = typer.Option(
        None, help="Write a PNG for each picture to this folder: where in it each word looked."
    ),
    max_pixels: int = typer.Option(
        None, min=0, help="Pixels of an image at most, 0 for no limit. (default: 51,000,000)"
    ),
    json_output: bool = typer.Option(
        False, "--json", help="Print a JSON list of {image, caption, score}."
    ),
) -> None:
    """Caption images in the order given, a line each: NAME<TAB>CAPTION, or CAPTION for one image.

    Line breaks and tabs within a name are written as \\n and \\t; --json has names as they are.
    A file that cannot be read is one line on stderr (exit code 1).
    """
    from vlm_bridge.cli.quiet import quiet_transformers, without_garbage_collection
    from vlm_bridge.configuration import load_recipe
    from vlm_bridge.data_pipeline import images
    from vlm_bridge.data_pipeline.isolated import ImageReader

    # What can be wrong with the paths is found before the seconds that torch and transformers take.
    pictures = images.iter_image_paths(paths)
    if max_pixels is not None:
        images.LIMITS.max_pixels = max_pixels
    if explain is not None:
        explain.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(config) if config else None

    with without_garbage_collection():
        from vlm_bridge.captioning.pipeline import Captioner

        quiet_transformers()
        captioner = Captioner.from_pretrained(checkpoint, device, recipe=recipe, compile=compile)
    changes = {
        "num_beams": 1 if do_sample and num_beams is None else num_beams,
        "max_new_tokens": max_new_tokens,
        "length_penalty": length_penalty,
        "object_bonus": object_bonus,
        "do_sample": do_sample or None,
        "temperature": temperature,
        "seed": seed,
    }
    given = {key: value for key, value in changes.items() if value is not None}
    decode = captioner.recipe.decode.replace(**given)

    with ImageReader(min(2, len(pictures))) as reader:
        results = captioner.caption(
            pictures, decode=decode, batch_size=batch_size, open_image=reader.open_image
        )
        panels = _write_explanations(captioner, results, explain, reader) if explain else {}
    _print_lines(results, captions=not json_output)
    if json_output:
        rows = [_json_row(result, panels.get(i)) for i, result in enumerate(results)]
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    if any(result.error is not None for result in results):
        raise typer.Exit(1)


def _print_lines(results: list[CaptionResult], *, captions: bool) -> None:
    """Print errors to stderr, and captions to stdout if asked for."""
    for result in results:
        if result.error is not None:
            typer.echo(on_one_line(redact(f"{result.image}: {result.error}")), err=True)
        elif captions:
            line = on_one_line(result.caption or "")
            typer.echo(f"{on_one_line(str(result.image))}\t{line}" if len(results) > 1 else line)


def _json_row(result: CaptionResult, panel: str | None) -> dict[str, str | float | None]:
    if result.error is not None:
        return {"image": redact(str(result.image)), "error": redact(result.error)}
    explanation = {"explanation": panel} if panel else {}
    return {
        "image": result.image,
        "caption": result.caption,
        "score": result.score,
        **explanation,
    }


def _write_explanations(
    captioner: Captioner, results: list[CaptionResult], folder: Path, reader: ImageReader
) -> dict[int, str]:
    """Write a PNG named like each captioned image; return the path of each result's index."""
    from vlm_bridge.captioning.attention_panels import attention_panels
    from vlm_bridge.captioning.explain import explain

    written: dict[int, str] = {}
    taken: set[str] = set()
    for index, result in enumerate(results):
        if result.caption is None:
            continue
        stem, number = Path(result.image).stem, 1
        while (name := stem if number == 1 else f"{stem}-{number}") in taken:  # from another folder
            number += 1
        taken.add(name)
        picture = reader.open_image(result.image)
        path = folder / f"{name}.png"
        attention_panels(explain(captioner, picture, caption=result.caption), picture).save(path)
        written[index] = str(path)
    return written

"""`vlm-bridge caption` and `vlm-bridge demo`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_bridge.cli import options
from vlm_bridge.cli.options import Option
from vlm_bridge.credentials import redact
from vlm_bridge.errors import UsageError, on_one_line

if TYPE_CHECKING:
    from vlm_bridge.captioning.pipeline import Captioner, CaptionResult
    from vlm_bridge.captioning.results_file import ResultsFile
    from vlm_bridge.configuration import DecodeSettings
    from vlm_bridge.data_pipeline.images import ImageReader


NAMED = 5  # images that a note names


def caption(
    paths: Annotated[list[str], typer.Argument(help="Images, folders of images, or globs.")],
    checkpoint: options.Checkpoint = None,
    config: options.Config = None,
    output: Annotated[
        Path | None, Option("-o", "--output", help="Write FILE.csv or .jsonl.")
    ] = None,
    num_beams: options.NumBeams = None,
    max_new_tokens: options.MaxNewTokens = None,
    min_new_tokens: options.MinNewTokens = None,
    length_penalty: options.LengthPenalty = None,
    repetition_penalty: options.RepetitionPenalty = None,
    no_repeat_ngram_size: options.NoRepeatNgramSize = None,
    object_threshold: options.ObjectThreshold = None,
    do_sample: Annotated[bool | None, Option("--do-sample", help="Sample, no search.")] = None,
    temperature: Annotated[float | None, Option(help="Temperature of sampling.")] = None,
    top_p: Annotated[float | None, Option(help="Sample from so much probability.")] = None,
    seed: Annotated[int | None, Option(help="Seed of sampling.")] = None,
    batch_size: options.BatchSize = 32,
    device: options.Device = "auto",
    compile: Annotated[bool, Option("--compile", help="Compile decoding (NVIDIA GPUs).")] = False,
    explain: Annotated[Path | None, Option(help="Folder of PNGs: where words looked.")] = None,
    max_pixels: Annotated[int | None, Option(min=0, help="Pixels of an image, 0: any.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Caption images in the order given, a line each: NAME<TAB>CAPTION, or CAPTION for one image.

    Line breaks and tabs within a name are written as \\n and \\t; --json has names as they are.
    A file that cannot be read is one line on stderr (exit code 1). Settings of generation are the
    recipe's unless they are given. --output writes image, caption, score and error to a file
    instead; the same command continues it after an interruption, or with further images.
    """
    given = dict(locals())
    if output and as_json:
        raise UsageError("give either --json, which prints, or --output, which writes a file")

    from vlm_bridge.captioning.results_file import ResultsFile
    from vlm_bridge.configuration import load_recipe
    from vlm_bridge.data_pipeline import images

    # Wrong paths are found before the seconds that torch and transformers take to load.
    files = images.iter_image_paths(paths)
    if max_pixels is not None:
        images.LIMITS.max_pixels = max_pixels
    if explain is not None:
        explain.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(config) if config else None
    results = ResultsFile(output) if output else None
    if not (left := _left(files, results)):
        return

    with images.ImageReader(min(2, len(left))) as reader:
        reader.submit("", int)  # its processes start while the models load
        captioner = _load(checkpoint, device, recipe=recipe, compile=compile)
        printing = _printing(as_json, named=len(files) > 1)
        with nullcontext(results.add) if results else printing as write:
            failures = _caption_files(captioner, left, given, reader, write)
    if failures:
        raise typer.Exit(1)


def _load(checkpoint: Path | None, device: str, **arguments: Any) -> Captioner:
    with options.without_garbage_collection():
        options.quiet_transformers()
        from vlm_bridge.captioning.pipeline import Captioner

        return Captioner.from_pretrained(checkpoint, device, **arguments)


def _left(files: list[Path], results: ResultsFile | None) -> list[Path]:
    """Return the files that have no caption yet."""
    if results is None:
        return files
    left = [file for file in files if file not in results]
    if done := len(files) - len(left):
        options.note(f"{results.path} has captions of {done} of the {len(files)} images")
    return left


def _caption_files(
    captioner: Captioner,
    files: Sequence[Path],
    given: Mapping[str, Any],
    reader: ImageReader,
    write: Callable[[dict[str, Any]], None],
) -> int:
    """Write a row for each image when it is ready; return the number of failed images.

    Args:
        given: the options of `caption` by name.
    """
    done = failures = 0
    unsure: list[str] = []
    output, several = given["output"], len(files) > 1
    bar = options.show_progress("images", plain_lines=output is not None) if several else None
    with bar or nullcontext() as report:
        try:
            for row in _rows(captioner, files, given, reader):
                write(row)
                done, failures = done + 1, failures + ("error" in row)
                unsure += [on_one_line(row["image"])] if row.get("unsure") else []
                if report:
                    report(done, len(files))
        except KeyboardInterrupt:
            kept = f" in {output}: the same command continues" if output else ""
            options.note(f"interrupted: {done} of {len(files)} images are done{kept}", always=True)
            raise typer.Exit(130) from None
    if output:
        print(f"captions: {output} ({done - failures} new, {failures} failed)")
    if unsure and not given["as_json"]:
        more = f" and {len(unsure) - NAMED} more" if len(unsure) > NAMED else ""
        which = f": {', '.join(unsure[:NAMED])}{more}" if several else ""
        options.note(f"unlike the training images, so the caption may well be wrong{which}")
    return failures


def _rows(
    captioner: Captioner, files: Sequence[Path], given: Mapping[str, Any], reader: ImageReader
) -> Iterator[dict[str, Any]]:
    """Yield image, caption and score, or image and error, which is also printed to stderr."""
    folder, panels = given["explain"], []
    settings, batch_size = options.given_settings(given), given["batch_size"]
    decode = captioner.recipe.decode.replace(**settings)
    for result in captioner.stream(
        files, batch_size=batch_size, open_image=reader.open_image, **settings
    ):
        if result.error is not None:
            options.note(on_one_line(redact(f"{result.image}: {result.error}")), always=True)
            yield {"image": redact(result.image), "error": redact(result.error)}
            continue
        row = {"image": result.image, "caption": result.caption, "score": result.score}
        row |= result.sureness()
        if folder:
            panels.append(_explain(captioner, result, decode, folder, panels, reader))
            row["explanation"] = panels[-1]
        yield row


@contextmanager
def _printing(as_json: bool, *, named: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that prints a row: CAPTION, NAME<TAB>CAPTION, or an item of an array."""
    before = "["

    def print_line(row: dict[str, Any]) -> None:
        if "caption" in row:
            name = f"{on_one_line(row['image'])}\t" if named else ""
            print(name + on_one_line(row["caption"]), flush=True)

    def print_item(row: dict[str, Any]) -> None:
        nonlocal before
        text = json.dumps(row, indent=2, ensure_ascii=False).replace("\n", "\n  ")
        print(f"{before}\n  {text}", end="", flush=True)
        before = ","

    try:
        yield print_item if as_json else print_line
    finally:
        if before == ",":  # after an interruption, too
            print("\n]")


def _explain(
    captioner: Captioner,
    result: CaptionResult,
    decode: DecodeSettings,
    folder: Path,
    others: Sequence[str],
    reader: ImageReader,
) -> str:
    """Write a PNG named like the image, and unlike others; return its path."""
    from vlm_bridge.captioning.explain import attention_panels, explain

    stem, number = Path(result.image).stem, 2
    path = folder / f"{stem}.png"
    while str(path) in others:  # an image of another folder has the same name
        path, number = folder / f"{stem}-{number}.png", number + 1
    image = reader.open_image(result.image)
    attention_panels(explain(captioner, image, decode, caption=result.caption), image).save(path)
    return str(path)


def demo(
    checkpoint: options.Checkpoint = None,
    config: options.Config = None,
    host: Annotated[str, Option(help="Address; 0.0.0.0 lets the network in.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 7860,
    run: Annotated[Path | None, Option("--run", help="A training run to show live.")] = None,
    root_path: Annotated[
        str, Option(help="Path behind a proxy, or its address: https://NAME/PATH.")
    ] = "",
    device: options.Device = "auto",
) -> None:
    """Serve a page that captions images and shows a training run, and a JSON endpoint."""
    if find_spec("gradio") is None:
        raise UsageError("the demo page needs gradio: pip install 'vlm-bridge[demo]'")

    from vlm_bridge.captioning.pipeline import Captioner
    from vlm_bridge.configuration import load_recipe
    from vlm_bridge.data_pipeline.images import ImageReader
    from vlm_bridge.demo.server import serving
    from vlm_bridge.demo.service import CaptionService
    from vlm_bridge.quickstart import real_photographs
    from vlm_bridge.training_strategy.checkpoint import BUNDLED

    options.quiet_transformers()
    recipe = load_recipe(config) if config else None
    captioner = Captioner.from_pretrained(checkpoint, device, recipe=recipe)
    examples = [
        (name.removeprefix("scikit-image ").capitalize(), image)
        for name, image in real_photographs()
    ]
    if root_path and "://" not in root_path:
        root_path = "/" + root_path.strip("/")
    with ImageReader() as reader:
        service = CaptionService(captioner, str(checkpoint or BUNDLED), reader.open_image)
        with serving(
            service, host, port, run=run, examples=examples, root_path=root_path.rstrip("/")
        ) as address:
            print(f"serving on {address} (Ctrl-C stops)", flush=True)
            threading.Event().wait()

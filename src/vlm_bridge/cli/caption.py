"""`vlm-bridge caption` and `vlm-bridge demo`."""

from __future__ import annotations

import threading
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
    from vlm_bridge.data_pipeline.images import ImageReader

SETTINGS = ("num_beams", "max_new_tokens", "length_penalty", "object_bonus", "temperature", "seed")


def caption(
    paths: Annotated[list[str], typer.Argument(help="Images, folders of images, or globs.")],
    checkpoint: options.Checkpoint = None,
    config: options.Config = None,
    num_beams: options.NumBeams = None,
    max_new_tokens: options.MaxNewTokens = None,
    length_penalty: options.LengthPenalty = None,
    object_bonus: options.ObjectBonus = None,
    do_sample: Annotated[bool, Option("--do-sample", help="Sample instead of searching.")] = False,
    temperature: Annotated[float | None, Option(help="Temperature of sampling.")] = None,
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
    recipe's unless they are given.
    """
    given = dict(locals())

    from vlm_bridge.configuration import load_recipe
    from vlm_bridge.data_pipeline import images

    # Wrong paths are found before the seconds that torch and transformers take to load.
    files = images.iter_image_paths(paths)
    if max_pixels is not None:
        images.LIMITS.max_pixels = max_pixels
    if explain is not None:
        explain.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(config) if config else None

    with options.without_garbage_collection():
        from vlm_bridge.captioning.pipeline import Captioner

        options.quiet_transformers()
        captioner = Captioner.from_pretrained(checkpoint, device, recipe=recipe, compile=compile)
    sampling = {"do_sample": True, "num_beams": 1} if do_sample else {}
    changes = {name: value for name in SETTINGS if (value := given[name]) is not None}
    decode = captioner.recipe.decode.replace(**sampling | changes)
    with images.ImageReader(min(2, len(files))) as reader:
        opened = {"batch_size": batch_size, "open_image": reader.open_image}
        results = list(captioner.stream(files, decode=decode, **opened))
        panels = _write_explanations(captioner, results, explain, reader) if explain else {}
    _print_results(results, panels, as_json)
    if any(result.error is not None for result in results):
        raise typer.Exit(1)


def _print_results(results: list[CaptionResult], panels: dict[int, str], as_json: bool) -> None:
    """Print errors to stderr and captions to stdout."""
    rows: list[dict[str, Any]] = []
    for number, result in enumerate(results):
        if result.error is not None:
            options.note(on_one_line(redact(f"{result.image}: {result.error}")), always=True)
            rows.append({"image": redact(result.image), "error": redact(result.error)})
            continue
        rows.append({"image": result.image, "caption": result.caption, "score": result.score})
        if number in panels:
            rows[-1]["explanation"] = panels[number]
        if not as_json:
            name = f"{on_one_line(result.image)}\t" if len(results) > 1 else ""
            print(name + on_one_line(result.caption or ""))
    if as_json:
        options.print_json(rows)


def _write_explanations(
    captioner: Captioner, results: list[CaptionResult], folder: Path, reader: ImageReader
) -> dict[int, str]:
    """Write a PNG named like each captioned image; return the path of each result's index."""
    from vlm_bridge.captioning.explain import attention_panels, explain

    written: dict[int, str] = {}
    for index, result in enumerate(results):
        if result.caption is None:
            continue
        stem, number = Path(result.image).stem, 2
        path = folder / f"{stem}.png"
        while str(path) in written.values():  # an image of another folder has the same name
            path, number = folder / f"{stem}-{number}.png", number + 1
        image = reader.open_image(result.image)
        attention_panels(explain(captioner, image, caption=result.caption), image).save(path)
        written[index] = str(path)
    return written


def demo(
    checkpoint: options.Checkpoint = None,
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
    from vlm_bridge.data_pipeline.images import ImageReader
    from vlm_bridge.demo.server import serving
    from vlm_bridge.demo.service import CaptionService
    from vlm_bridge.quickstart import real_photographs

    options.quiet_transformers()
    captioner = Captioner.from_pretrained(checkpoint, device)
    examples = [
        (name.removeprefix("scikit-image ").capitalize(), image)
        for name, image in real_photographs()
    ]
    if root_path and "://" not in root_path:
        root_path = "/" + root_path.strip("/")
    with ImageReader() as reader:
        service = CaptionService(captioner, checkpoint and str(checkpoint), reader.open_image)
        with serving(
            service, host, port, run=run, examples=examples, root_path=root_path.rstrip("/")
        ) as address:
            print(f"serving on {address} (Ctrl-C stops)", flush=True)
            threading.Event().wait()

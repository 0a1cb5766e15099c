"""`vlm-bridge finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlm_bridge.cli import options
from vlm_bridge.cli.options import Option
from vlm_bridge.errors import DataError

if TYPE_CHECKING:
    from vlm_bridge.finetuning import FineTuned

SHOWN_SCORES = ("CIDEr", "BLEU-4", "perplexity", "visual_gain")


def finetune(
    images: Annotated[Path, typer.Argument(help="Folder of images with captions.")],
    output_dir: Annotated[Path, Option(help="Folder of the new captioner and its report.")],
    overrides: options.Overrides = None,
    start: Annotated[
        str, Option("--from", metavar="bundled|CKPT|HUB", help="Captioner to start from.")
    ] = "bundled",
    captions_file: Annotated[Path | None, Option(help="Caption file, if it is not found.")] = None,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Teach a captioner the style of your own captioned images (20 to 20,000), and compare.

    Captions are found as `vlm-data transform` finds them: captions.csv (image,caption), a text file
    beside each image, and others. A fifth to a tenth of the images is held out, and captioned
    before and after. The recipe is chosen by the number of images; KEY=VALUE changes it.
    """
    if not images.is_dir():  # found before torch is loaded
        hint = f" (--captions-file {images} names captions)" if images.is_file() else ""
        raise DataError(f"no such folder: {images}{hint}")

    from vlm_bridge.finetuning import TRAINING
    from vlm_bridge.finetuning import finetune as run
    from vlm_bridge.training_strategy.resume import Interrupted

    options.quiet_transformers()
    try:
        result = run(
            images, output_dir, start=start, captions_file=captions_file, device=device,
            overrides=overrides or (),
            progress=lambda what: options.show_progress(what, plain_lines=what != TRAINING),
        )  # fmt: skip
    except (Interrupted, KeyboardInterrupt) as interruption:
        options.note("interrupted: the same command continues where this one stopped", always=True)
        raise typer.Exit(getattr(interruption, "exit_code", 130)) from None
    if as_json:
        options.print_json(result.to_dict())
    else:
        _print_result(result)


def _print_result(result: FineTuned) -> None:
    for example in result.examples:
        print(f"{Path(example.image).name}\n  before  {example.before}\n  after   {example.after}")
        print(f"  yours   {example.reference}")
    rows = [["", "before", "after"]]
    for name in SHOWN_SCORES:
        if name in result.before and name in result.after:
            rows.append([name, f"{result.before[name]:.4f}", f"{result.after[name]:.4f}"])
    options.print_rows(rows)
    print(f"{result.verdict}\n{result.seconds / 60:.1f} minutes; report: {result.report}")
    print(f"next: vlm-bridge caption IMAGE --checkpoint {result.checkpoint}")

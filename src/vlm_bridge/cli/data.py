"""``vlm-data``: look at a dataset, turn it into a caption folder, look at what training will read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from vlm_bridge.configuration import Recipe
    from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
    from vlm_bridge.data_pipeline.sources import SourceItem

app = typer.Typer(
    name="vlm-data",
    help="Explore a dataset, turn it into a caption folder, inspect what training reads.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


# Both are written out, since importing the originals would slow down --help; a test compares them.
class SourceName(StrEnum):
    """Names in ``data_pipeline.sources.SOURCES``."""

    flickr8k = "flickr8k"
    local = "local"
    scenes = "scenes"


class CaptionStyleName(StrEnum):
    """Names in ``data_pipeline.captions.CAPTION_STYLES``."""

    sentence = "sentence"
    raw = "raw"


_INPUT_DIR = typer.Option(None, help="Folder of the dataset (flickr8k, local).")
_CAPTIONS_FILE = typer.Option(None, help="Caption file (local).  [default: found in the input folder]")
_NUM_TRAIN = typer.Option(10_000, min=0, help="Pictures to draw (scenes).")
_NUM_VAL = typer.Option(500, min=0, help="Pictures to draw (scenes).")
_NUM_TEST = typer.Option(1_000, min=0, help="Pictures of unseen colour-shape pairs to draw (scenes).")
_WORDINGS = typer.Option(2, min=1, max=2, help="Captions a picture (scenes).")
_SEED = typer.Option(0, help="Seed of the splits (local) or of the drawing (scenes).")
_JSON = typer.Option(False, "--json", help="Print JSON.")


@app.command("explore-dataset")
def explore_dataset(
    source: SourceName = typer.Option(None, help="A dataset in its own layout."),
    data_dir: Path = typer.Option(None, help="A caption folder, instead of a source."),
    input_dir: Path = _INPUT_DIR,
    captions_file: Path = _CAPTIONS_FILE,
    num_train: int = _NUM_TRAIN,
    num_val: int = _NUM_VAL,
    num_test: int = _NUM_TEST,
    wordings: int = _WORDINGS,
    seed: int = _SEED,
    samples: int = typer.Option(8, min=0, help="Images to show."),
    grid: Path = typer.Option(None, help="Also write the shown images with their captions to this PNG."),
    json_output: bool = _JSON,
) -> None:
    """Show sizes, caption lengths, vocabulary and a few samples of a source or a caption folder."""
    import json
    from dataclasses import asdict

    from vlm_bridge.cli.progress import show_progress
    from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
    from vlm_bridge.data_pipeline.explore import describe_items, folder_items, sample_items
    from vlm_bridge.data_pipeline.sources import SourceOptions, make_source
    from vlm_bridge.errors import UsageError

    if (source is None) == (data_dir is None):
        raise UsageError("give either --source or --data-dir")
    if data_dir is not None:
        items, set_aside = folder_items(CaptionFolder.open(data_dir)), []
    else:
        options = SourceOptions(input_dir, captions_file, num_train, num_val, num_test, seed, wordings)
        opened = make_source(source.value, options)
        items, set_aside = opened.items(), opened.rejected
    with show_progress("pictures measured") as report:
        statistics = describe_items(items, report)
    shown = sample_items(items, samples, seed)
    statistics["set_aside"] = [asdict(item) for item in set_aside]
    statistics["samples"] = [
        {"id": item.image_id, "split": item.split, "captions": item.captions} for item in shown
    ]
    if grid is not None:
        _write_grid(shown, grid)
    if json_output:
        print(json.dumps(statistics, indent=2, ensure_ascii=False))
    else:
        _print_statistics(statistics)
        if grid is not None:
            print(f"\npictures: {grid}")


@app.command("transform")
def transform(
    source: SourceName = typer.Option(..., help="A dataset in its own layout."),
    output_dir: Path = typer.Option(..., help="The caption folder to make."),
    input_dir: Path = _INPUT_DIR,
    captions_file: Path = _CAPTIONS_FILE,
    num_train: int = _NUM_TRAIN,
    num_val: int = _NUM_VAL,
    num_test: int = _NUM_TEST,
    wordings: int = _WORDINGS,
    seed: int = _SEED,
    val_fraction: float = typer.Option(0.1, help="Share for validation, where the source has no splits."),
    test_fraction: float = typer.Option(0.1, help="Share for testing, where the source has no splits."),
    image_size: int = typer.Option(640, help="Longest side of a stored picture, in pixels."),
    caption_style: CaptionStyleName = typer.Option(
        None, help="sentence tidies captions into sentences.  [default: the source's]"
    ),
    limit: int = typer.Option(None, help="At most N images a split, for a quick trial."),
    near_duplicate_distance: int = typer.Option(
        4, help="Report pictures whose perceptual hashes differ in at most N of 64 bits."
    ),
    workers: int = typer.Option(None, help="Processes.  [default: one a core, at most 8]"),
    json_output: bool = _JSON,
) -> None:
    """Turn a dataset into a caption folder. Ctrl-C stops; the same command continues."""
    import json

    from vlm_bridge.cli.progress import show_progress
    from vlm_bridge.data_pipeline.sources import SourceOptions, make_source
    from vlm_bridge.data_pipeline.transform import transform as run

    options = SourceOptions(input_dir, captions_file, num_train, num_val, num_test, seed, wordings)
    try:
        with show_progress("pictures") as report:
            manifest = run(
                make_source(source.value, options),
                output_dir,
                workers=workers if workers is not None else _default_workers(),
                seed=seed,
                val_fraction=val_fraction,
                test_fraction=test_fraction,
                image_size=image_size,
                caption_style=caption_style.value if caption_style else None,
                limit=limit,
                near_duplicate_distance=near_duplicate_distance,
                progress=report,
            )
    except KeyboardInterrupt:
        print("interrupted: the same command continues where this one stopped", file=sys.stderr)
        raise typer.Exit(130) from None
    if json_output:
        print(json.dumps(manifest, indent=2, ensure_ascii=False))
    else:
        _print_manifest(manifest, output_dir)


@app.command("inspect-loader")
def inspect_loader(
    data_dir: Path = typer.Option(None, help="A caption folder.  [default: the recipe's]"),
    config: Path = typer.Option(None, help="A recipe: also shows the batch as its language model's tokens."),
    batch_size: int = typer.Option(None, min=1, help="Captions in a batch.  [default: the recipe's]"),
    check: int = typer.Option(256, min=0, help="Pictures to decode as a check."),
    check_all: bool = typer.Option(False, "--all", help="Decode every picture and compare the fingerprint."),
    json_output: bool = _JSON,
) -> None:
    """Check a caption folder and show the first batch that training would read."""
    import json
    from dataclasses import replace

    from vlm_bridge.cli.progress import show_progress
    from vlm_bridge.configuration import load_recipe
    from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
    from vlm_bridge.data_pipeline.explore import describe_items, find_broken, folder_items, sample_items
    from vlm_bridge.errors import DataError, UsageError

    if data_dir is None and config is None:
        raise UsageError("give --data-dir, --config, or both")
    recipe = load_recipe(config)
    if batch_size is not None:
        recipe = replace(recipe, batch_size=batch_size)
    folder = CaptionFolder.open(data_dir or recipe.data_dir)
    items = folder_items(folder)
    statistics = describe_items(items)
    checked = items if check_all else sample_items(items, check)
    with show_progress("pictures decoded") as report:
        broken = find_broken(checked, report)
    if check_all and not broken and folder.compute_fingerprint() != folder.fingerprint:
        raise DataError(
            f"{folder.root} was changed after it was made (its fingerprint differs): make it again"
        )

    batch = None
    if "train" in folder.splits:
        batch = _first_batch(folder.split("train"), recipe, with_tokens=config is not None)
    if json_output:
        result = {
            "data_dir": str(folder.root),
            "fingerprint": folder.fingerprint,
            "statistics": statistics,
            "pictures_decoded": len(checked),
            "broken": [{"id": item.id, "reason": item.reason} for item in broken],
            "first_batch": batch,
        }
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        print(f"{folder.root}: {folder.manifest.get('source', 'unknown source')}, {folder.fingerprint}")
        _print_statistics(statistics)
        print(f"\n{len(checked)} of {len(items)} pictures decoded, {len(broken)} broken")
        for item in broken:
            print(f"  {item.id}: {item.reason}")
        if batch:
            _print_batch(batch)
    if broken:
        raise DataError(f"{len(broken)} pictures of {folder.root} cannot be read: make the folder again")


def _default_workers() -> int:
    import os

    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _first_batch(images: Sequence[CaptionedImage], recipe: Recipe, *, with_tokens: bool) -> dict[str, Any]:
    """Describe the first batch of the first epoch: its rows, and its token counts if they are asked for."""
    from vlm_bridge.data_pipeline.loader import EpochPlan

    plan = EpochPlan(
        [len(image.captions) for image in images],
        row_captions=recipe.captions_per_image,
        batch_captions=recipe.batch_size,
        seed=recipe.seed,
    )
    rows = plan.batches(0)[0]
    batch: dict[str, Any] = {
        "batches_per_epoch": plan.batches_per_epoch,
        "rows": [
            {
                "id": images[row.image].original_id,
                "captions": [images[row.image].captions[caption] for caption in row.captions],
            }
            for row in rows
        ],
    }
    if with_tokens:
        batch["tokens"] = _count_tokens(images, recipe, rows)
    return batch


def _count_tokens(images: Sequence[CaptionedImage], recipe: Recipe, rows: Sequence[Any]) -> dict[str, Any]:
    from vlm_bridge.cli.quiet import quiet_transformers
    from vlm_bridge.data_pipeline.loader import Row, TokenizedImages
    from vlm_bridge.model_architecture.language_model import build_language_model
    from vlm_bridge.training_strategy.trainer import caption_format

    quiet_transformers()
    language_model = build_language_model(recipe.language_model)
    # Only the images of this batch: tokenising all captions of a large dataset would take minutes.
    tokenized = TokenizedImages([images[row.image] for row in rows], caption_format(language_model, recipe))
    packed = tokenized.pack([Row(index, row.captions) for index, row in enumerate(rows)])
    decode = language_model.tokenizer.decode
    return {
        "shape": list(packed.input_ids.shape),
        "supervised": packed.num_supervised,
        "padding_share": 1 - packed.num_tokens / packed.input_ids.size,
        "first_row": [decode([token]) for token in packed.input_ids[0][packed.segments[0] != 0]],
    }


def _write_grid(items: Sequence[SourceItem], path: Path) -> None:
    """Write the pictures of ``items`` with their first captions as one PNG."""
    import tempfile

    from vlm_bridge.evaluation.contact_sheet import SheetItem, contact_sheet

    with tempfile.TemporaryDirectory() as drawn:
        tiles = []
        for index, item in enumerate(items):
            picture = item.path
            if item.draw is not None:
                picture = Path(drawn) / f"{index}.png"
                item.draw().save(picture)
            assert picture is not None
            tiles.append(SheetItem(picture, item.captions[0] if item.captions else ""))
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(tiles, path)


def _print_statistics(statistics: dict[str, Any]) -> None:
    per_split = ", ".join(f"{count} {split}" for split, count in statistics["images_per_split"].items())
    print(f"{statistics['images']} images ({per_split}), {statistics['captions']} captions")
    print(f"{'':20}{'min':>8}{'median':>8}{'p95':>8}{'max':>8}")
    for key in ("captions_per_image", "words_per_caption", "picture_width", "picture_height"):
        if numbers := statistics[key]:
            cells = "".join(f"{numbers[column]:8g}" for column in ("min", "median", "p95", "max"))
            print(f"{key.replace('_', ' '):20}{cells}")
    vocabulary = statistics["vocabulary"]
    common = ", ".join(word for word, _ in vocabulary["most_common"])
    print(
        f"vocabulary: {vocabulary['words']} words, {vocabulary['seen_once']} seen once; most common: {common}"
    )
    _print_reasons("pictures cannot be read", statistics["unreadable"])
    _print_reasons("set aside by the source", statistics.get("set_aside", []))
    if statistics.get("samples"):
        print("\nsamples")
    for sample in statistics.get("samples", []):
        print(f"  {sample['id']}" + (f" ({sample['split']})" if sample["split"] else ""))
        for caption in sample["captions"]:
            print(f"    {caption}")


def _print_manifest(manifest: dict[str, Any], output_dir: Path) -> None:
    counts = ", ".join(
        f"{split} {count['images']} images / {count['captions']} captions"
        for split, count in manifest["counts"].items()
    )
    print(f"{output_dir}: {counts}")
    for split in ("train", "val"):
        if not manifest["counts"][split]["images"]:
            print(f"note: no image is in {split}; training needs some")
    if near := manifest["near_duplicates"]:
        print(f"near duplicates: {near['pairs']} pairs, {near['pairs_across_splits']} of them across splits")
    _print_reasons("set aside", manifest["rejected"])
    print(f"licence: {manifest['licence_note']}")
    print(f"everything else: {output_dir / 'manifest.json'}")


def _print_reasons(what: str, items: Sequence[dict[str, str]], shown: int = 5) -> None:
    if items:
        print(f"{what}: {len(items)}")
    for item in items[:shown]:
        print(f"  {item['id']}: {item['reason']}")
    if len(items) > shown:
        print(f"  and {len(items) - shown} more")


def _print_batch(batch: dict[str, Any]) -> None:
    print(f"\nfirst of {batch['batches_per_epoch']} batches of an epoch")
    for row in batch["rows"]:
        print(f"  {row['id']}: {' | '.join(row['captions'])}")
    if tokens := batch.get("tokens"):
        rows, length = tokens["shape"]
        print(
            f"  {rows} rows of {length} tokens, {tokens['supervised']} supervised, "
            f"{tokens['padding_share']:.0%} padding"
        )
        print(f"  first row: {' '.join(repr(token) for token in tokens['first_row'])}")

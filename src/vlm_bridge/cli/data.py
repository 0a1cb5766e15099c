"""``vlm-data``: explore a dataset, make a caption folder of it, inspect what training reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlm_bridge.cli.options import AsJson, note, print_json, quiet_transformers, show_progress
from vlm_bridge.data_pipeline.captions import CaptionStyle
from vlm_bridge.data_pipeline.sources import SOURCES
from vlm_bridge.data_pipeline.splits import SplitBy
from vlm_bridge.errors import DataError, UsageError

if TYPE_CHECKING:
    from vlm_bridge.configuration import Recipe
    from vlm_bridge.data_pipeline.samples import CaptionedImage
    from vlm_bridge.data_pipeline.sources import Source, SourceItem

app = typer.Typer(
    name="vlm-data",
    help="Explore a dataset, turn it into a caption folder, inspect what training reads.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Option = typer.Option
DatasetName = StrEnum("DatasetName", ["flickr30k", "coco", "conceptual"])
SplitKind = StrEnum("SplitKind", ["fractions", "official"])

OF_SOURCES = (
    "Some sources have more options: coco --year, --no-restval; scenes --num-train, --num-val, "
    "--num-test, --wordings; groundcap --keep-tags, --split official (docs/datasets.md)."
)

# Options of sources, which several commands take; those of single ones are not in the help.
Name = Annotated[str | None, Option(help=f"{', '.join(SOURCES)}. (default: found out)")]
InputDir = Annotated[Path | None, Option("--input-dir", "--source-path", help="Dataset's folder.")]
CaptionsFile = Annotated[Path | None, Option(help="Caption file, if it is not found.")]
FollowLinks = Annotated[bool, Option("--follow-links", help="Follow links out of the folder.")]
Year = Annotated[int | None, Option(hidden=True)]
Restval = Annotated[bool, Option(hidden=True)]
NumImages = Annotated[int, Option(min=0, hidden=True)]
Wordings = Annotated[int, Option(min=1, max=2, hidden=True)]
Seed = Annotated[int, Option(help="Seed of the splits, samples and drawings.")]
KeepTags = Annotated[bool, Option("--keep-tags", hidden=True)]
Share = Annotated[float | None, Option(help="Share of images. (default: often 0.1)")]
PLANNING = ("seed", "split_by", "val_fraction", "test_fraction", "caption_style", "limit")


@app.command("download")
def download(
    name: Annotated[DatasetName, typer.Argument(help="The dataset.")],
    output_dir: Annotated[Path | None, Option(help="(default: datasets/NAME)")] = None,
    year: Annotated[Literal["2014", "2017"], Option(help="Of coco.")] = "2017",
) -> None:
    """Print the commands that download a dataset, for `| sh`; run again, they continue."""
    from importlib.resources import files
    from shlex import quote

    import yaml

    from vlm_bridge.data_pipeline.sources import source_class

    downloads = yaml.safe_load((files("vlm_bridge") / "data_pipeline/downloads.yaml").read_text())
    source, dataset = source_class(name), downloads[name]
    folder = output_dir or Path("datasets") / name
    read_from = quote(str(folder / "shards" if name == "conceptual" else folder))
    print(
        f"# {source.description}\n# page: {dataset['page']}\n# licence: {source.licence_note}\n"
        f"folder={quote(str(folder))}\n{downloads['start']}{dataset['commands']}"
        f"{dataset.get(int(year), '')}# then: vlm-data transform --source {name} "
        f"--input-dir {read_from} --output-dir data/{name}"
    )


@app.command("explore-dataset", epilog=OF_SOURCES)
def explore_dataset(
    source: Name = None,
    data_dir: Annotated[Path | None, Option(help="A caption folder, not a source.")] = None,
    input_dir: InputDir = None,
    captions_file: CaptionsFile = None,
    follow_links: FollowLinks = False,
    year: Year = None,
    restval: Restval = True,
    num_train: NumImages = 10_000,
    num_val: NumImages = 500,
    num_test: NumImages = 1_000,
    wordings: Wordings = 2,
    seed: Seed = 0,
    samples: Annotated[int, Option(min=0, help="Images to show.")] = 8,
    grid: Annotated[Path | None, Option(help="(default: runs/explore/NAME.png)")] = None,
    no_grid: Annotated[bool, Option("--no-grid", help="Write no PNG of the samples.")] = False,
    tokenizer: Annotated[str, Option(help="Also count this tokenizer's tokens.")] = "",
    keep_tags: KeepTags = False,
    as_json: AsJson = False,
) -> None:
    """Show sizes, caption lengths, vocabulary and samples of a source or caption folder."""
    options = dict(locals())  # those of the source too

    from vlm_bridge.data_pipeline import explore
    from vlm_bridge.data_pipeline.caption_folder import open_data_folder

    if source is not None and data_dir is not None:
        raise UsageError("give either --source or --data-dir")
    if no_grid and grid is not None:
        raise UsageError("give either --grid or --no-grid")
    skipped = []
    if data_dir is not None:
        name = data_dir.resolve().name
        items = explore.folder_items(open_data_folder(data_dir), skipped)
    else:
        opened = _open_source(options)
        name, items, skipped = opened.name, opened.items(), opened.rejected
    count_tokens = _token_counter(tokenizer) if tokenizer else lambda texts: []
    with show_progress("images measured") as report:
        result = explore.describe_items(items, report, count_tokens=count_tokens)
    shown = explore.sample_items(items, samples, seed)
    result |= {"set_aside": [item.to_dict() for item in skipped]}
    result["samples"] = explore.describe_samples(shown, keep_tags=keep_tags)
    if shown and not no_grid:
        grid = grid or Path("runs/explore") / f"{name}.png"
        _write_grid(shown, [str(*sample["captions"][:1]) for sample in result["samples"]], grid)
        result["grid"] = str(grid)
    _print_result(result, as_json)


@app.command("transform", epilog=OF_SOURCES)
def transform(
    source: Name = None,
    output_dir: Annotated[Path | None, Option(help="The caption folder to make.")] = None,
    input_dir: InputDir = None,
    captions_file: CaptionsFile = None,
    follow_links: FollowLinks = False,
    year: Year = None,
    restval: Restval = True,
    num_train: NumImages = 10_000,
    num_val: NumImages = 500,
    num_test: NumImages = 1_000,
    wordings: Wordings = 2,
    seed: Seed = 0,
    split: Annotated[SplitKind, Option(hidden=True)] = SplitKind.fractions,
    split_by: Annotated[
        SplitBy | None, Option(help="Hashes of ids, exact shares, or films.")
    ] = None,
    val_fraction: Share = None,
    test_fraction: Share = None,
    image_size: Annotated[int, Option(min=1, help="Longest side of an image in pixels.")] = 640,
    caption_style: Annotated[CaptionStyle | None, Option(help="sentence tidies captions.")] = None,
    keep_tags: KeepTags = False,
    limit: Annotated[int | None, Option(min=1, help="At most N images a split.")] = None,
    near_duplicate_distance: Annotated[int, Option(min=0, max=64, help="Differing bits.")] = 4,
    max_pixels: Annotated[int | None, Option(min=0, help="Pixels of an image, 0: any.")] = None,
    workers: Annotated[int | None, Option(min=1, help="Processes. (default: 2 to 8)")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Only show the splits.")] = False,
    num_rows: Annotated[int | None, Option(min=1, help="--dry-run of N images.")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a dataset into a caption folder. Ctrl-C stops; the same command continues."""
    options = dict(locals())  # those of the source too

    from vlm_bridge.data_pipeline import images
    from vlm_bridge.data_pipeline.transform import transform as run

    if output_dir is None and not dry_run:
        raise UsageError("give --output-dir, the caption folder to make (or --dry-run)")
    if num_rows is not None and (not dry_run or split == SplitKind.official):
        raise UsageError("--num-rows goes with --dry-run and without --split official")
    if max_pixels is not None:
        images.LIMITS.max_pixels = max_pixels
    opened = _open_source(options | {"official_split": split == SplitKind.official})
    planning: Any = {name: options[name] for name in PLANNING}
    if output_dir is None or dry_run:
        _print_result(_preview(opened, planning, num_rows), as_json)
        return
    workers = workers or min(8, max(2, os.cpu_count() or 1))
    try:
        with show_progress("images") as report:
            manifest = run(
                opened, output_dir, workers=workers, image_size=image_size, progress=report,
                near_duplicate_distance=near_duplicate_distance, **planning,
            )  # fmt: skip
    except KeyboardInterrupt:
        note("interrupted: the same command continues where this one stopped", always=True)
        raise typer.Exit(130) from None
    _print_result(manifest if as_json else _summary(manifest), as_json)


@app.command("inspect-loader")
def inspect_loader(
    data_dir: Annotated[Path | None, Option(help="(default: the recipe's)")] = None,
    config: Annotated[Path | None, Option(help="A recipe: also shows tokens.")] = None,
    batch_size: Annotated[int | None, Option(min=1, help="Captions in a batch.")] = None,
    check: Annotated[int, Option(min=0, help="Images to decode as a check.")] = 256,
    check_all: Annotated[bool, Option("--all", help="Check all, and the fingerprint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a caption folder and show the first batch that training would read."""
    from vlm_bridge.configuration import load_recipe
    from vlm_bridge.data_pipeline import explore
    from vlm_bridge.data_pipeline.caption_folder import open_data_folder, readable_split
    from vlm_bridge.data_pipeline.images import check_image

    if data_dir is None and config is None:
        raise UsageError("give --data-dir, --config, or both")
    recipe = load_recipe(config)
    recipe = recipe.replace(batch_size=batch_size or recipe.batch_size)
    folder = open_data_folder(data_dir or recipe.data_dir)
    skipped = []
    items = explore.folder_items(folder, skipped)
    checked = items if check_all else explore.sample_items(items, check)
    with show_progress("images decoded") as report:
        _, broken = explore.read_images(checked, check_image, report)
    if check_all and not broken and folder.compute_fingerprint() != folder.fingerprint:
        raise DataError(f"{folder.root} was changed (its fingerprint differs): make it again")
    result = {
        "data_dir": str(folder.root),
        "source": folder.manifest.get("source", "unknown source"),
        "fingerprint": folder.fingerprint,
        "statistics": explore.describe_items(items),
        "set_aside": [item.to_dict() for item in skipped],
        "pictures_decoded": len(checked),
        "broken": [item.to_dict() for item in broken],
        "first_batch": None,
    }
    if "train" in folder.splits:
        images, _ = readable_split(folder, "train")
        result["first_batch"] = _first_batch(images, recipe, config is not None)
    _print_result(result, as_json)
    if broken:
        unread = f"{len(broken)} images of {folder.root} cannot be read"
        raise DataError(f"{unread}: make the folder again")


def _open_source(options: dict[str, Any]) -> Source:
    """Return the named source, or log and return the one that the input folder's files show."""
    from vlm_bridge.data_pipeline.sources import find_source, make_source

    options = dict(options)
    name, input_dir = options.pop("source"), options["input_dir"]
    if name is None:
        name, file = find_source(input_dir, options["captions_file"])
        if input_dir is not None:
            note(f"source: {name} ({file})")
    return make_source(name, **options)


def _first_batch(images: list[CaptionedImage], recipe: Recipe, with_tokens: bool) -> dict[str, Any]:
    """Describe the first batch: its captions, and its tokens if they are asked for."""
    from vlm_bridge.data_pipeline.loader import TokenizedImages
    from vlm_bridge.model_architecture.captioner import caption_format
    from vlm_bridge.model_architecture.weights import build_language_model
    from vlm_bridge.training_strategy.data import epoch_plan

    data = lengths = None
    if with_tokens:
        quiet_transformers()
        language_model = build_language_model(recipe.language_model)
        data = TokenizedImages(images, caption_format(language_model, recipe))
        lengths = data.caption_lengths if recipe.tokens_per_batch is not None else None
    plan = epoch_plan(recipe, [len(image.captions) for image in images], lengths)
    batch: dict[str, Any] = {"batches_per_epoch": plan.num_batches(0), "rows": []}
    rows = plan.batches(0)[0]
    for row in rows:
        captions = [images[row.image].captions[number] for number in row.captions]
        batch["rows"].append({"id": images[row.image].original_id, "captions": captions})
    if data is not None:
        packed = data.pack(rows)
        first = packed.input_ids[0][packed.segments[0] != 0]
        batch["tokens"] = {
            "shape": list(packed.input_ids.shape),
            "supervised": packed.num_supervised,
            "padding_share": 1 - packed.num_tokens / packed.input_ids.size,
            "first_row": [language_model.tokenizer.decode([token]) for token in first],
        }
    return batch


def _preview(source: Source, planning: Any, num_rows: int | None) -> dict[str, Any]:
    """Return images of each split and steps per epoch of the default recipe."""
    from vlm_bridge.configuration import Recipe
    from vlm_bridge.data_pipeline.transform import preview, split_rule
    from vlm_bridge.training_strategy.data import epoch_plan

    if num_rows is None:
        captions, rule = preview(source, **planning)
    else:
        rule = split_rule(source, planning).resolve([None] * num_rows)
        most = planning["limit"] or num_rows
        captions = {split: [1] * min(most, size) for split, size in rule.sizes(num_rows).items()}
    recipe = Recipe()
    return {
        "source": source.name,
        "images": {split: len(of_split) for split, of_split in captions.items()},
        "captions": {split: sum(of_split) for split, of_split in captions.items()},
        "split_rule": source.split_rule or rule.describe(),
        "exact": num_rows is None or rule.by == "image",
        "batch_size": recipe.batch_size,
        "steps_per_epoch": epoch_plan(recipe, captions["train"], None).num_batches(0),
    }


def _summary(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what a user looks at first of a manifest."""
    names = ("counts", "split_rule", "rejected", "near_duplicates", "licence_note")
    summary = {name: manifest[name] for name in names}
    if summary["near_duplicates"]:
        summary["near_duplicates"] = manifest["near_duplicates"] | {"listed": "in manifest.json"}
    return summary


def _token_counter(name: str) -> Callable[[list[str]], list[int]]:
    quiet_transformers()
    from transformers import AutoTokenizer

    from vlm_bridge.credentials import reach_hub
    from vlm_bridge.model_architecture.language_model import encode_as_text
    from vlm_bridge.model_architecture.weights import loading_error

    try:
        reach_hub(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of transformers, the hub or the file's format
        raise loading_error("tokenizer", name, error) from None
    return lambda texts: [len(ids) for ids in encode_as_text(tokenizer, texts)]


def _write_grid(items: Sequence[SourceItem], captions: Sequence[str], path: Path) -> None:
    """Write the images of ``items``, each with a caption, as one PNG; broken ones are gray."""
    from vlm_bridge.captioning.explain import SheetItem, draw_sheet
    from vlm_bridge.data_pipeline.sources import iter_images

    images = (image() if callable(image) else image or b"" for image in iter_images(items))
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(list(map(SheetItem, images, captions))).save(path)


def _print_result(result: dict[str, Any], as_json: bool) -> None:
    """Print JSON, or else YAML in which skipped items are counted by cause."""
    import yaml

    if as_json:
        print_json(result)
        return
    style = {"default_flow_style": None, "width": 10_000}  # short mappings are on one line
    print(yaml.safe_dump(_by_cause(result), sort_keys=False, allow_unicode=True, **style), end="")


def _by_cause(result: dict[str, Any]) -> dict[str, Any]:
    from vlm_bridge.data_pipeline.samples import by_cause

    shown = {}
    for name, value in result.items():
        if name in ("set_aside", "unreadable", "broken", "rejected"):
            value = by_cause((item["id"], item["reason"]) for item in value)
        shown[name] = _by_cause(value) if isinstance(value, dict) else value
    return shown

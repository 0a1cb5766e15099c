"""``vlm-data``: explore a dataset, make a caption folder of it, inspect what training reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from vlm_bridge.cli.options import note, quiet_transformers, show_progress
from vlm_bridge.data_pipeline.captions import CaptionStyle
from vlm_bridge.data_pipeline.sources import SOURCES
from vlm_bridge.data_pipeline.splits import SplitBy
from vlm_bridge.errors import DataError, ImageError, UsageError

if TYPE_CHECKING:
    from vlm_bridge.configuration import Recipe
    from vlm_bridge.data_pipeline.samples import CaptionedImage
    from vlm_bridge.data_pipeline.sources import Source, SourceItem
    from vlm_bridge.data_pipeline.transform import Planning

app = typer.Typer(
    name="vlm-data",
    help="Explore a dataset, turn it into a caption folder, inspect what training reads.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Option = typer.Option
DatasetName = StrEnum("DatasetName", ["flickr30k", "coco", "conceptual"])
SplitKind = StrEnum("SplitKind", ["fractions", "official"])

Name = Annotated[
    str | None,
    Option(
        metavar=f"[{'|'.join(SOURCES)}]",
        help="The dataset's layout. (default: found out; without --input-dir groundcap)",
    ),
]
InputDir = Annotated[
    Path | None,
    Option("--input-dir", "--source-path", help="Folder of the dataset. (default: the hub)"),
]
CaptionsFile = Annotated[
    Path | None, Option(help="Caption file; Karpathy's split file (coco). (default: found)")
]
FollowLinks = Annotated[
    bool, Option("--follow-links", help="Read images that links lead out of the folder to.")
]
Year = Annotated[int | None, Option(help="2014 or 2017: COCO's own splits (coco).")]
Restval = Annotated[bool, Option(help="Train on Karpathy's restval images too (coco).")]
NumImages = Annotated[int, Option(min=0, help="Images to draw (scenes).")]
Wordings = Annotated[int, Option(min=1, max=2, help="Captions of an image (scenes).")]
Seed = Annotated[int, Option(help="Seed of the splits, samples and drawings.")]
KeepTags = Annotated[bool, Option("--keep-tags", help="Keep grounding tags (groundcap).")]
Share = Annotated[
    float | None,
    Option(help="Share of images the source gives no split. (default: the source's, often 0.1)"),
]
Split = Annotated[SplitKind, Option(help="official keeps the dataset's test part (groundcap).")]
SplitWay = Annotated[
    SplitBy | None,
    Option(
        help="What is split: ids by hash, images in exact shares, or whole films. "
        "(default: groundcap film, others hash)"
    ),
]
ImageSize = Annotated[int, Option(min=1, help="Longest side of a stored image in pixels.")]
Style = Annotated[
    CaptionStyle | None, Option(help="sentence tidies captions. (default: the source's)")
]
Limit = Annotated[int | None, Option(min=1, help="A sample of at most N images a split.")]
Distance = Annotated[
    int, Option(min=0, max=64, help="Report images whose hashes differ in at most N of 64 bits.")
]
MaxPixels = Annotated[
    int | None, Option(min=0, help="Pixels of an image, 0: any. (default: 51,000,000)")
]
Workers = Annotated[int | None, Option(min=1, help="Processes. (default: by cores, 2 to 8)")]
DryRun = Annotated[bool, Option("--dry-run", help="Only show the splits.")]
NumRows = Annotated[int | None, Option(min=1, help="With --dry-run: of N images; reads no data.")]
Json = Annotated[bool, Option("--json", help="Print JSON.")]
PLANNING = ("seed", "split_by", "val_fraction", "test_fraction", "caption_style", "limit")


@app.command("download")
def download(
    name: Annotated[DatasetName, typer.Argument(help="The dataset.")],
    output_dir: Annotated[Path | None, Option(help="(default: datasets/NAME)")] = None,
    year: Annotated[int, Option(help="2014 or 2017 (coco).")] = 2017,
) -> None:
    """Print the commands that download a dataset, for `| sh`; run again, they continue."""
    from importlib.resources import files
    from shlex import quote

    import yaml

    from vlm_bridge.data_pipeline.sources import source_class

    if year not in (2014, 2017):
        raise UsageError(f"--year {year}: choose from 2014, 2017")
    downloads = yaml.safe_load((files("vlm_bridge") / "data_pipeline/downloads.yaml").read_text())
    source, dataset = source_class(name), downloads[name]
    folder = output_dir or Path("datasets") / name
    read_from = quote(str(folder / "shards" if name == "conceptual" else folder))
    print(
        f"# {source.description}\n# page: {dataset['page']}\n# licence: {source.licence_note}\n"
        f"folder={quote(str(folder))}\n{downloads['start']}{dataset['commands']}"
        f"{dataset.get(year, '')}# then: vlm-data transform --source {name} "
        f"--input-dir {read_from} --output-dir data/{name}"
    )


@app.command("explore-dataset")
def explore_dataset(
    context: typer.Context,  # holds the options of the source too
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
    grid: Annotated[
        Path | None, Option(help="PNG of the samples. (default: runs/explore/NAME.png)")
    ] = None,
    no_grid: Annotated[bool, Option("--no-grid", help="Write no PNG.")] = False,
    tokenizer: Annotated[str, Option(help="Also count this tokenizer's tokens.")] = "",
    keep_tags: KeepTags = False,
    json_output: Json = False,
) -> None:
    """Show sizes, caption lengths, vocabulary, tags and samples of a source or caption folder."""
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
    else:  # with tags, which are counted
        opened = _open_source(context.params | {"keep_tags": True})
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
    _print_result(result, json_output)


@app.command("transform")
def transform(
    context: typer.Context,  # holds the options of the source too
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
    split: Split = SplitKind.fractions,
    split_by: SplitWay = None,
    val_fraction: Share = None,
    test_fraction: Share = None,
    image_size: ImageSize = 640,
    caption_style: Style = None,
    keep_tags: KeepTags = False,
    limit: Limit = None,
    near_duplicate_distance: Distance = 4,
    max_pixels: MaxPixels = None,
    workers: Workers = None,
    dry_run: DryRun = False,
    num_rows: NumRows = None,
    json_output: Json = False,
) -> None:
    """Turn a dataset into a caption folder. Ctrl-C stops; the same command continues."""
    import os

    from vlm_bridge.data_pipeline import images
    from vlm_bridge.data_pipeline.transform import transform as run

    if output_dir is None and not dry_run:
        raise UsageError("give --output-dir, the caption folder to make (or --dry-run)")
    if num_rows is not None and (not dry_run or split == SplitKind.official):
        raise UsageError("--num-rows goes with --dry-run and without --split official")
    if max_pixels is not None:
        images.LIMITS.max_pixels = max_pixels
    opened = _open_source(context.params | {"official_split": split == SplitKind.official})
    planning = cast("Planning", {name: context.params[name] for name in PLANNING})
    if output_dir is None or dry_run:
        _print_result(_preview(opened, planning, num_rows), json_output)
        return
    workers = workers or min(8, max(2, os.cpu_count() or 1))
    try:
        with show_progress("images") as report:
            manifest = run(
                opened, output_dir, workers=workers, image_size=image_size, progress=report,
                near_duplicate_distance=near_duplicate_distance, **planning,
            )  # fmt: skip
    except KeyboardInterrupt:
        note("interrupted: the same command continues where this one stopped")
        raise typer.Exit(130) from None
    _print_result(manifest if json_output else _summary(manifest), json_output)


@app.command("inspect-loader")
def inspect_loader(
    data_dir: Annotated[Path | None, Option(help="(default: the recipe's)")] = None,
    config: Annotated[Path | None, Option(help="A recipe: also shows tokens.")] = None,
    batch_size: Annotated[int | None, Option(min=1, help="Captions in a batch.")] = None,
    check: Annotated[int, Option(min=0, help="Images to decode as a check.")] = 256,
    check_all: Annotated[
        bool, Option("--all", help="Decode all images and compare the fingerprint.")
    ] = False,
    json_output: Json = False,
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
        raise DataError(
            f"{folder.root} was changed after it was made (its fingerprint differs): make it again"
        )
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
    _print_result(result, json_output)
    if broken:
        unread = f"{len(broken)} images of {folder.root} cannot be read"
        raise DataError(f"{unread}: make the folder again")


def _open_source(options: dict[str, Any]) -> Source:
    """Return the named source, or the one that the input folder's files tell, and log it."""
    from vlm_bridge.data_pipeline.sources import find_source, make_source

    name, input_dir = options["source"], options["input_dir"]
    if name is None:
        name, file = find_source(input_dir, options["captions_file"])
        if input_dir is not None:
            note(f"source: {name} ({file})")
    return make_source(name, **{key: options[key] for key in options if key != "source"})


def _first_batch(images: list[CaptionedImage], recipe: Recipe, with_tokens: bool) -> dict[str, Any]:
    """Describe the first batch: its rows, and its token counts if they are asked for."""
    from vlm_bridge.data_pipeline.loader import Row, TokenizedImages
    from vlm_bridge.model_architecture.captioner import caption_format
    from vlm_bridge.model_architecture.weights import build_language_model
    from vlm_bridge.training_strategy.data import epoch_plan

    format = lengths = None
    if with_tokens:
        quiet_transformers()
        language_model = build_language_model(recipe.language_model)
        format = caption_format(language_model, recipe)
        if recipe.tokens_per_batch is not None:
            lengths = TokenizedImages(images, format).caption_lengths
    plan = epoch_plan(recipe, [len(image.captions) for image in images], lengths)
    rows = plan.batches(0)[0]
    shown = [images[row.image] for row in rows]
    texts = [[i.captions[c] for c in row.captions] for i, row in zip(shown, rows, strict=True)]
    batch: dict[str, Any] = {
        "batches_per_epoch": plan.num_batches(0),
        "rows": [
            {"id": image.original_id, "captions": captions}
            for image, captions in zip(shown, texts, strict=True)
        ],
    }
    if format is not None:
        tokenized = TokenizedImages(shown, format)
        packed = tokenized.pack([Row(index, row.captions) for index, row in enumerate(rows)])
        first = packed.input_ids[0][packed.segments[0] != 0]
        batch["tokens"] = {
            "shape": list(packed.input_ids.shape),
            "supervised": packed.num_supervised,
            "padding_share": 1 - packed.num_tokens / packed.input_ids.size,
            "first_row": [language_model.tokenizer.decode([token]) for token in first],
        }
    return batch


def _preview(source: Source, planning: Planning, num_rows: int | None) -> dict[str, Any]:
    """Return images of each split and steps per epoch of the default recipe."""
    from vlm_bridge.configuration import Recipe
    from vlm_bridge.data_pipeline.transform import preview, split_rule
    from vlm_bridge.training_strategy.data import epoch_plan

    if num_rows is None:
        captions, rule = preview(source, **planning)
    else:
        rule = split_rule(source, planning).resolve([None] * num_rows)
        most = planning.get("limit") or num_rows
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
    if empty := [name for name in ("train", "val") if not manifest["counts"][name]["images"]]:
        summary["note"] = (
            f"no image is in {' and '.join(empty)}, and training needs some: where the source "
            "decides no splits, --val-fraction and --test-fraction change the shares"
        )
    return summary


def _token_counter(name: str) -> Callable[[list[str]], list[int]]:

    quiet_transformers()
    from transformers import AutoTokenizer

    from vlm_bridge.credentials import hub_problem, reach_hub
    from vlm_bridge.model_architecture.language_model import encode_as_text

    try:
        reach_hub(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of transformers, the hub or the file's format
        why = hub_problem(error, name) or str(error).strip().partition("\n")[0]
        raise DataError(f"cannot load the tokenizer {name!r}: {why}") from None
    return lambda texts: [len(ids) for ids in encode_as_text(tokenizer, texts)]


def _write_grid(items: Sequence[SourceItem], captions: Sequence[str], path: Path) -> None:
    """Write the images of ``items`` with one caption each as one PNG; broken ones are gray."""
    from PIL import Image

    from vlm_bridge.captioning.explain import SheetItem, draw_sheet
    from vlm_bridge.data_pipeline.images import decode_image
    from vlm_bridge.data_pipeline.sources import iter_images

    tiles = []
    for image, caption in zip(iter_images(items), captions, strict=True):
        try:
            shown = image() if callable(image) else decode_image(image or b"").image
        except ImageError:
            shown = Image.new("RGB", (4, 3), "lightgray")
        tiles.append(SheetItem(shown, caption))
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(tiles).save(path)


def _print_result(result: dict[str, Any], as_json: bool) -> None:
    """Print JSON, or else YAML in which skipped items are counted by cause."""

    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes numbers that belong together on one line."""

        def represent_dict(self, data: dict[str, Any]) -> yaml.Node:
            is_short = all(isinstance(value, int | float) for value in data.values())
            return self.represent_mapping("tag:yaml.org,2002:map", data, flow_style=is_short)

    Dumper.add_representer(dict, Dumper.represent_dict)
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        shown = _by_cause(result)
        print(yaml.dump(shown, None, Dumper, sort_keys=False, allow_unicode=True, width=10_000))


def _by_cause(result: dict[str, Any]) -> dict[str, Any]:
    from vlm_bridge.data_pipeline.samples import by_cause

    def shown(name: str, value: Any) -> Any:
        if name in ("set_aside", "unreadable", "broken", "rejected"):
            return by_cause((item["id"], item["reason"]) for item in value)
        return _by_cause(value) if isinstance(value, dict) else value

    return {name: shown(name, value) for name, value in result.items()}

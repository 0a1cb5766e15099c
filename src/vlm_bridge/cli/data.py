"""``vlm-data``: explore a dataset, make a caption folder of it, inspect what training reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_bridge.data_pipeline.downloads import DATASETS

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
DatasetName = StrEnum("DatasetName", list(DATASETS))
# Written out, since importing the originals would slow down --help; a test compares them.
SourceName = StrEnum(
    "SourceName", ["groundcap", "flickr8k", "flickr30k", "coco", "conceptual", "local", "scenes"]
)
CaptionStyleName = StrEnum("CaptionStyleName", ["sentence", "raw"])
SplitByName = StrEnum("SplitByName", ["hash", "image", "film"])
SplitKind = StrEnum("SplitKind", ["fractions", "official"])

Name = Annotated[
    SourceName | None,
    Option(help="The dataset's layout. (default: found out; without --input-dir groundcap)"),
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
SplitBy = Annotated[
    SplitByName | None,
    Option(
        help="What is split: ids by hash, images in exact shares, or whole films. "
        "(default: groundcap film, others hash)"
    ),
]
ImageSize = Annotated[int, Option(help="Longest side of a stored image in pixels.")]
CaptionStyle = Annotated[
    CaptionStyleName | None, Option(help="sentence tidies captions. (default: the source's)")
]
Limit = Annotated[int | None, Option(help="A sample of at most N images a split.")]
Distance = Annotated[int, Option(help="Report images whose hashes differ in at most N of 64 bits.")]
MaxPixels = Annotated[
    int | None, Option(min=0, help="Pixels of an image, 0: any. (default: 51,000,000)")
]
Workers = Annotated[int | None, Option(help="Processes. (default: by cores, 2 to 8)")]
DryRun = Annotated[bool, Option("--dry-run", help="Only show the splits.")]
NumRows = Annotated[int | None, Option(min=1, help="With --dry-run: of N images; reads no data.")]
Json = Annotated[bool, Option("--json", help="Print JSON.")]


@app.command("download")
def download(
    name: Annotated[DatasetName, typer.Argument(help="The dataset.")],
    output_dir: Annotated[Path | None, Option(help="(default: datasets/NAME)")] = None,
    year: Annotated[int, Option(help="2014 or 2017 (coco).")] = 2017,
) -> None:
    """Print the commands that download a dataset, for `| sh`; run again, they continue."""
    import shlex

    from vlm_bridge.data_pipeline.sources import SOURCES
    from vlm_bridge.errors import UsageError

    if year not in (2014, 2017):
        raise UsageError(f"--year {year}: choose from 2014, 2017")
    dataset, source = DATASETS[name], SOURCES[name]
    folder = output_dir or Path("datasets") / name
    read_from = shlex.quote(str(folder / "shards" if name == "conceptual" else folder))
    for line in (source.description, f"page: {dataset.page}", f"licence: {source.licence_note}"):
        print(f"# {line}")
    print("set -e", *dataset.commands(folder, year), sep="\n")
    print(f"# then: vlm-data transform --source {name} --input-dir {read_from} ", end="")
    print(f"--output-dir data/{name}")


@app.command("explore-dataset")
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
    grid: Annotated[
        Path | None, Option(help="PNG of the samples. (default: runs/explore/NAME.png)")
    ] = None,
    no_grid: Annotated[bool, Option("--no-grid", help="Write no PNG.")] = False,
    tokenizer: Annotated[str | None, Option(help="Also count this tokenizer's tokens.")] = None,
    keep_tags: KeepTags = False,
    json_output: Json = False,
) -> None:
    """Show sizes, caption lengths, vocabulary, tags and samples of a source or caption folder."""
    from vlm_bridge.cli.progress import show_progress
    from vlm_bridge.data_pipeline import explore
    from vlm_bridge.data_pipeline.caption_folder import open_data_folder
    from vlm_bridge.data_pipeline.sources import Rejected
    from vlm_bridge.errors import UsageError

    if source is not None and data_dir is not None:
        raise UsageError("give either --source or --data-dir")
    if no_grid and grid is not None:
        raise UsageError("give either --grid or --no-grid")
    skipped: list[Rejected] = []
    facts: dict[str, Any] = {}
    if data_dir is not None:
        name, items = (
            data_dir.resolve().name,
            explore.folder_items(open_data_folder(data_dir), skipped),
        )
    else:  # with tags, which are counted
        opened = _open_source(
            source, input_dir, captions_file, num_train=num_train, num_val=num_val, year=year,
            num_test=num_test, seed=seed, wordings=wordings, restval=restval, keep_tags=True,
            follow_links=follow_links,
        )  # fmt: skip
        name, items, facts, skipped = opened.name, opened.items(), opened.facts(), opened.rejected
    with show_progress("images measured") as report:
        statistics = explore.describe_items(items, report, count_tokens=_token_counter(tokenizer))
    shown = explore.sample_items(items, samples, seed)
    statistics["dataset"] = facts
    statistics["set_aside"] = _plain(skipped)
    statistics["samples"] = explore.describe_samples(shown, keep_tags=keep_tags)
    if shown and not no_grid:
        grid = grid or Path("runs/explore") / f"{name}.png"
        _write_grid(shown, [str(*s["captions"][:1]) for s in statistics["samples"]], grid)
    _print_result(statistics, json_output, _statistics_lines)
    if shown and not (no_grid or json_output):
        print(f"\nimages: {grid}")


@app.command("transform")
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
    split: Split = SplitKind.fractions,
    split_by: SplitBy = None,
    val_fraction: Share = None,
    test_fraction: Share = None,
    image_size: ImageSize = 640,
    caption_style: CaptionStyle = None,
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
    from vlm_bridge.data_pipeline import images
    from vlm_bridge.errors import UsageError

    if output_dir is None and not dry_run:
        raise UsageError("give --output-dir, the caption folder to make (or --dry-run)")
    if num_rows is not None and not dry_run:
        raise UsageError("--num-rows goes with --dry-run; for fewer images there is --limit")
    if num_rows is not None and split == SplitKind.official:
        raise UsageError("--num-rows knows no official split: leave it out to read the dataset")
    if max_pixels is not None:
        images.LIMITS.max_pixels = max_pixels
    opened = _open_source(
        source, input_dir, captions_file, num_train=num_train, num_val=num_val, year=year,
        num_test=num_test, seed=seed, wordings=wordings, restval=restval, keep_tags=keep_tags,
        follow_links=follow_links, official_split=split == SplitKind.official,
    )  # fmt: skip
    planning: dict[str, Any] = {
        "seed": seed,
        "split_by": split_by,
        "val_fraction": val_fraction,
        "test_fraction": test_fraction,
        "caption_style": caption_style,
        "limit": limit,
    }
    if output_dir is None or dry_run:
        result = _preview(opened, planning, num_rows)
        _print_result(result, json_output, _preview_lines)
        return
    more = {"image_size": image_size, "near_duplicate_distance": near_duplicate_distance}
    manifest = _transform(opened, output_dir, workers, planning | more)
    _print_result(manifest, json_output, lambda m: _manifest_lines(m, output_dir))


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
    from vlm_bridge.cli.progress import show_progress
    from vlm_bridge.configuration import load_recipe
    from vlm_bridge.data_pipeline import explore
    from vlm_bridge.data_pipeline.caption_folder import open_data_folder, readable_split
    from vlm_bridge.data_pipeline.sources import Rejected
    from vlm_bridge.errors import DataError, UsageError

    if data_dir is None and config is None:
        raise UsageError("give --data-dir, --config, or both")
    recipe = load_recipe(config)
    recipe = recipe.replace(batch_size=batch_size or recipe.batch_size)
    folder = open_data_folder(data_dir or recipe.data_dir)
    skipped: list[Rejected] = []
    items = explore.folder_items(folder, skipped)
    checked = items if check_all else explore.sample_items(items, check)
    with show_progress("images decoded") as report:
        broken = explore.find_broken(checked, report)
    if check_all and not broken and folder.compute_fingerprint() != folder.fingerprint:
        raise DataError(
            f"{folder.root} was changed after it was made (its fingerprint differs): make it again, "
            "or of a folder of other tools, delete its manifest and the next start makes another"
        )
    batch = None
    if "train" in folder.splits:
        batch = _first_batch(readable_split(folder, "train")[0], recipe, config is not None)
    result = {
        "data_dir": str(folder.root),
        "source": folder.manifest.get("source", "unknown source"),
        "fingerprint": folder.fingerprint,
        "statistics": explore.describe_items(items),
        "set_aside": _plain(skipped),
        "pictures_decoded": len(checked),
        "broken": _plain(broken),
        "first_batch": batch,
    }
    _print_result(result, json_output, _inspection_lines)
    if broken:
        raise DataError(
            f"{len(broken)} images of {folder.root} cannot be read: make the folder again"
        )


def _transform(
    source: Source, output_dir: Path, workers: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    import os

    from vlm_bridge.cli.progress import note, show_progress
    from vlm_bridge.data_pipeline.transform import transform as run

    workers = workers if workers is not None else min(8, max(2, os.cpu_count() or 1))
    try:
        with show_progress("images") as report:
            return run(source, output_dir, workers=workers, progress=report, **options)
    except KeyboardInterrupt:
        note("interrupted: the same command continues where this one stopped")
        raise typer.Exit(130) from None


def _open_source(
    name: SourceName | None, input_dir: Path | None, captions_file: Path | None, **options: Any
) -> Source:
    """Return the named source, or the one that the input folder's files tell, and log it."""
    from vlm_bridge.cli.progress import note
    from vlm_bridge.data_pipeline.sources import find_source, make_source

    found: str | None = name
    if found is None:
        found, file = find_source(input_dir, captions_file)
        if input_dir is not None:
            note(f"source: {found} ({file})")
    return make_source(found, input_dir=input_dir, captions_file=captions_file, **options)


def _first_batch(images: list[CaptionedImage], recipe: Recipe, with_tokens: bool) -> dict[str, Any]:
    """Describe the first batch: its rows, and its token counts if they are asked for."""
    from vlm_bridge.cli.quiet import quiet_transformers
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
    batch: dict[str, Any] = {
        "batches_per_epoch": plan.num_batches(0),
        "rows": [
            {"id": image.original_id, "captions": [image.captions[c] for c in row.captions]}
            for image, row in zip(shown, rows, strict=True)
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


def _preview(source: Source, planning: dict[str, Any], num_rows: int | None) -> dict[str, Any]:
    """Return images of each split and steps per epoch of the default recipe."""
    from vlm_bridge.configuration import Recipe
    from vlm_bridge.data_pipeline.loader import EpochPlan
    from vlm_bridge.data_pipeline.splits import SPLITS
    from vlm_bridge.data_pipeline.transform import preview, split_rule

    if num_rows is None:
        captions, rule = preview(source, **planning)
    else:
        shares = planning["split_by"], planning["val_fraction"], planning["test_fraction"]
        rule = split_rule(source, *shares).resolve([None] * num_rows)
        most = planning["limit"] or num_rows
        captions = {split: [1] * min(most, size) for split, size in rule.sizes(num_rows).items()}
    recipe = Recipe()
    plan = EpochPlan(
        captions["train"],
        row_captions=recipe.captions_per_image,
        batch_captions=recipe.batch_size,
        seed=recipe.seed,
    )
    return {
        "source": source.name,
        "images": {split: len(captions[split]) for split in SPLITS},
        "captions": {split: sum(captions[split]) for split in SPLITS},
        "split_rule": source.split_rule or rule.describe(),
        "exact": num_rows is None or rule.by == "image",
        "batch_size": recipe.batch_size,
        "steps_per_epoch": plan.num_batches(0),
    }


def _token_counter(name: str | None) -> Callable[[list[str]], list[int]] | None:
    if name is None:
        return None
    from vlm_bridge.cli.quiet import quiet_transformers

    quiet_transformers()
    from transformers import AutoTokenizer

    from vlm_bridge.credentials import hub_problem, reach_hub
    from vlm_bridge.errors import DataError
    from vlm_bridge.model_architecture.language_model import encode_as_text

    try:
        reach_hub(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of transformers, the hub or the file's format
        why = hub_problem(error, name) or str(error).strip().partition("\n")[0]
        raise DataError(f"cannot load the tokenizer {name!r}: {why}") from None
    return lambda texts: [len(ids) for ids in encode_as_text(tokenizer, texts)]


def _write_grid(items: Sequence[SourceItem], captions: Sequence[str], path: Path) -> None:
    """Write the images of ``items`` with one caption each as one PNG."""
    import tempfile

    from vlm_bridge.data_pipeline.sources import iter_pictures
    from vlm_bridge.evaluation.contact_sheet import SheetItem, contact_sheet

    with tempfile.TemporaryDirectory() as unpacked:
        tiles = []
        for caption, picture in zip(captions, iter_pictures(items), strict=True):
            file = Path(unpacked) / f"{len(tiles)}.png"
            if callable(picture):
                picture().save(file)
            elif picture is None or isinstance(picture, bytes):
                file.write_bytes(picture or b"")
            else:
                file = picture
            tiles.append(SheetItem(file, caption))
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(tiles, path)


def _plain(skipped: Iterable[Any]) -> list[dict[str, str]]:
    return [{"id": item.id, "reason": item.reason} for item in skipped]


def _print_result(
    result: dict[str, Any], as_json: bool, lines: Callable[[dict[str, Any]], Iterable[str]]
) -> None:
    import json

    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        print("\n".join(lines(result)))


def _preview_lines(result: dict[str, Any]) -> Iterable[str]:
    about = "" if result["exact"] else "about "
    images = " / ".join(f"{count:,}" for count in result["images"].values())
    total = sum(result["images"].values())
    yield f"{result['source']}, train / val / test: {about}{images} of {total:,} images"
    steps, size = result["steps_per_epoch"], result["batch_size"]
    yield f"{about}{steps:,} steps per epoch at batch size {size}"
    yield f"split rule: {result['split_rule']}"
    yield "nothing was written (--dry-run)"


def _statistics_lines(statistics: dict[str, Any]) -> Iterable[str]:
    if facts := statistics.get("dataset"):
        rows = ", ".join(f"{part} {count:,}" for part, count in facts["rows"].items())
        human = facts["human_annotated_rows"]
        yield f"{facts['files']} files, {facts['bytes'] / 1e6:,.1f} MB; rows: {rows}; "
        yield f"{human:,} annotated by people"
        yield from (f"  {name:18}{kind}" for name, kind in facts["fields"].items())
    splits = ", ".join(f"{n} {split}" for split, n in statistics["images_per_split"].items())
    films = f", {statistics['films']} films" if statistics["films"] else ""
    yield f"{statistics['images']} images ({splits}), {statistics['captions']} captions{films}"
    columns = ("min", "median", "p95", "max")
    yield f"{'':20}" + "".join(f"{column:>8}" for column in columns)
    for key, numbers in statistics.items():
        if isinstance(numbers, dict) and numbers.keys() == set(columns):
            cells = "".join(f"{numbers[column]:8g}" for column in columns)
            yield f"{key.replace('_', ' '):20}{cells}"
    if not statistics["tokens_per_caption"]:
        yield "tokens per caption: not counted; name a tokenizer with --tokenizer"
    words = statistics["vocabulary"]
    common = ", ".join(word for word, _ in words["most_common"])
    yield f"vocabulary: {words['words']} words, {words['seen_once']} once; most common: {common}"
    if tags := statistics["tags"]:
        yield (
            f"tags: in {tags['captions_with_tags']} captions, unbalanced in "
            f"{tags['captions_with_unbalanced_tags']}; {tags['ids_per_caption']:.1f} detections each"
        )
        for kind, numbers in tags["kinds"].items():
            common = ", ".join(f"{label} {count}" for label, count in numbers["most_common"])
            yield f"  {kind} {numbers['meaning']}: {numbers['tags']} of {numbers['classes']} classes; {common}"
    yield from _reason_lines("images cannot be read", statistics["unreadable"])
    yield from _reason_lines("skipped by the source", statistics.get("set_aside", []))
    for sample in statistics.get("samples", []):
        yield f"\n{sample['id']} {sample['split'] or ''}"
        yield from (f"  {len(text.split())} words: {text}" for text in sample["captions"])


def _manifest_lines(manifest: dict[str, Any], output_dir: Path) -> Iterable[str]:
    counts = manifest["counts"]
    parts = (f"{s} {n['images']} images / {n['captions']} captions" for s, n in counts.items())
    yield f"{output_dir}: {', '.join(parts)}"
    if empty := [split for split in ("train", "val") if not counts[split]["images"]]:
        yield (
            f"note: no image is in {' and '.join(empty)}, and training needs some: where the source "
            "decides no splits, --val-fraction and --test-fraction change the shares"
        )
    if near := manifest["near_duplicates"]:
        yield f"near duplicates: {near['pairs']} pairs, {near['pairs_across_splits']} across splits"
    yield from _reason_lines("skipped", manifest["rejected"])
    yield f"licence: {manifest['licence_note']}"
    yield f"everything else: {output_dir / 'manifest.json'}"


def _inspection_lines(result: dict[str, Any]) -> Iterable[str]:
    yield f"{result['data_dir']}: {result['source']}, {result['fingerprint']}"
    yield from _statistics_lines(result["statistics"])
    yield f"\n{result['pictures_decoded']} images decoded, {len(result['broken'])} broken"
    yield from _reason_lines("broken", result["broken"])
    yield from _reason_lines("skipped samples", result["set_aside"])
    if batch := result["first_batch"]:
        yield f"\nfirst of {batch['batches_per_epoch']} batches of an epoch"
        for row in batch["rows"]:
            yield f"  {row['id']}: {' | '.join(row['captions'])}"
        if tokens := batch.get("tokens"):
            rows, length = tokens["shape"]
            yield f"  {rows} rows of {length} tokens, {tokens['supervised']} supervised, " + (
                f"{tokens['padding_share']:.0%} padding"
            )
            yield f"  first row: {' '.join(map(repr, tokens['first_row']))}"


def _reason_lines(what: str, items: Sequence[dict[str, str]], shown: int = 8) -> Iterable[str]:
    """Yield a line for each cause with its count: a thousand equal ones are one line."""
    from vlm_bridge.data_pipeline.samples import by_cause
    from vlm_bridge.errors import on_one_line

    if items:
        causes = by_cause((item["id"], item["reason"]) for item in items)
        yield f"{what}: {len(items):,}"
        yield from (f"  {on_one_line(cause)}" for cause in causes[:shown])
        if len(causes) > shown:
            yield f"  and {len(causes) - shown:,} more causes"

"""``vlm-data``: look at a dataset, turn it into a caption folder, look at what training will read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vlm_bridge.data_pipeline.downloads import DATASETS

if TYPE_CHECKING:
    from vlm_bridge.configuration import Recipe
    from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
    from vlm_bridge.data_pipeline.data_folder import SplitImages
    from vlm_bridge.data_pipeline.loader import TokenizedImages
    from vlm_bridge.data_pipeline.sources import Rejected, Source, SourceItem, SourceOptions

app = typer.Typer(
    name="vlm-data",
    help="Fetch or explore a dataset, turn it into a caption folder, inspect what training reads.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
DatasetName = StrEnum("DatasetName", list(DATASETS))


# These are written out, since importing the originals would slow down --help; a test compares them.
class SourceName(StrEnum):
    """Names in ``data_pipeline.sources.SOURCES``."""

    groundcap = "groundcap"
    flickr8k = "flickr8k"
    flickr30k = "flickr30k"
    coco = "coco"
    conceptual = "conceptual"
    local = "local"
    scenes = "scenes"


class CaptionStyleName(StrEnum):
    """Names in ``data_pipeline.captions.CAPTION_STYLES``."""

    sentence = "sentence"
    raw = "raw"


class SplitByName(StrEnum):
    """Names in ``data_pipeline.splits.SplitBy``."""

    hash = "hash"
    image = "image"
    film = "film"


class SplitKind(StrEnum):
    """Who decides the splits of a dataset that has some of its own, but not all three."""

    fractions = "fractions"
    official = "official"


_SOURCE_HELP = "A dataset in its own layout. (default: found out; without --input-dir groundcap)"
_INPUT_DIR = typer.Option(
    None,
    "--input-dir",
    "--source-path",
    help="Folder of the dataset (groundcap: its parquet files). (default: the hub for groundcap)",
)
_CAPTIONS_FILE = typer.Option(
    None,
    help="Caption file (local, flickr30k), Karpathy's split file (coco). (default: found in the input folder)",
)
_FOLLOW_LINKS = typer.Option(
    False, "--follow-links", help="Read images that links outside the input folder lead to."
)
_YEAR = typer.Option(
    None, help="2014 or 2017: COCO's own splits (coco). (default: Karpathy's, then the newest)"
)
_RESTVAL = typer.Option(True, help="Train on Karpathy's restval images too (coco).")
_NUM_TRAIN = typer.Option(10_000, min=0, help="Pictures to draw (scenes).")
_NUM_VAL = typer.Option(500, min=0, help="Pictures to draw (scenes).")
_NUM_TEST = typer.Option(
    1_000, min=0, help="Pictures of unseen colour-shape pairs to draw (scenes)."
)
_WORDINGS = typer.Option(2, min=1, max=2, help="Captions a picture (scenes).")
_SEED = typer.Option(0, help="Seed of the splits (local) or of the drawing (scenes).")
_JSON = typer.Option(False, "--json", help="Print JSON.")


@app.command("download")
def download(
    name: DatasetName = typer.Argument(..., help="The dataset."),
    output_dir: Path = typer.Option(None, help="Folder to fetch to. (default: datasets/NAME)"),
    year: int = typer.Option(2017, help="2014 or 2017 (coco)."),
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
    source: SourceName = typer.Option(None, help=_SOURCE_HELP),
    data_dir: Path = typer.Option(None, help="A caption folder, instead of a source."),
    input_dir: Path = _INPUT_DIR,
    captions_file: Path = _CAPTIONS_FILE,
    follow_links: bool = _FOLLOW_LINKS,
    year: int = _YEAR,
    restval: bool = _RESTVAL,
    num_train: int = _NUM_TRAIN,
    num_val: int = _NUM_VAL,
    num_test: int = _NUM_TEST,
    wordings: int = _WORDINGS,
    seed: int = _SEED,
    samples: int = typer.Option(8, min=0, help="Images to show."),
    grid: Path = typer.Option(
        None, help="PNG of the shown images with their captions. (default: runs/explore/NAME.png)"
    ),
    no_grid: bool = typer.Option(False, "--no-grid", help="Write no PNG."),
    tokenizer: str = typer.Option(
        None, help="Hub name or folder: also counts captions in its language model's tokens."
    ),
    keep_tags: bool = typer.Option(
        False, "--keep-tags", help="Show captions with their grounding tags."
    ),
    json_output: bool = _JSON,
) -> None:
    """Show sizes, fields, caption lengths, vocabulary, tags and a few samples of a source or a caption folder."""
    import json
    from dataclasses import asdict

    from vlm_bridge.cli.progress import show_progress
    from vlm_bridge.data_pipeline.data_folder import open_data_folder
    from vlm_bridge.data_pipeline.explore import (
        describe_items,
        folder_items,
        plain_caption,
        sample_items,
    )
    from vlm_bridge.data_pipeline.sources import SourceOptions
    from vlm_bridge.errors import UsageError

    if source is not None and data_dir is not None:
        raise UsageError("give either --source or --data-dir")
    if no_grid and grid is not None:
        raise UsageError("give either --grid or --no-grid")
    count_tokens, no_tokens = _token_counter(tokenizer)
    facts: dict[str, Any] = {}
    if data_dir is not None:
        name = data_dir.resolve().name
        set_aside: list[Rejected] = []
        items = folder_items(open_data_folder(data_dir), set_aside)
    else:
        # With their tags, which are counted.
        options = SourceOptions(
            input_dir, captions_file, num_train, num_val, num_test, seed, wordings, keep_tags=True,
            year=year, restval=restval, follow_links=follow_links,
        )  # fmt: skip
        opened = _open_source(source, options)
        name = opened.name
        items, set_aside = opened.items(), opened.rejected
        facts = opened.facts()
    with show_progress("pictures measured") as report:
        statistics = describe_items(items, report, count_tokens=count_tokens)
    shown = sample_items(items, samples, seed)
    text_of = str if keep_tags else plain_caption
    statistics["dataset"] = facts
    statistics["set_aside"] = [asdict(item) for item in set_aside]
    statistics["samples"] = [
        {
            "id": item.image_id,
            "split": item.split,
            "captions": [text_of(text) for text in item.captions],
        }
        for item in shown
    ]
    picture_grid = None if no_grid or not shown else grid or Path("runs/explore") / f"{name}.png"
    if picture_grid is not None:
        captions = [
            sample["captions"][0] if sample["captions"] else "" for sample in statistics["samples"]
        ]
        _write_grid(shown, captions, picture_grid)
    if json_output:
        print(json.dumps(statistics, indent=2, ensure_ascii=False))
    else:
        _print_facts(facts)
        _print_statistics(statistics, no_tokens=no_tokens)
        if picture_grid is not None:
            print(f"\npictures: {picture_grid}")


@app.command("transform")
def transform(
    source: SourceName = typer.Option(None, help=_SOURCE_HELP),
    output_dir: Path = typer.Option(None, help="The caption folder to make."),
    input_dir: Path = _INPUT_DIR,
    captions_file: Path = _CAPTIONS_FILE,
    follow_links: bool = _FOLLOW_LINKS,
    year: int = _YEAR,
    restval: bool = _RESTVAL,
    num_train: int = _NUM_TRAIN,
    num_val: int = _NUM_VAL,
    num_test: int = _NUM_TEST,
    wordings: int = _WORDINGS,
    seed: int = _SEED,
    split: SplitKind = typer.Option(
        SplitKind.fractions, help="official keeps the dataset's own test part (groundcap)."
    ),
    split_by: SplitByName = typer.Option(
        None,
        help="What is dealt out where the source has no splits: each id by its hash, images in exact shares, or "
        "whole films. (default: groundcap film (image where ids name none), others hash)",
    ),
    val_fraction: float = typer.Option(
        None,
        help="Share for validation, where the source has no splits. (default: groundcap 0.05, conceptual 0.01 "
        "(more of fewer than 10,000), others 0.1)",
    ),
    test_fraction: float = typer.Option(
        None,
        help="Share for testing, where the source has no splits. (default: groundcap 0.15, conceptual 0.01 "
        "(more of fewer than 10,000), others 0.1)",
    ),
    image_size: int = typer.Option(640, help="Longest side of a stored picture, in pixels."),
    caption_style: CaptionStyleName = typer.Option(
        None, help="sentence tidies captions into sentences. (default: the source's)"
    ),
    keep_tags: bool = typer.Option(
        False, "--keep-tags", help="Keep grounding tags in captions (groundcap)."
    ),
    limit: int = typer.Option(
        None, help="A sample of at most N images a split, for a quick trial."
    ),
    near_duplicate_distance: int = typer.Option(
        4, help="Report pictures whose perceptual hashes differ in at most N of 64 bits."
    ),
    max_pixels: int = typer.Option(
        None, min=0, help="Pixels of an image at most, 0 for no limit. (default: 51,000,000)"
    ),
    workers: int = typer.Option(None, help="Processes. (default: one a core, at most 8)"),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only say what the splits would be."),
    num_rows: int = typer.Option(
        None, min=1, help="With --dry-run: of a dataset of N images; reads no data."
    ),
    json_output: bool = _JSON,
) -> None:
    """Turn a dataset into a caption folder. Ctrl-C stops; the same command continues."""
    import json

    from vlm_bridge.cli.progress import show_progress
    from vlm_bridge.data_pipeline import images
    from vlm_bridge.data_pipeline.sources import SourceOptions
    from vlm_bridge.data_pipeline.transform import transform as run
    from vlm_bridge.errors import UsageError

    if output_dir is None and not dry_run:
        raise UsageError("give --output-dir, the caption folder to make (or --dry-run)")
    if num_rows is not None and not dry_run:
        raise UsageError("--num-rows goes with --dry-run; for fewer images there is --limit")
    if max_pixels is not None:
        images.LIMITS.max_pixels = max_pixels
    opened = _open_source(
        source,
        SourceOptions(
            input_dir, captions_file, num_train, num_val, num_test, seed, wordings,
            official_split=split is SplitKind.official, keep_tags=keep_tags, year=year, restval=restval,
            follow_links=follow_links,
        ),
    )  # fmt: skip
    planning: dict[str, Any] = {
        "seed": seed,
        "split_by": split_by.value if split_by else None,
        "val_fraction": val_fraction,
        "test_fraction": test_fraction,
        "caption_style": caption_style.value if caption_style else None,
        "limit": limit,
    }
    if dry_run:
        outlook = _outlook(opened, planning, num_rows)
        print(json.dumps(outlook, indent=2)) if json_output else _print_outlook(outlook)
        return
    try:
        with show_progress("pictures") as report:
            manifest = run(
                opened,
                output_dir,
                workers=workers if workers is not None else _default_workers(),
                image_size=image_size,
                near_duplicate_distance=near_duplicate_distance,
                progress=report,
                **planning,
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
    data_dir: Path = typer.Option(None, help="A caption folder. (default: the recipe's)"),
    config: Path = typer.Option(
        None, help="A recipe: also shows the batch as its language model's tokens."
    ),
    batch_size: int = typer.Option(
        None, min=1, help="Captions in a batch. (default: the recipe's)"
    ),
    check: int = typer.Option(256, min=0, help="Pictures to decode as a check."),
    check_all: bool = typer.Option(
        False, "--all", help="Decode every picture and compare the fingerprint."
    ),
    json_output: bool = _JSON,
) -> None:
    """Check a caption folder and show the first batch that training would read."""
    import json
    from dataclasses import asdict

    from vlm_bridge.cli.progress import show_progress
    from vlm_bridge.configuration import load_recipe
    from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
    from vlm_bridge.data_pipeline.data_folder import open_data_folder, readable_split
    from vlm_bridge.data_pipeline.explore import (
        describe_items,
        find_broken,
        folder_items,
        sample_items,
    )
    from vlm_bridge.errors import DataError, UsageError

    if data_dir is None and config is None:
        raise UsageError("give --data-dir, --config, or both")
    recipe = load_recipe(config)
    if batch_size is not None:
        recipe = recipe.replace(batch_size=batch_size)
    folder = open_data_folder(data_dir or recipe.data_dir)
    set_aside: list[Rejected] = []
    items = folder_items(folder, set_aside)
    statistics = describe_items(items)
    checked = items if check_all else sample_items(items, check)
    with show_progress("pictures decoded") as report:
        broken = find_broken(checked, report)
    if check_all and not broken and folder.compute_fingerprint() != folder.fingerprint:
        mend = "make it again"
        if isinstance(folder, CaptionFolder) and not folder.is_checked:
            mend = "delete its manifest, and the next start makes another"
        raise DataError(
            f"{folder.root} was changed after it was made (its fingerprint differs): {mend}"
        )

    batch = None
    if "train" in folder.splits:
        batch = _first_batch(
            readable_split(folder, "train")[0], recipe, with_tokens=config is not None
        )
    if json_output:
        result = {
            "data_dir": str(folder.root),
            "fingerprint": folder.fingerprint,
            "statistics": statistics,
            "set_aside": [{"id": item.id, "reason": item.reason} for item in set_aside],
            "pictures_decoded": len(checked),
            "broken": [{"id": item.id, "reason": item.reason} for item in broken],
            "first_batch": batch,
        }
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        print(
            f"{folder.root}: {folder.manifest.get('source', 'unknown source')}, {folder.fingerprint}"
        )
        _print_statistics(statistics)
        print(f"\n{len(checked)} of {len(items)} pictures decoded, {len(broken)} broken")
        _print_reasons("broken", [asdict(item) for item in broken])
        _print_reasons("skipped samples", [asdict(item) for item in set_aside])
        if batch:
            _print_batch(batch)
    if broken:
        raise DataError(
            f"{len(broken)} pictures of {folder.root} cannot be read: make the folder again"
        )


def _open_source(name: SourceName | None, options: SourceOptions) -> Source:
    """Return the source of a name, or the one that the input folder's files tell, which is said in one line."""
    from vlm_bridge.cli.progress import note
    from vlm_bridge.data_pipeline.sources import find_source, make_source

    if name is not None:
        return make_source(name.value, options)
    found, file = find_source(options)
    if options.input_dir is not None:
        note(f"source: {found} ({file})")
    return make_source(found, options)


def _default_workers() -> int:
    import os

    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(8, max(2, cores))  # two or more decode apart from this process


def _first_batch(images: SplitImages, recipe: Recipe, *, with_tokens: bool) -> dict[str, Any]:
    """Describe the first batch of the first epoch: its rows, and its token counts if they are asked for."""
    from vlm_bridge.training_strategy.data import epoch_plan

    language_model = _language_model(recipe) if with_tokens else None
    lengths = None
    if recipe.tokens_per_batch is not None:  # which only a recipe says
        lengths = _tokenized(images, recipe, language_model).caption_lengths
    plan = epoch_plan(recipe, [len(image.captions) for image in images], lengths, images.shards)
    rows = plan.batches(0)[0]
    batch: dict[str, Any] = {
        "batches_per_epoch": plan.num_batches(0),
        "rows": [
            {
                "id": images[row.image].original_id,
                "captions": [images[row.image].captions[caption] for caption in row.captions],
            }
            for row in rows
        ],
    }
    if language_model is not None:
        batch["tokens"] = _count_tokens(images, recipe, rows, language_model)
    return batch


def _language_model(recipe: Recipe) -> Any:
    from vlm_bridge.cli.quiet import quiet_transformers
    from vlm_bridge.model_architecture.weights import build_language_model

    quiet_transformers()
    return build_language_model(recipe.language_model)


def _tokenized(
    images: Sequence[CaptionedImage], recipe: Recipe, language_model: Any
) -> TokenizedImages:
    from vlm_bridge.data_pipeline.loader import TokenizedImages
    from vlm_bridge.model_architecture.captioner import caption_format

    return TokenizedImages(images, caption_format(language_model, recipe))


def _count_tokens(
    images: Sequence[CaptionedImage], recipe: Recipe, rows: Sequence[Any], language_model: Any
) -> dict[str, Any]:
    from vlm_bridge.data_pipeline.loader import Row

    # Only the images of this batch: tokenising all captions of a large dataset would take a while.
    tokenized = _tokenized([images[row.image] for row in rows], recipe, language_model)
    packed = tokenized.pack([Row(index, row.captions) for index, row in enumerate(rows)])
    decode = language_model.tokenizer.decode
    return {
        "shape": list(packed.input_ids.shape),
        "supervised": packed.num_supervised,
        "padding_share": 1 - packed.num_tokens / packed.input_ids.size,
        "first_row": [decode([token]) for token in packed.input_ids[0][packed.segments[0] != 0]],
    }


def _outlook(source: Source, planning: dict[str, Any], num_rows: int | None) -> dict[str, Any]:
    """What a transformation would make: images of each split and steps per epoch of the published recipe."""
    from vlm_bridge.configuration import Recipe
    from vlm_bridge.data_pipeline.loader import EpochPlan
    from vlm_bridge.data_pipeline.splits import SPLITS
    from vlm_bridge.data_pipeline.transform import preview, split_rule
    from vlm_bridge.errors import UsageError

    if num_rows is None:
        captions, rule = preview(source, **planning)
    else:
        if source.split_rule is not None or getattr(source, "official_split", False):
            raise UsageError(
                "--num-rows knows no official split: leave it out, and the dataset is read"
            )
        rule = split_rule(
            source, planning["split_by"], planning["val_fraction"], planning["test_fraction"]
        )
        rule = rule.resolve([None] * num_rows)
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


def _print_outlook(outlook: dict[str, Any]) -> None:
    about = "" if outlook["exact"] else "about "
    images = " / ".join(f"{count:,}" for count in outlook["images"].values())
    print(
        f"{outlook['source']}, train / val / test: {about}{images} of {sum(outlook['images'].values()):,} images"
    )
    print(
        f"{about}{outlook['steps_per_epoch']:,} steps per epoch at batch size {outlook['batch_size']}"
    )
    print(f"split rule: {outlook['split_rule']}")
    print("nothing was written (--dry-run)")


def _token_counter(name: str | None) -> tuple[Callable[[list[str]], list[int]] | None, str]:
    """Return what counts the tokens of captions with the tokenizer called ``name``; or None, and why not."""
    if name is None:
        return None, "name a tokenizer with --tokenizer"
    from vlm_bridge.cli.quiet import quiet_transformers

    quiet_transformers()
    from transformers import AutoTokenizer

    from vlm_bridge.hub import hub_problem, reach_hub
    from vlm_bridge.model_architecture.language_model import encode_as_text

    try:
        reach_hub(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        # A missing folder, gated access, no network, a damaged file: none of them is worth the statistics.
        why = (
            hub_problem(error, name)
            or (str(error).strip().splitlines() or [type(error).__name__])[0]
        )
        return None, f"cannot load the tokenizer {name!r}: {why}"
    return lambda texts: [len(ids) for ids in encode_as_text(tokenizer, texts)], ""


def _write_grid(items: Sequence[SourceItem], captions: Sequence[str], path: Path) -> None:
    """Write the pictures of ``items`` with one caption each as one PNG."""
    import tempfile

    from vlm_bridge.data_pipeline.sources import iter_pictures
    from vlm_bridge.evaluation.contact_sheet import SheetItem, contact_sheet

    with tempfile.TemporaryDirectory() as unpacked:
        tiles = []
        for index, (picture, caption) in enumerate(
            zip(iter_pictures(items), captions, strict=True)
        ):
            file = Path(unpacked) / f"{index}.png"
            if callable(picture):
                picture().save(file)
                picture = file
            elif picture is None or isinstance(picture, bytes):
                file.write_bytes(picture or b"")
                picture = file
            tiles.append(SheetItem(picture, caption))
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(tiles, path)


def _print_facts(facts: dict[str, Any]) -> None:
    if not facts:
        return
    rows = ", ".join(f"{part} {count:,}" for part, count in facts["rows"].items())
    print(f"{facts['files']} files, {facts['bytes'] / 1e6:,.1f} MB; rows: {rows}; ", end="")
    print(f"{facts['human_annotated_rows']:,} annotated by people")
    for name, kind in facts["fields"].items():
        print(f"  {name:18}{kind}")


def _print_statistics(statistics: dict[str, Any], *, no_tokens: str = "") -> None:
    per_split = ", ".join(
        f"{count} {split}" for split, count in statistics["images_per_split"].items()
    )
    print(f"{statistics['images']} images ({per_split}), {statistics['captions']} captions", end="")
    print(f", {statistics['films']} films" if statistics["films"] else "")
    print(f"{'':20}{'min':>8}{'median':>8}{'p95':>8}{'max':>8}")
    for key in (
        "images_per_film", "captions_per_image", "words_per_caption", "tokens_per_caption",
        "picture_width", "picture_height",
    ):  # fmt: skip
        if numbers := statistics[key]:
            cells = "".join(f"{numbers[column]:8g}" for column in ("min", "median", "p95", "max"))
            print(f"{key.replace('_', ' '):20}{cells}")
    if no_tokens:
        print(f"tokens per caption: not counted; {no_tokens}")
    vocabulary = statistics["vocabulary"]
    common = ", ".join(word for word, _ in vocabulary["most_common"])
    print(
        f"vocabulary: {vocabulary['words']} words, {vocabulary['seen_once']} seen once; most common: {common}"
    )
    _print_tags(statistics["tags"])
    _print_reasons("pictures cannot be read", statistics["unreadable"])
    _print_reasons("skipped by the source", statistics.get("set_aside", []))
    _print_samples(statistics.get("samples", []))


def _print_tags(tags: dict[str, Any] | None) -> None:
    if tags is None:
        return
    print(
        f"tags: in {tags['captions_with_tags']} captions, none in {tags['captions_without_tags']}, "
        f"{tags['captions_with_unbalanced_tags']} with more opened than closed or the reverse; "
        f"{tags['ids_per_caption']:.1f} detections named in a caption"
    )
    print(
        f"  {'tag':16}{'tags':>8}{'a caption':>11}{'classes':>9}  tags with 0, 1, 2 ... ids; most common classes"
    )
    for kind, numbers in tags["kinds"].items():
        ids = ", ".join(f"{count} x {number}" for number, count in numbers["ids_per_tag"].items())
        common = ", ".join(f"{label} {count}" for label, count in numbers["most_common"])
        name = f"{kind} {numbers['meaning']}"
        print(
            f"  {name:16}{numbers['tags']:8}{numbers['per_caption']:11.1f}{numbers['classes']:9}  {ids}; {common}"
        )


def _print_samples(samples: Sequence[dict[str, Any]]) -> None:
    import textwrap

    if not samples:
        return
    width = max(12, *(len(sample["id"]) for sample in samples))
    print(f"\n{'sample':{width}}  {'split':6}{'words':>6}  caption")
    for sample in samples:
        name, split = sample["id"], sample["split"] or ""
        for caption in sample["captions"]:
            first, *rest = textwrap.wrap(caption, 88) or [""]
            print(f"{name:{width}}  {split:6}{len(caption.split()):6}  {first}")
            for line in rest:
                print(f"{'':{width}}  {'':12}  {line}")
            name = split = ""


def _print_manifest(manifest: dict[str, Any], output_dir: Path) -> None:
    counts = ", ".join(
        f"{split} {count['images']} images / {count['captions']} captions"
        for split, count in manifest["counts"].items()
    )
    print(f"{output_dir}: {counts}")
    for split in ("train", "val"):
        if not manifest["counts"][split]["images"]:
            print(
                f"note: no image is in {split}, and training needs some: where the source decides no splits, "
                "--val-fraction and --test-fraction change the shares"
            )
    if near := manifest["near_duplicates"]:
        print(
            f"near duplicates: {near['pairs']} pairs, {near['pairs_across_splits']} of them across splits"
        )
    _print_reasons("skipped", manifest["rejected"])
    print(f"licence: {manifest['licence_note']}")
    print(f"everything else: {output_dir / 'manifest.json'}")


def _print_reasons(what: str, items: Sequence[dict[str, str]], shown: int = 8) -> None:
    """Print a line for each cause with its count, so that a thousand equal ones are one line."""
    from vlm_bridge.data_pipeline.bad_samples import by_cause
    from vlm_bridge.errors import on_one_line

    causes = by_cause((item["id"], item["reason"]) for item in items)
    if items:
        print(f"{what}: {len(items):,}")
    for cause in causes[:shown]:
        print(f"  {on_one_line(cause)}")
    if len(causes) > shown:
        print(f"  and {len(causes) - shown:,} more causes")


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

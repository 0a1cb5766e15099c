"""`vlm-bridge info`, `doctor`, `export`, `average`, `features` and `new-decoder`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_bridge.cli import options
from vlm_bridge.cli.options import Option
from vlm_bridge.errors import ConfigurationError, UsageError

if TYPE_CHECKING:
    from vlm_bridge.captioning.publish import CardFacts
    from vlm_bridge.configuration import Recipe

ORIGINAL_HEADS = 8  # of the original project's bridge; its checkpoints do not name them
Layout = StrEnum("Layout", ["huggingface", "original"])
Dtype = StrEnum("Dtype", ["float16", "bfloat16", "float32", "int8", "int4"])


def info(
    overrides: options.Overrides = None,
    config: options.RecipeFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Count the parameters of a recipe's parts and show the feature shape. Reads no weights."""
    options.quiet_transformers()
    found = parts_of(options.load_recipe(config, overrides))
    if as_json:
        options.print_json(found)
        return
    rows = [("component", "role", "pretrained", "trainable", "parameters")]
    for part in found["components"]:
        total, trainable = part["parameters"], part["trainable"]
        trained = "no" if not trainable else "all" if trainable == total else f"{trainable:,}"
        pretrained = "yes" if part["pretrained"] else "no"
        rows.append((part["name"], part["role"], pretrained, trained, f"{total:,}"))
    options.print_rows(rows)
    tokens, width = found["features_shape"]
    print(
        f"trainable share   {found['trainable_share']:.2%}\n"
        f"features          [B, {tokens}, {width}]: {tokens} tokens x {width}, "
        f"{found['soft_tokens']} soft tokens before the text"
    )


def parts_of(recipe: Recipe) -> dict[str, Any]:
    """Count the parameters of a recipe's parts, from shapes alone (on the meta device)."""
    from vlm_bridge.model_architecture.captioner import build_captioner

    model = build_captioner(recipe, meta=True)
    names = {
        "vision_encoder": recipe.vision_encoder.name,
        "bridge": recipe.bridge.kind,
        "language_model": recipe.language_model.name,
    }
    components: list[dict[str, Any]] = []
    for role, name in names.items():
        parameters = list(getattr(model, role).parameters())
        counts = {
            "parameters": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        }
        components.append({"name": name, "role": role, **counts, "pretrained": role != "bridge"})
    share = sum(c["trainable"] for c in components) / sum(c["parameters"] for c in components)
    return {
        "components": components,
        "features_shape": [model.vision_encoder.num_tokens, model.vision_encoder.embed_dim],
        "soft_tokens": model.bridge.num_soft_tokens,
        "trainable_share": share,
    }


def doctor(as_json: options.AsJson = False) -> None:
    """Check versions, devices, Java, disk and hub access, and name commands that mend problems."""
    from vlm_bridge.doctor import run_checks

    checks = run_checks()
    if as_json:
        options.print_json([asdict(check) for check in checks])
    else:
        width = max(len(check.name) for check in checks)
        colors = {"ok": "green", "warn": "yellow", "fail": "red"}
        for check in checks:
            status = typer.style(f"{check.status:<5}", colors[check.status])
            typer.echo(f"{status}{check.name:<{width}}  {check.detail}")
            if check.fix:
                typer.echo(f"{'':<{width + 7}}mend: {check.fix}")
    if failures := [check.name for check in checks if check.status == "fail"]:
        names = ", ".join(failures)
        options.note(f"error: required and missing or broken: {names}", always=True)
        raise typer.Exit(1)


def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint, run folder, or hub model.")],
    output_dir: Annotated[Path, Option(help="Where to write; made if need be.")],
    format: Annotated[Layout, Option(help="original is one .pth file.")] = Layout.huggingface,
    config: options.Config = None,
    dtype: Annotated[Dtype | None, Option(help="Of the weights. (default: as stored)")] = None,
    title: Annotated[str | None, Option(help="Title of the model card.")] = None,
    license: Annotated[str | None, Option(help="License for the model card, e.g. mit.")] = None,
    dataset: Annotated[str | None, Option(help="The training data on the model card.")] = None,
    metrics: Annotated[Path | None, Option(help="Scores. (default: the run's last)")] = None,
    overwrite: options.Overwrite = False,
    push_to_hub: Annotated[str | None, Option(metavar="REPO", help="Also upload it.")] = None,
    private: Annotated[bool, Option("--private", help="Make the repository private.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only list files, sizes and gaps.")] = False,
) -> None:
    """Write a trained captioner as a Hugging Face folder, or in the original project's layout."""
    original = format == Layout.original
    if original and (push_to_hub or dtype in ("int8", "int4")):
        raise UsageError("--push-to-hub, int8 and int4 are for Hugging Face folders: no --format")
    if private and not push_to_hub:
        raise UsageError("--private needs --push-to-hub REPO")

    from vlm_bridge.captioning import publish
    from vlm_bridge.configuration import load_recipe
    from vlm_bridge.formats.dinov2_gemma import save_original
    from vlm_bridge.training_strategy import checkpoint as checkpoints

    options.quiet_transformers()
    target = output_dir / (checkpoints.BEST_WEIGHTS if original else checkpoints.WEIGHTS_NAME)
    options.refuse_existing(target, overwrite)
    where = checkpoints.find_checkpoint(checkpoint)
    content = checkpoints.load_checkpoint(where)
    given = load_recipe(config) if config else None
    recipe = checkpoints.recipe_of(content, where, given, is_built=False)
    if dtype is not None:
        content["weights"] = checkpoints.stored_as(content["weights"], dtype.name)
    title, scores = title or output_dir.resolve().name, _scores(where, metrics)
    facts = publish.CardFacts(title, push_to_hub, license, dataset, scores)
    with TemporaryDirectory() if dry_run else nullcontext(output_dir) as folder:
        if original:
            save_original(Path(folder, target.name), recipe, content, where)
        else:
            publish.write_huggingface_folder(content, recipe, Path(folder), facts)
        for name in [target.name] if original else publish.FILES:
            size = Path(folder, name).stat().st_size
            print(f"{'would write' if dry_run else 'wrote'} {output_dir / name} ({size:,} bytes)")
    for line in _open_points(recipe, facts, original):
        options.note(f"note: {line}")
    if push_to_hub and dry_run:
        kind = "a private repository" if private else "a public repository"
        print(f"would push them to {publish.SITE}/{push_to_hub}, {kind}")
        publish.require_token()
    elif push_to_hub:
        print(f"pushed to {publish.push_to_hub(output_dir, push_to_hub, private=private)}")
    elif not dry_run:
        print(f"next: vlm-bridge caption IMAGE --checkpoint {output_dir}")


def _scores(checkpoint: Path, given: Path | None) -> dict[str, Any] | None:
    """Return given scores, or those of the last evaluation beside a checkpoint or in its run."""
    from vlm_bridge.evaluation import run_folder

    if given is None:
        folder = checkpoint.parent
        places = (folder, folder.parent) if folder.name == "checkpoints" else (folder,)
        written = [file for place in places for file in run_folder.evaluations_in(place)]
        given = written[-1] if written else None
    return dict(run_folder.read_scores(given).metrics) if given else None


def _open_points(recipe: Recipe, facts: CardFacts, original: bool) -> Iterator[str]:
    """Yield what is left open, or needs care on other machines."""
    from vlm_bridge.captioning.publish import is_local, training_data

    for name in filter(is_local, [*recipe.vision_encoder.names, recipe.language_model.name]):
        yield f"{name} is a folder of this machine: others must have it in the same place"
    for name in recipe.own_code:
        yield f"{name} is code of yours: others need it, and a recipe that names it"
    if original and (heads := recipe.bridge.num_heads) != ORIGINAL_HEADS:
        yield f"in the original project, construct its FullModel with bridge_num_heads={heads}"
    if not original and not facts.license:
        yield "the model card names no license: give --license, or edit README.md"
    if not (original or facts.dataset or training_data(recipe)):
        yield "the model card names no training data: give --dataset, or edit README.md"
    if not original and not facts.metrics:
        yield "the model card has no scores: evaluate with --output-dir RUN/val before exporting"


def average(
    checkpoint: Annotated[list[str], typer.Argument(help="Checkpoints, runs or hub models.")],
    output_dir: Annotated[Path, Option(help="Folder of the averaged run; made if need be.")],
    named_apart_from: Annotated[
        str | None, Option(help="Run for images without an object in the prompt.")
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Average the trained weights of several runs, which often captions better than any of them.

    The runs start from the same weights and see other views, samples or orders of the data (model
    soups: Wortsman et al. 2022; of self-critical runs: Ramé et al. 2024, WARP).
    """
    from vlm_bridge.training_strategy import checkpoint as checkpoints

    if len(checkpoint) < 2:
        raise UsageError("an average needs two checkpoints or more")
    target = output_dir / "checkpoints" / checkpoints.BEST_WEIGHTS
    options.refuse_existing(target, overwrite)
    paths = [checkpoints.find_checkpoint(name) for name in checkpoint]
    plain = checkpoints.find_checkpoint(named_apart_from) if named_apart_from else None
    checkpoints.save_average(target, paths, plain)
    print(f"wrote {target}, the mean of {', '.join(map(str, paths))}")
    print(f"next: vlm-bridge caption IMAGE --checkpoint {output_dir}")


def features(
    overrides: options.Overrides = None,
    config: options.RecipeFile = None,
    verify: Annotated[bool, Option("--verify", help="Compare all checksums.")] = False,
    evict_to: Annotated[str | None, Option(help="Remove old caches down to, e.g., 5GiB.")] = None,
    cache_dir: Annotated[Path | None, Option(help="With --evict-to: where caches are.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Encode the images of a recipe ahead of training, or remove the least recently used caches."""
    from vlm_bridge.data_pipeline.features import cache_root

    if cache_dir is not None and evict_to is None:
        raise UsageError("--cache-dir needs --evict-to; a recipe's own place is feature_cache=DIR")
    root, recipe = cache_dir, None
    if root is None:
        recipe = options.load_recipe(config, overrides)
        root = cache_root(recipe.feature_cache, recipe.data_dir)
    if root is None:
        raise ConfigurationError("feature_cache=off: give feature_cache=auto or a folder")
    if recipe is None or evict_to is not None:
        _evict(root, str(evict_to), as_json)
    else:
        _build_features(recipe, verify, as_json)


def _evict(root: Path, size: str, as_json: bool) -> None:
    from vlm_bridge.data_pipeline.features import as_bytes, caches_below, evict

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", size.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"--evict-to {size!r} is not a size: 5GiB, 500MB or 0, for example")
    unit = (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")
    removed = evict(root, int(float(match[1]) * unit))
    kept = caches_below(root)
    if as_json:
        facts = {
            name: [{"folder": str(folder), "bytes": size} for folder, size in caches.items()]
            for name, caches in (("removed", removed), ("kept", kept))
        }
        options.print_json({"cache_dir": str(root), **facts})
        return
    for folder, num_bytes in removed.items():
        print(f"removed {folder} ({as_bytes(num_bytes)})")
    print(f"{len(kept)} caches below {root} take {as_bytes(sum(kept.values()))}")


def _build_features(recipe: Recipe, verify: bool, as_json: bool) -> None:
    from vlm_bridge.data_pipeline.caption_folder import open_data_folder
    from vlm_bridge.data_pipeline.features import as_bytes
    from vlm_bridge.device import resolve_device
    from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder
    from vlm_bridge.training_strategy.data import split_features, usable_images

    options.quiet_transformers()
    folder = open_data_folder(recipe.data_dir)
    encoder: Any = build_vision_encoder(recipe.vision_encoder)
    encoder = encoder.to(resolve_device(recipe.device))
    facts: list[dict[str, Any]] = []
    for split in ("train", "val"):
        images = usable_images(folder, split, recipe)
        started = time.perf_counter()
        cache: Any = split_features(encoder, recipe, split, images, check_all=verify).items
        seconds = time.perf_counter() - started
        rate = None if cache.was_there else len(cache) / seconds
        facts.append(
            {
                "split": split,
                "folder": str(cache.folder),
                "num_images": len(cache),
                "num_bytes": cache.num_bytes,
                "images_per_second": rate,
                "was_there": cache.was_there,
                "seconds": seconds,
            }
        )
        if not as_json:
            state = f"made in {seconds:.0f} s, {rate:.1f} images/s" if rate else "was there"
            size = f"{len(cache):,} images, {as_bytes(cache.num_bytes)}"
            print(f"{split}: {size} in {cache.folder}: {state}")
    if as_json:
        options.print_json(facts)


def new_decoder(
    data_dir: Annotated[Path, Option(help="Caption folder; its words become word pieces.")],
    output_dir: Annotated[Path, Option(help="Where to write it, for `language_model.name`.")],
    layers: Annotated[int, Option(min=1, help="Layers.")] = 6,
    width: Annotated[int, Option(min=1, help="Width; feed-forward layers are 4x as wide.")] = 256,
    heads: Annotated[int, Option(min=1, help="Attention heads; they must divide the width.")] = 4,
    vocabulary: Annotated[int, Option(min=100, help="Word pieces at most.")] = 6000,
    dropout: Annotated[float, Option(min=0.0, max=0.9, help="Dropout in training.")] = 0.1,
    seed: Annotated[int, Option(min=0, help="Seed of the random weights.")] = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Make a small decoder with cross-attention, to be trained from nothing on your captions."""
    from vlm_bridge.data_pipeline.caption_folder import open_data_folder, readable_split

    options.refuse_existing(output_dir / "config.json", overwrite)
    images, _ = readable_split(open_data_folder(data_dir), "train")

    from vlm_bridge.model_architecture.weights import DecoderSize, write_new_decoder

    options.quiet_transformers()
    size = DecoderSize(layers, width, heads, vocabulary, dropout)
    captions = (caption for image in images for caption in image.captions)
    pieces, parameters = write_new_decoder(captions, output_dir, size, seed=seed)
    print(
        f"{output_dir}: {layers} layers of width {width}, {pieces:,} word pieces, "
        f"{parameters:,} parameters\n"
        f"next: train it whole: vlm-training --config RECIPE language_model.name={output_dir} "
        "'trainable.bridge.*=null' 'trainable.language_model.*=null'"
    )

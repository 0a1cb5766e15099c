"""`vlm-bridge features`."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from vlm_bridge.configuration import Recipe

UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
UNITS |= {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def features(
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Recipe overrides."),
    config: Path = typer.Option(
        None, "--config", "-c", help="Recipe (YAML); training-default without it."
    ),
    verify: bool = typer.Option(
        False, "--verify", help="Compare the checksum of every cached image."
    ),
    evict_to: str = typer.Option(
        None,
        "--evict-to",
        metavar="SIZE",
        help="Build nothing; remove caches until they fit into, e.g., 5GiB.",
    ),
    cache_dir: Path = typer.Option(
        None,
        "--cache-dir",
        help="Where to look for caches to remove, instead of where the recipe keeps them.",
    ),
    json_output: bool = typer.Option(False, "--json", help="Print JSON for machines."),
) -> None:
    """Encode the images of a recipe ahead of training, or remove the least recently used caches."""
    from vlm_bridge.configuration import DEFAULT_RECIPE, load_recipe, shipped_recipe
    from vlm_bridge.data_pipeline.features import cache_root
    from vlm_bridge.errors import ConfigurationError, UsageError

    if cache_dir is not None and evict_to is None:
        raise UsageError("--cache-dir needs --evict-to; a recipe's own place is feature_cache=DIR")
    if evict_to is not None and cache_dir is not None:
        _evict(cache_dir, evict_to, json_output)
        return
    recipe = load_recipe(config or shipped_recipe(DEFAULT_RECIPE), overrides or ())
    root = cache_root(recipe.feature_cache, recipe.data_dir)
    if root is None:
        raise ConfigurationError("feature_cache=off: give feature_cache=auto or a folder")
    if evict_to is not None:
        _evict(root, evict_to, json_output)
    else:
        _build(recipe, verify, json_output)


def _evict(root: Path, size: str, json_output: bool) -> None:
    from vlm_bridge.data_pipeline.features import as_bytes, caches_below, evict
    from vlm_bridge.errors import UsageError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", size.strip())
    if match is None or match[2].lower() not in UNITS:
        raise UsageError(f"--evict-to {size!r} is not a size: 5GiB, 500MB or 0, for example")
    removed = evict(root, int(float(match[1]) * UNITS[match[2].lower()]))
    kept = caches_below(root)
    if json_output:
        facts = {
            name: [{"folder": str(folder), "bytes": size} for folder, size in caches.items()]
            for name, caches in (("removed", removed), ("kept", kept))
        }
        typer.echo(json.dumps({"cache_dir": str(root), **facts}, indent=2))
        return
    for folder, num_bytes in removed.items():
        typer.echo(f"removed {folder} ({as_bytes(num_bytes)})")
    typer.echo(f"{len(kept)} caches below {root} take {as_bytes(sum(kept.values()))}")


def _build(recipe: Recipe, verify: bool, json_output: bool) -> None:
    from vlm_bridge.cli.quiet import quiet_transformers
    from vlm_bridge.data_pipeline.caption_folder import open_data_folder
    from vlm_bridge.data_pipeline.features import as_bytes
    from vlm_bridge.device import resolve_device
    from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder
    from vlm_bridge.training_strategy.data import cached_features, usable_images

    quiet_transformers()
    folder = open_data_folder(recipe.data_dir)
    encoder: Any = build_vision_encoder(recipe.vision_encoder)
    encoder = encoder.to(resolve_device(recipe.device))
    facts: list[dict[str, Any]] = []
    for split in ("train", "val"):
        images = usable_images(folder, split, recipe)
        started = time.perf_counter()
        cache = cached_features(encoder, recipe, split, images, verify)
        seconds = time.perf_counter() - started
        rate = None if cache.was_there else len(cache) / seconds
        facts.append({"split": split, "folder": str(cache.folder), "num_images": len(cache)})
        facts[-1] |= {"num_bytes": cache.num_bytes, "images_per_second": rate}
        facts[-1] |= {"was_there": cache.was_there, "seconds": seconds}
        if not json_output:
            state = f"made in {seconds:.0f} s, {rate:.1f} images/s" if rate else "was there"
            size = f"{len(cache):,} images, {as_bytes(cache.num_bytes)}"
            typer.echo(f"{split}: {size} in {cache.folder}: {state}")
    if json_output:
        typer.echo(json.dumps(facts, indent=2))

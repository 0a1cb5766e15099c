"""`vlm-bridge features`."""

from __future__ import annotations

from pathlib import Path

import typer

UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


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
    """Encode the pictures of a recipe's training ahead of it, or remove the least recently used caches.

    Several of these commands, on one machine or on several that share a disk, divide the work among them.
    """
    import json

    from vlm_bridge.configuration import DEFAULT_RECIPE, load_recipe, shipped_recipe
    from vlm_bridge.errors import UsageError

    if cache_dir is not None and evict_to is None:
        raise UsageError(
            "--cache-dir says where --evict-to looks; a recipe's own place is feature_cache=DIR"
        )
    max_bytes = _bytes_of(evict_to) if evict_to is not None else None
    if max_bytes is None or cache_dir is None:
        recipe = load_recipe(config or shipped_recipe(DEFAULT_RECIPE), overrides or ())
    else:
        recipe = None

    if max_bytes is not None:
        from vlm_bridge.data_pipeline.feature_cache import caches_below, evict

        if recipe is not None:
            from vlm_bridge.training_strategy.features import cache_root

            cache_dir = cache_root(recipe)
        removed = evict(cache_dir, max_bytes)
        kept = caches_below(cache_dir)
        kept_bytes = sum(cache.num_bytes for cache in kept)
        if json_output:
            facts = {
                "cache_dir": str(cache_dir),
                "removed": [
                    {"folder": str(cache.folder), "bytes": cache.num_bytes} for cache in removed
                ],
                "kept": [{"folder": str(cache.folder), "bytes": cache.num_bytes} for cache in kept],
            }
            typer.echo(json.dumps(facts, indent=2))
            return
        for cache in removed:
            typer.echo(f"removed {cache.folder} ({_size(cache.num_bytes)})")
        in_use = " (in use, or unreadable)" if kept_bytes > max_bytes else ""
        typer.echo(f"{len(kept)} caches below {cache_dir} take {_size(kept_bytes)}{in_use}")
        return

    assert recipe is not None
    from vlm_bridge.cli.quiet import quiet_transformers
    from vlm_bridge.training_strategy.features import build_caches

    quiet_transformers()
    built = build_caches(recipe, lambda line: typer.echo(line, err=True), check_all=verify)
    if json_output:
        facts = [{**vars(cache), "folder": str(cache.folder)} for cache in built]
        typer.echo(json.dumps(facts, indent=2))
        return
    for cache in built:
        rate = (
            f", encoded at {cache.images_per_second:.1f} images/s"
            if cache.images_per_second
            else ""
        )
        state = "was there" if cache.was_there else f"made in {cache.seconds:.0f} s"
        typer.echo(
            f"{cache.split}: {cache.num_images:,} images, {_size(cache.num_bytes)} in {cache.folder}: {state}{rate}"
        )


def _bytes_of(text: str) -> int:
    """Bytes of a size such as 5GiB, 500MB or 0."""
    import re

    from vlm_bridge.errors import UsageError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise UsageError(f"--evict-to {text!r} is not a size: 5GiB, 500MB or 0, for example")
    return int(float(match[1]) * units[match[2].lower()])


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:.1f} MiB"

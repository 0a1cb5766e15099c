"""``vlm-data download``: fetch a dataset as far as anyone may, and say how to get the rest."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from vlm_bridge.data_pipeline.downloads import Fetched


class DatasetName(StrEnum):
    """Names in ``data_pipeline.downloads.DATASETS``; written out so that --help is instant, and compared by a test."""

    flickr30k = "flickr30k"
    coco = "coco"
    conceptual = "conceptual"


def download(
    name: DatasetName = typer.Argument(..., help="The dataset."),
    output_dir: Path = typer.Option(None, help="Folder to fetch to. (default: datasets/NAME)"),
    part: list[str] = typer.Option(
        None, help="Only this part: captions, val or train; may be given again. (default: all)"
    ),
    year: int = typer.Option(None, help="2014 or 2017 (coco). (default: 2017)"),
    keep_archives: bool = typer.Option(
        False, "--keep-archives", help="Keep archives after unpacking them."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only list what would be fetched."),
    json_output: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Fetch a dataset's freely available files, resumed and checked; print licence and commands for the others."""
    import json
    from dataclasses import asdict

    from vlm_bridge.cli.progress import show_progress
    from vlm_bridge.data_pipeline.downloads import DATASETS, remote_size
    from vlm_bridge.data_pipeline.downloads import download as run
    from vlm_bridge.data_pipeline.sources import SOURCES

    dataset = DATASETS[name.value]
    folder = output_dir or Path("datasets") / name.value
    files = dataset.choose(part or (), year)
    source = SOURCES[name.value]
    summary: dict[str, Any] = {
        "dataset": name.value,
        "description": source.description,
        "page": dataset.page,
        "licence": source.licence_note,
        "output_dir": str(folder),
        "files": [
            {
                "url": file.url,
                "part": file.part,
                "bytes": remote_size(file),
                "sha256": file.sha256,
                "unpacked": list(file.members),
            }
            for file in files
        ],
        "by_hand": list(dataset.by_hand(folder)),
        "then": dataset.then(folder),
    }
    if not json_output:
        _print_offer(summary)
    if dry_run:
        print(json.dumps(summary, indent=2)) if json_output else print(
            "nothing was fetched (--dry-run)"
        )
        return
    try:
        fetched = run(files, folder, keep_archives=keep_archives, show_progress=show_progress)
    except KeyboardInterrupt:
        print("interrupted: the same command continues where this one stopped", file=sys.stderr)
        raise typer.Exit(130) from None
    if json_output:
        print(json.dumps(summary | {"fetched": [asdict(file) for file in fetched]}, indent=2))
    else:
        _print_result(fetched)


def _print_offer(summary: dict[str, Any]) -> None:
    print(summary["description"])
    print(f"page:    {summary['page']}")
    print(f"licence: {summary['licence']}")
    print(f"free to fetch, to {summary['output_dir']}:")
    for file in summary["files"]:
        what = f" ({', '.join(file['unpacked'])} of it)" if file["unpacked"] else ""
        print(f"  {_size(file['bytes']):>12}  {file['part']:9} {file['url']}{what}")
    if summary["by_hand"]:
        print("by hand:")
    for step in summary["by_hand"]:
        print(f"  {step}")
    print(f"then:\n  {summary['then']}")


def _print_result(fetched: list[Fetched]) -> None:
    for file in fetched:
        how = "was there" if file.was_there else "fetched and checked"
        unpacked = f", {file.unpacked:,} files unpacked" if file.unpacked else ""
        print(f"{file.name}: {how}, {_size(file.bytes)}{unpacked}")


def _size(size: int | None) -> str:
    if size is None:
        return "size unknown"
    return f"{size / 1e9:,.2f} GB" if size >= 10**9 else f"{size / 1e6:,.1f} MB"

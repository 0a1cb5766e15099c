"""Manifests of caption folders that other tools prepared.

The dinov2-gemma project writes ``ROOT/{train,val,test}/{images/*.jpg,captions.jsonl}`` without a manifest. Here one is
made on first use, beside the splits or, where the folder is read-only, in the user's cache. It is made again when the
folder has changed. The fingerprint depends on content alone, so checkpoints continue on another machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm_bridge import __version__
from vlm_bridge.data_pipeline.bad_samples import BadSamples
from vlm_bridge.data_pipeline.caption_folder import (
    CAPTIONS_NAME,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    PREPARED_ELSEWHERE,
    caption_lines,
    fingerprint,
    image_digests,
    image_files,
    index_captions,
    parse_manifest,
    write_atomically,
)
from vlm_bridge.data_pipeline.splits import SPLITS
from vlm_bridge.environment import cache_dir
from vlm_bridge.errors import DataError

logger = logging.getLogger(__name__)

SAY_EVERY_SECONDS = 10.0


def current_manifest(root: Path) -> dict[str, Any]:
    """Return the manifest of a folder that other tools prepared; make it where there is none for its present state.

    Args:
        root: the folder that holds train, val and test.

    Raises:
        DataError: no line of a split can be used.
    """
    state, places = _state(root), (root / MANIFEST_NAME, _cached(root))
    known = [manifest for place in places if (manifest := _read(place)) is not None]
    manifest = next((manifest for manifest in known if manifest.get("state") == state), None)
    if manifest is None:
        manifest = {**_make(root), "state": state}
        why = "has changed since its manifest was made" if known else f"has no {MANIFEST_NAME}"
        logger.info(f"{root} {why}: {_write(manifest, *places)} ({_sizes(manifest['counts'])})")
    if shared := manifest.get("also_in_train"):
        counts = " and ".join(f"{number:,} {split} images" for split, number in shared.items())
        logger.info(f"{counts} of {root} are in train too: scores on them are too good")
    return manifest


def _make(root: Path) -> dict[str, Any]:
    counts: dict[str, dict[str, int]] = {}
    digests: dict[str, dict[str, str]] = {}
    logged = time.monotonic()
    for split in SPLITS:
        folder = root / split
        if not (folder / CAPTIONS_NAME).is_file():
            continue
        bad = BadSamples(f"{split} captions")
        images = index_captions(folder, bad)
        if bad.total and not len(images):
            raise DataError(
                f"none of the {bad.total:,} lines of {folder / CAPTIONS_NAME} can be used: {bad.summary()}; captions "
                f"in another form: `vlm-data transform --source local --input-dir {root} --output-dir NEW_FOLDER`"
            )
        if not bad.total:
            continue
        counts[split] = {"images": len(images), "captions": images.num_captions}
        digests[split] = {}
        for path, digest in image_digests(folder):
            digests[split][path] = digest
            if time.monotonic() - logged > SAY_EVERY_SECONDS:
                logged = time.monotonic()
                logger.info(
                    f"{split}: hashed {len(digests[split]):,} of about {len(images):,} images"
                )
    if not counts:
        raise DataError(
            f"the {CAPTIONS_NAME} files in {root} have no lines: prepare the folder again"
        )
    train = set(digests.get("train", {}).values())
    shared = {s: len(train & set(digests[s].values())) for s in counts if s != "train"}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created_with": f"vlm-bridge {__version__}",
        "source": PREPARED_ELSEWHERE,
        "counts": counts,
        "also_in_train": {split: number for split, number in shared.items() if number},
        "fingerprint": fingerprint(
            {split: caption_lines(root / split) for split in counts}, digests
        ),
    }


def _write(manifest: Mapping[str, Any], beside: Path, cached: Path) -> str:
    """Write a manifest to the first place that can be written, and say which."""
    content = (json.dumps(manifest, indent=2) + "\n").encode()
    for place in (beside, cached):
        with suppress(OSError):
            if place == cached:
                place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, content)
            return f"made {place}"
    return f"neither it nor {cached.parent} can be written, so every start makes a manifest anew"


def _read(place: Path) -> dict[str, Any] | None:
    try:
        return parse_manifest(place)
    except (OSError, DataError):
        return None


def _cached(root: Path) -> Path:
    name = hashlib.sha256(str(root.resolve()).encode(errors="surrogateescape")).hexdigest()[:16]
    return cache_dir() / "manifests" / f"{name}.json"


def _state(root: Path) -> str:
    """Hash caption files, and names and sizes of images: what a look at each start can afford."""
    digest = hashlib.blake2b(digest_size=16)
    for split in SPLITS:
        folder = root / split
        if (folder / CAPTIONS_NAME).is_file():
            with (folder / CAPTIONS_NAME).open("rb") as file:
                digest.update(
                    f"{split}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode()
                )
            for path in image_files(folder):
                line = f"{path.name}\0{path.stat().st_size}\0"
                digest.update(line.encode(errors="surrogateescape"))
    return f"blake2b:{digest.hexdigest()}"


def _sizes(counts: Mapping[str, Mapping[str, int]]) -> str:
    return ", ".join(f"{split} {count['images']:,} images" for split, count in counts.items())

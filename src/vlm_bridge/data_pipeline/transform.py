"""Make a caption folder of a source: clean captions, split, decode images, list what is skipped.

The same command continues interrupted work: an image is written under another name and renamed,
and the manifest comes last. The result depends on the source and the settings alone.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from PIL import Image

from vlm_bridge import __version__
from vlm_bridge.data_pipeline.caption_folder import (
    CAPTIONS_NAME,
    FORMAT,
    FORMAT_VERSION,
    IMAGES_NAME,
    MANIFEST_NAME,
    UNFINISHED_NAME,
    fingerprint,
    read_manifest,
)
from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS, CaptionStyle, clean_caption
from vlm_bridge.data_pipeline.images import ImageReader, decode_image, result_of
from vlm_bridge.data_pipeline.samples import NUM_CAUSES, SkippedSample, by_cause
from vlm_bridge.data_pipeline.sources import RawImage, Source, SourceItem, iter_images
from vlm_bridge.data_pipeline.splits import (
    DUPLICATE_PRIORITY,
    SPLITS,
    SplitBy,
    SplitName,
    SplitRule,
)
from vlm_bridge.errors import DataError, ImageError
from vlm_bridge.files import write_atomically
from vlm_bridge.parsing import is_text

Progress = Callable[[int, int], None]  # called with (images done, images in all)

JPEG_QUALITY = 95
MAX_LISTED_NEAR_DUPLICATES = 100
IMAGES_A_PROCESS = 32  # fewer are not worth the start of another one


class Planning(TypedDict, total=False):
    """Options of a plan; None is the source's own. ``limit`` is a number of images a split."""

    seed: int
    split_by: SplitBy | None
    val_fraction: float | None
    test_fraction: float | None
    caption_style: CaptionStyle | None
    limit: int | None


Hashes = tuple[str, int, str]  # of an image's pixels, its looks (64 bits) and its file


@dataclass(slots=True)
class _Planned:
    """One image: cleaned captions, its split, the name of its file, and its hashes once made."""

    captions: list[str]
    split: SplitName
    file_name: str
    item: SourceItem
    pixels: str = ""
    looks: int = 0
    sha256: str = ""

    @property
    def image_id(self) -> str:
        return self.item.image_id


@dataclass(frozen=True)
class _Plan:
    """The images to make, what was skipped so far, and how images are split."""

    images: list[_Planned]
    skipped: list[SkippedSample]
    rule: SplitRule
    facts: dict[str, Any]


def transform(
    source: Source,
    output_dir: str | Path,
    *,
    workers: int = 1,
    image_size: int = 640,
    near_duplicate_distance: int = 4,
    progress: Progress = lambda done, total: None,
    **planning: Unpack[Planning],
) -> dict[str, Any]:
    """Write ``source`` as a caption folder and return its manifest.

    Args:
        workers: processes; with several, images are decoded by an `ImageReader`.
        image_size: longest side in pixels, by default COCO's; smaller upright RGB JPEGs are copied
            unchanged.
        near_duplicate_distance: differing bits of 64-bit perceptual hashes to report.

    Raises:
        VLMBridgeError: a bad option, no usable image, or a folder that holds something else.
    """
    plan = _plan(source, planning)
    facts = plan.facts
    facts["settings"]["image_size"] = image_size
    facts["settings"]["near_duplicate_distance"] = near_duplicate_distance
    root = Path(output_dir)
    if finished := _claim(root, facts):
        return finished
    broken = _make_images(root, plan.images, image_size, workers, progress)
    kept, duplicates = _drop_duplicates([p for p in plan.images if p.sha256])
    skipped = [*plan.skipped, *broken, *duplicates]
    if not kept:
        causes = by_cause(skipped)[:NUM_CAUSES]
        why = f": {'; '.join(causes)}" if causes else ""
        raise DataError(f"no usable image in source {source.name}{why}")
    facts["duplicates"] = {
        "rule": f"equal pixels across splits: kept in the first of {', '.join(DUPLICATE_PRIORITY)}",
        "set_aside": len(duplicates),
        "within_a_split": len(kept) - len({p.pixels for p in kept}),
    }
    finds_near = source.finds_near_duplicates
    facts["near_duplicates"] = _near(kept, near_duplicate_distance) if finds_near else None
    facts["rejected"] = [item._asdict() for item in skipped]
    return _finish(source, root, kept, facts)


def preview(
    source: Source, **planning: Unpack[Planning]
) -> tuple[dict[SplitName, list[int]], SplitRule]:
    """Return numbers of captions of the images that :func:`transform` would make, and the rule.

    No image is opened, so broken and duplicate ones are counted too.
    """
    plan = _plan(source, planning)
    return {s: [len(p.captions) for p in plan.images if p.split == s] for s in SPLITS}, plan.rule


def _plan(source: Source, planning: Planning) -> _Plan:
    seed, limit = planning.get("seed", 0), planning.get("limit")
    style = planning.get("caption_style") or source.default_caption_style
    shares = (planning.get(name) for name in ("split_by", "val_fraction", "test_fraction"))
    rule = split_rule(source, *shares)
    items = source.items()
    # A name that is no text cannot be written into captions.jsonl.
    unnamed = [item.image_id for item in items if not is_text(item.image_id)]
    skipped = [
        *source.rejected,
        *(SkippedSample(name, "its name is not UTF-8") for name in unnamed),
    ]
    items = [item for item in items if is_text(item.image_id)]
    undecided = [item for item in items if item.split is None]
    ids, films = [item.image_id for item in undecided], [item.film for item in undecided]
    rule = rule.resolve(films)
    split_of: dict[str, SplitName] = dict(zip(ids, rule.assign(ids, films, seed=seed), strict=True))
    placed: list[tuple[SourceItem, SplitName]]
    placed = [(item, item.split or split_of[item.image_id]) for item in items]
    if limit is not None:
        placed = _sample(placed, limit, seed)
    images: list[_Planned] = []
    taken: set[str] = set()
    for item, split in placed:
        if captions := _clean(item, style, skipped):
            images.append(_Planned(captions, split, _file_name(item.image_id, taken), item))
    # A changed source must not continue an older folder.
    lines = (json.dumps([p.image_id, p.split, p.captions]) for p in images)
    facts = {
        "source": source.name,
        "seed": seed,
        "content": f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}",
        "split_rule": source.split_rule or rule.describe(),
        "settings": {
            "split_by": rule.by,
            "val_fraction": rule.val_fraction,
            "test_fraction": rule.test_fraction,
            "caption_style": style,
            "limit": limit,
        },
    }
    return _Plan(images, skipped, rule, facts)


def split_rule(
    source: Source, by: SplitBy | None, val_fraction: float | None, test_fraction: float | None
) -> SplitRule:
    """Return the source's usual rule with the given values. Raises UsageError as `SplitRule`."""
    given: dict[str, Any] = {"by": by, "val_fraction": val_fraction, "test_fraction": test_fraction}
    given = {name: value for name, value in given.items() if value is not None}
    if given:
        given["held_out_at_least"] = 0
    return replace(source.default_split_rule, **given)


def _sample(
    placed: list[tuple[SourceItem, SplitName]], limit: int, seed: int
) -> list[tuple[SourceItem, SplitName]]:
    """Return ``limit`` items of each split in their own order, chosen by a hash of (seed, id)."""

    def rank(image_id: str) -> bytes:
        # Apart from the hash that splits: a sample of one split must not depend on the shares.
        return hashlib.blake2b(f"sample/{seed}/{image_id}".encode(), digest_size=16).digest()

    chosen: set[str] = set()
    for split in SPLITS:
        ids = (item.image_id for item, its in placed if its == split)
        chosen |= {*heapq.nsmallest(limit, ids, key=rank)}
    return [pair for pair in placed if pair[0].image_id in chosen]


def _clean(item: SourceItem, style: CaptionStyle, skipped: list[SkippedSample]) -> list[str]:
    short = [caption for caption in item.captions if len(caption) <= MAX_CAPTION_CHARACTERS]
    if too_long := len(item.captions) - len(short):
        reason = f"{too_long} captions of more than {MAX_CAPTION_CHARACTERS:,} characters"
        skipped.append(SkippedSample(item.image_id, reason))
    captions = [text for caption in short if (text := clean_caption(caption, style))]
    if empty := len(short) - len(captions):
        skipped.append(
            SkippedSample(item.image_id, f"{empty} of {len(short)} captions without words")
        )
    return captions


def _file_name(image_id: str, taken: set[str]) -> str:
    """Return a portable, unused file name, with a part of a hash where the id cannot be one."""
    name = re.sub(r"[^\w.-]+", "_", image_id).strip(".")[:60]
    if name != image_id or name.casefold() in taken:
        name = f"{name}-{hashlib.sha256(image_id.encode()).hexdigest()[:8]}"
    taken.add(name.casefold())
    return f"{name}.jpg"


def _claim(root: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Begin or continue the folder; return its manifest if it is finished.

    Raises:
        DataError: the folder holds something else, or was made with other settings.
    """
    begun = root / UNFINISHED_NAME / "settings.json"
    earlier = {}
    is_finished = (root / MANIFEST_NAME).is_file()
    if is_finished:
        earlier = read_manifest(root)
    elif begun.is_file():
        earlier = json.loads(begun.read_bytes())
    elif root.is_dir() and any(path.name != UNFINISHED_NAME for path in root.iterdir()):
        raise DataError(f"{root} is not empty and no caption folder: choose another --output-dir")
    before, now = ({**some, **some.get("settings", {})} for some in (earlier, facts))
    compared = [key for key in ("source", "seed", *facts["settings"], "content") if key in before]
    changed = [key for key in compared if before[key] != now[key]]
    # Another seed or limit changes the content as well: name the cause, not its consequence.
    causes = [f"{key} was {before[key]}" for key in changed if key != "content"]
    if changed:
        raise DataError(
            f"{root} was made with other settings "
            f"({', '.join(causes) or 'the captions or images of the source differ'}): "
            "choose another --output-dir or delete that folder"
        )
    if not is_finished:
        for folder in (begun.parent, *(root / split / IMAGES_NAME for split in SPLITS)):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomically(begun, json.dumps(facts).encode())
    return earlier if is_finished else None


def _make_images(
    root: Path,
    planned: Sequence[_Planned],
    image_size: int,
    workers: int,
    progress: Progress,
) -> list[SkippedSample]:
    """Make every image that is not there yet; return the broken ones."""
    broken: list[SkippedSample] = []
    processes = 0 if workers == 1 else min(workers, 1 + len(planned) // IMAGES_A_PROCESS)
    left = zip(planned, iter_images(p.item for p in planned), strict=True)
    done = 0
    with ImageReader(processes) if processes else nullcontext() as reader:
        # Bounded, since a task may hold a file's bytes.
        while batch := list(islice(left, 32 * max(1, processes))):
            calls: list[Callable[[], Hashes]] = []
            for p, image in batch:
                path = root / p.split / IMAGES_NAME / p.file_name
                call = partial(_make_image, p.image_id, image, path, image_size)
                calls.append(
                    partial(result_of, reader.submit(call), p.image_id) if reader else call
                )
            for (p, _), call in zip(batch, calls, strict=True):
                try:
                    p.pixels, p.looks, p.sha256 = call()
                except ImageError as error:
                    broken.append(SkippedSample(p.image_id, error.reason))
                done += 1
                progress(done, len(planned))
    return broken


def _make_image(image_id: str, image: RawImage | None, target: Path, image_size: int) -> Hashes:
    """Decode or draw one image and put it where it belongs, unless it is there."""
    import imagehash

    try:
        content = target.read_bytes()
        stored = decode_image(content).image
    except (OSError, ImageError):
        content, stored = _content(image_id, image, image_size)
        unfinished = target.with_name(f".{target.name}")
        unfinished.write_bytes(content)
        unfinished.replace(target)
    pixels = hashlib.sha256(f"{stored.size}".encode() + stored.tobytes()).hexdigest()
    looks = int(str(imagehash.phash(stored)), 16)
    return pixels, looks, hashlib.sha256(content).hexdigest()


def _content(image_id: str, image: RawImage | None, image_size: int) -> tuple[bytes, Image.Image]:
    """Return the file to store, the image's own where training can read it, and its image."""
    if image is None:
        raise ImageError(image_id, "the source holds no image for it")
    if callable(image):
        rgb = image()
    else:
        decoded = decode_image(image)
        rgb = decoded.image
        if decoded.is_plain_jpeg and max(rgb.size) <= image_size:
            return image if isinstance(image, bytes) else image.read_bytes(), rgb
    rgb.thumbnail((image_size, image_size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Full color resolution (4:4:4): JPEG's usual halving blurs the edges of saturated colors.
    rgb.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue(), decode_image(buffer.getvalue()).image


def _drop_duplicates(images: Sequence[_Planned]) -> tuple[list[_Planned], list[SkippedSample]]:
    """Keep equal images in one split only; return those kept, and the others."""
    home: dict[str, _Planned] = {}
    for p in sorted(images, key=lambda p: DUPLICATE_PRIORITY.index(p.split)):
        home.setdefault(p.pixels, p)
    kept = [p for p in images if home[p.pixels].split == p.split]
    others = ((p, home[p.pixels]) for p in images if home[p.pixels].split != p.split)
    return kept, [
        SkippedSample(p.image_id, f"{p.split}: same image as {first.image_id} in {first.split}")
        for p, first in others
    ]


def _near(kept: Sequence[_Planned], distance: int) -> dict[str, Any]:
    """Report pairs of images that look alike; those across splits first, then the most alike."""
    hashes = np.array([p.looks for p in kept], dtype=np.uint64)
    splits = np.array([SPLITS.index(p.split) for p in kept])
    num_pairs = num_across = 0
    listed: list[tuple[bool, int, int, int]] = []
    for i in range(len(kept)):
        bits = np.bitwise_count(hashes[i] ^ hashes[i + 1 :])
        near = np.flatnonzero(bits <= distance)
        is_within = splits[near + i + 1] == splits[i]
        num_pairs += len(near)
        num_across += int((~is_within).sum())
        new = zip(is_within.tolist(), bits[near].tolist(), repeat(i), (near + i + 1).tolist())
        listed = heapq.nsmallest(MAX_LISTED_NEAR_DUPLICATES, [*listed, *new])
    names = [f"{p.split}/{p.image_id}" for p in kept]
    return {
        "measure": "64-bit perceptual hash (DCT), differing bits",
        "distance": distance,
        "pairs": num_pairs,
        "pairs_across_splits": num_across,
        "listed": [{"images": [names[i], names[j]], "distance": n} for _, n, i, j in listed],
    }


def _finish(
    source: Source, root: Path, kept: Sequence[_Planned], facts: dict[str, Any]
) -> dict[str, Any]:
    """Write the captions and the manifest, and return it."""
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    digests: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    for p in kept:
        name = f"{IMAGES_NAME}/{p.file_name}"
        records = (
            {"image_path": name, "caption": c, "original_id": p.image_id} for c in p.captions
        )
        lines[p.split] += [json.dumps(record, ensure_ascii=False) for record in records]
        digests[p.split][name] = p.sha256
    for split in SPLITS:
        _write(root / split / CAPTIONS_NAME, "".join(f"{line}\n" for line in lines[split]))
        for path in (root / split / IMAGES_NAME).iterdir():
            if f"{IMAGES_NAME}/{path.name}" not in digests[split]:  # a duplicate
                path.unlink()
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created_with": f"vlm-bridge {__version__}",
        "description": source.description,
        "licence_note": source.licence_note,
        "counts": {s: {"images": len(digests[s]), "captions": len(lines[s])} for s in SPLITS},
        **facts,
        "fingerprint": fingerprint(lines, digests),
    }
    _write(root / MANIFEST_NAME, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(root / UNFINISHED_NAME, ignore_errors=True)
    return manifest


def _write(path: Path, text: str) -> None:
    """Write text that may hold half characters (names of files that are not UTF-8), escaped."""
    write_atomically(path, text.encode(errors="backslashreplace"))

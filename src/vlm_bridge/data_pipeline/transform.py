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
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

from PIL import Image

from vlm_bridge import __version__
from vlm_bridge.data_pipeline import caption_folder as folders
from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS, CaptionStyle, clean_caption
from vlm_bridge.data_pipeline.images import ImageReader, decode_image, open_image
from vlm_bridge.data_pipeline.near_duplicates import near_duplicates
from vlm_bridge.data_pipeline.samples import SkippedSample, main_causes
from vlm_bridge.data_pipeline.sources import RawImage, Source, SourceItem, iter_images, open_source
from vlm_bridge.data_pipeline.splits import DUPLICATE_PRIORITY, SPLITS, SplitBy, SplitRule
from vlm_bridge.errors import DataError, ImageError
from vlm_bridge.files import write_atomically
from vlm_bridge.parsing import is_text

Progress = Callable[[int, int], None]  # called with (images done, images in all)

JPEG_QUALITY = 95
IMAGES_A_PROCESS = 32  # fewer are not worth the start of another one


class Planning(TypedDict, total=False):
    """Options of a plan; None is the source's own. ``limit`` is a number of images a split."""

    seed: int
    split_by: SplitBy | None
    val_fraction: float | None
    test_fraction: float | None
    caption_style: CaptionStyle | None
    limit: int | None


Hashes = tuple[str, int, str]


class _Made(NamedTuple):
    """A made image, with hashes of its pixels, of how it looks (64 bits), and of its file."""

    item: SourceItem
    path: Path
    pixels: str
    looks: int
    sha256: str


def transform(
    images: str | Path | Source,
    output_dir: str | Path,
    *,
    source: str | None = None,
    captions_file: str | Path | None = None,
    workers: int = 1,
    image_size: int = 640,
    near_duplicate_distance: int = 4,
    progress: Progress = lambda done, total: None,
    **planning: Unpack[Planning],
) -> dict[str, Any]:
    """Write captioned images as a caption folder and return its manifest.

    Args:
        images: folder with a dataset or your own images, or an opened source.
        source: name of the dataset in the folder, of `SOURCES`; None finds it out.
        captions_file: caption file of the folder, if it is not found.
        workers: processes; with several, images are decoded by an `ImageReader`.
        image_size: longest side in pixels, by default COCO's; smaller upright RGB JPEGs are copied
            unchanged.
        near_duplicate_distance: differing bits of 64-bit perceptual hashes to report.

    Raises:
        VLMBridgeError: a bad option, no usable image, or a folder that holds something else.
    """
    opened = images if isinstance(images, Source) else open_source(images, source, captions_file)
    items, skipped, rule = _plan(opened, planning)
    # A changed source must not continue an older folder.
    lines = "".join(json.dumps([item.image_id, item.split, item.captions]) for item in items)
    facts: dict[str, Any] = {
        "source": opened.name,
        "seed": planning.get("seed", 0),
        "content": f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}",
        "split_rule": opened.split_rule or rule.describe(),
        "settings": {
            "split_by": rule.by,
            "val_fraction": rule.val_fraction,
            "test_fraction": rule.test_fraction,
            "image_size": image_size,
            "caption_style": planning.get("caption_style") or opened.default_caption_style,
            "limit": planning.get("limit"),
            "near_duplicate_distance": near_duplicate_distance,
        },
    }
    root = Path(output_dir)
    if finished := _claim(root, facts):
        return finished
    made, broken = _make_images(root, items, image_size, workers, progress)
    kept, duplicates = _drop_duplicates(made)
    skipped += [*broken, *duplicates]
    if not kept:
        causes = main_causes(skipped)
        raise DataError(f"no usable image in source {opened.name}: {causes or 'it is empty'}")
    finds_near = opened.finds_near_duplicates
    facts["near_duplicates"] = _near(kept, near_duplicate_distance) if finds_near else None
    facts["rejected"] = [sample.to_dict() for sample in skipped]
    return _finish(opened, root, kept, facts)


def preview(source: Source, **planning: Unpack[Planning]) -> tuple[dict[str, list[int]], SplitRule]:
    """Return numbers of captions of the images that :func:`transform` would make, and the rule.

    No image is opened, so broken and duplicate ones are counted too.
    """
    items, _, rule = _plan(source, planning)
    return {s: [len(item.captions) for item in items if item.split == s] for s in SPLITS}, rule


def split_rule(source: Source, planning: Planning) -> SplitRule:
    """Return the source's usual rule with the given values. Raises UsageError as `SplitRule`."""
    given: dict[str, Any] = {
        "by": planning.get("split_by"),
        "val_fraction": planning.get("val_fraction"),
        "test_fraction": planning.get("test_fraction"),
    }
    given = {name: value for name, value in given.items() if value is not None}
    return replace(source.default_split_rule, **given)


def _plan(
    source: Source, planning: Planning
) -> tuple[list[SourceItem], list[SkippedSample], SplitRule]:
    """Return images with their splits and clean captions, what is skipped, and the rule."""
    seed, limit = planning.get("seed", 0), planning.get("limit")
    style = planning.get("caption_style") or source.default_caption_style
    found = source.items()
    items = [item for item in found if is_text(item.image_id)]  # JSON holds no others
    unnamed = (item.image_id for item in found if not is_text(item.image_id))
    skipped = [*source.rejected, *(SkippedSample(n, "its name is not UTF-8") for n in unnamed)]
    undecided = [item for item in items if item.split is None]
    ids, films = [item.image_id for item in undecided], [item.film for item in undecided]
    rule = split_rule(source, planning).resolve(films)
    split_of = dict(zip(ids, rule.assign(ids, films, seed=seed), strict=True))
    items = [replace(i, split=i.split or split_of[i.image_id]) for i in items]
    if limit is not None:
        items = _sample(items, limit, seed)
    for n, item in enumerate(items):
        short = (text for text in item.captions if len(text) <= MAX_CAPTION_CHARACTERS)
        captions = [clean for text in short if (clean := clean_caption(text, style))]
        if lost := len(item.captions) - len(captions):
            reason = f"{lost} of {len(item.captions)} captions without words, or too long"
            skipped.append(SkippedSample(item.image_id, reason))
        items[n] = replace(item, captions=captions)
    return [item for item in items if item.captions], skipped, rule


def _sample(items: Sequence[SourceItem], limit: int, seed: int) -> list[SourceItem]:
    """Return ``limit`` images of each split in their own order, chosen by a hash of (seed, id)."""

    def rank(item: SourceItem) -> bytes:
        # Apart from the hash that splits: a sample of one split must not depend on the shares.
        return hashlib.blake2b(f"sample/{seed}/{item.image_id}".encode(), digest_size=16).digest()

    chosen: set[str] = set()
    for split in SPLITS:
        best = heapq.nsmallest(limit, (item for item in items if item.split == split), key=rank)
        chosen |= {item.image_id for item in best}
    return [item for item in items if item.image_id in chosen]


def _claim(root: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Begin or continue the folder; return its manifest if it is finished.

    Raises:
        DataError: the folder holds something else, or was made with other settings.
    """
    begun = root / folders.UNFINISHED_NAME / "settings.json"
    is_finished = (root / folders.MANIFEST_NAME).is_file()
    if is_finished:
        earlier = folders.read_manifest(root)
    elif begun.is_file():
        earlier = json.loads(begun.read_bytes())
    elif root.is_dir() and any(path.name != folders.UNFINISHED_NAME for path in root.iterdir()):
        raise DataError(f"{root} is not empty and no caption folder: choose another --output-dir")
    else:
        earlier = facts
    # Another seed or limit changes the content as well: name the cause, not its consequence.
    for key in ("source", "seed", "settings", "content"):
        if earlier.get(key) != facts[key]:
            raise DataError(
                f"{root} was made of other data or with other options "
                f"({key}: {earlier.get(key)}): choose another --output-dir or delete that folder"
            )
    if is_finished:
        return earlier
    for folder in (begun.parent, *(root / split / folders.IMAGES_NAME for split in SPLITS)):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(begun, json.dumps(facts).encode())
    return None


def _make_images(
    root: Path, items: Sequence[SourceItem], image_size: int, workers: int, progress: Progress
) -> tuple[list[_Made], list[SkippedSample]]:
    """Make every image that is not there yet; return all, and the broken ones."""
    made: list[_Made] = []
    broken: list[SkippedSample] = []
    taken: set[str] = set()
    processes = min(workers, 1 + len(items) // IMAGES_A_PROCESS)
    left = zip(items, iter_images(items), strict=True)
    with ImageReader(processes) if workers > 1 else nullcontext() as reader:
        # Bounded, since a task may hold a file's bytes.
        while batch := list(islice(left, 32 * processes)):
            tasks: list[tuple[SourceItem, Path, Callable[[], Hashes]]] = []
            for item, image in batch:
                path = root / str(item.split) / folders.IMAGES_NAME / _file_name(item, taken)
                task = partial(_make_image, item.image_id, image, path, image_size)
                result = reader.submit(item.image_id, task) if reader else task
                tasks.append((item, path, result))
            for item, path, task in tasks:
                try:
                    made.append(_Made(item, path, *task()))
                except ImageError as error:
                    broken.append(SkippedSample(item.image_id, error.reason))
                progress(len(made) + len(broken), len(items))
    return made, broken


def _file_name(item: SourceItem, taken: set[str]) -> str:
    """Return a portable, unused file name, with a part of a hash where the id cannot be one."""
    name = re.sub(r"[^\w.-]+", "_", item.image_id).strip(".")[:60]
    if name != item.image_id or name.casefold() in taken:
        name = f"{name}-{hashlib.sha256(item.image_id.encode()).hexdigest()[:8]}"
    taken.add(name.casefold())
    return f"{name}.jpg"


def _make_image(image_id: str, image: RawImage | None, target: Path, image_size: int) -> Hashes:
    """Decode or draw one image and put it where it belongs, unless it is there."""
    import imagehash

    try:
        content = target.read_bytes()
        stored = open_image(content)
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
        rgb, is_plain_jpeg = decode_image(image)
        if is_plain_jpeg and max(rgb.size) <= image_size:
            return image if isinstance(image, bytes) else image.read_bytes(), rgb
    rgb.thumbnail((image_size, image_size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Full color resolution (4:4:4): JPEG's usual halving blurs the edges of saturated colors.
    rgb.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue(), open_image(buffer.getvalue())


def _drop_duplicates(made: Sequence[_Made]) -> tuple[list[_Made], list[SkippedSample]]:
    """Keep equal images in one split only; return those kept, and the others."""
    home: dict[str, SourceItem] = {}
    for image in sorted(made, key=lambda image: DUPLICATE_PRIORITY.index(image.item.split)):
        home.setdefault(image.pixels, image.item)
    kept: list[_Made] = []
    duplicates: list[SkippedSample] = []
    for image in made:
        item, first = image.item, home[image.pixels]
        if item.split == first.split:
            kept.append(image)
        else:
            reason = f"{item.split}: same image as {first.image_id} in {first.split}"
            duplicates.append(SkippedSample(item.image_id, reason))
    return kept, duplicates


def _near(kept: Sequence[_Made], distance: int) -> dict[str, Any]:
    looks, splits = [image.looks for image in kept], [str(image.item.split) for image in kept]
    names = [f"{image.item.split}/{image.item.image_id}" for image in kept]
    return near_duplicates(looks, splits, names, distance)


def _finish(
    source: Source, root: Path, kept: Sequence[_Made], facts: dict[str, Any]
) -> dict[str, Any]:
    """Write the captions and the manifest, and return it."""
    lines: dict[str, list[str]] = {}
    digests: dict[str, dict[str, str]] = {}
    for split in SPLITS:
        of_split = [image for image in kept if image.item.split == split]
        images = {f"{folders.IMAGES_NAME}/{image.path.name}": image for image in of_split}
        digests[split] = {name: image.sha256 for name, image in images.items()}
        records = (
            {"image_path": name, "caption": caption, "original_id": image.item.image_id}
            for name, image in images.items()
            for caption in image.item.captions
        )
        lines[split] = [json.dumps(record, ensure_ascii=False) for record in records]
        text = "".join(f"{line}\n" for line in lines[split])
        write_atomically(root / split / folders.CAPTIONS_NAME, text.encode())
        others = {*(root / split / folders.IMAGES_NAME).iterdir()}
        for path in others - {image.path for image in of_split}:
            path.unlink()  # a duplicate, or what an interrupted run left
    manifest = {
        "format": folders.FORMAT,
        "format_version": folders.FORMAT_VERSION,
        "created_with": f"vlm-bridge {__version__}",
        "description": source.description,
        "licence_note": source.licence_note,
        "counts": {s: {"images": len(digests[s]), "captions": len(lines[s])} for s in SPLITS},
        **facts,
        "fingerprint": folders.fingerprint(lines, digests),
    }
    write_atomically(root / folders.MANIFEST_NAME, f"{json.dumps(manifest, indent=2)}\n".encode())
    shutil.rmtree(root / folders.UNFINISHED_NAME, ignore_errors=True)
    return manifest

"""Make a caption folder of a source: clean captions, split, decode images, account for what is skipped.

The same command continues interrupted work: an image is written under another name and renamed, a
journal lists finished ones, and the manifest comes last. The result depends on the source and the
settings alone, not on the number of processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import heapq
import io
import json
import re
import shutil
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_bridge import __version__
from vlm_bridge.data_pipeline.caption_folder import (
    FORMAT,
    FORMAT_VERSION,
    IMAGES_NAME,
    MANIFEST_NAME,
    UNFINISHED_NAME,
    CaptionFolderWriter,
    caption_line,
    fingerprint,
    is_prepared_elsewhere,
    read_manifest,
    write_atomically,
)
from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS, CaptionStyle, clean_caption
from vlm_bridge.data_pipeline.images import decode_image
from vlm_bridge.data_pipeline.isolated import IsolatedPool
from vlm_bridge.data_pipeline.samples import NUM_CAUSES, by_cause
from vlm_bridge.data_pipeline.sources.base import (
    Picture,
    Rejected,
    Source,
    SourceItem,
    iter_pictures,
)
from vlm_bridge.data_pipeline.splits import (
    DUPLICATE_PRIORITY,
    SPLITS,
    SplitBy,
    SplitName,
    SplitRule,
)
from vlm_bridge.errors import DataError, ImageError, UsageError
from vlm_bridge.parsing import is_text

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""

DEFAULT_IMAGE_SIZE = 640
"""Longest side in pixels: COCO's, so that the usual datasets are copied byte for byte."""

DEFAULT_NEAR_DUPLICATE_DISTANCE = 4
"""Differing bits of 64: few enough that what is reported is almost always the same photograph."""

JPEG_QUALITY = 95
MAX_LISTED_NEAR_DUPLICATES = 100

_TASKS_A_CHUNK = 16
_CHUNK_BYTES = 8 << 20  # of pictures that travel with their tasks
_CHUNKS_A_WORKER = 4


def transform(
    source: Source,
    output_dir: str | Path,
    *,
    workers: int = 1,
    seed: int = 0,
    split_by: SplitBy | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    image_size: int = DEFAULT_IMAGE_SIZE,
    caption_style: CaptionStyle | None = None,
    limit: int | None = None,
    near_duplicate_distance: int = DEFAULT_NEAR_DUPLICATE_DISTANCE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``source`` as a caption folder and return its manifest.

    Args:
        workers: processes; with several, images are decoded within the limits of `isolated`.
        seed: of the split and of the sample.
        split_by: see `SplitRule`; None is the source's rule, as for the two fractions.
        image_size: longest side in pixels; smaller upright RGB JPEGs are copied unchanged.
        limit: images a split, sampled by hash of (seed, id).
        near_duplicate_distance: differing bits of 64-bit perceptual hashes to report.

    Raises:
        VLMBridgeError: a bad option, no usable image, or a folder that holds something else.
    """
    rule = split_rule(source, split_by, val_fraction, test_fraction)
    _check_at_least_one(workers=workers, image_size=image_size, limit=limit)
    _check_distance(near_duplicate_distance)
    style = caption_style or source.default_caption_style
    planned, rejected, rule = _plan(source, style, rule, seed, limit)
    settings = {
        "split_by": rule.by,
        "val_fraction": rule.val_fraction,
        "test_fraction": rule.test_fraction,
        "image_size": image_size,
        "caption_style": style,
        "limit": limit,
        "near_duplicate_distance": near_duplicate_distance,
    }
    identity = {"source": source.name, "seed": seed, **settings, "content": _digest(planned)}
    writer = CaptionFolderWriter(Path(output_dir))
    if finished := _claim(writer, identity):
        return finished
    with _alone(writer):
        finds_near = source.finds_near_duplicates
        outcomes = _prepare_pictures(writer, planned, image_size, finds_near, workers, progress)
        kept, duplicates = _keep(source, planned, outcomes, rejected)
        near = _near_duplicates(kept, outcomes, near_duplicate_distance) if finds_near else None
        facts = {
            "split_rule": source.split_rule or rule.describe(),
            "seed": seed,
            "settings": settings,
            "content": identity["content"],
            "duplicates": duplicates,
            "near_duplicates": near,
            "rejected": [asdict(item) for item in rejected],
        }
        return _finish(source, writer, kept, outcomes, facts)


def _keep(
    source: Source,
    planned: list[_Planned],
    outcomes: dict[str, _Outcome],
    rejected: list[Rejected],
) -> tuple[list[_Planned], dict[str, Any]]:
    """Return the images to keep and facts on duplicates; add the others to ``rejected``."""
    rejected += [
        Rejected(p.image_id, o.error) for p in planned if (o := outcomes[p.image_id]).error
    ]
    usable = [p for p in planned if not outcomes[p.image_id].error]
    kept, doubles, within_split = _drop_duplicates(usable, outcomes)
    rejected += doubles
    if not kept:
        causes = by_cause((item.id, item.reason) for item in rejected)[:NUM_CAUSES]
        why = f": {'; '.join(causes)}" if causes else ""
        raise DataError(f"no usable image in source {source.name}{why}")
    rule = f"equal pixels across splits: kept in the first of {', '.join(DUPLICATE_PRIORITY)}"
    return kept, {"rule": rule, "set_aside": len(doubles), "within_a_split": within_split}


def _finish(
    source: Source,
    writer: CaptionFolderWriter,
    kept: list[_Planned],
    outcomes: dict[str, _Outcome],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write the captions and the manifest, and return it."""
    lines = {split: _caption_lines(kept, split) for split in SPLITS}
    digests: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    for p in kept:
        digests[p.split][f"{IMAGES_NAME}/{p.file_name}"] = outcomes[p.image_id].sha256
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created_with": f"vlm-bridge {__version__}",
        "source": source.name,
        "description": source.description,
        "licence_note": source.licence_note,
        "counts": {
            split: {"images": len(digests[split]), "captions": len(lines[split])}
            for split in SPLITS
        },
        **facts,
        "fingerprint": fingerprint(lines, digests),
    }
    for split in SPLITS:
        writer.write_captions(split, lines[split])
        names = {Path(path).name for path in digests[split]}
        for path in writer.images_dir(split).iterdir():
            if path.name not in names:  # a duplicate
                path.unlink()
    writer.finish(manifest)
    shutil.rmtree(writer.working_dir, ignore_errors=True)
    return manifest


def preview(
    source: Source,
    *,
    seed: int = 0,
    split_by: SplitBy | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    caption_style: CaptionStyle | None = None,
    limit: int | None = None,
) -> tuple[dict[SplitName, list[int]], SplitRule]:
    """Return what :func:`transform` would make, without opening a picture: captions of each image, and the rule.

    Broken and duplicate pictures are still among them. Raises as :func:`transform`.
    """
    rule = split_rule(source, split_by, val_fraction, test_fraction)
    _check_at_least_one(limit=limit)
    planned, _, rule = _plan(
        source, caption_style or source.default_caption_style, rule, seed, limit
    )
    return {split: [len(p.captions) for p in planned if p.split == split] for split in SPLITS}, rule


def split_rule(
    source: Source, by: SplitBy | None, val_fraction: float | None, test_fraction: float | None
) -> SplitRule:
    """Return the source's usual rule with whatever is given in its place; UsageError as :class:`SplitRule`."""
    given: dict[str, Any] = {"by": by, "val_fraction": val_fraction, "test_fraction": test_fraction}
    if any(value is not None for value in given.values()):
        given["held_out_at_least"] = 0
    return replace(
        source.default_split_rule,
        **{name: value for name, value in given.items() if value is not None},
    )


# --- planning ---


@dataclass(frozen=True, slots=True)
class _Planned:
    """One image to make: cleaned captions, its split and the name of its file."""

    image_id: str
    captions: tuple[str, ...]
    split: SplitName
    file_name: str
    item: SourceItem


def _plan(
    source: Source, style: CaptionStyle, rule: SplitRule, seed: int, limit: int | None
) -> tuple[list[_Planned], list[Rejected], SplitRule]:
    """Read, clean and split: what to make, what was skipped so far, and the rule that was used."""
    items = source.items()
    # Names of files that are no text cannot be written into captions.jsonl.
    rejected = [
        Rejected(item.image_id, "its name is not UTF-8")
        for item in items
        if not is_text(item.image_id)
    ]
    if rejected:
        items = [item for item in items if is_text(item.image_id)]
    undecided = [item for item in items if item.split is None]
    ids, films = [item.image_id for item in undecided], [item.film for item in undecided]
    rule = rule.resolve(films)
    split_of = dict(zip(ids, rule.assign(ids, films, seed=seed), strict=True))
    if limit is not None:
        items = _sample(
            items, [item.split or split_of[item.image_id] for item in items], limit, seed
        )
    planned: list[_Planned] = []
    rejected = [*source.rejected, *rejected]
    taken_names: set[str] = set()
    for item in items:
        split = item.split or split_of[item.image_id]
        short = [caption for caption in item.captions if len(caption) <= MAX_CAPTION_CHARACTERS]
        if too_long := len(item.captions) - len(short):
            reason = f"{too_long} captions of more than {MAX_CAPTION_CHARACTERS:,} characters"
            rejected.append(Rejected(item.image_id, reason))
        cleaned = [clean_caption(caption, style) for caption in short]
        captions = tuple(filter(None, cleaned))
        if empty := len(cleaned) - len(captions):
            rejected.append(
                Rejected(item.image_id, f"{empty} of {len(cleaned)} captions without words")
            )
        if not captions:
            continue
        planned.append(
            _Planned(item.image_id, captions, split, _file_name(item.image_id, taken_names), item)
        )
    repeated = [image_id for image_id, n in Counter(p.image_id for p in planned).items() if n > 1]
    if repeated:
        raise DataError(f"the source names image {repeated[0]} more than once")
    return planned, rejected, rule


def _sample(
    items: list[SourceItem], splits: list[SplitName], limit: int, seed: int
) -> list[SourceItem]:
    """Return ``limit`` items of each split in their own order, chosen by a hash of (seed, id)."""

    def rank(index: int) -> bytes:
        # Apart from the hash that splits: a sample of one split must not depend on the shares.
        return hashlib.blake2b(
            f"sample/{seed}/{items[index].image_id}".encode(), digest_size=16
        ).digest()

    of_split = {split: [i for i, its in enumerate(splits) if its == split] for split in SPLITS}
    chosen = sorted(
        i for indices in of_split.values() for i in heapq.nsmallest(limit, indices, key=rank)
    )
    return [items[index] for index in chosen]


def _file_name(image_id: str, taken: set[str]) -> str:
    """Return a portable, unused file name; an id that cannot be one (or only by case) gets part of a hash."""
    name = re.sub(r"[^\w.-]+", "_", image_id).strip(".")[:60]
    if name != image_id or name.casefold() in taken:
        name = f"{name}-{hashlib.sha256(image_id.encode()).hexdigest()[:8]}"
    taken.add(name.casefold())
    return f"{name}.jpg"


def _digest(planned: list[_Planned]) -> str:
    """Hash what will be made, wherever the source lies: a changed one must not continue an older folder."""
    digest = hashlib.sha256()
    for p in planned:
        digest.update(json.dumps([p.image_id, p.split, p.captions]).encode())
    return f"sha256:{digest.hexdigest()}"


def _check_distance(bits: int) -> None:
    if not 0 <= bits <= 64:
        raise UsageError(f"--near-duplicate-distance must be from 0 to 64, not {bits}")


def _check_at_least_one(**options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


# --- continuing ---


def _claim(writer: CaptionFolderWriter, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Make the folder ours, or return the manifest if this very transformation is already finished.

    Raises:
        DataError: the folder holds something else, or another transformation.
    """
    root = writer.root
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file: choose another --output-dir")
    if is_prepared_elsewhere(root):
        raise DataError(
            f"{root} is a caption folder that other tools prepared: train on it, "
            "or choose another --output-dir"
        )
    state = writer.working_dir / "settings.json"
    if (root / MANIFEST_NAME).is_file():
        manifest = read_manifest(root)
        earlier = {key: manifest.get(key) for key in ("source", "seed", "content")} | manifest.get(
            "settings", {}
        )
        _refuse_other(root, "finished", earlier, identity)
        shutil.rmtree(writer.working_dir, ignore_errors=True)
        return manifest
    if state.is_file():
        _refuse_other(root, "begun", json.loads(state.read_bytes()), identity)
    elif root.is_dir() and any(path.name != UNFINISHED_NAME for path in root.iterdir()):
        raise DataError(f"{root} is not empty and no caption folder: choose another --output-dir")
    writer.prepare()
    write_atomically(state, json.dumps(identity).encode())
    return None


@contextlib.contextmanager
def _alone(writer: CaptionFolderWriter) -> Iterator[None]:
    """Keep other processes from making the same folder. Raises DataError while one does."""
    with (writer.working_dir / "lock").open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{writer.root} is being made by another process: wait for it, or choose another --output-dir"
            ) from None
        yield


def _refuse_other(root: Path, stage: str, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    # What an older version did not write down yet shows in the content.
    changed = [key for key in now if key in earlier and earlier[key] != now[key]]
    # Another seed or limit changes the content as well: name the cause, not its consequence.
    changed = [key for key in changed if key != "content"] or changed
    if changed:
        what = ", ".join(
            "the captions or images of the source differ"
            if key == "content"
            else f"{key} was {earlier.get(key)}"
            for key in changed
        )
        raise DataError(
            f"{root} was {stage} with other settings ({what}): "
            "choose another --output-dir or delete that folder"
        )


class _Journal:
    """Remembers finished pictures, a line each; a line cut off by an interruption is ignored."""

    def __init__(self, path: Path):
        self._path = path

    def read(self) -> dict[str, _Outcome]:
        outcomes = {}
        if self._path.is_file():
            for line in self._path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    outcome = _Outcome(**json.loads(line))
                    outcomes[outcome.image_id] = outcome
        return outcomes

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[_Outcome], None]]:
        with self._path.open("ab", buffering=0) as file:

            def remember(outcome: _Outcome) -> None:
                # The newline goes first: it also ends a line that was cut off.
                file.write(b"\n" + json.dumps(asdict(outcome)).encode())

            yield remember


# --- pictures ---


@dataclass(frozen=True)
class _Task:
    """One image to make, as a process needs it."""

    image_id: str
    picture: Picture | None
    target: Path
    temporary: Path
    image_size: int
    hash_looks: bool


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of a picture: hashes of its pixels, its looks (hexadecimal) and its file; or an error."""

    image_id: str
    pixels: str = ""
    looks: str = ""
    sha256: str = ""
    bytes: int = 0
    error: str = ""


def _prepare_pictures(
    writer: CaptionFolderWriter,
    planned: list[_Planned],
    image_size: int,
    hash_looks: bool,
    workers: int,
    progress: Progress | None,
) -> dict[str, _Outcome]:
    """Make every picture that is not there yet; outcomes by image id."""
    journal = _Journal(writer.working_dir / "journal.jsonl")
    remembered = journal.read()
    outcomes: dict[str, _Outcome] = {}
    remaining: list[_Planned] = []
    for p in planned:
        target = writer.images_dir(p.split) / p.file_name
        earlier = remembered.get(p.image_id)
        if earlier is not None and target.is_file() and target.stat().st_size == earlier.bytes:
            outcomes[p.image_id] = earlier
        else:
            remaining.append(p)
    tasks = (
        _Task(
            p.image_id,
            picture,
            target=writer.images_dir(p.split) / p.file_name,
            temporary=writer.working_dir / f"{p.split}-{p.file_name}",
            image_size=image_size,
            hash_looks=hash_looks,
        )
        for p, picture in zip(remaining, iter_pictures(p.item for p in remaining), strict=True)
    )
    # Starting a process costs as much as many small images. Where several are allowed, one is started at any rate for
    # files: what a damaged one does, it does there.
    few = len(remaining) < 2 * _TASKS_A_CHUNK
    is_drawn = all(p.item.draw is not None for p in remaining)
    processes = 0 if workers == 1 or (few and is_drawn) else 1 if few else workers
    report = progress or (lambda done, total: None)
    report(len(outcomes), len(planned))
    with journal.writing() as remember, contextlib.closing(_run(tasks, processes)) as finished:
        for outcome in finished:
            outcomes[outcome.image_id] = outcome
            # A picture that failed is tried again next time: its file may have been mended.
            if not outcome.error:
                remember(outcome)
            report(len(outcomes), len(planned))
    return outcomes


def _run(tasks: Iterator[_Task], processes: int) -> Generator[_Outcome]:
    """Yield outcomes in order, from this process (0) or others."""
    if not processes:
        yield from map(_make_picture, tasks)
        return
    remaining = _chunks(tasks)
    pool: IsolatedPool[_Task, _Outcome] = IsolatedPool(_make_picture, processes)
    try:
        pending: deque[tuple[Any, list[_Task]]] = deque()
        while True:
            # Bounded, so that a million tasks or gigabytes of images do not pile up in the queue.
            while len(pending) < processes * _CHUNKS_A_WORKER and (chunk := next(remaining, None)):
                pending.append((pool.submit(chunk), chunk))
            if not pending:
                return
            yield from pool.result(
                *pending.popleft(),
                failed=lambda task, reason: _Outcome(task.image_id, error=reason),
            )
    finally:
        pool.close()


def _chunks(tasks: Iterable[_Task]) -> Iterator[list[_Task]]:
    """Group tasks into chunks that are worth sending to a process and do not weigh much."""
    chunk: list[_Task] = []
    weight = 0
    for task in tasks:
        chunk.append(task)
        weight += len(task.picture) if isinstance(task.picture, bytes) else 0
        if len(chunk) == _TASKS_A_CHUNK or weight >= _CHUNK_BYTES:
            yield chunk
            chunk, weight = [], 0
    if chunk:
        yield chunk


def _make_picture(task: _Task) -> _Outcome:
    """Decode or draw one picture and put it where it belongs."""
    try:
        image, unchanged = _load(task)
    except ImageError as error:
        return _Outcome(task.image_id, error=error.reason)
    pixels = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    looks = _perceptual_hash(image) if task.hash_looks else ""
    content = unchanged if unchanged is not None else _encode(image, task.image_size)
    task.temporary.write_bytes(content)
    task.temporary.replace(task.target)
    return _Outcome(task.image_id, pixels, looks, hashlib.sha256(content).hexdigest(), len(content))


def _load(task: _Task) -> tuple[Image.Image, bytes | None]:
    """Return the picture, and its file's bytes where these can be used unchanged."""
    picture = task.picture
    if picture is None:
        raise ImageError(task.image_id, "the source holds no picture for it")
    if callable(picture):
        return picture(), None
    decoded = decode_image(picture)
    if not (decoded.is_plain_jpeg and max(decoded.image.size) <= task.image_size):
        return decoded.image, None
    return decoded.image, picture if isinstance(picture, bytes) else picture.read_bytes()


def _encode(image: Image.Image, image_size: int) -> bytes:
    image.thumbnail((image_size, image_size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Full colour resolution (4:4:4): JPEG's usual halving blurs the edges of saturated colours.
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _perceptual_hash(image: Image.Image) -> str:
    """Return the 64-bit DCT hash of a picture as 16 hexadecimal digits."""
    import imagehash

    return str(imagehash.phash(image))


# --- duplicates ---


def _drop_duplicates(
    usable: list[_Planned], outcomes: dict[str, _Outcome]
) -> tuple[list[_Planned], list[Rejected], int]:
    """Keep equal pictures in one split only: (kept, skipped, copies left within a split)."""
    home: dict[str, _Planned] = {}
    for p in sorted(usable, key=lambda p: DUPLICATE_PRIORITY.index(p.split)):
        home.setdefault(outcomes[p.image_id].pixels, p)
    kept: list[_Planned] = []
    doubles: list[Rejected] = []
    for p in usable:
        first = home[outcomes[p.image_id].pixels]
        if first.split == p.split:
            kept.append(p)
        else:
            doubles.append(
                Rejected(
                    p.image_id, f"{p.split}: same picture as {first.image_id} in {first.split}"
                )
            )
    return kept, doubles, len(kept) - len(home)


def _near_duplicates(
    kept: list[_Planned], outcomes: dict[str, _Outcome], distance: int
) -> dict[str, Any]:
    """Report pairs of pictures that look alike; those across splits first, then the most alike."""
    hashes = np.array([int(outcomes[p.image_id].looks, 16) for p in kept], dtype=np.uint64)
    pairs = near_pairs(hashes, distance)
    splits = np.array([SPLITS.index(p.split) for p in kept])
    first, second, bits = pairs
    across = splits[first] != splits[second]
    order = np.lexsort((second, first, bits, ~across))[:MAX_LISTED_NEAR_DUPLICATES]
    return {
        "measure": "64-bit perceptual hash (DCT), differing bits",
        "distance": distance,
        "pairs": len(first),
        "pairs_across_splits": int(across.sum()),
        "listed": [
            {
                "images": [
                    f"{kept[i].split}/{kept[i].image_id}",
                    f"{kept[j].split}/{kept[j].image_id}",
                ],
                "distance": int(bits[n]),
            }
            for n in order
            for i, j in [(first[n], second[n])]
        ],
    }


def near_pairs(hashes: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (i, j, differing bits) of all i < j of ``hashes`` (uint64, [n]) at most ``distance`` bits apart.

    Compares block by block in numpy, in under 100 MB: the time is quadratic, but 50,000 hashes take seconds.
    """
    block = 2048
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for top in range(0, len(hashes), block):
        rows = hashes[top : top + block]
        for left in range(top, len(hashes), block):
            bits = np.bitwise_count(rows[:, None] ^ hashes[None, left : left + block])
            i, j = np.nonzero(bits <= distance)
            above_diagonal = i + top < j + left
            i, j = i[above_diagonal], j[above_diagonal]
            found.append((i + top, j + left, bits[i, j]))
    if not found:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, empty
    first, second, bits = (np.concatenate(column) for column in zip(*found, strict=True))
    return first, second, bits


# --- writing ---


def _caption_lines(kept: list[_Planned], split: SplitName) -> list[str]:
    return [
        caption_line(p.file_name, caption, p.image_id)
        for p in kept
        if p.split == split
        for caption in p.captions
    ]

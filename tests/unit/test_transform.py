"""Transforming: the result depends on source and settings alone, and accounts for everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from vlm_bridge.data_pipeline.caption_folder import MANIFEST_NAME, CaptionFolder
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.data_pipeline.sources.local import LocalFolder
from vlm_bridge.data_pipeline.sources.scenes import Scenes
from vlm_bridge.data_pipeline.transform import transform
from vlm_bridge.errors import DataError


def tree(root: Path) -> dict[Path, bytes]:
    """Every file below ``root`` with its content."""
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def drawn(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """A smooth random image: it survives JPEG and scaling, unlike noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "dataset").mkdir()
    return tmp_path / "dataset"


@pytest.fixture
def dataset(root: Path) -> Path:
    """Forty images with a caption each, in a folder of its own."""
    for index in range(40):
        drawn(index).save(root / f"{index}.jpg", quality=95)
    write_captions(root, {f"{index}.jpg": f"caption {index}" for index in range(40)})
    return root


def write_captions(
    root: Path, captions: dict[str, str], split: dict[str, str] | None = None
) -> None:
    rows = [f"{name},{caption},{(split or {}).get(name, '')}" for name, caption in captions.items()]
    (root / "captions.csv").write_text("image,caption,split\n" + "\n".join(rows) + "\n")


def test_the_number_of_processes_does_not_matter(dataset: Path, tmp_path: Path) -> None:
    (dataset / "7.jpg").write_bytes(b"broken")
    one, two = (transform(LocalFolder(dataset), tmp_path / str(n), workers=n) for n in (1, 2))
    assert one == two and tree(tmp_path / "1") == tree(tmp_path / "2")


def test_an_interrupted_run_continues_to_the_same_result(dataset: Path, tmp_path: Path) -> None:
    transform(LocalFolder(dataset), tmp_path / "whole")
    out, fifteenth = tmp_path / "interrupted", Mock(side_effect=[*range(14), KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        transform(LocalFolder(dataset), out, progress=fifteenth)
    assert not (out / MANIFEST_NAME).exists()
    with pytest.raises(DataError, match="unfinished"):
        CaptionFolder.open(out)
    # Whatever else an abrupt end leaves: an image cut short, an unfinished file.
    cut = next(out.glob("*/images/0.jpg"))
    cut.write_bytes(cut.read_bytes()[:100])
    (cut.parent / ".9.jpg").write_bytes(b"half")
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*/images/[!.]*") if path != cut}
    assert len(finished) == 14
    transform(LocalFolder(dataset), out)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "not made again"
    assert tree(out) == tree(tmp_path / "whole")


def test_other_settings_sources_and_files_are_refused(dataset: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "out", LocalFolder(dataset)
    first = transform(source, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert transform(source, out) == first, "a finished folder is left alone"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    for match, changed in (
        ("seed: 0", {"seed": 1}),
        ("settings: .*'val_fraction': 0.1", {"val_fraction": 0.3}),
        ("settings: .*'limit': None", {"limit": 3}),
    ):
        with pytest.raises(DataError, match=match):
            transform(source, out, **changed)
    with pytest.raises(DataError, match="source: local"):
        transform(Scenes(2, 1, 1), out)
    write_captions(dataset, {"0.jpg": "another caption"})
    with pytest.raises(DataError, match="content: sha256"):
        transform(source, out)


def test_odd_images_are_made_upright_rgb_or_skipped(root: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    good: dict[str, Any] = {
        "plain.jpg": (drawn(0), {"quality": 90}),
        "turned.jpg": (drawn(1), {"exif": exif}),
        "deep.png": (Image.fromarray(np.arange(48 * 32, dtype=np.uint16).reshape(32, 48) * 40), {}),
        "clear.png": (Image.new("RGBA", (9, 9), (255, 0, 0, 100)), {}),
        "thin.png": (drawn(5, (2000, 1)), {}),
        "large.jpg": (drawn(6, (900, 300)), {}),
    }
    for name, (image, options) in good.items():
        image.save(root / name, **options)
    (root / "cut.jpg").write_bytes((root / "large.jpg").read_bytes()[:2000])
    write_captions(root, dict.fromkeys([*good, "cut.jpg"], "A caption."))
    manifest = transform(LocalFolder(root), tmp_path / "out", val_fraction=0, test_fraction=0)
    assert manifest["counts"]["train"] == {"images": len(good), "captions": len(good)}
    (broken,) = manifest["rejected"]
    assert broken["id"] == "cut" and "truncated" in broken["reason"]
    made = CaptionFolder.open(tmp_path / "out").split("train")
    images = {image.original_id: image.path for image in made}
    for path in images.values():
        with Image.open(path) as stored:
            assert (stored.format, stored.mode, max(stored.size) <= 640) == ("JPEG", "RGB", True)
    assert images["plain"].read_bytes() == (root / "plain.jpg").read_bytes()
    sizes = [open_image(images[name]).size for name in ("turned", "large", "thin")]
    assert sizes == [(32, 48), (640, 213), (640, 1)]
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == len(good)


def test_equal_images_stay_in_one_split_and_the_test_split_wins(root: Path, tmp_path: Path) -> None:
    names = ["a.png", "b.png", "c.png", "d.png", "e.png", "f.png"]
    for name, seed in zip(names, [1, 1, 1, 2, 2, 3], strict=True):
        drawn(seed).save(root / name)
    splits = dict(zip(names, ["train", "val", "test", "train", "train", "val"], strict=True))
    write_captions(root, dict.fromkeys(names, "A caption."), splits)
    manifest = transform(LocalFolder(root), tmp_path / "out")
    assert [counts["images"] for counts in manifest["counts"].values()] == [2, 1, 1]
    assert manifest["rejected"] == [
        {"id": "a", "reason": "train: same image as c in test"},
        {"id": "b", "reason": "val: same image as c in test"},
    ]
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 4


def test_near_duplicates_are_reported_and_kept(tmp_path: Path) -> None:
    splits = {"a.png": "train", "b.jpg": "val", "c.png": "train"}
    for seed, name in zip((1, 1, 2), splits, strict=True):
        drawn(seed, (64, 64)).save(tmp_path / name)  # JPEG changes a few values
    write_captions(tmp_path, dict.fromkeys(splits, "A caption."), splits)
    manifest = transform(LocalFolder(tmp_path), tmp_path / "out")
    near = manifest["near_duplicates"]
    assert (near["pairs"], near["pairs_across_splits"], manifest["rejected"]) == (1, 1, [])
    assert near["listed"][0]["images"] == ["train/a", "val/b"]


def test_images_without_a_caption_are_left_out(dataset: Path, tmp_path: Path) -> None:
    write_captions(dataset, {"0.jpg": "A dog .", "1.jpg": " . "})
    source, out = LocalFolder(dataset), tmp_path / "out"
    manifest = transform(source, out, caption_style="sentence", val_fraction=0)
    reasons = {entry["id"]: entry["reason"] for entry in manifest["rejected"]}
    assert reasons["1"] == "1 of 1 captions without words, or too long"
    folder = CaptionFolder.open(tmp_path / "out")
    assert [i.captions for split in folder.splits for i in folder.split(split)] == [("A dog.",)]


def test_ids_become_portable_file_names(root: Path, tmp_path: Path) -> None:
    names = ["x/y z.png", "x_y_z.png", "X_Y_Z.png", "caf\u00e9.png", "n" * 200 + ".png"]
    (root / "x").mkdir()
    for index, name in enumerate(names):
        drawn(index).save(root / name)
    write_captions(root, dict.fromkeys(names, "A caption."))
    transform(LocalFolder(root), tmp_path / "out", val_fraction=0, test_fraction=0)
    images = CaptionFolder.open(tmp_path / "out").split("train")
    assert len({image.path.name.casefold() for image in images}) == len(names)
    assert all(" " not in image.path.name and len(image.path.name) < 80 for image in images)


def test_limit_takes_a_seeded_sample_of_each_split(dataset: Path, tmp_path: Path) -> None:
    def chosen(name: str, seed: int) -> set[str]:
        shares = {"val_fraction": 0.0, "test_fraction": 0.0}
        transform(LocalFolder(dataset), tmp_path / name, limit=5, seed=seed, **shares)
        return {image.original_id for image in CaptionFolder.open(tmp_path / name).split("train")}

    first = chosen("first", seed=0)
    assert len(first) == 5 and first != {str(index) for index in range(5)}
    write_captions(dataset, {f"{index}.jpg": f"caption {index}" for index in reversed(range(40))})
    assert chosen("reversed", seed=0) == first and chosen("other", seed=1) != first
    manifest = transform(Scenes(5, 5, 1), tmp_path / "out", limit=2)
    assert [counts["images"] for counts in manifest["counts"].values()] == [2, 2, 1]


def test_nothing_usable_leaves_no_manifest(dataset: Path, tmp_path: Path) -> None:
    (dataset / "0.jpg").write_bytes(b"")
    write_captions(dataset, {"0.jpg": "A dog."})
    with pytest.raises(DataError, match="no usable image"):
        transform(LocalFolder(dataset), tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    with pytest.raises(DataError, match="no usable image"):
        transform(Scenes(0, 0, 0), tmp_path / "nothing")

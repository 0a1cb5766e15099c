"""What a recipe's ``data_dir`` may be: a caption folder, or a folder of shards."""

from __future__ import annotations

from pathlib import Path

from vlm_bridge.data_pipeline.caption_folder import (
    MANIFEST_NAME,
    UNFINISHED_NAME,
    CaptionedImages,
    CaptionFolder,
    is_prepared_elsewhere,
)
from vlm_bridge.data_pipeline.samples import MAX_SKIPPED_SHARE, Skipped
from vlm_bridge.data_pipeline.shards import ShardFolder, ShardImages
from vlm_bridge.data_pipeline.splits import SPLITS, SplitName
from vlm_bridge.errors import DataError

DataFolder = CaptionFolder | ShardFolder
SplitImages = CaptionedImages | ShardImages
"""The images of a split: a sequence with `take`, `paths` and `shards`."""


def open_data_folder(path: str | Path) -> DataFolder:
    """Open a caption folder or a shard folder.

    Args:

    Raises:
        DataError: neither of them, or one that cannot be used.
    """
    root = Path(path)
    is_ours = (root / MANIFEST_NAME).exists() or (root / UNFINISHED_NAME).is_dir()
    if is_ours or not root.is_dir() or is_prepared_elsewhere(root):
        return CaptionFolder.open(root)
    if any(_shards_in(root / split) for split in SPLITS):
        return ShardFolder.open(root)
    if _shards_in(root):
        raise DataError(
            f"the shards in {root} are of no split: move or link them into {root}/train and {root}/val"
        )
    raise DataError(
        f"{root} is not a caption folder (it has no {MANIFEST_NAME}) and not a shard folder (no *.tar in "
        f"{'/, '.join(SPLITS)}/): make one with `vlm-data transform --source local --input-dir PICTURES "
        "--output-dir NEW_FOLDER`"
    )


def readable_split(folder: DataFolder, split: SplitName) -> tuple[SplitImages, Skipped]:
    """Return the images of a split, and what of its shards or captions was skipped.

    Of a caption folder that was checked when it was made, the first line that cannot be read is an error.

    Raises:
        DataError: no such split, a line that cannot be read, or more than `MAX_SKIPPED_SHARE` of a split's samples.
    """
    bad = Skipped(f"{split} samples")
    if isinstance(folder, CaptionFolder) and folder.is_checked:
        return folder.split(split), bad
    images = folder.split(split, bad)
    bad.check(MAX_SKIPPED_SHARE)
    return images, bad


def _shards_in(folder: Path) -> bool:
    return any(".tar" in path.suffixes[-2:] or path.suffix == ".tgz" for path in folder.glob("*"))

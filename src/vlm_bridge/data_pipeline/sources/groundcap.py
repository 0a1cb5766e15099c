"""GroundCap: film frames with grounded captions (Oliveira et al., 2025, arXiv:2502.13898).

Read from the Hugging Face hub or from a local folder of its parquet files with the columns
``id``, ``image`` (``{bytes, path}``), ``detections``, ``caption`` and ``human_annotated``.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vlm_bridge.credentials import hub_problem
from vlm_bridge.data_pipeline.captions import strip_tags
from vlm_bridge.data_pipeline.samples import SkippedSample
from vlm_bridge.data_pipeline.sources import (
    ParquetImage,
    Source,
    SourceItem,
    read_rows,
    schema_of,
)
from vlm_bridge.data_pipeline.splits import SplitName, SplitRule, normalise_split
from vlm_bridge.errors import DataError

HUB_NAME = "daniel3303/GroundCap"
COLUMNS = {"id", "image", "caption"}
# IMDb's number of a title, as MovieNet names its films; not the end of another word.
_FILM = re.compile(r"(?<![A-Za-z0-9])tt\d+")


@dataclass
class GroundCap(Source):
    """52,350 film frames; rows that share an id are one image with several captions.

    Images are split 80/5/15 in whole films where ids name them.

    Attributes:
        input_dir: searched for parquet files to its depth; None is the hub.
        official_split: keep the dataset's own test part.
    """

    name = "groundcap"
    description = "GroundCap: film frames, each with a grounded paragraph"
    licence_note = "CC-BY-4.0: credit Oliveira et al., GroundCap (2025); frames: MovieNet's films"
    default_caption_style = "raw"
    needs_input_dir = False

    input_dir: Path | None = None
    official_split: bool = False
    keep_tags: bool = False

    def __post_init__(self) -> None:
        self.default_split_rule = SplitRule(None, 0.05, 0.0 if self.official_split else 0.15)

    @classmethod
    def recognize(cls, folder: Path) -> str | None:
        path = next(folder.rglob("*.parquet"), None)
        with suppress(DataError):  # a damaged file shows nothing
            if path and COLUMNS | {"detections"} <= set(schema_of(path).names):
                return path.relative_to(folder).as_posix()
        return None

    def items(self) -> list[SourceItem]:
        """Return the images in the order of the files, the test part's first."""
        self.rejected = []
        items: dict[str, SourceItem] = {}
        for path, part in self._files():
            split = part if self.official_split and part == "test" else None
            for row, values in enumerate(read_rows(path, ["id", "caption"])):
                image_id, caption = values["id"], values["caption"] or ""
                if not image_id:
                    self.rejected.append(SkippedSample(f"{path.name} row {row}", "it has no id"))
                    continue
                film = _FILM.search(image_id)
                image = ParquetImage(path, row)
                item = SourceItem(image_id, [], split, image, film and film[0])
                item = items.setdefault(image_id, item)  # an image of test stays there
                item.captions.append(caption if self.keep_tags else strip_tags(caption))
        if not items:
            raise DataError(f"{self.input_dir or HUB_NAME} holds no rows")
        return list(items.values())

    def _files(self) -> list[tuple[Path, SplitName | None]]:
        """Return the parquet files with their parts, those of the test part first."""
        import pyarrow.types as types

        root = self.input_dir or _download()
        paths = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
        if not paths:
            raise DataError(
                f"no parquet file in {root}: --source-path is a folder of {HUB_NAME}'s parquet "
                "files (your own images: --source local)"
            )
        for path in paths:
            kinds = {field.name: field.type for field in schema_of(path)}
            if COLUMNS - kinds.keys() or not types.is_struct(kinds["image"]):
                raise DataError(
                    f"{path} is not GroundCap: it needs columns id, caption and image (a struct of "
                    f"bytes and path), and has {', '.join(kinds)}"
                )
        order = ("test", "val", "train", None)
        parts: list[tuple[Path, SplitName | None]] = [(path, _part_of(path)) for path in paths]
        found = sorted(parts, key=lambda file: order.index(file[1]))
        if self.official_split and found[0][1] != "test":
            raise DataError(f"--split official: {root} has no test part (test-*.parquet)")
        return found


def _part_of(path: Path) -> SplitName | None:
    """Return the part of a file: ``train-00000-of-00004.parquet``, or ``train/0000.parquet``."""
    return normalise_split(path.stem.split("-")[0]) or normalise_split(path.parent.name)


def _download() -> Path:
    """Return the hub's copy in the user's cache (1.9 GB; an interrupted download continues)."""
    from huggingface_hub import snapshot_download

    files = "data/*.parquet"
    try:
        return Path(snapshot_download(HUB_NAME, repo_type="dataset", allow_patterns=files))
    except Exception as error:  # of any library on the way to the hub
        why = hub_problem(error, HUB_NAME, "dataset") or f"{type(error).__name__}: {error}"
        raise DataError(
            f"cannot get {HUB_NAME} from the Hugging Face hub: {why}; or name a folder of its "
            "parquet files with --source-path"
        ) from error

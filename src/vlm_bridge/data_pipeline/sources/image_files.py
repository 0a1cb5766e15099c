"""Find the image files of a dataset by the names that caption files give them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from vlm_bridge.data_pipeline.caption_folder import MANIFEST_NAME, UNFINISHED_NAME
from vlm_bridge.data_pipeline.images import IMAGE_SUFFIXES
from vlm_bridge.data_pipeline.samples import is_inside
from vlm_bridge.parsing import shown

LEADS_OUT = (
    "a link that leads out of the dataset's folder: copy the file there, or give --follow-links"
)
_SUBFOLDERS = ("", "images/", "Images/")  # below the folder of the caption file
_CAPTION_NUMBER = re.compile(r"#\d+\s*$")


def without_number(name: str) -> str:
    """Return an image's name without the number of its caption (``a.jpg#0``)."""
    return _CAPTION_NUMBER.sub("", name).strip()


class ImageFiles:
    """The image files below a folder, except those of caption folders made of the dataset.

    Links that lead out of the folder are skipped unless ``follow_links``.

    Attributes:
        paths: the files by their names relative to the folder, with slashes.
        linked_out: the names of the links that are skipped.
    """

    def __init__(self, root: Path, follow_links: bool = False):
        self.root, self.follow_links = root, follow_links
        self.paths: dict[str, Path] = {}
        self.linked_out: list[str] = []
        self._seen: set[Path] = set()
        self._scan(root, root.resolve())

    def _scan(self, folder: Path, resolved: Path) -> None:
        real = folder.resolve()
        is_made = (folder / MANIFEST_NAME).is_file() or (folder / UNFINISHED_NAME).is_dir()
        if real in self._seen or (is_made and folder != self.root):
            return  # a link in a circle, or a caption folder made of the dataset
        self._seen.add(real)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = folder / entry.name
            is_image = path.suffix.lower() in IMAGE_SUFFIXES
            if entry.name.startswith(".") or not (is_image or entry.is_dir()):
                continue
            name = path.relative_to(self.root).as_posix()
            if entry.is_symlink() and not (self.follow_links or is_inside(resolved, path)):
                self.linked_out.append(name)
            elif entry.is_dir():
                self._scan(path, resolved)
            elif entry.is_file():
                self.paths[name] = path

    def find(self, name: str, beside: Path | None = None) -> Path | None:
        """Return the image file that a caption file names, None where there is none.

        A name may lack folders, its suffix or nothing but spelling (Unicode form, case, kind of
        slashes, the number of a caption) where exactly one file fits.

        Args:
            beside: the folder of the caption file.

        Raises:
            ValueError: several files fit.
        """
        bare = without_number(name).replace("\\", "/")
        below = ""
        if beside is not None and beside != self.root and beside.is_relative_to(self.root):
            below = f"{beside.relative_to(self.root).as_posix()}/"
        for top in (below, ""):
            for known in (top + folder + end for end in (name, bare) for folder in _SUBFOLDERS):
                if known in self.paths:
                    return self.paths[known]
        wanted = f"/{_folded(bare)}"
        for by_end in self._by_end:
            known = by_end.get(wanted.rpartition("/")[2], ())
            fits = [found for found in known if found[0].endswith(wanted)]
            fits = [found for found in fits if found[0].startswith(f"/{_folded(below)}")] or fits
            if len(fits) > 1:
                files = ", ".join(found for _, found in fits[:3])
                raise ValueError(f"image name {shown(name)} fits several files ({files})")
            if fits:
                return self.paths[fits[0][1]]
        return None

    @cached_property
    def _by_end(self) -> tuple[dict[str, list[tuple[str, str]]], ...]:
        """(folded, name) of each file by the end of its name, with and without the suffix."""
        whole, stems = defaultdict(list), defaultdict(list)
        for name in self.paths:
            for by_end, spelled in ((whole, name), (stems, name.rpartition(".")[0])):
                folded = f"/{_folded(spelled)}"
                by_end[folded.rpartition("/")[2]].append((folded, name))
        return whole, stems


def _folded(name: str) -> str:
    decomposed = unicodedata.normalize("NFD", name.removeprefix("./")).casefold()
    return unicodedata.normalize("NFC", decomposed)

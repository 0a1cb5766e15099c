"""Find the image files of a dataset by the names that caption files give them.

The user's own folder is read wherever it leads; a link within it that leads out is skipped and
named, unless ``follow_links`` allows it.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from functools import cached_property
from pathlib import Path, PurePosixPath

from vlm_bridge.data_pipeline.caption_folder import (
    FORMAT,
    MANIFEST_NAME,
    UNFINISHED_NAME,
    inside,
    is_inside,
)
from vlm_bridge.data_pipeline.images import IMAGE_SUFFIXES
from vlm_bridge.parsing import shown

LEADS_OUT = (
    "a link that leads out of the dataset's folder: copy the file there, or give --follow-links"
)
MISSING = "its image is missing"
_SUBFOLDERS = ("", "images/", "Images/")  # below the folder of the caption file
_CAPTION_NUMBER = re.compile(r"#\d+\s*$")


class LeadsOutError(ValueError):
    """The named image lies behind a link that leads out of the dataset's folder."""


def without_number(name: str) -> str:
    """Return an image's name without the number of its caption (``a.jpg#0``)."""
    return _CAPTION_NUMBER.sub("", name).strip()


class ImageFiles:
    """The image files below a folder.

    Args:
        root: the dataset's folder, which links must not leave.
        folder: where the images are; None is the root.
        recursive: look into the folders below, except caption folders made of the dataset.

    Attributes:
        paths: the files by their names relative to the folder, with slashes.
        linked_out: the names of the links that are skipped.
    """

    def __init__(
        self,
        root: Path,
        folder: Path | None = None,
        follow_links: bool = False,
        recursive: bool = True,
    ):
        self.folder = folder or root
        self.follow_links = follow_links
        self._resolved = root.resolve()
        self.paths: dict[str, Path] = {}
        self.linked_out: list[str] = []
        if self._allows(self.folder):
            self._scan(recursive)
        else:
            self.linked_out.append(self.folder.name)

    def find(self, name: str, beside: Path | None = None) -> Path | None:
        """Return the image file that a caption file names, None where there is none.

        Names may differ from the file's by Unicode form, case, kind of slashes, a missing suffix
        or the number of a caption (``#0``) where exactly one file fits.

        Args:
            beside: the folder of the caption file, where that is not the root.

        Raises:
            LeadsOutError: the file lies behind a link that leads out.
            ValueError: the name leads out of the folder, or several files fit.
        """
        if not self._allows(self.folder):
            raise LeadsOutError(LEADS_OUT)
        starts = list(_SUBFOLDERS)
        if beside is not None and beside != self.folder and beside.is_relative_to(self.folder):
            below = f"{beside.relative_to(self.folder).as_posix()}/"
            starts = [*(below + start for start in _SUBFOLDERS), *starts]
        bare = without_number(name).replace("\\", "/")
        for spelled in dict.fromkeys((name, without_number(name), bare)):
            for start in starts:
                if (known := self.paths.get(f"{start}{spelled}")) is not None:
                    return known
                path = inside(self.folder, f"{start}{spelled}")
                if path.is_file():
                    return self._through_link(path)
        for known in self._by_folded_name:
            fits = sorted(
                {path for start in starts for path in known.get(_folded(start + bare), ())}
            )
            if len(fits) > 1:
                files = ", ".join(path.relative_to(self.folder).as_posix() for path in fits[:3])
                raise ValueError(
                    f"image name {shown(name)} fits several files ({files}): write the whole name"
                )
            if fits:
                return fits[0]
        return None

    def look_up(self, name: str) -> tuple[Path | None, str]:
        """Return the image file that a caption file names, or None and the reason."""
        try:
            path = self.find(name)
        except ValueError as error:
            return None, str(error)
        return path, "" if path is not None else MISSING

    def nearest(self, name: str) -> list[str]:
        """Return up to three file names that look like a name, the most similar first."""
        bases = {PurePosixPath(known).name for known in self.paths}
        base = PurePosixPath(name.replace("\\", "/")).name
        return difflib.get_close_matches(base, sorted(bases), n=3, cutoff=0.3)

    def _allows(self, path: Path) -> bool:
        return self.follow_links or is_inside(self._resolved, path)

    def _through_link(self, path: Path) -> Path:
        """Return a file that the scan saw by another name or not at all."""
        if self._allows(path):
            return self._by_real_path.get(path.resolve(), path)
        if not any(path.is_relative_to(self.folder / link) for link in self.linked_out):
            self.linked_out.append(path.relative_to(self.folder).as_posix())
        raise LeadsOutError(LEADS_OUT)

    @cached_property
    def _by_real_path(self) -> dict[Path, Path]:
        return {path.resolve(): path for path in self.paths.values()}

    @cached_property
    def _by_folded_name(self) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
        """The files by their names without differences in spelling, and by these without suffix."""
        whole: dict[str, list[Path]] = {}
        without_suffix: dict[str, list[Path]] = {}
        for name, path in self.paths.items():
            whole.setdefault(_folded(name), []).append(path)
            without_suffix.setdefault(_folded(name[: -len(path.suffix)]), []).append(path)
        return whole, without_suffix

    def _scan(self, recursive: bool) -> None:
        seen: set[Path] = set()
        pending = [self.folder]
        while pending:
            here = pending.pop()
            if (real := here.resolve()) in seen:  # links in a circle
                continue
            seen.add(real)
            for entry in sorted(os.scandir(here), key=lambda entry: entry.name):
                path = here / entry.name
                is_folder = recursive and entry.is_dir()
                is_image = path.suffix.lower() in IMAGE_SUFFIXES
                if entry.name.startswith(".") or not (is_folder or is_image):
                    continue
                name = path.relative_to(self.folder).as_posix()
                if entry.is_symlink() and not self._allows(path):
                    self.linked_out.append(name)
                elif not is_folder and entry.is_file():
                    self.paths[name] = path
                elif is_folder and not _is_caption_folder(path):
                    pending.append(path)
        self.paths = dict(sorted(self.paths.items()))


def _folded(name: str) -> str:
    decomposed = unicodedata.normalize("NFD", name.removeprefix("./")).casefold()
    return unicodedata.normalize("NFC", decomposed)


def _is_caption_folder(path: Path) -> bool:
    """Return whether `transform` made a folder, or has begun to."""
    if (path / UNFINISHED_NAME).is_dir():
        return True
    try:
        with (path / MANIFEST_NAME).open(encoding="utf-8") as file:
            return f'"{FORMAT}"' in file.read(1000)
    except (OSError, ValueError):
        return False

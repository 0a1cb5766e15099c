"""Find the image files of a dataset by the names that caption files give them.

One rule holds for links in every source: what the user names is read wherever it leads, and a link within a dataset's
folder that leads out of it is skipped and named, unless `follow_links` allows it.
"""

from __future__ import annotations

import difflib
import os
import unicodedata
from dataclasses import dataclass
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
from vlm_bridge.data_pipeline.sources.tables import without_number
from vlm_bridge.parsing import shown

LEADS_OUT = (
    "a link that leads out of the dataset's folder: copy the file there, or give --follow-links"
)

MISSING = "its image is missing"

_IMAGE_FOLDERS = ("", "images", "Images")
"""Where the images of a caption file may lie, beside the file itself."""


class LeadsOutError(ValueError):
    """An image's name is that of a link that leads out of the dataset's folder, or of a file behind one."""

    def __init__(self, path: Path):
        self.path = path
        super().__init__(LEADS_OUT)


@dataclass
class ImageFiles:
    """The image files of a dataset.

    Attributes:
        root: the dataset's folder, which links must not leave.
        folder: where the images are; None is the root.
        follow_links: read also what links outside the root lead to.
        recursive: look into the folders below, caption folders that were made of the dataset left out.
    """

    root: Path
    folder: Path | None = None
    follow_links: bool = False
    recursive: bool = True

    @property
    def paths(self) -> dict[str, Path]:
        """The files by their names relative to the folder, with slashes."""
        return self._scanned[0]

    @property
    def linked_out(self) -> list[str]:
        """The names of the links that are skipped."""
        return self._scanned[1]

    def allows(self, path: Path) -> bool:
        """Whether a file or folder may be read, as far as links are concerned."""
        return self.follow_links or is_inside(self._resolved, path)

    def find(self, name: str, beside: Path | None = None) -> Path | None:
        """Return the image file that a caption file names, None where there is none.

        Names may differ from the file's by Unicode form, case, the kind of slashes, a missing suffix or the number of
        a caption (``#0``), where exactly one file fits then.

        Args:
            beside: the folder of the caption file, where that is not the root.

        Raises:
            LeadsOutError: the file is a link that leads out.
            ValueError: the name leads out of the folder, or several files fit.
        """
        for start in self._starts(beside):
            if (known := self._scanned[0].get(f"{start}{name}")) is not None:
                return known
        folders = [self.folder or self.root]
        if beside is not None and beside != folders[0]:
            folders.insert(0, beside)
        names = dict.fromkeys((name, without_number(name), without_number(name).replace("\\", "/")))
        for candidate in filter(None, names):
            for folder in folders:
                for sub in _IMAGE_FOLDERS:
                    path = inside(folder / sub, candidate)
                    if path.is_file():
                        return self._checked(path, folder)
        return self._similar(without_number(name), beside)

    def look_up(self, name: str) -> tuple[Path | None, str]:
        """Return the image file that a caption file names, or None and the reason."""
        if (path := self.paths.get(name)) is not None:
            return path, ""
        if name in self.linked_out:
            return None, LEADS_OUT
        try:
            path = self.find(name)
        except ValueError as error:
            return None, str(error)
        return path, "" if path is not None else MISSING

    def nearest(self, name: str) -> list[str]:
        """Return up to three names of files that look like a name, the most alike first."""
        by_base = {PurePosixPath(known).name: known for known in self.paths}
        base = PurePosixPath(name.replace("\\", "/")).name
        return [by_base[near] for near in difflib.get_close_matches(base, by_base, n=3, cutoff=0.3)]

    def _checked(self, path: Path, folder: Path) -> Path:
        # The folder of a caption file that the user named elsewhere counts as a root too.
        is_elsewhere = not folder.is_relative_to(self.root)
        if self.allows(path) or (is_elsewhere and is_inside(folder.resolve(), path)):
            return path
        raise LeadsOutError(path)

    def note_link(self, path: Path) -> None:
        """Note a file that a link leads out to, unless the link itself is noted."""
        folder = self.folder or self.root
        known = {folder / name for name in self.linked_out}
        if known.isdisjoint((path, *path.parents)):
            self.linked_out.append(
                path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
            )

    @cached_property
    def _starts_of(self) -> dict[Path | None, list[str]]:
        return {}

    def _starts(self, beside: Path | None) -> list[str]:
        """Return what may stand before a name in `paths`, the folder of the caption file first."""
        if beside not in self._starts_of:
            folder = self.folder or self.root
            starts = [""]
            if beside is not None and beside != folder and beside.is_relative_to(folder):
                starts.insert(0, f"{beside.relative_to(folder).as_posix()}/")
            named = [
                f"{start}{sub}/" if sub else start for start in starts for sub in _IMAGE_FOLDERS
            ]
            self._starts_of[beside] = named
        return self._starts_of[beside]

    def _similar(self, name: str, beside: Path | None) -> Path | None:
        """Return the one file whose name differs from ``name`` in spelling only, then in its suffix only."""
        folder = self.folder or self.root
        wanted = [_folded(f"{start}{name}".replace("\\", "/")) for start in self._starts(beside)]
        for known in self._by_folded_name:
            fits = sorted({path for spelled in wanted for path in known.get(spelled, ())})
            if len(fits) > 1:
                files = ", ".join(path.relative_to(folder).as_posix() for path in fits[:3])
                raise ValueError(
                    f"image name {shown(name)} fits several files ({files}): write the whole name"
                )
            if fits:
                return fits[0]
        return None

    @cached_property
    def _by_folded_name(self) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
        """The files by their names without differences in spelling, and by these without suffix."""
        whole: dict[str, list[Path]] = {}
        without_suffix: dict[str, list[Path]] = {}
        for name, path in self.paths.items():
            whole.setdefault(_folded(name), []).append(path)
            without_suffix.setdefault(_folded(name[: -len(path.suffix)]), []).append(path)
        return whole, without_suffix

    @cached_property
    def _resolved(self) -> Path:
        return self.root.resolve()

    @cached_property
    def _scanned(self) -> tuple[dict[str, Path], list[str]]:
        folder = self.folder or self.root
        if not self.allows(folder):
            return {}, [folder.name]
        found: dict[str, Path] = {}
        linked_out: list[str] = []
        seen: set[Path] = set()
        pending = [folder]
        while pending:
            here = pending.pop()
            if (real := here.resolve()) in seen:  # links in a circle
                continue
            seen.add(real)
            for entry in _entries(here):
                path = here / entry.name
                is_folder = self.recursive and entry.is_dir()
                if not (is_folder or path.suffix.lower() in IMAGE_SUFFIXES):
                    continue
                name = path.relative_to(folder).as_posix()
                if entry.is_symlink() and not self.allows(path):
                    linked_out.append(name)
                elif not is_folder and entry.is_file():
                    found[name] = path
                elif is_folder and not _is_caption_folder(path):
                    pending.append(path)
        return dict(sorted(found.items())), linked_out


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder by name, without hidden files."""
    with os.scandir(folder) as entries:
        return sorted(
            (e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name
        )


def _folded(name: str) -> str:
    decomposed = unicodedata.normalize("NFD", name.removeprefix("./")).casefold()
    return unicodedata.normalize("NFC", decomposed)


def _is_caption_folder(path: Path) -> bool:
    """Whether a folder is a caption folder, finished or not, as `transform` writes one."""
    if (path / UNFINISHED_NAME).is_dir():
        return True
    try:
        with (path / MANIFEST_NAME).open(encoding="utf-8") as file:
            return f'"{FORMAT}"' in file.read(1000)
    except (OSError, ValueError):
        return False

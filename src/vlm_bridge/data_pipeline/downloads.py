"""Fetching datasets: what anyone may fetch, resumed and checked; for the rest, the page and the commands.

Checksums are those that others recorded and publish: COCO's are TensorFlow Datasets' (``url_checksums/coco.txt``),
that of Karpathy's archive stands in several public repositories with the same size. Where none is known, the size
that the server names and the archive's own CRCs are checked.

A file grows as ``NAME.part``; what identifies the server's version of it is kept beside it, so that a broken
connection goes on where it stopped (HTTP Range, RFC 9110 section 14) and never mixes two versions.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from shlex import quote
from typing import Any
from urllib.parse import urlsplit

from vlm_bridge import __version__
from vlm_bridge.data_pipeline.caption_folder import inside, write_atomically
from vlm_bridge.data_pipeline.sources.conceptual import shards_command
from vlm_bridge.errors import DataError, UsageError

Progress = Callable[[int, int], None]
"""Called with (done, total): megabytes of a transfer, files of an archive."""

ShowProgress = Callable[[str], AbstractContextManager[Progress]]
"""Opens a progress display for what the text names."""

TIMEOUT_S = 60.0
MAX_FAILURES = 5
"""In a row without a byte gained; waits double from ``FIRST_WAIT_S``."""

FIRST_WAIT_S = 1.0
RECEIPTS_NAME = ".downloads.json"
"""Says which archives were unpacked, since they are removed afterwards."""

_CHUNK_BYTES = 1 << 20
_MB = 10**6
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES})
_DAMAGED_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


@dataclass(frozen=True)
class RemoteFile:
    """A file that anyone may fetch."""

    url: str
    part: str
    """What of the dataset it holds: captions, val, train."""
    size: int | None = None
    """Bytes; None where they are not known for certain."""
    sha256: str | None = None
    members: tuple[str, ...] = ()
    """Patterns of what to unpack; empty where it is no archive."""
    year: int | None = None
    """None where it serves every year of the dataset."""
    save_as: str = ""

    @property
    def name(self) -> str:
        """Its name in the output folder."""
        return self.save_as or Path(urlsplit(self.url).path).name


@dataclass(frozen=True)
class Dataset:
    """How to get a dataset; ``by_hand`` and ``then`` are steps in words and commands for a folder."""

    page: str
    files: tuple[RemoteFile, ...]
    by_hand: Callable[[Path], Sequence[str]]
    then: Callable[[Path], str]

    def choose(self, parts: Sequence[str] = (), year: int | None = None) -> list[RemoteFile]:
        """Return the files of these parts (all without any) and this year (the newest without one).

        Raises:
            UsageError: no such part or year.
        """
        years = {file.year for file in self.files if file.year is not None}
        if year is not None and year not in years:
            known = ", ".join(map(str, sorted(years))) or "this dataset has only one version"
            raise UsageError(f"--year {year}: choose from {known}")
        year = year or max(years, default=None)
        of_year = [file for file in self.files if file.year in (None, year)]
        known_parts = list(dict.fromkeys(file.part for file in of_year))
        if unknown := set(parts) - set(known_parts):
            raise UsageError(f"--part {min(unknown)}: choose from {', '.join(known_parts)}")
        return [file for file in of_year if not parts or file.part in parts]


@dataclass(frozen=True)
class Fetched:
    """What became of a file: its place, or how many files were unpacked from it."""

    name: str
    url: str
    bytes: int
    unpacked: int = 0
    was_there: bool = False


def _karpathy(dataset: str) -> RemoteFile:
    return RemoteFile(
        "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
        part="captions",
        size=36_745_453,
        sha256="4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
        members=(f"dataset_{dataset}.json",),
    )


def _coco(path: str, part: str, year: int, members: str, size: int, sha256: str) -> RemoteFile:
    # Plain HTTP: the host's certificate is not for its name. The checksums make up for it.
    return RemoteFile(f"http://images.cocodataset.org/{path}", part, size, sha256, (members,), year)


_CAPTIONS = "annotations/captions_*.json"

DATASETS: dict[str, Dataset] = {
    "flickr30k": Dataset(
        page="http://shannon.cs.illinois.edu/DenotationGraph/",
        files=(_karpathy("flickr30k"),),
        by_hand=lambda folder: (
            "ask for the photographs (flickr30k-images, about 4.4 GB) with the form at "
            "https://forms.illinois.edu/sec/229675; the answer is a link",
            f"tar -xf flickr30k-images.tar.gz -C {quote(str(folder))}",
        ),
        then=lambda folder: _transform_command("flickr30k", folder),
    ),
    "coco": Dataset(
        page="https://cocodataset.org/#download",
        files=(
            _karpathy("coco"),
            _coco("annotations/annotations_trainval2017.zip", "captions", 2017, _CAPTIONS, 252_907_541,
                  "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268"),
            _coco("zips/val2017.zip", "val", 2017, "val2017/*.jpg", 815_585_330,
                  "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
            _coco("zips/train2017.zip", "train", 2017, "train2017/*.jpg", 19_336_861_798,
                  "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
            _coco("annotations/annotations_trainval2014.zip", "captions", 2014, _CAPTIONS, 252_872_794,
                  "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009"),
            _coco("zips/val2014.zip", "val", 2014, "val2014/*.jpg", 6_645_013_297,
                  "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0"),
            _coco("zips/train2014.zip", "train", 2014, "train2014/*.jpg", 13_510_573_713,
                  "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775"),
        ),
        by_hand=lambda folder: (),
        then=lambda folder: _transform_command("coco", folder),
    ),
    "conceptual": Dataset(
        page="https://ai.google.com/research/ConceptualCaptions/download",
        files=(
            RemoteFile("https://storage.googleapis.com/gcc-data/Validation/GCC-1.1.0-Validation.tsv", "val",
                       save_as="Validation_GCC-1.1.0-Validation.tsv"),
            RemoteFile("https://storage.googleapis.com/gcc-data/Train/GCC-training.tsv", "train",
                       save_as="Train_GCC-training.tsv"),
        ),
        by_hand=lambda folder: (
            "fetch the pictures from the URLs (hours; of 3.3 million, many are gone)",
            "pip install img2dataset",
            shards_command(folder / "Validation_GCC-1.1.0-Validation.tsv", folder / "shards" / "validation"),
            shards_command(folder / "Train_GCC-training.tsv", folder / "shards" / "train"),
        ),
        then=lambda folder: _transform_command("conceptual", folder / "shards"),
    ),
}  # fmt: skip


def _transform_command(source: str, folder: Path) -> str:
    return f"vlm-data transform --source {source} --input-dir {quote(str(folder))} --output-dir data/{source}"


def download(
    files: Sequence[RemoteFile],
    folder: Path,
    *,
    keep_archives: bool = False,
    show_progress: ShowProgress = lambda what: nullcontext(lambda done, total: None),
) -> list[Fetched]:
    """Fetch and unpack ``files`` into ``folder``; what is there already stays. The same call continues.

    Raises:
        DataError: a host cannot be reached, a file was changed or damaged, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    receipts = _read_receipts(folder)
    done: list[Fetched] = []
    for file in files:
        key = f"{file.name} {' '.join(file.members)}".strip()
        if earlier := receipts.get(key):
            done.append(
                Fetched(file.name, file.url, earlier["bytes"], earlier["unpacked"], was_there=True)
            )
            continue
        target = folder / file.name
        was_there = target.is_file()
        if was_there:
            if problem := _problem(file, target, file.size):
                raise DataError(
                    f"{target} is not {file.url} ({problem}): move it away, and the same command fetches it"
                )
        else:
            with show_progress(f"{file.name}, MB") as report:
                fetch(file, target, report)
        size = target.stat().st_size
        unpacked = 0
        if file.members:
            with show_progress(f"files of {file.name}") as report:
                unpacked = unpack(target, folder, file.members, report)
            receipts[key] = {"url": file.url, "bytes": size, "unpacked": unpacked}
            write_atomically(folder / RECEIPTS_NAME, json.dumps(receipts, indent=2).encode())
            if not keep_archives:
                target.unlink()
        done.append(Fetched(file.name, file.url, size, unpacked, was_there))
    return done


def remote_size(file: RemoteFile) -> int | None:
    """Return the bytes of a file: as known, or else as its server says; None where that cannot be asked."""
    if file.size is not None:
        return file.size
    try:
        with _open(file.url, {}, "HEAD", timeout=10) as answer:
            return _length(answer.headers.get("Content-Length"))
    except (OSError, http.client.HTTPException):
        return None


def fetch(file: RemoteFile, target: Path, progress: Progress = lambda done, total: None) -> None:
    """Fetch one file to ``target``, which appears when it is whole and checked.

    Raises:
        DataError: as :func:`download`.
    """
    partial = target.with_name(f"{target.name}.part")
    failures = 0
    reached = False
    while True:
        before = _size(partial)
        try:
            total = _transfer(file, partial, progress)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != http.HTTPStatus.TOO_MANY_REQUESTS:
                raise DataError(
                    f"{_host(file)} refuses {file.url} ({error.code} {error.reason}): "
                    "the dataset's page may name a new place"
                ) from None
            reached = True
            problem = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise DataError(
                    f"cannot write {partial} ({error.strerror}): make room, and the same command continues"
                ) from None
            problem = _one_line(error)
            reached = reached or not isinstance(error, urllib.error.URLError)
        failures = 1 if _size(partial) > before else failures + 1
        # A host that cannot be reached at all is named at once; one that breaks off or is busy is asked again.
        if failures >= MAX_FAILURES or not reached:
            raise DataError(
                f"cannot fetch {file.url} from {_host(file)} ({problem}): check the network (a proxy is taken from "
                "https_proxy and http_proxy); the same command continues"
            )
        time.sleep(FIRST_WAIT_S * 2 ** (failures - 1))
    if problem := _problem(file, partial, total):
        partial.unlink()
        raise DataError(
            f"{file.url} is not what it should be ({problem}): damaged on its way or changed at its source; "
            "it was removed, and the same command fetches it anew"
        )
    partial.replace(target)
    _version_file(partial).unlink(missing_ok=True)


def unpack(
    archive: Path,
    folder: Path,
    members: Sequence[str],
    progress: Progress = lambda done, total: None,
) -> int:
    """Unpack what matches the patterns, checking every CRC; return the number of files. Files that are there stay.

    Raises:
        DataError: damaged (it is removed then), a name that leads out of ``folder``, or the disk is full.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            wanted = [
                info
                for info in opened.infolist()
                if not info.is_dir() and any(fnmatch(info.filename, pattern) for pattern in members)
            ]
            if not wanted:
                raise DataError(
                    f"{archive} holds no {' or '.join(members)}: it was changed at its source"
                )
            missing = [info for info in wanted if _size(_place(folder, info)) != info.file_size]
            _check_room(
                folder, sum(info.file_size for info in missing), f"what is in {archive.name}"
            )
            for number, info in enumerate(missing, start=1 + len(wanted) - len(missing)):
                _unpack_member(opened, info, _place(folder, info))
                progress(number, len(wanted))
    except _DAMAGED_ARCHIVE as error:
        archive.unlink()
        raise DataError(
            f"{archive} is damaged ({_one_line(error)}) and was removed: the same command fetches it anew"
        ) from None
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise DataError(
            f"cannot write to {folder} ({error.strerror}): make room, and the same command continues"
        ) from None
    return len(wanted)


# --- one transfer ---


def _transfer(file: RemoteFile, partial: Path, progress: Progress) -> int | None:
    """Append what is missing of a file; return the size that the server names.

    Raises:
        OSError, HTTPException: the connection failed or broke: what came is kept.
        DataError: the file is not the one that is known, or there is no room for it.
    """
    have = _size(partial)
    version = _read_version(partial) if have else {}
    headers = {}
    if version:
        headers["Range"] = f"bytes={have}-"
        if version["validator"]:
            # Another version than the one begun is then sent whole, from its first byte.
            headers["If-Range"] = version["validator"]
    try:
        answer = _open(file.url, headers)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not version:
            raise
        if version["size"] == have:
            return have  # it was all there
        partial.unlink()
        raise ConnectionError("the file became shorter at its source") from None
    with answer:
        start, total = _extent(answer)
        if start:
            total = version.get("size") if total is None else total
        if start not in (0, have) or (start and total != version["size"]):
            partial.unlink()
            raise ConnectionError("the server sent a part of another file")
        if file.size is not None and total not in (None, file.size):
            raise DataError(
                f"{file.url} has {total:,} bytes, where {file.size:,} are known: it was changed at its source"
            )
        _check_room(partial.parent, (total or 0) - start, file.name)
        _write_version(partial, answer, total)
        done = start
        with partial.open("ab" if start else "wb") as output:
            while chunk := answer.read1(_CHUNK_BYTES):
                output.write(chunk)
                if (done + len(chunk)) // _MB > done // _MB:
                    progress((done + len(chunk)) // _MB, max(total or 0, done + len(chunk)) // _MB)
                done += len(chunk)
    if total is not None and done < total:
        raise ConnectionError(f"the connection broke after {done:,} of {total:,} bytes")
    return total


def _open(
    url: str, headers: dict[str, str], method: str = "GET", timeout: float = TIMEOUT_S
) -> Any:
    identity = {"User-Agent": f"vlm-bridge/{__version__}", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers=identity | headers, method=method)
    return urllib.request.urlopen(request, timeout=timeout)


def _extent(answer: Any) -> tuple[int, int | None]:
    """Return where the content of an answer begins in the file, and the size of the whole file."""
    if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
        return 0, _length(answer.headers.get("Content-Length"))
    # "bytes 100-199/200"; the last number may be "*".
    extent, _, total = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    start = _length(extent.partition("-")[0])
    if start is None:
        raise ConnectionError("the server does not say which part of the file it sends")
    return start, _length(total)


def _length(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _version_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _write_version(partial: Path, answer: Any, size: int | None) -> None:
    etag = answer.headers.get("ETag", "")
    # A weak tag promises the same meaning, not the same bytes.
    validator = (
        etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified", "")
    )
    _version_file(partial).write_text(
        json.dumps({"validator": validator, "size": size}), encoding="utf-8"
    )


def _read_version(partial: Path) -> dict[str, Any]:
    try:
        version = json.loads(_version_file(partial).read_bytes())
        return {"validator": version["validator"], "size": version["size"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # nothing is known of what is there: it is fetched anew


def _problem(file: RemoteFile, path: Path, served_size: int | None) -> str:
    """Say why what lies at ``path`` cannot be the file, by its size and checksum; empty where it can."""
    size = _size(path)
    expected = file.size if file.size is not None else served_size
    if expected is not None and size != expected:
        return f"it has {size:,} bytes, not {expected:,}"
    if file.sha256 is not None:
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != file.sha256:
            return f"its SHA-256 is {digest}, not {file.sha256}"
    return ""


# --- archives and the disk ---


def _place(folder: Path, info: zipfile.ZipInfo) -> Path:
    try:
        return inside(folder, info.filename)
    except ValueError:
        raise DataError(f"the archive's member {info.filename!r} leads out of {folder}") from None


def _unpack_member(opened: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    with opened.open(info) as content, temporary.open("wb") as output:
        shutil.copyfileobj(content, output, _CHUNK_BYTES)
    temporary.replace(target)


def _check_room(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder} has {free / 1e9:,.1f} GB free, {what} needs {needed / 1e9:,.1f} GB: make room or choose "
            "another --output-dir"
        )


def _read_receipts(folder: Path) -> dict[str, Any]:
    path = folder / RECEIPTS_NAME
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise DataError(
            f"{path} is damaged: remove it, and what is missing is fetched again"
        ) from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _host(file: RemoteFile) -> str:
    return urlsplit(file.url).netloc


def _one_line(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return " ".join(str(reason).split()) or type(error).__name__

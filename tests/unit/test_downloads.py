"""Downloads against a real HTTP server: broken connections, ranges, changed and damaged files, a full disk."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import re
import shutil
import socket
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlm_bridge.cli.download import DatasetName
from vlm_bridge.data_pipeline import downloads
from vlm_bridge.data_pipeline.downloads import (
    DATASETS,
    RemoteFile,
    download,
    fetch,
    remote_size,
    unpack,
)
from vlm_bridge.data_pipeline.sources import SOURCES
from vlm_bridge.errors import DataError, UsageError

CONTENT = bytes(range(256)) * 2000


@dataclass
class Site:
    """What the server offers, how it misbehaves, and what it was asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    break_after: int | None = None
    """Bytes of an answer after which the connection is closed."""
    ranges: bool = True
    failures: list[int] = field(default_factory=list)
    """Statuses of the next answers."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Method and Range of every request."""


class Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        site = self.site
        site.asked.append((self.command, self.headers.get("Range", "")))
        content = site.files.get(self.path)
        if site.failures or content is None:
            self.send_error(site.failures.pop(0) if site.failures else 404)
            return
        etag = site.etags.get(self.path, '"one"')
        start = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and site.ranges and self.headers.get("If-Range", etag) == etag:
            start = int(wanted[1])
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", etag)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(content) if site.break_after is None else start + site.break_after
        self.wfile.write(content[start:end])
        self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""


@pytest.fixture
def site() -> Iterator[Site]:
    """A server on this machine with one file, /data.bin."""
    offered = Site(files={"/data.bin": CONTENT})
    handler = type("OfSite", (Handler,), {"site": offered})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    offered.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield offered
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "FIRST_WAIT_S", 0)
    for name in (
        "http_proxy",
        "HTTP_PROXY",
        "https_proxy",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)


def data_file(site: Site, **known: object) -> RemoteFile:
    return RemoteFile(f"{site.url}/data.bin", "data", **known)  # type: ignore[arg-type]


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def left_over(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_fetched_and_checked(site: Site, tmp_path: Path) -> None:
    known = data_file(site, size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())
    fetch(known, tmp_path / "data.bin")
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert left_over(tmp_path) == {"data.bin"} and site.asked == [("GET", "")]


def test_a_broken_connection_goes_on_where_it_stopped(site: Site, tmp_path: Path) -> None:
    site.break_after = 100_000
    fetch(data_file(site), tmp_path / "data.bin")
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert [asked for _, asked in site.asked] == ["", *(f"bytes={n}00000-" for n in range(1, 6))]


def test_a_later_run_goes_on_too(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "MAX_FAILURES", 1)
    site.break_after = 300_000
    with pytest.raises(
        DataError, match=r"the connection broke after 300,000 of 512,000 bytes.*continues"
    ) as caught:
        fetch(data_file(site), tmp_path / "data.bin")
    assert "\n" not in str(caught.value) and not (tmp_path / "data.bin").exists()
    site.break_after = None
    fetch(data_file(site), tmp_path / "data.bin")
    assert (tmp_path / "data.bin").read_bytes() == CONTENT and site.asked[-1] == (
        "GET",
        "bytes=300000-",
    )


def interrupted(site: Site, target: Path, at: int = 300_000) -> None:
    """Leave a file of which ``at`` bytes came."""
    site.break_after = at
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError):
        patch.setattr(downloads, "MAX_FAILURES", 1)
        fetch(data_file(site), target)
    site.break_after = None
    site.asked.clear()


def test_versions_are_not_mixed(site: Site, tmp_path: Path) -> None:
    interrupted(site, tmp_path / "data.bin")
    site.files["/data.bin"], site.etags["/data.bin"] = CONTENT[::-1], '"two"'
    fetch(data_file(site), tmp_path / "data.bin")
    assert (tmp_path / "data.bin").read_bytes() == CONTENT[::-1]


def test_another_size_is_not_mixed_in_where_the_server_has_no_tags(
    site: Site, tmp_path: Path
) -> None:
    site.etags["/data.bin"] = 'W/"weak"'
    interrupted(site, tmp_path / "data.bin")
    site.files["/data.bin"] = CONTENT[::-1] + b"more"
    fetch(data_file(site), tmp_path / "data.bin")
    assert (tmp_path / "data.bin").read_bytes() == CONTENT[::-1] + b"more"


def test_a_server_without_ranges_is_asked_for_the_whole(site: Site, tmp_path: Path) -> None:
    interrupted(site, tmp_path / "data.bin")
    site.ranges = False
    fetch(data_file(site), tmp_path / "data.bin")
    assert (tmp_path / "data.bin").read_bytes() == CONTENT and len(site.asked) == 1


def test_all_bytes_but_not_the_name(site: Site, tmp_path: Path) -> None:
    interrupted(site, tmp_path / "data.bin")
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    fetch(data_file(site), tmp_path / "data.bin")
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_file_that_became_shorter_is_fetched_anew(site: Site, tmp_path: Path) -> None:
    interrupted(site, tmp_path / "data.bin")
    site.files["/data.bin"] = CONTENT[:1000]
    fetch(data_file(site), tmp_path / "data.bin")
    assert (tmp_path / "data.bin").read_bytes() == CONTENT[:1000]


def test_a_part_that_nothing_is_known_of_is_replaced(site: Site, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(b"?" * 1000)
    fetch(data_file(site), tmp_path / "data.bin")
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again_and_a_refusal_is_final(site: Site, tmp_path: Path) -> None:
    site.failures = [503, 429, 500]
    fetch(data_file(site), tmp_path / "data.bin")
    site.failures = [503] * 9
    with pytest.raises(DataError, match="503 Service Unavailable"):
        fetch(data_file(site), tmp_path / "again.bin")
    assert len(site.failures) == 9 - downloads.MAX_FAILURES
    site.failures.clear()
    site.asked.clear()
    with pytest.raises(DataError, match=r"refuses http://.*/none \(404 Not Found\)"):
        fetch(RemoteFile(f"{site.url}/none", "data"), tmp_path / "none")
    assert len(site.asked) == 1


def test_an_unreachable_host_is_named(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = RemoteFile(f"http://127.0.0.1:{port}/x", "data")
    with pytest.raises(
        DataError, match=rf"cannot fetch .* from 127\.0\.0\.1:{port} \(.*refused\).*network"
    ) as caught:
        fetch(file, tmp_path / "x")
    assert "\n" not in str(caught.value)
    assert remote_size(file) is None and remote_size(replace(file, size=5)) == 5


def test_changed_and_damaged_files_are_named(site: Site, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="has 512,000 bytes, where 7 are known: it was changed at its source"
    ):
        fetch(data_file(site, size=7), tmp_path / "data.bin")
    with pytest.raises(DataError, match=r"SHA-256 is [0-9a-f]{64}, not 00.*fetches it anew"):
        fetch(data_file(site, sha256="0" * 64), tmp_path / "data.bin")
    assert not (tmp_path / "data.bin").exists() and not (tmp_path / "data.bin.part").exists()


def test_a_full_disk_is_named(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(site, tmp_path / "data.bin")
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(DataError, match=r"GB free, data\.bin needs"):
        fetch(data_file(site), tmp_path / "data.bin")
    monkeypatch.setattr(shutil, "disk_usage", usage)

    opened = Path.open

    def full(path: Path, mode: str = "r", *rest: object, **options: object) -> object:
        if path.name.endswith(".part") and mode == "ab":
            return opened(Path("/dev/full"), "wb")
        return opened(path, mode, *rest, **options)  # type: ignore[call-overload]

    if Path("/dev/full").exists():
        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(DataError, match=r"cannot write .*No space left.*continues"):
            fetch(data_file(site), tmp_path / "data.bin")
        monkeypatch.undo()
    fetch(data_file(site), tmp_path / "data.bin")
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_an_archive_is_unpacked_once_and_removed(site: Site, tmp_path: Path) -> None:
    members = {
        "annotations/captions_val.json": b"{}",
        "annotations/instances.json": b"[]",
        "readme": b"x",
    }
    site.files["/a.zip"] = zipped(members)
    file = RemoteFile(f"{site.url}/a.zip", "captions", members=("annotations/captions_*.json",))
    (done,) = download([file], tmp_path)
    assert (done.unpacked, done.was_there) == (1, False)
    assert left_over(tmp_path) == {"annotations", downloads.RECEIPTS_NAME}
    assert left_over(tmp_path / "annotations") == {"captions_val.json"}
    site.asked.clear()
    (again,) = download([file], tmp_path)
    assert again.was_there and not site.asked
    # Other members of the same archive are another wish.
    download([replace(file, members=("readme",))], tmp_path, keep_archives=True)
    assert {"a.zip", "readme"} <= left_over(tmp_path)


def test_unpacking_continues_and_leaves_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zipped({f"train/{n}.jpg": b"x" * n for n in range(1, 5)}))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "2.jpg").write_bytes(b"yy")
    (tmp_path / "train" / "3.jpg").write_bytes(b"x")
    seen: list[tuple[int, int]] = []
    assert unpack(tmp_path / "a.zip", tmp_path, ["train/*"], lambda *now: seen.append(now)) == 4
    assert (tmp_path / "train" / "2.jpg").read_bytes() == b"yy"
    assert (tmp_path / "train" / "3.jpg").read_bytes() == b"xxx"
    assert seen == [(2, 4), (3, 4), (4, 4)]


def test_a_damaged_archive_is_removed_and_fetched_anew(site: Site, tmp_path: Path) -> None:
    whole = zipped({"a.txt": b"the same words " * 50}, zipfile.ZIP_STORED)
    site.files["/a.zip"] = whole.replace(b"same", b"sane", 1)
    file = RemoteFile(f"{site.url}/a.zip", "captions", members=("*.txt",))
    with pytest.raises(DataError, match=r"is damaged \(Bad CRC-32.*fetches it anew"):
        download([file], tmp_path)
    assert left_over(tmp_path) <= {".a.txt.part"}
    site.files["/a.zip"] = b"no archive"
    with pytest.raises(DataError, match="is damaged"):
        download([file], tmp_path)
    site.files["/a.zip"] = whole
    assert download([file], tmp_path)[0].unpacked == 1


def test_archives_cannot_write_elsewhere_and_must_hold_what_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    archive = tmp_path / "in" / "a.zip"
    archive.write_bytes(zipped({"../evil.txt": b"x"}))
    with pytest.raises(DataError, match="leads out of"):
        unpack(archive, tmp_path / "in", ["*"])
    assert not (tmp_path / "evil.txt").exists()
    with pytest.raises(DataError, match=r"holds no \*\.json"):
        unpack(archive, tmp_path / "in", ["*.json"])


def test_a_file_that_was_there_is_checked_and_not_touched(site: Site, tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(CONTENT[:100])
    with pytest.raises(
        DataError, match=r"data\.bin is not http.*it has 100 bytes, not 512,000.*move it away"
    ):
        download([data_file(site, size=len(CONTENT))], tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT[:100] and not site.asked
    (done,) = download([data_file(site)], tmp_path)
    assert done.was_there


def test_what_is_offered_is_a_source_and_fully_described() -> None:
    assert set(DATASETS) == {name.value for name in DatasetName} and set(DATASETS) <= set(SOURCES)
    for dataset in DATASETS.values():
        assert dataset.page.startswith("http") and dataset.choose()
        for file in dataset.files:
            # Plain HTTP only where the content is known.
            assert file.url.startswith("https://") or (file.size and file.sha256)
            assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            assert bool(file.members) == file.name.endswith(".zip")


def test_parts_and_years_are_chosen() -> None:
    coco = DATASETS["coco"]
    names = [file.name for file in coco.choose()]
    assert names == [
        "caption_datasets.zip",
        "annotations_trainval2017.zip",
        "val2017.zip",
        "train2017.zip",
    ]
    assert [file.name for file in coco.choose(["val"], 2014)] == ["val2014.zip"]
    with pytest.raises(UsageError, match="--part test: choose from captions, val, train"):
        coco.choose(["test"])
    with pytest.raises(UsageError, match="--year 2015: choose from 2014, 2017"):
        coco.choose(year=2015)
    with pytest.raises(UsageError, match="only one version"):
        DATASETS["flickr30k"].choose(year=2014)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def local_flickr30k(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Karpathy's archive, offered by this machine."""
    archive = zipped({"dataset_flickr30k.json": b'{"images": []}', "dataset_coco.json": b"{}"})
    site.files["/caption_datasets.zip"] = archive
    known = RemoteFile(
        f"{site.url}/caption_datasets.zip", "captions", len(archive), hashlib.sha256(archive).hexdigest(),
        ("dataset_flickr30k.json",),
    )  # fmt: skip
    monkeypatch.setitem(DATASETS, "flickr30k", replace(DATASETS["flickr30k"], files=(known,)))


@pytest.mark.usefixtures("local_flickr30k")
def test_the_command_fetches_what_is_free_and_says_the_rest(
    site: Site, run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dry = run_here("data", "download", "flickr30k", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    for part in ("DenotationGraph", "non-commercial", "forms.illinois.edu/sec/229675",
                 "tar -xf flickr30k-images.tar.gz -C datasets/flickr30k", "nothing was fetched",
                 "vlm-data transform --source flickr30k --input-dir datasets/flickr30k"):  # fmt: skip
        assert part in dry.stdout
    assert not site.asked and not (tmp_path / "datasets").exists()

    done = run_here("data", "download", "flickr30k", "--output-dir", "f30k", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fetched"][0]["unpacked"] == 1
    assert (tmp_path / "f30k" / "dataset_flickr30k.json").is_file()
    again = run_here("data", "download", "flickr30k", "--output-dir", "f30k")
    assert "caption_datasets.zip: was there" in again.stdout and "1 files unpacked" in again.stdout


@pytest.mark.usefixtures("local_flickr30k")
def test_a_failing_command_is_one_line(site: Site, run_here: Run, tmp_path: Path) -> None:
    site.files.clear()
    failed = run_here("data", "download", "flickr30k", "--output-dir", tmp_path / "f30k")
    assert failed.returncode == 1
    assert [
        line for line in failed.stderr.splitlines() if line.startswith("error:")
    ] == failed.stderr.splitlines()[-1:]
    assert "404" in failed.stderr and "Traceback" not in failed.stderr
    wrong = run_here("data", "download", "flickr30k", "--part", "train")
    assert wrong.returncode == 2 and "choose from captions" in wrong.stderr

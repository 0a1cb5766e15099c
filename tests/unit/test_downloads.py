"""The commands that `vlm-data download` prints, run by a real shell."""

from __future__ import annotations

import functools
import hashlib
import http.server
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlm_bridge.cli.data import DatasetName, app
from vlm_bridge.data_pipeline.sources import source_class

TOOLS = ("sh", "curl", "unzip", "sha256sum")
needs_tools = pytest.mark.skipif(
    sys.platform == "win32" or not all(map(shutil.which, TOOLS)), reason=f"needs {TOOLS}"
)


@pytest.mark.parametrize("name", DatasetName)
def test_every_offer_names_page_licence_and_the_next_step(name: str) -> None:
    done = CliRunner().invoke(app, ["download", name, "--output-dir", "my data"])
    assert done.exit_code == 0, done.output
    for part in ("# page: http", source_class(name).licence_note, f"--source {name}", "'my data"):
        assert part in done.output
    assert subprocess.run(["sh", "-n"], input=done.output, text=True).returncode == 0


def test_coco_has_two_years() -> None:
    runner = CliRunner()
    assert "val2017.zip" in runner.invoke(app, ["download", "coco"]).output
    of_2014 = runner.invoke(app, ["download", "coco", "--year", "2014"]).output
    assert "val2014.zip" in of_2014 and "2017" not in of_2014
    assert runner.invoke(app, ["download", "coco", "--year", "2015"]).exit_code != 0


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server on this machine, and its folder."""
    root = tmp_path / "site"
    root.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", root
    server.shutdown()
    server.server_close()
    thread.join()


@needs_tools
def test_archives_are_fetched_checked_and_unpacked(site: tuple[str, Path], tmp_path: Path) -> None:
    url, root = site
    with zipfile.ZipFile(root / "a.zip", "w") as archive:
        archive.writestr("val/1.jpg", b"one")
        archive.writestr("other/2.jpg", b"two")
    checksum = hashlib.sha256((root / "a.zip").read_bytes()).hexdigest()
    folder = tmp_path / "it's here"
    printed = CliRunner().invoke(app, ["download", "flickr30k", "--output-dir", str(folder)]).output
    functions = printed[: printed.index("\nkarpathy dataset")]

    def run(sha256: str) -> int:
        command = f"{functions}\nfetch {url}/a.zip 'val/*.jpg' {sha256}"
        return subprocess.run(["sh"], input=command, text=True).returncode

    assert run("0" * 64) != 0 and not (folder / "val").exists()
    (folder / "a.zip").unlink()
    assert run(checksum) == 0
    assert (folder / "val" / "1.jpg").read_bytes() == b"one" and not (folder / "other").exists()


@needs_tools
def test_lists_of_urls_get_a_header_for_img2dataset(tmp_path: Path) -> None:
    for name, script in {
        "pip": "",
        "curl": 'while [ "$1" != -o ]; do shift; done; mkdir -p "${2%/*}"; echo "a caption\thttp" > "$2"',
        "img2dataset": 'echo "$2|${12}"; cat "$2"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    printed = CliRunner().invoke(app, ["download", "conceptual", "--output-dir", "it's"]).output
    done = subprocess.run(
        ["sh"], input=printed, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True,
        text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        *("it's/validation.tsv.with-header.tsv|it's/shards/validation", "caption\turl"),
        *("a caption\thttp", "it's/train.tsv.with-header.tsv|it's/shards/train", "caption\turl"),
        "a caption\thttp",
    ]

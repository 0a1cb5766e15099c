"""The commands that `vlm-data download` prints, run by a real shell."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlm_bridge.cli.data import DatasetName, app
from vlm_bridge.data_pipeline.sources import source_class

TOOLS = ("sh", "curl", "unzip", "sha256sum")
needs_tools = pytest.mark.skipif(
    sys.platform == "win32" or not all(map(shutil.which, TOOLS)), reason=f"needs {TOOLS}"
)


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["download", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("name", DatasetName)
def test_every_offer_names_page_license_and_the_next_step(name: str) -> None:
    output = printed(name, "--output-dir", "my data")
    for part in ("# page: http", source_class(name).licence_note, f"--source {name}", "'my data"):
        assert part in output
    assert subprocess.run(["sh", "-n"], input=output, text=True).returncode == 0


def test_coco_has_two_years() -> None:
    assert "val2017.zip" in printed("coco")
    of_2014 = printed("coco", "--year", "2014")
    assert "val2014.zip" in of_2014 and "2017" not in of_2014
    assert CliRunner().invoke(app, ["download", "coco", "--year", "2015"]).exit_code != 0


@needs_tools
def test_archives_are_fetched_checked_and_unpacked(tmp_path: Path) -> None:
    source, folder = tmp_path / "a.zip", tmp_path / "it's here"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("val/1.jpg", b"one")
        archive.writestr("other/2.jpg", b"two")
    checksum = hashlib.sha256(source.read_bytes()).hexdigest()
    functions = printed("flickr30k", "--output-dir", str(folder)).split("\nkarpathy dataset")[0]

    def run(sha256: str) -> int:
        command = f"{functions}\nfetch {source.as_uri()} 'val/*.jpg' {sha256}"
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
    done = subprocess.run(
        ["sh"], input=printed("conceptual", "--output-dir", "it's"), capture_output=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        *("it's/validation.tsv.with-header.tsv|it's/shards/validation", "caption\turl"),
        *("a caption\thttp", "it's/train.tsv.with-header.tsv|it's/shards/train", "caption\turl"),
        "a caption\thttp",
    ]

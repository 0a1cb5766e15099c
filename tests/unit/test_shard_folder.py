"""Shards as training data: indexed once, read by place; hostile tars do no harm."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from logs import log_lines
from shards import jpeg, sample, write_shard_folder, write_tar
from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline.caption_folder import open_data_folder, readable_split
from vlm_bridge.data_pipeline.features import check_images, images_digest
from vlm_bridge.data_pipeline.images import check_image, image_size, open_image
from vlm_bridge.data_pipeline.samples import CaptionedImage, Skipped, TarImage
from vlm_bridge.errors import DataError, ImageError
from vlm_bridge.evaluation.run_folder import Prediction
from vlm_bridge.training_strategy.data import usable_images


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_shard_folder(tmp_path / "data")


def paths_of(images: list[CaptionedImage]) -> list[TarImage]:
    return [image.path for image in images if isinstance(image.path, TarImage)]


def test_samples_are_read_from_where_they_lie(root: Path) -> None:
    folder = open_data_folder(root)
    assert folder.splits == ["train", "val"]
    images = folder.split("train")
    assert [image.captions for image in images] == [(f"image number {n}",) for n in range(30)]
    assert images[12].original_id == "00012"
    assert str(images[12].path) == f"{root}/train/00001.tar/00012.jpg"
    assert images[12].path.name == "00012.jpg"
    assert images[12].path.read_bytes() == jpeg(12)
    assert open_image(images[12].path).size == image_size(images[12].path) == (24, 24)
    assert {path.suffix for path in root.rglob("*") if path.is_file()} == {".tar"}


def read_all(root: Path, members: list[tuple[str, bytes]]) -> tuple[dict[str, str], dict[str, str]]:
    """The captions and the skipped samples of a shard by key."""
    skipped = Skipped("samples")
    write_tar(root / "train" / "0.tar", members)
    images = open_data_folder(root).split("train", skipped)
    return (
        {image.original_id: image.captions[0] for image in images},
        {sample.id.rpartition("/")[2]: sample.reason for sample in skipped.samples},
    )


def test_captions_come_from_text_or_json_and_plain_extensions_go_first(tmp_path: Path) -> None:
    members = [
        ("./part.1/a.png", jpeg(1)), ("./part.1/a.json", b'{"caption": "in json"}'),
        ("b.webp", jpeg(2)), ("b.txt", b" "), ("b.json", b'{"caption": "for the text is empty"}'),
        ("c.JPG", jpeg(3)), ("c.txt", b"text wins\n"), ("c.json", b'{"caption": "not this"}'),
        ("d.input.jpg", jpeg(1)), ("d.output.txt", b"of d"),
        ("e.jpg", jpeg(2)), ("e.mask.png", jpeg(3)), ("e.en.txt", b"not this"),
        ("f.jpg", jpeg(1)), ("f.txt", b"of f"), ("e.txt", b"of e"),
        *((f"my photo v1.{n}.{kind}", jpeg(n)) for n in range(5) for kind in ("jpg", "txt")),
    ]  # fmt: skip
    captions, skipped = read_all(tmp_path, members)
    assert captions == {
        "part.1/a": "in json", "b": "for the text is empty", "c": "text wins",
        "d": "of d", "e": "of e", "f": "of f",
    }  # fmt: skip
    assert "several 0.jpg, 1.jpg" in skipped.pop("my photo v1")
    assert skipped == {}


def test_the_fingerprint_follows_the_content(root: Path) -> None:
    fingerprint = open_data_folder(root).fingerprint
    os.utime(root / "train" / "00002.tar", ns=(1, 1))  # a copy elsewhere is the same data
    assert open_data_folder(root).fingerprint == fingerprint
    write_tar(root / "train" / "00001.tar", [*sample(70), *sample(71)])
    changed = open_data_folder(root)
    assert len(changed.split("train")) == 22
    assert changed.compute_fingerprint() == changed.fingerprint != fingerprint


def test_the_fingerprint_is_that_of_earlier_versions(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "00000.tar", [("a.jpg", b"no image"), ("a.txt", b"a caption")])
    found = open_data_folder(tmp_path).fingerprint
    assert found == "sha256:1a03dd39cf7fb2d402257c060a01a8d6428a082ee1b718e7f8ab44e9d9be9f6c"


def test_samples_that_cannot_be_used_are_skipped_and_counted(root: Path) -> None:
    broken = [("00041.jpg", b"no image"), ("00041.txt", b"it has a caption")]
    twice = [*sample(42), *sample(43), *sample(42, "the same key again")]
    shard = write_tar(root / "train" / "00003.tar", [("00040.jpg", jpeg(40)), *broken, *twice])
    skipped = Skipped("train captions")
    images = open_data_folder(root).split("train", skipped)
    assert (len(images), skipped.total) == (32, 34)
    assert [(sample.id, sample.reason) for sample in skipped.samples] == [
        (f"{shard}/00040", "it has no caption"),
        (f"{shard}/00042", "it has several jpg; a key ends at the first dot"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="00040: it has no caption"):
        open_data_folder(root).split("train")
    lines = log_lines()
    recipe = Recipe(max_bad_samples=0.1, feature_cache=str(root / ".features"))
    assert usable_images(open_data_folder(root), "train", recipe)[-1].original_id == "00043"
    assert any("skipped 1 of 32 train images" in line and "00041.jpg" in line for line in lines)
    with pytest.raises(DataError, match="2 of 34 train samples"):
        readable_split(open_data_folder(root), "train")


def test_a_tar_that_was_cut_off_gives_the_samples_before(root: Path) -> None:
    path = root / "train" / "00001.tar"
    with tarfile.open(path) as tar:
        os.truncate(path, tar.getmember("00015.jpg").offset_data + 10)
    skipped = Skipped("train captions")
    assert len(open_data_folder(root).split("train", skipped)) == 25
    assert "00015.jpg is not whole" in skipped.samples[0].reason
    assert skipped.samples[0].id == str(path)


def test_a_tar_cut_off_after_it_was_indexed_is_an_error_for_each_sample(root: Path) -> None:
    images = paths_of(open_data_folder(root).split("train"))
    path = root / "train" / "00001.tar"
    os.truncate(path, images[13].offset + 10)
    assert list(check_images(images)) == list(range(13, 20))
    with pytest.raises(ImageError, match=r"00001.tar/00013.jpg: its shard became shorter") as error:
        open_image(images[13])
    assert "\n" not in str(error.value)
    path.unlink()
    for read in (open_image, check_image, image_size):
        with pytest.raises(ImageError, match="cannot be read"):
            read(images[12])
    with pytest.raises(DataError):
        images_digest(images, root / "nowhere")


def add(tar: tarfile.TarFile, name: bytes, content: bytes = b"", **changes: object) -> None:
    member = tarfile.TarInfo(os.fsdecode(name))
    member.size = len(content)
    for key, value in changes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def test_hostile_members_lead_nowhere(tmp_path: Path) -> None:
    members = [*sample(0), ("../../x.jpg", jpeg(1)), ("/x.jpg", jpeg(1))]
    with tarfile.open(write_tar(tmp_path / "train" / "0.tar", members), "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            add(tar, b"00007.jpg", type=kind, linkname="/etc/passwd")
        add(tar, b"\xff.jpg", jpeg(2))  # a name that is not UTF-8
        add(tar, b"\xff.txt", b"text")
    skipped = Skipped("train")
    images = open_data_folder(tmp_path).split("train", skipped)
    assert [image.original_id for image in images] == ["00000", "\\xff"]
    assert images[1].captions == ("text",)
    assert {sample.reason for sample in skipped.samples} == {
        "its name leads out of the shard", "a link, device or sparse file",
    }  # fmt: skip
    for number, size in enumerate((2**40, -512), 1):
        lying = tarfile.TarInfo("00009.jpg")
        lying.size = size
        header = lying.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "train" / f"{number}.tar").write_bytes(header + bytes(2048))
    (tmp_path / "train" / "3.tar").write_bytes(b"no tar at all")
    skipped = Skipped("train")
    assert len(open_data_folder(tmp_path).split("train", skipped)) == 2
    assert sum("cut off" in sample.reason for sample in skipped.samples) == 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train/0.tar.gz": b"\x1f\x8b"}, "compressed: run gunzip"),
        ({"0.tar": b""}, "move or link them into"),
        ({"train/readme.txt": b""}, "is no caption folder .* and no shard folder"),
        ({"manifest.json": b"{", "train/0.tar": b""}, "manifest.json is damaged"),
    ],
)
def test_other_folders_are_refused_in_a_line(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        open_data_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_predictions_find_their_images_again(root: Path) -> None:
    image = open_data_folder(root).split("val")[2]
    made = Prediction(image, "a caption", -1.0, None, {"CIDEr": 0.5})
    record = json.loads(json.dumps(made.to_record()))
    assert Prediction.from_record(record) == made

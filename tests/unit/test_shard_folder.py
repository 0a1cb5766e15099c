"""Shards as training data: indexed once, read by place, in windows; damage is told and hostile tars lead nowhere."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from logs import log_lines
from shards import jpeg, sample, write_shard_folder, write_tar
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.data_pipeline import shards as shard_folder
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage, CaptionFolder
from vlm_bridge.data_pipeline.data_folder import open_data_folder, readable_split
from vlm_bridge.data_pipeline.features import images_digest
from vlm_bridge.data_pipeline.image_check import check_images, usable_images
from vlm_bridge.data_pipeline.images import check_image, image_size, open_image
from vlm_bridge.data_pipeline.loader import EpochPlan, TokenBudget
from vlm_bridge.data_pipeline.samples import Skipped, TarImage
from vlm_bridge.data_pipeline.shards import SAMPLE, ShardFolder, known_index
from vlm_bridge.errors import ConfigurationError, DataError, ImageError
from vlm_bridge.evaluation.predictions import Prediction
from vlm_bridge.training_strategy.data import epoch_plan


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_shard_folder(tmp_path / "data")


@pytest.fixture
def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The tars whose headers were read."""
    passes: list[Path] = []
    index = shard_folder.index_shard
    monkeypatch.setattr(
        shard_folder, "index_shard", lambda path: passes.append(path) or index(path)
    )
    return passes


def test_samples_are_read_from_where_they_lie(root: Path) -> None:
    before = {path for path in root.rglob("*") if path.suffix == ".tar"}
    folder = open_data_folder(root)
    assert folder.splits == ["train", "val"]
    images = folder.split("train")
    assert len(images) == 30
    assert [image.captions for image in images] == [(f"picture number {n}",) for n in range(30)]
    assert images[12].original_id == "00012"
    assert str(images[12].path) == f"{root}/train/00001.tar/00012.jpg"
    assert images[12].path.name == "00012.jpg"
    assert images.path(12).read_bytes() == jpeg(12)
    assert open_image(images[12].path).size == image_size(images[12].path) == (24, 24)
    assert [image.original_id for image in images[3:5]] == ["00003", "00004"]
    assert [path.name for path in images.paths[28:]] == ["00028.jpg", "00029.jpg"]
    assert images.shards.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert images.take(np.array([25, 1])).shards.tolist() == [2, 0]
    assert {
        path for path in root.rglob("*") if path.is_file() and path.suffix != ".index"
    } == before


def test_captions_in_json_png_pictures_and_folders(tmp_path: Path) -> None:
    members = [
        ("./part.1/a.png", jpeg(1)), ("./part.1/a.json", json.dumps({"caption": "in json"}).encode()),
        ("b.webp", jpeg(2)), ("b.txt", b" "), ("b.json", b'{"caption": "json, for the text is empty"}'),
        ("c.JPG", jpeg(3)), ("c.txt", b"text wins\n"), ("c.json", b'{"caption": "not this"}'),
    ]  # fmt: skip
    write_tar(tmp_path / "train" / "0.tar", members)
    images = open_data_folder(tmp_path).split("train")
    assert [image.captions[0] for image in images] == [
        "in json",
        "json, for the text is empty",
        "text wins",
    ]
    assert [image.original_id for image in images] == ["part.1/a", "b", "c"]


def read_all(root: Path, members: list[tuple[str, bytes]]) -> tuple[dict[str, str], dict[str, str]]:
    """The captions and the losses of a shard by key."""
    bad = Skipped("samples")
    write_tar(root / "train" / "0.tar", members)
    images = open_data_folder(root).split("train", bad)
    return (
        {image.original_id: image.captions[0] for image in images},
        {sample.where.rpartition("/")[2]: sample.reason for sample in bad.samples},
    )


def test_the_rest_of_a_name_is_its_extension(tmp_path: Path) -> None:
    members = [
        ("a.input.jpg", jpeg(1)), ("a.output.txt", b"of a"),
        ("b.jpg", jpeg(2)), ("b.mask.png", jpeg(3)), ("b.en.txt", b"not this"), ("b.txt", b"of b"),
        ("c.input.jpg", jpeg(4)), ("c.meta.json", b'{"caption": "of c"}'),
    ]  # fmt: skip
    assert read_all(tmp_path, members) == ({"a": "of a", "b": "of b", "c": "of c"}, {})


def test_samples_that_dots_make_one_are_named(tmp_path: Path) -> None:
    members = [
        (f"my photo v1.{n}.{kind}", content)
        for n in range(5)
        for kind, content in (("jpg", jpeg(n)), ("txt", b"x"))
    ]
    captions, losses = read_all(tmp_path, members)
    assert captions == {} and list(losses) == ["my photo v1"]
    assert "several images (my photo v1.0.jpg, my photo v1.1.jpg" in losses["my photo v1"]
    assert "first dot" in losses["my photo v1"]


def test_members_that_stand_apart_are_named_with_the_cure(tmp_path: Path) -> None:
    images = [(f"{n}.jpg", jpeg(n)) for n in range(3)]
    texts = [(f"{n}.txt", b"x") for n in range(2)]
    captions, losses = read_all(tmp_path, [*images, *texts])
    assert captions == {}
    assert "sort the tar by name" in losses["0"] and losses["0"] == losses["1"]
    assert losses["2"] == "it has no caption"


def test_an_index_is_kept_and_renewed_where_a_tar_changes(
    root: Path, count_passes: list[Path]
) -> None:
    fingerprint = open_data_folder(root).fingerprint
    assert len(count_passes) == 4
    count_passes.clear()
    assert open_data_folder(root).fingerprint == fingerprint
    assert count_passes == []
    os.utime(root / "train" / "00002.tar", ns=(1, 1))  # a copy elsewhere is the same data
    assert open_data_folder(root).fingerprint == fingerprint
    assert count_passes == [root / "train" / "00002.tar"]
    write_tar(root / "train" / "00001.tar", [*sample(70), *sample(71)])
    changed = open_data_folder(root)
    assert len(changed.split("train")) == 22
    assert changed.fingerprint != fingerprint
    assert changed.compute_fingerprint() == changed.fingerprint


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "places"])
def test_a_damaged_index_is_made_again(root: Path, damage: str, count_passes: list[Path]) -> None:
    fingerprint = open_data_folder(root).fingerprint
    kept = root / ".shards" / "train" / "00000.tar.index"
    content = kept.read_bytes()
    if damage == "places":  # whole, but it leads out of the tar
        header, _, body = content.partition(b"\n")
        samples = np.frombuffer(body[: 10 * SAMPLE.itemsize], SAMPLE).copy()
        samples["picture"][3] = 2**62
        body = samples.tobytes() + body[10 * SAMPLE.itemsize :]
        facts = json.loads(header) | {"checksum": shard_folder._checksum(body)}
        kept.write_bytes(json.dumps(facts).encode() + b"\n" + body)
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        kept.write_bytes({"cut": content[:-5], "flip": flipped, "empty": b""}[damage])
    count_passes.clear()
    assert open_data_folder(root).fingerprint == fingerprint
    assert count_passes == [root / "train" / "00000.tar"]
    assert kept.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_read_all_the_same(
    root: Path, count_passes: list[Path]
) -> None:
    (root / ".shards").write_text(
        "a file, where nothing can be kept"
    )  # permissions do not stop root
    for passes in (4, 8):
        folder = open_data_folder(root)
        assert folder.manifest["counts"]["train"]["images"] == 30
        assert len(count_passes) == passes


def test_memory_is_tens_of_bytes_a_sample(root: Path) -> None:
    index = known_index(root / "train" / "00000.tar", root / "index")
    assert SAMPLE.itemsize == 29
    assert index.samples.nbytes + len(index.names) == 10 * (29 + len("00000.jpg"))


def test_bad_samples_are_set_aside_and_counted(root: Path) -> None:
    broken = [("00041.jpg", b"no picture"), ("00041.txt", b"it has a caption")]
    twice = [*sample(42), *sample(43), *sample(42, "the same key again")]
    write_tar(root / "train" / "00003.tar", [("00040.jpg", jpeg(40)), *broken, *twice])
    bad = Skipped("train captions")
    images = open_data_folder(root).split("train", bad)
    assert (len(images), bad.total) == (33, 35)
    shard = root / "train" / "00003.tar"
    assert [(sample.where, sample.reason) for sample in bad.samples] == [
        (f"{shard}/00042", "a sample with this key came before in this shard"),
        (f"{shard}/00040", "it has no caption"),
    ]
    with pytest.raises(DataError, match="00042: a sample with this key came before"):
        open_data_folder(root).split("train")
    lines = log_lines()
    used = usable_images(open_data_folder(root), "train", max_bad_share=0.1)
    assert [image.original_id for image in used][-2:] == ["00042", "00043"]
    assert any("skipped 1 of 33 train images" in line and "00041.jpg" in line for line in lines)
    with pytest.raises(
        DataError, match="2 of 35 train captions cannot be used, more than max_bad_samples"
    ):
        usable_images(open_data_folder(root), "train", max_bad_share=0.01)
    with pytest.raises(DataError, match="2 of 35 train samples"):
        readable_split(open_data_folder(root), "train")


def test_a_tar_that_was_cut_off_gives_what_stands_before(root: Path) -> None:
    path = root / "train" / "00001.tar"
    with tarfile.open(path) as tar:
        middle = tar.getmember("00015.jpg").offset_data + 10
    os.truncate(path, middle)
    bad = Skipped("train captions")
    images = open_data_folder(root).split("train", bad)
    assert len(images) == 25
    assert "in the middle of 00015.jpg" in bad.samples[0].reason
    assert bad.samples[0].where == str(path)


def test_a_tar_cut_off_between_index_and_read_is_an_error_for_each_sample(root: Path) -> None:
    images = open_data_folder(root).split("train")
    pictures = list(images.paths)
    path = root / "train" / "00001.tar"
    os.truncate(path, pictures[13].offset + 10)
    assert list(check_images(pictures)) == list(range(13, 20))
    with pytest.raises(ImageError, match=r"00001.tar/00013.jpg: its shard became shorter") as error:
        open_image(pictures[13])
    assert "\n" not in str(error.value)
    assert not pictures[13].is_file() and pictures[12].is_file()
    with pytest.raises(DataError, match="was changed after it was indexed"):
        images[13]
    path.unlink()
    for read in (open_image, check_image, image_size):
        with pytest.raises(ImageError, match="cannot be read"):
            read(pictures[12])
    with pytest.raises(DataError):
        images_digest(pictures, root / "nowhere")


def test_hostile_members_lead_nowhere(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "train" / "0.tar", [*sample(0), ("../../x.jpg", jpeg(1)), ("/x.jpg", jpeg(1))]
    )
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            link = tarfile.TarInfo("00007.jpg")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
        content = jpeg(2)
        odd = tarfile.TarInfo(os.fsdecode(b"\xff.jpg"))  # whose name is not UTF-8
        odd.size = len(content)
        tar.addfile(odd, io.BytesIO(content))
        text = tarfile.TarInfo(os.fsdecode(b"\xff.txt"))
        text.size = 4
        tar.addfile(text, io.BytesIO(b"text"))
    bad = Skipped("train")
    images = open_data_folder(tmp_path).split("train", bad)
    assert [image.original_id for image in images] == ["00000", "\\xff"]
    assert images[1].captions == ("text",)
    assert {sample.reason for sample in bad.samples} == {
        "its name leads out of the shard", "a link, device or sparse file",
    }  # fmt: skip
    lying = tarfile.TarInfo("00009.jpg")
    lying.size = 2**40
    (tmp_path / "train" / "1.tar").write_bytes(lying.tobuf() + bytes(2048))
    (tmp_path / "train" / "2.tar").write_bytes(b"no tar at all")
    bad = Skipped("train")
    assert len(open_data_folder(tmp_path).split("train", bad)) == 2
    assert [sample.reason for sample in bad.samples if "cut off" in sample.reason].__len__() == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train/0.tar.gz": b"\x1f\x8b"}, "gunzip"),
        ({"train/0.tgz": b"\x1f\x8b"}, "gunzip"),
        ({"train/0.tar.zst": b""}, "unzstd"),
        ({"0.tar": b""}, "move or link them into"),
        ({"train/readme.txt": b""}, "is not a caption folder .* and not a shard folder"),
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


def test_a_compressed_shard_beside_the_plain_one_does_no_harm(root: Path) -> None:
    (root / "val" / "00000.tar.gz").write_bytes(b"x")
    assert len(open_data_folder(root).split("val")) == 4


def test_a_split_without_shards(root: Path) -> None:
    with pytest.raises(DataError, match=r"has no test shards \(it has: train, val\)"):
        open_data_folder(root).split("test")


def test_a_caption_folder_is_still_one(drawn_caption_folder: Path) -> None:
    folder = open_data_folder(drawn_caption_folder)
    assert isinstance(folder, CaptionFolder) and not isinstance(folder, ShardFolder)
    images, bad = readable_split(folder, "val")
    assert (len(images), len(bad)) == (8, 0)
    assert images.shards.tolist() == [0] * 8


def test_the_content_hash_is_that_of_the_same_files(root: Path, tmp_path: Path) -> None:
    images = open_data_folder(root).split("val")
    copies = []
    for picture in images.paths:
        copies.append(tmp_path / picture.name)
        copies[-1].write_bytes(picture.read_bytes())
    assert images_digest(images.paths, tmp_path / "a") == images_digest(copies, tmp_path / "b")


def test_predictions_find_their_pictures_again(root: Path) -> None:
    image = open_data_folder(root).split("val")[2]
    made = Prediction(image, "a caption", -1.0, None, {"CIDEr": 0.5})
    record = json.loads(json.dumps(made.to_record()))
    assert Prediction.from_record(record) == made
    record["tar"]["offset"] = -1
    with pytest.raises(ValueError):
        Prediction.from_record(record)
    assert isinstance(image, CaptionedImage) and isinstance(image.path, TarImage)


# The order of an epoch.

SHARDS = np.repeat(np.arange(7), [30, 1, 20, 0, 49, 60, 40])


def plan(
    buffer: int, *, seed: int = 0, budget: int | None = None, shards: np.ndarray | None = SHARDS
) -> EpochPlan:
    counts = np.random.default_rng(5).integers(1, 5, len(SHARDS))
    chosen = (
        TokenBudget(budget, np.random.default_rng(6).integers(3, 20, counts.sum()))
        if budget
        else None
    )
    return EpochPlan(
        counts,
        row_captions=2,
        batch_captions=8,
        seed=seed,
        budget=chosen,
        shuffle_buffer=buffer,
        shards=shards,
    )


def images_in_order(plan: EpochPlan, epoch: int) -> list[int]:
    """Each image where it is first read."""
    return list(dict.fromkeys(row.image for batch in plan.batches(epoch) for row in batch))


@pytest.mark.parametrize("buffer", [0, 1, 16, 1000])
@pytest.mark.parametrize("budget", [None, 90])
def test_every_caption_comes_once_and_the_order_is_a_function_of_seed_and_epoch(
    buffer: int, budget: int | None
) -> None:
    one, again = plan(buffer, budget=budget), plan(buffer, budget=budget)
    counts = np.random.default_rng(5).integers(1, 5, len(SHARDS))
    for epoch in (1, 0):
        batches = list(one.batches(epoch))
        assert batches == list(again.batches(epoch))
        read = sorted(
            (row.image, caption) for batch in batches for row in batch for caption in row.captions
        )
        assert read == [
            (image, caption) for image, count in enumerate(counts) for caption in range(count)
        ]
    assert list(one.batches(0)) != list(one.batches(1))
    assert list(one.batches(0)) != list(plan(buffer, seed=1, budget=budget).batches(0))


@pytest.mark.parametrize("budget", [None, 90])
@pytest.mark.parametrize("shards", [SHARDS, None])
def test_images_stay_within_windows_of_the_stream(
    shards: np.ndarray | None, budget: int | None
) -> None:
    buffer = 16
    of_image = SHARDS if shards is not None else np.zeros_like(SHARDS)
    orders = set()
    for epoch in range(4):
        order = images_in_order(plan(buffer, budget=budget, shards=shards), epoch)
        # Shards follow one another in some order: recovered from where most of each is read.
        turn = sorted(
            set(of_image.tolist()), key=lambda s: np.mean(np.flatnonzero(of_image[order] == s))
        )
        stream = [image for shard in turn for image in np.flatnonzero(of_image == shard).tolist()]
        place = {image: number for number, image in enumerate(stream)}
        distances = [abs(place[image] - number) for number, image in enumerate(order)]
        assert 0 < max(distances) < buffer
        orders.add(tuple(turn))
    assert len(orders) > 1 or shards is None


def test_a_large_buffer_shuffles_across_shards_and_none_is_todays_order() -> None:
    order = images_in_order(plan(1000), 0)
    assert len(np.flatnonzero(np.diff(SHARDS[order]))) > 50
    counts = np.random.default_rng(5).integers(1, 5, len(SHARDS))
    before = EpochPlan(counts, row_captions=2, batch_captions=8, seed=0)
    assert list(before.batches(3)) == list(plan(0).batches(3))


def test_the_recipe_key_is_read() -> None:
    recipe = override_recipe(Recipe(), ["shuffle_buffer=16", "captions_per_image=1"])
    counts = np.ones(len(SHARDS), np.int64)
    windows = epoch_plan(recipe, counts, None, SHARDS)
    assert list(windows.batches(0)) != list(epoch_plan(Recipe(), counts, None, SHARDS).batches(0))
    sampled = override_recipe(recipe, ["objective=scst", "batch_size=10", "start_from=x"])
    assert epoch_plan(sampled, counts, None, SHARDS).shuffle_buffer == 16
    with pytest.raises(ConfigurationError, match="shuffle_buffer"):
        override_recipe(Recipe(), ["shuffle_buffer=-1"])

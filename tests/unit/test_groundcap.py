"""GroundCap from parquet files: rows become images, and images are read when their turn comes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from groundcap import frame, make_row, write_groundcap, write_rows
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.explore import describe_items
from vlm_bridge.data_pipeline.sources import iter_images
from vlm_bridge.data_pipeline.sources.groundcap import GroundCap
from vlm_bridge.data_pipeline.splits import SPLITS
from vlm_bridge.data_pipeline.transform import preview, transform
from vlm_bridge.errors import DataError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 rows of training and 60 of test, 12 films, row groups of 50."""
    return write_groundcap(tmp_path_factory.mktemp("groundcap"), train=240, test=60, films=12)


def test_rows_become_images_with_clean_captions(dataset: Path) -> None:
    items = GroundCap(dataset).items()
    assert len(items) == 300 and len({item.image_id for item in items}) == 300
    assert {item.split for item in items} == {None}
    assert {item.film for item in items} == {f"tt{1000000 + film}" for film in range(12)}
    captions = {item.image_id: item.captions for item in items}
    assert captions["tt1000000_000000"] == ["The person walks on the road, in frame 0 & alone."]
    tagged = {item.image_id: item.captions for item in GroundCap(dataset, keep_tags=True).items()}
    assert tagged["tt1000000_000000"] == [make_row(0, 12)["caption"]]
    some = items[::7]
    frames = [frame(int(item.image_id.split("_")[1])) for item in some]
    assert list(iter_images(some)) == frames


def test_films_stay_together_and_parts_are_as_near_as_they_allow(
    dataset: Path, tmp_path: Path
) -> None:
    manifest = transform(GroundCap(dataset), tmp_path / "out")
    folder = CaptionFolder.open(tmp_path / "out")
    images = {split: folder.split(split) for split in SPLITS}
    films = {s: {image.original_id.split("_")[0] for image in images[s]} for s in SPLITS}
    assert sum(map(len, films.values())) == len(set().union(*films.values())) == 12
    # 12 films of 25 frames: 45 and 15 of 300 are nearest to two films and one.
    assert {split: counts["images"] for split, counts in manifest["counts"].items()} == {
        "train": 225, "val": 25, "test": 50,
    }  # fmt: skip
    assert manifest["settings"]["split_by"] == "film"
    assert manifest["split_rule"].startswith("whole films")
    assert "CC-BY-4.0" in manifest["licence_note"]


def test_by_image_counts_are_exact_also_by_default_where_ids_name_no_film(
    dataset: Path, tmp_path: Path
) -> None:
    captions, rule = preview(GroundCap(dataset), split_by="image")
    assert [len(captions[split]) for split in ("train", "val", "test")] == [240, 15, 45]
    nameless = write_groundcap(tmp_path / "nameless", train=80, test=20, films=0)
    captions, rule = preview(GroundCap(nameless))
    assert rule.by == "image" and [len(of_split) for of_split in captions.values()] == [80, 5, 15]


def test_the_official_test_part_stays_and_validation_comes_out_of_training(dataset: Path) -> None:
    official = GroundCap(dataset, official_split=True)
    assert [item.split for item in official.items()].count("test") == 60
    captions, rule = preview(official, split_by="image")
    assert [len(of_split) for of_split in captions.values()] == [228, 12, 60]
    assert rule.test_fraction == 0


def test_rows_of_one_id_are_one_image(tmp_path: Path) -> None:
    rows = [make_row(index) for index in range(4)]
    rows[2] = rows[0] | {"caption": "Another caption."}
    write_rows(tmp_path / "train-00000-of-00001.parquet", rows[:2])
    write_rows(tmp_path / "test-00000-of-00001.parquet", rows[2:])
    items = {item.image_id: item for item in GroundCap(tmp_path).items()}
    assert len(items) == 3 and len(items[rows[0]["id"]].captions) == 2
    source = GroundCap(tmp_path, official_split=True)
    item = {item.image_id: item for item in source.items()}[rows[0]["id"]]
    assert item.split == "test" and item.captions[0] == "Another caption."


def test_broken_rows_are_skipped(tmp_path: Path) -> None:
    rows = [make_row(index, films=0) for index in range(40)]
    rows[1]["image"] = None
    rows[2]["image"] = {"bytes": None, "path": "elsewhere.jpg"}
    rows[3]["image"] = {"bytes": b"", "path": None}
    rows[4]["image"] = {"bytes": frame(4)[:200], "path": None}
    rows[5]["caption"] = None
    rows[6]["id"] = None
    rows[7]["caption"] = '<gdo class="person" person-0></gdo>'
    write_rows(tmp_path / "train-00000-of-00001.parquet", rows)
    manifest = transform(GroundCap(tmp_path), tmp_path / "out")
    skipped = {entry["id"]: entry["reason"] for entry in manifest["rejected"]}
    assert skipped.pop("train-00000-of-00001.parquet row 6") == "it has no id"
    assert set(skipped) == {f"frame_00000{n}" for n in (1, 2, 3, 4, 5, 7)}
    assert skipped["frame_000005"] == "1 of 1 captions without words, or too long"
    assert sum(counts["images"] for counts in manifest["counts"].values()) == 33


def test_statistics_count_words_without_tags(dataset: Path) -> None:
    source = GroundCap(dataset, keep_tags=True)
    statistics = describe_items(source.items(), count_tokens=lambda texts: list(map(len, texts)))
    assert statistics["films"] == 12 and statistics["images_per_film"]["max"] == 25
    assert statistics["words_per_caption"]["max"] == 10
    assert statistics["tokens_per_caption"]["min"] >= 40


def test_a_file_or_folders_named_by_part_are_read_too(dataset: Path, tmp_path: Path) -> None:
    file = next(dataset.rglob("test-*.parquet"))
    assert len(GroundCap(file).items()) == 60
    (tmp_path / "default" / "test").mkdir(parents=True)
    (tmp_path / "default" / "test" / "0000.parquet").write_bytes(file.read_bytes())
    items = GroundCap(tmp_path, official_split=True).items()
    assert {item.split for item in items} == {"test"}


def test_other_files_are_named(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no parquet file in .*--source local"):
        GroundCap(tmp_path).items()
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(DataError, match=r"text\.parquet is damaged or no parquet file"):
        GroundCap(tmp_path).items()
    for columns in ("id text", "id caption image"):
        pq.write_table(pa.table({c: ["a"] for c in columns.split()}), tmp_path / "other.parquet")
        with pytest.raises(DataError, match="it needs columns id, caption and image"):
            GroundCap(tmp_path / "other.parquet").items()
    train = next(dataset.rglob("train-*.parquet"))
    with pytest.raises(DataError, match="no test part"):
        GroundCap(train, official_split=True).items()


def test_the_hub_is_asked_for_parquet_files_alone(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def snapshot_download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(dataset)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert len(GroundCap().items()) == 300
    assert asked == {
        "name": "daniel3303/GroundCap", "repo_type": "dataset", "allow_patterns": "data/*.parquet",
    }  # fmt: skip

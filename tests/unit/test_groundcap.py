"""GroundCap from parquet files: rows become images, and pictures are read when their turn comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from groundcap import frame, make_row, write_groundcap, write_rows
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.explore import describe_items
from vlm_bridge.data_pipeline.parquet import read_pictures
from vlm_bridge.data_pipeline.sources import make_source
from vlm_bridge.data_pipeline.sources.groundcap import GroundCap
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
    assert captions["tt1000000_000000"] == ["The man walks on the road, in frame 0 & alone."]
    tagged = {item.image_id: item.captions for item in GroundCap(dataset, keep_tags=True).items()}
    assert tagged["tt1000000_000000"] == [make_row(0, 12)["caption"]]


def test_pictures_are_those_of_their_rows(dataset: Path) -> None:
    items = GroundCap(dataset).items()
    some = [item for number, item in enumerate(items) if number % 7 == 0]
    contents = list(read_pictures(item.stored for item in some if item.stored))
    assert contents == [frame(int(item.image_id.split("_")[1])) for item in some]


def test_films_stay_together_and_parts_are_as_near_as_they_allow(
    dataset: Path, tmp_path: Path
) -> None:
    manifest = transform(GroundCap(dataset), tmp_path / "out")
    folder = CaptionFolder.open(tmp_path / "out")
    films = {
        split: {image.original_id.split("_")[0] for image in folder.split(split)}  # type: ignore[arg-type]
        for split in folder.splits
    }
    assert sum(map(len, films.values())) == len(set().union(*films.values())) == 12
    # 12 films of 25 frames: 45 and 15 of 300 are nearest to two films and one.
    assert {split: counts["images"] for split, counts in manifest["counts"].items()} == {
        "train": 225, "val": 25, "test": 50,
    }  # fmt: skip
    assert manifest["settings"]["split_by"] == "film"
    assert (
        manifest["split_rule"].startswith("whole films") and "CC-BY-4.0" in manifest["licence_note"]
    )


def test_by_image_counts_are_exact_also_by_default_where_ids_name_no_film(
    dataset: Path, tmp_path: Path
) -> None:
    captions, rule = preview(GroundCap(dataset), split_by="image")
    assert [len(captions[split]) for split in ("train", "val", "test")] == [240, 15, 45]
    nameless = write_groundcap(tmp_path / "nameless", train=80, test=20, films=0)
    captions, rule = preview(GroundCap(nameless))
    assert rule.by == "image" and [len(of_split) for of_split in captions.values()] == [80, 5, 15]


def test_the_official_test_part_stays_and_validation_comes_out_of_training(dataset: Path) -> None:
    official = {
        item.image_id
        for item in GroundCap(dataset, official_split=True).items()
        if item.split == "test"
    }
    assert len(official) == 60
    captions, rule = preview(GroundCap(dataset, official_split=True), split_by="image")
    assert [len(of_split) for of_split in captions.values()] == [228, 12, 60]
    assert rule.test_fraction == 0


def test_rows_of_one_id_are_one_image(tmp_path: Path) -> None:
    rows = [make_row(index) for index in range(4)]
    rows[2] = rows[0] | {"caption": "Another caption."}
    (tmp_path / "all").mkdir()
    write_rows(tmp_path / "all" / "train-00000-of-00001.parquet", rows[:2])
    write_rows(tmp_path / "all" / "test-00000-of-00001.parquet", rows[2:])
    items = {item.image_id: item for item in GroundCap(tmp_path / "all").items()}
    assert len(items) == 3 and len(items[rows[0]["id"]].captions) == 2

    source = GroundCap(tmp_path / "all", official_split=True)
    items = {item.image_id: item for item in source.items()}
    assert items[rows[0]["id"]].split == "test" and items[rows[0]["id"]].captions == [
        "Another caption."
    ]
    assert [entry.reason for entry in source.rejected] == ["train: the same id as an image of test"]


def test_broken_rows_are_set_aside(tmp_path: Path) -> None:
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
    reasons = {entry["id"]: entry["reason"] for entry in manifest["rejected"]}
    assert {name.removeprefix("frame_00000"): reason for name, reason in reasons.items()} == {
        "train-00000-of-00001.parquet row 6": "it has no id",
        "5": "1 of 1 captions without words",
        "7": "1 of 1 captions without words",
        "1": "the source holds no picture for it",
        "2": "the source holds no picture for it",
        "3": "the file is empty",
        "4": reasons["frame_000004"],
    }
    assert any(word in reasons["frame_000004"].lower() for word in ("truncated", "damaged"))
    assert sum(counts["images"] for counts in manifest["counts"].values()) == 33


def test_statistics_count_words_without_tags_and_the_tags(dataset: Path) -> None:
    statistics = describe_items(
        GroundCap(dataset, keep_tags=True).items(),
        count_tokens=lambda texts: [len(text) for text in texts],
    )
    assert statistics["films"] == 12 and statistics["images_per_film"]["max"] == 25
    assert (
        statistics["words_per_caption"]["max"] == 10
        and statistics["tokens_per_caption"]["min"] >= 40
    )
    assert statistics["tags"]["kinds"]["gda"]["ids_per_tag"] == {1: 300}
    assert statistics["tags"]["kinds"]["gdo"]["classes"] == 3
    assert statistics["picture_width"] == {"min": 48, "median": 48, "p95": 48, "max": 48}


def test_facts_of_the_files(dataset: Path) -> None:
    facts = GroundCap(dataset).facts()
    assert facts["rows"] == {"test": 60, "train": 240} and facts["human_annotated_rows"] == 30
    assert list(facts["fields"]) == ["id", "image", "detections", "caption", "human_annotated"]
    assert facts["files"] == 3 and facts["bytes"] > 100_000


def test_a_file_or_folders_named_by_part_are_read_too(dataset: Path, tmp_path: Path) -> None:
    file = next(dataset.rglob("test-*.parquet"))
    assert len(GroundCap(file).items()) == 60
    (tmp_path / "default" / "test").mkdir(parents=True)
    (tmp_path / "default" / "test" / "0000.parquet").write_bytes(file.read_bytes())
    items = GroundCap(tmp_path, official_split=True).items()
    assert {item.split for item in items} == {"test"}


def test_what_is_not_groundcap_is_named(dataset: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(DataError, match=r"no such folder.*--input-dir"):
        make_source("groundcap", input_dir=tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no parquet file in .*--source local"):
        GroundCap(tmp_path / "empty").items()
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(DataError, match=r"text\.parquet is damaged or no parquet file"):
        GroundCap(tmp_path / "text.parquet").items()
    pq.write_table(pa.table({"id": ["a"], "text": ["b"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="no column caption"):
        GroundCap(tmp_path / "other.parquet").items()
    pq.write_table(
        pa.table({"id": ["a"], "caption": ["b"], "image": ["c"]}), tmp_path / "odd.parquet"
    )
    with pytest.raises(DataError, match="its column image is string"):
        GroundCap(tmp_path / "odd.parquet").items()
    train = next(dataset.rglob("train-*.parquet"))
    with pytest.raises(DataError, match="no test part"):
        GroundCap(train, official_split=True).items()


def test_a_file_cut_short_is_named(dataset: Path, tmp_path: Path) -> None:
    whole = next(dataset.rglob("test-*.parquet")).read_bytes()
    damaged = bytearray(whole)
    damaged[200:3000] = bytes(2800)
    (tmp_path / "test-0.parquet").write_bytes(damaged)
    with pytest.raises(DataError, match=r"test-0\.parquet is damaged"):
        source = GroundCap(tmp_path)
        list(read_pictures(item.stored for item in source.items() if item.stored))


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


def test_without_the_hub_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"cannot get daniel3303/GroundCap.*--source-path"
    ) as caught:
        GroundCap().items()
    assert "\n" not in str(caught.value)

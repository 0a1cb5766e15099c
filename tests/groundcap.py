"""A small GroundCap in the schema that the dataset publishes: parquet files of drawn film frames."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

BOX = pa.struct(dict.fromkeys("xywh", pa.float32()))
DETECTION = pa.struct({"id": pa.int32(), "label": pa.string(), "score": pa.float32(), "box": BOX})
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "detections": pa.list_(DETECTION),
        "caption": pa.string(),
        "human_annotated": pa.bool_(),
    }
)
LABELS = ("person", "dog", "car")


def write_groundcap(
    root: Path, *, train: int = 400, test: int = 100, films: int = 20, side: int = 48
) -> Path:
    """Write two files ``data/train-*.parquet`` and one ``data/test-*.parquet``; return ``root``.

    The frames of each film are spread over both parts, as in the published dataset. With
    ``films=0`` ids name none.
    """
    order = random.Random(0).sample(range(train + test), train + test)
    (root / "data").mkdir(parents=True)
    for part, start, end in (
        ("train-00000-of-00002", 0, train // 2),
        ("train-00001-of-00002", train // 2, train),
        ("test-00000-of-00001", train, train + test),
    ):
        rows = [make_row(index, films, side) for index in order[start:end]]
        write_rows(root / "data" / f"{part}.parquet", rows)
    return root


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a parquet file with the dataset's schema, 50 rows a group."""
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, row_group_size=50)


def make_row(index: int, films: int = 20, side: int = 48) -> dict[str, Any]:
    """Return a row: a frame whose colors are its own, and a caption with every kind of tag."""
    label = LABELS[index % len(LABELS)]
    name = f"tt{1000000 + index % films}_{index:06d}" if films else f"frame_{index:06d}"
    box = {"x": 1.0, "y": 2.0, "w": 20.0, "h": 10.0}
    return {
        "id": name,
        "image": {"bytes": frame(index, side), "path": f"{name}.jpg"},
        "detections": [{"id": 0, "label": label, "score": 0.9, "box": box}],
        "caption": f'<gdo class="{label}" {label}-0>The {label}</gdo> '
        f'<gda class="walk" {label}-0>walks</gda> '
        f'<gdl class="road" road-0>on the road</gdl>, in frame {index} &amp; alone.',
        "human_annotated": index % 10 == 0,
    }


def frame(index: int, side: int = 48) -> bytes:
    """Return a JPEG of four colored fields, different for every index."""
    field = Image.frombytes("RGB", (2, 2), random.Random(index).randbytes(12))
    buffer = io.BytesIO()
    field.resize((side, side * 2 // 3), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()

"""Processes with a limit on time and memory: what one task does is that task's alone."""

from __future__ import annotations

import io
import os
import sys
import time

import pytest

from demo_server import noise, png
from vlm_bridge.data_pipeline import isolated
from vlm_bridge.data_pipeline.isolated import ImageReader, IsolatedPool
from vlm_bridge.errors import ImageError


def misbehave(task: str) -> str:
    if task == "sleep":
        time.sleep(600)
    if task == "eat":
        return str(len(bytes(8 << 30)))
    if task == "die":
        os._exit(9)
    return task.upper()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux counts it")
def test_a_task_that_takes_too_much_costs_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "SECONDS_AN_IMAGE", 0.5)
    pool: IsolatedPool[str, str] = IsolatedPool(misbehave, 2)
    try:
        pool.result(pool.submit(["warm up"] * 20), ["warm up"] * 20, lambda task, reason: reason)
        tasks = ["a", "sleep", "b", "die", "eat", "c"]
        results = pool.result(pool.submit(tasks), tasks, lambda task, reason: f"{task}: {reason}")
    finally:
        pool.close()
    assert [results[0], results[2], results[5]] == ["A", "B", "C"]
    assert results[1] == "sleep: it takes more than 0 s to read"
    assert "ended its process" in results[3]
    assert "2 GiB of memory" in results[4]


def test_images_are_read_apart_as_here() -> None:
    from vlm_bridge.data_pipeline.images import decode_image

    image = noise(3)
    with ImageReader() as reader:
        assert reader.open_image(png(image)).tobytes() == decode_image(png(image)).image.tobytes()
        with pytest.raises(ImageError, match="no image"):
            reader.open_image(b"words")
        buffer = io.BytesIO()
        image.save(buffer, "GIF")
        assert reader.open_image(buffer.getvalue()).size == image.size

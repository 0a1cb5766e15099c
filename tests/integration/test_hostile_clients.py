"""A server process under many clients, some hostile: the others get their own answers, and memory stays flat."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the demo page needs gradio: pip install 'vlm-bridge[demo]'")

import httpx

from demo_server import noise, png

NUM_CLIENTS, REQUESTS_PER_CLIENT = 20, 10
MORE_MEMORY_MB = 100
"""What buffers and the arenas of threads may add; a picture of each request that stayed would be more."""


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a hundred bytes."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


HOSTILE = [
    {"files": {"image": ("bomb.png", bomb())}},
    {"files": {"image": ("cut.png", png(noise(0, (300, 200)))[:5000])}},
    {"files": {"image": ("empty.jpg", b"")}},
    {"files": {"image": ("../../x.jpg", b"<svg onload=alert(1)>" * 99)}},
    {"files": {"image": ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")}},
    {"files": {"image": ("a.png", png(noise(0)))}, "data": {"num_beams": "9" * 5000}},
    {"files": {"image": ("a.png", png(noise(0)))}, "data": {"temperature": "nan"}},
    {"files": {f"picture{n}": ("a.png", b"x") for n in range(30)}},
    {"content": b"--x\r\nContent-Disposition: form-data; name=\"image\"", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},  # noqa: E501
    {"content": b"\0" * 100_000, "headers": {"Content-Type": "multipart/form-data; boundary=" + "y" * 5000}},
]  # fmt: skip


@pytest.fixture
def server(tiny_vit_dir: Path, tiny_llama_dir: Path) -> Iterator[tuple[str, int]]:
    """Address and process id."""
    tests = Path(__file__).parent.parent
    paths = os.pathsep.join([str(tests), *filter(None, sys.path)])
    command = [sys.executable, tests / "demo_server.py", tiny_vit_dir, tiny_llama_dir]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        yield (
            next(match[0] for line in lines if (match := re.search(r"http://[\d.:]+", line))),
            process.pid,
        )
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def memory_mb(process_id: int) -> int:
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024  # type: ignore[index]


@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_a_tenth_of_200_requests_is_hostile_and_nobody_else_notices(
    server: tuple[str, int],
) -> None:
    address, process_id = server
    uploads = [png(noise(client)) for client in range(NUM_CLIENTS)]

    def caption(upload: bytes) -> tuple[str, float]:
        files = {"image": ("photo.png", upload)}
        response = httpx.post(
            f"{address}/api/caption", files=files, data={"num_beams": "2"}, timeout=300
        )
        assert response.status_code == 200, response.text
        answer = response.json()
        return answer["caption"], answer["alternatives"][0]["score"]

    def attack(number: int) -> int:
        request = {"timeout": 300, **HOSTILE[number % len(HOSTILE)]}
        response = httpx.post(f"{address}/api/caption", **request)
        assert "Traceback" not in response.text
        return response.status_code

    def client(number: int) -> tuple[list[tuple[str, float]], int]:
        attack_at = number % REQUESTS_PER_CLIENT
        answers, refusal = [], 0
        for turn in range(REQUESTS_PER_CLIENT):
            if turn == attack_at:
                refusal = attack(number)
            else:
                answers.append(caption(uploads[number]))
        return answers, refusal

    alone = [caption(upload) for upload in uploads]
    assert len({score for _, score in alone}) == NUM_CLIENTS, (
        "the pictures can be told apart by their scores"
    )
    for number in range(len(HOSTILE)):
        attack(number)
    before = memory_mb(process_id)
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        results = list(pool.map(client, range(NUM_CLIENTS)))
    after = memory_mb(process_id)
    for number, (answers, refusal) in enumerate(results):
        text, score = alone[number]
        assert [answer for answer, _ in answers] == [text] * (REQUESTS_PER_CLIENT - 1)
        assert [s for _, s in answers] == pytest.approx(
            [score] * (REQUESTS_PER_CLIENT - 1), abs=1e-5
        )
        assert refusal in (400, 411, 413, 415, 422), (number, refusal)
    print(f"{NUM_CLIENTS * REQUESTS_PER_CLIENT} requests: {before} MB before, {after} MB after")
    assert after - before < MORE_MEMORY_MB

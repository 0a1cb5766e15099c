"""Requests that the demo's own page would never send, raw: no file of the machine is read, no other page is served."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio", reason="the demo page needs gradio: pip install 'vlm-bridge[demo]'")

import httpx

from demo_server import noise, png, served, tiny_service
from vlm_bridge.demo import guard
from vlm_bridge.demo.service import MAX_UPLOAD, CaptionService

SETTINGS = [2, 0, 1, 6, 1]
"""Of the page's sliders."""


@pytest.fixture(scope="module")
def service(tiny_vit_dir: Path, tiny_llama_dir: Path) -> CaptionService:
    return tiny_service(tiny_vit_dir, tiny_llama_dir)


@pytest.fixture(scope="module", params=["127.0.0.1", "0.0.0.0"])
def address(request: pytest.FixtureRequest, service: CaptionService) -> Iterator[str]:
    with served(service, host=request.param, examples=[("noise", noise(99))]) as address:
        yield address.replace("0.0.0.0", "127.0.0.1")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """An image of the machine that nobody uploaded."""
    path = tmp_path / "secret.png"
    path.write_bytes(png(noise(7)))
    return path


def file_value(path: object, **more: Any) -> dict[str, Any]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, **more}


def asked(address: str, function: int, data: list[Any]) -> str:
    """What the queue answers to a call of one of the page's functions, all of it."""
    session = f"s{time.monotonic_ns()}"
    call = {"data": data, "fn_index": function, "session_hash": session, "trigger_id": 1}
    joined = httpx.post(f"{address}/gradio_api/queue/join", json=call, timeout=60)
    if joined.status_code != 200:
        return joined.text
    lines = []
    with httpx.stream(
        "GET", f"{address}/gradio_api/queue/data", params={"session_hash": session}, timeout=60
    ) as told:
        for line in told.iter_lines():
            lines.append(line)
            if '"process_completed"' in line or '"close_stream"' in line:
                break
    return "\n".join(lines)


def functions(address: str) -> dict[int, int]:
    """The page's functions, and how many inputs each has."""
    config = httpx.get(f"{address}/config", timeout=60).json()
    return {function["id"]: len(function["inputs"]) for function in config["dependencies"]}


def uploaded(address: str, content: bytes) -> str:
    response = httpx.post(
        f"{address}/gradio_api/upload", files={"files": ("a.png", content)}, timeout=60
    )
    assert response.status_code == 200, response.text
    return response.json()[0]


def test_an_upload_is_captioned_through_the_queue(address: str) -> None:
    path = uploaded(address, png(noise(3)))
    function = next(i for i, count in functions(address).items() if count == 6)
    told = asked(address, function, [[{"image": file_value(path), "caption": None}], *SETTINGS])
    assert "vb-caption" in told


def test_no_file_of_the_machine_is_read_or_copied(address: str, secret: Path) -> None:
    upload = Path(uploaded(address, png(noise(4))))
    folder = upload.parent.parent
    before = {path for path in folder.rglob("*") if path.is_file()}
    link = upload.parent / "link.png"
    link.symlink_to(secret)
    for path in (secret, "/etc/passwd", "/proc/self/environ", folder / ".." / secret.name, link):
        for function, count in functions(address).items():
            for value in (
                [{"image": file_value(path), "caption": None}],
                [{"image": file_value(path, url=f"file://{path}"), "caption": None}],
                file_value(path),
                str(path),
            ):
                told = asked(address, function, [value, *SETTINGS][:count] if count else [value])
                assert "vb-caption" not in told, (path, function, value)
                assert "root:" not in told
        response = httpx.get(f"{address}/gradio_api/file={path}", timeout=60)
        assert response.status_code in (403, 404), (path, response.status_code)
    link.unlink()
    after = {path for path in folder.rglob("*") if path.is_file()}
    assert after <= before


def sent(address: str, request: str) -> str:
    """The beginning of what the server answers to bytes."""
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
        connection.sendall(request.encode())
        return connection.recv(4096).decode()


def status(address: str, host: str, path: str = "/") -> int:
    answer = sent(address, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n")
    return int(answer.split()[1])


def test_only_names_of_this_server_are_answered(address: str) -> None:
    port = urlsplit(address).port
    for host in (
        "evil.example",
        f"evil.example:{port}",
        f"localhost.evil.example:{port}",
        "",
        "[::1",
        "a b",
    ):
        assert status(address, host) == 400, host
        assert status(address, host, "/config") == 400, host
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}", "[::1]:80"):
        assert status(address, host) == 200, host


def test_an_address_is_a_name_only_where_the_network_is_let_in() -> None:
    assert guard.is_trusted("192.168.1.7:7860", "0.0.0.0")
    assert not guard.is_trusted("192.168.1.7:7860", "127.0.0.1")
    assert guard.is_trusted("192.168.1.7:7860", "192.168.1.7")
    assert guard.is_trusted("box.example", "box.example")
    assert guard.is_trusted(socket.gethostname(), "0.0.0.0")
    assert not guard.is_trusted("evil.example", "0.0.0.0")


def test_requests_of_other_pages_are_refused(address: str) -> None:
    form = {"files": {"image": ("a.png", png(noise(0)))}, "timeout": 60}
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert httpx.post(f"{address}/api/caption", headers=headers, **form).status_code == 403, (
            headers
        )
        call = {"data": [], "fn_index": 0, "session_hash": "x"}
        joined = httpx.post(
            f"{address}/gradio_api/queue/join", json=call, headers=headers, timeout=60
        )
        assert joined.status_code == 403, headers
    own = {"Origin": address, "Sec-Fetch-Site": "same-origin"}
    assert httpx.post(f"{address}/api/caption", headers=own, **form).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/proxy=http://example.org/", "/gradio_api/vibe-edit/", "/gradio_api/info", "/docs", "/openapi.json",
     "/monitoring", "/gradio_api/call/refresh", "/gradio_api/run/predict", "/login", "/runs", "/gradio_api/runs"],
)  # fmt: skip
def test_what_the_page_does_not_need_is_not_there(address: str, path: str) -> None:
    assert httpx.get(f"{address}{path}", timeout=60).status_code == 404
    assert httpx.post(f"{address}{path}", json={}, timeout=60).status_code == 404


def test_bodies_are_bounded_said_or_not(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = guard.FILES_TOGETHER * MAX_UPLOAD + guard.FORM_ALLOWANCE
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {urlsplit(address).netloc}\r\n"
    assert " 413 " in sent(address, f"{head}Content-Length: {limit + 1}\r\n\r\n")

    def without_end() -> Iterator[bytes]:
        for _ in range(64):
            yield bytes(2**16)

    unsaid = httpx.post(f"{address}/gradio_api/queue/join", content=without_end(), timeout=60)
    assert unsaid.status_code in (400, 413)  # the first where a framework on the way tells it so
    monkeypatch.setattr(guard, "MAX_STORED", 10)
    full = httpx.post(
        f"{address}/gradio_api/upload", files={"files": ("a.png", png(noise(1)))}, timeout=60
    )
    assert full.status_code == 503
    assert "come back later" in full.json()["error"]


def test_a_request_that_does_not_arrive_is_given_up(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    parts = urlsplit(address)
    head = f"POST /api/caption HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: 1000\r\n"
    assert " 408 " in sent(
        address, f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n--x"
    )


def test_idle_connections_are_closed(
    service: CaptionService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "IDLE_SECONDS", 1)
    with served(service) as address:
        parts = urlsplit(address)
        idle = [
            socket.create_connection((parts.hostname, parts.port), timeout=20) for _ in range(50)
        ]
        assert httpx.get(address, timeout=60).status_code == 200
        for one in idle:
            assert one.recv(1) == b""  # the other side has closed
            one.close()


@pytest.mark.skipif(os.name == "nt", reason="signals are those of POSIX")
def test_an_interrupted_server_ends_whatever_it_computes(
    tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    program = (
        "import sys, time; from pathlib import Path; from demo_server import tiny_service\n"
        "from vlm_bridge.demo.server import Demo, serve\n"
        "service = tiny_service(*map(Path, sys.argv[1:]))\n"
        "service.answer = lambda *_, **__: time.sleep(600)\n"
        "serve(Demo(service))\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-c", program, tiny_vit_dir, tiny_llama_dir],
        env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "serving on" in line)
        address = line.split("serving on ")[1].split()[0]
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{address}/api/caption", files={"image": ("a.png", png(noise(0)))}, timeout=2
            )
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert time.monotonic() - started < 6
        assert "Traceback" not in json.dumps(process.stdout.read())
    finally:
        process.kill()
        process.stdout.close()

"""The demo over HTTP: clients get answers to their own images, and no file of the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the demo page needs gradio: pip install 'vlm-bridge[demo]'")

import httpx
from PIL import Image

from demo_server import noise, png, tiny_service
from vlm_bridge.demo.server import serving
from vlm_bridge.demo.service import MAX_UPLOAD_MB, MEGABYTE, CaptionService

SETTINGS = [2, 0, 1, 6, 1]  # of the page's sliders


@pytest.fixture(scope="module")
def service(tiny_vit_dir: Path, tiny_llama_dir: Path) -> CaptionService:
    return tiny_service(tiny_vit_dir, tiny_llama_dir)


@pytest.fixture(scope="module")
def address(service: CaptionService) -> Iterator[str]:
    with serving(service, examples=[("noise", noise(99))]) as address:
        yield address


def post(address: str, content: bytes, name: str = "photo.png", **fields: object) -> httpx.Response:
    data = {key: str(value) for key, value in fields.items()}
    files = {"image": (name, content)}
    return httpx.post(f"{address}/api/caption", files=files, data=data, timeout=120)


# Answers.


def test_clients_at_once_get_the_answers_to_their_own_images(
    address: str, service: CaptionService
) -> None:
    """Every fourth client is hostile, and the others do not notice."""
    bomb = Image.new("1", (30_000, 30_000))
    hostile = [b"", png(noise(0, (300, 200)))[:5000], b"<svg onload=alert(1)>" * 99, png(bomb)]
    images = [png(noise(seed)) for seed in range(12)]
    with ThreadPoolExecutor(16) as clients:
        responses = list(
            clients.map(lambda image: post(address, image, num_beams=4), [*images, *hostile])
        )
    assert [response.status_code for response in responses[12:]] == [422] * 4
    scores = set()
    for image, response in zip(images, responses, strict=False):
        answer = response.json()
        request = service.default_request.updated({"num_beams": "4"})
        alone = service.answer(image, "photo.png", request)
        assert answer.keys() == {"caption", "alternatives", "seconds"}
        assert answer["caption"] == alone.captions[0].caption
        for other, expected in zip(answer["alternatives"], alone.captions, strict=True):
            assert other["caption"] == expected.caption
            assert other["score"] == pytest.approx(expected.score, abs=1e-5)
        scores.add(answer["alternatives"][0]["score"])
    assert len(scores) == 12


def test_wrong_uploads_and_forms_are_refused_with_one_line(address: str) -> None:
    image, large = png(noise(0)), bytes(MAX_UPLOAD_MB * MEGABYTE + 1)
    for response, message in (
        (post(address, b"just words\n" * 50, "words.jpg"), "words.jpg: it is no image"),
        (post(address, large), "at most 20 MB"),
        (post(address, image, num_beams=1000), "num_beams"),
        (httpx.post(f"{address}/api/caption", files={"other": ("a.png", image)}), "file `image`"),
    ):
        assert response.status_code == 422
        assert message in response.json()["error"]
        assert "\n" not in response.json()["error"]
    many = {f"image{n}": ("a.png", b"x") for n in range(30)}
    assert httpx.post(f"{address}/api/caption", files=many).status_code == 400
    page = httpx.get(address)  # loads nothing from elsewhere
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http:" not in policy and "https:" not in policy and "*" not in policy


def test_health_names_the_model_and_the_version(address: str) -> None:
    health = httpx.get(f"{address}/health").json()
    assert health.keys() == {"status", "model", "version"}
    assert health["status"] == "ok"
    assert "runs/tiny" in health["model"]


# Attacks.


def asked(address: str, function: int, data: list[Any]) -> str:
    """Return all that the queue answers to a call of one of the page's functions."""
    session = f"s{time.monotonic_ns()}"
    call = {"data": data, "fn_index": function, "session_hash": session, "trigger_id": 1}
    joined = httpx.post(f"{address}/gradio_api/queue/join", json=call, timeout=60)
    if joined.status_code != 200:
        return joined.text
    lines = []
    url, params = f"{address}/gradio_api/queue/data", {"session_hash": session}
    with httpx.stream("GET", url, params=params, timeout=60) as stream:
        for line in stream.iter_lines():
            lines.append(line)
            if '"process_completed"' in line or '"close_stream"' in line:
                break
    return "\n".join(lines)


def uploaded(address: str, content: bytes) -> httpx.Response:
    files = {"files": ("a.png", content)}
    return httpx.post(f"{address}/gradio_api/upload", files=files, timeout=60)


def test_only_uploads_are_read_through_the_queue(address: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(noise(7)))
    upload = Path(uploaded(address, png(noise(3))).json()[0])
    link = upload.parent / "link.png"
    link.symlink_to(secret)
    config = httpx.get(f"{address}/config", timeout=60).json()
    functions = {f["id"]: len(f["inputs"]) for f in config["dependencies"]}
    caption = next(id for id, count in functions.items() if count == 6)

    def value(path: object, **more: str) -> dict[str, Any]:
        return {"path": str(path), "meta": {"_type": "gradio.FileData"}, **more}

    assert "vb-caption" in asked(
        address, caption, [[{"image": value(upload), "caption": None}], *SETTINGS]
    )
    for path in (secret, "/etc/passwd", upload.parent / ".." / ".." / secret.name, link):
        for function, count in functions.items():
            for image in (value(path), value(path, url=f"file://{path}")):
                for given in ([{"image": image, "caption": None}], image, str(path)):
                    told = asked(address, function, [given, *SETTINGS][: max(count, 1)])
                    assert "vb-caption" not in told, (path, function, given)
                    assert "root:" not in told
        response = httpx.get(f"{address}/gradio_api/file={path}", timeout=60)
        assert response.status_code in (403, 404), path


def test_only_names_of_this_server_are_answered(address: str) -> None:
    port = httpx.URL(address).port
    for host in ("evil.example", f"localhost.evil.example:{port}", "", "[::1", "a b"):
        assert httpx.get(f"{address}/config", headers={"Host": host}).status_code == 400, host
    for host in (f"127.0.0.1:{port}", f"LOCALHOST:{port}"):
        assert httpx.get(address, headers={"Host": host}).status_code == 200, host


def test_requests_of_other_pages_and_large_ones_are_refused(address: str) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        for path in ("/api/caption", "/gradio_api/queue/join", "/gradio_api/upload"):
            refused = httpx.post(f"{address}{path}", headers={"Origin": origin}, json={})
            assert refused.status_code == 403, path
    files = {"image": ("a.png", png(noise(0)))}
    own = httpx.post(f"{address}/api/caption", headers={"Origin": address}, files=files)
    assert own.status_code == 200
    join = f"{address}/gradio_api/queue/join"
    assert httpx.post(join, content=bytes(2 * MEGABYTE)).status_code == 413
    assert httpx.post(join, content=iter([b"x"] * 3)).status_code == 411
    assert uploaded(address, bytes(MAX_UPLOAD_MB * MEGABYTE + 1)).status_code == 413


def test_an_interrupted_demo_ends_and_names_its_address(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['vlm-bridge', 'demo', '--port', '0', '--device', 'cpu']; "
    code += "from vlm_bridge.cli.main import run_bridge; run_bridge()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    with process:
        line = next(line for line in process.stdout if "serving on" in line)
        assert httpx.get(line.split()[2], timeout=60).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


@pytest.mark.parametrize("root_path", ["/demo", "https://example.org/demo"])
def test_a_proxy_may_leave_the_path_or_take_it_away(
    service: CaptionService, root_path: str
) -> None:
    # The last test here: gradio keeps uploads of one server in a process.
    files = {"image": ("a.png", png(noise(0)))}
    with serving(service, root_path=root_path) as address:
        for prefix in ("", "/demo"):
            config = httpx.get(f"{address}{prefix}/config").json()
            assert config["root"].endswith("/demo")
            assert httpx.get(f"{address}{prefix}/health").status_code == 200
            url = f"{address}{prefix}/api/caption"
            # The proxy's name is another than this server's.
            public = {"Origin": "https://example.org", "Sec-Fetch-Site": "same-origin"}
            assert httpx.post(url, files=files, headers=public).status_code == 200
            for site in ("cross-site", "same-site"):
                other = {"Origin": "https://evil.example", "Sec-Fetch-Site": site}
                other["X-Forwarded-Host"] = "evil.example"
                assert httpx.post(url, files=files, headers=other).status_code == 403
            large = {"image": ("a.png", bytes(2 * MEGABYTE))}  # the limit of uploads holds
            assert httpx.post(url, files=large).status_code == 422
        named = root_path.startswith("https")
        for name, allowed in (("example.org", named), ("evil.example", False)):
            answer = httpx.get(f"{address}/health", headers={"Host": name})
            assert answer.status_code == (200 if allowed else 400), name
        old = {"Origin": "https://example.org"}  # of a browser without Sec-Fetch-Site
        answer = httpx.post(f"{address}/api/caption", files=files, headers=old)
        assert answer.status_code == (200 if named else 403)

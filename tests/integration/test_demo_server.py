"""The demo's server over HTTP: everybody is answered, for their own picture, or told clearly why not."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the demo page needs gradio: pip install 'vlm-bridge[demo]'")

import httpx

from demo_server import noise, png, served, tiny_service
from vlm_bridge.demo.service import MAX_UPLOAD, CaptionService

SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'


@pytest.fixture(scope="module")
def service(tiny_vit_dir: Path, tiny_llama_dir: Path) -> CaptionService:
    return tiny_service(tiny_vit_dir, tiny_llama_dir)


@pytest.fixture(scope="module")
def address(service: CaptionService) -> Iterator[str]:
    with served(service, examples=[("noise", noise(99))]) as address:
        yield address


def post(address: str, content: bytes, name: str = "photo.png", **fields: object) -> httpx.Response:
    data = {key: str(value) for key, value in fields.items()}
    return httpx.post(
        f"{address}/api/caption", files={"image": (name, content)}, data=data, timeout=120
    )


def test_twenty_clients_at_once_get_the_answers_to_their_own_pictures(
    address: str, service: CaptionService
) -> None:
    pictures = [noise(seed) for seed in range(20)]
    with ThreadPoolExecutor(20) as clients:
        responses = list(
            clients.map(lambda picture: post(address, png(picture), num_beams=4), pictures)
        )
    assert [response.status_code for response in responses] == [200] * 20
    told = [response.json() for response in responses]
    for picture, answer in zip(pictures, told, strict=True):
        request = service.default_request.updated({"num_beams": "4"})
        alone = service.answer(png(picture), "photo.png", request)
        assert answer["caption"] == alone.caption
        assert [other["caption"] for other in answer["alternatives"]] == [
            c.caption for c in alone.alternatives
        ]
        scores = [candidate.score for candidate in alone.alternatives]
        assert [other["score"] for other in answer["alternatives"]] == pytest.approx(
            scores, abs=1e-5
        )
    assert len({answer["alternatives"][0]["score"] for answer in told}) == 20


@pytest.mark.parametrize(
    ("content", "name", "status", "says"),
    [
        (b"just words\n" * 50, "words.jpg", 415, "words.jpg: it is no image"),
        (SVG, "drawing.svg", 415, "drawing.svg: it is an SVG drawing"),
        (b"", "nothing.jpg", 415, "the file is empty"),
        (bytes(MAX_UPLOAD + 1), "large.jpg", 413, "at most 20 MB"),
        (bytes(60_000_000), "larger.jpg", 413, "at most 20 MB"),
    ],
    ids=["text", "svg", "empty", "too-large", "60MB"],
)
def test_what_is_no_picture_is_refused_with_one_line(
    address: str, content: bytes, name: str, status: int, says: str
) -> None:
    response = post(address, content, name)
    assert response.status_code == status
    assert says in response.json()["error"]
    assert "\n" not in response.json()["error"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_beams": 1000}, "num_beams=1000: give 1 to 8"),
        ({"num_beams": "many"}, "num_beams='many' is no int"),
        ({"temperature": "nan"}, "temperature=nan"),
        ({"beams": 3}, "no setting 'beams'"),
    ],
)
def test_impossible_settings_are_named(address: str, fields: dict[str, object], says: str) -> None:
    response = post(address, png(noise(0)), **fields)
    assert response.status_code == 422
    assert says in response.json()["error"]


def test_a_form_without_a_picture_is_told_so(address: str) -> None:
    response = httpx.post(f"{address}/api/caption", files={"picture": ("a.png", png(noise(0)))})
    assert response.status_code == 422
    assert "no file `image`" in response.json()["error"]
    response = httpx.post(f"{address}/api/caption", content=b"x")
    assert response.status_code == 415


def test_the_page_loads_nothing_from_elsewhere(address: str) -> None:
    page = httpx.get(address)
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http:" not in policy and "https:" not in policy and "*" not in policy
    config = httpx.get(f"{address}/config").json()
    assert config["analytics_enabled"] is False


def test_an_upload_to_the_page_has_the_same_limit(address: str) -> None:
    files = {"files": ("large.jpg", bytes(MAX_UPLOAD + 1))}
    assert httpx.post(f"{address}/gradio_api/upload", files=files, timeout=60).status_code == 413

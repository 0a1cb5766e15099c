"""The demo page as people use it, in Chromium; skipped where Debian's `chromium` and `chromium-driver` are missing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the demo page needs gradio: pip install 'vlm-bridge[demo]'")
pytest.importorskip(
    "selenium", reason="driving a browser needs selenium: pip install 'vlm-bridge[dev]'"
)

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from demo_server import noise, served, tiny_service
from vlm_bridge.demo.service import CaptionService

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no browser: apt install chromium chromium-driver"
)

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE = 90
WIDE, PHONE = 1280, 390


@pytest.fixture(scope="module")
def service(tiny_vit_dir: Path, tiny_llama_dir: Path) -> CaptionService:
    return tiny_service(tiny_vit_dir, tiny_llama_dir)


@pytest.fixture(scope="module")
def address(service: CaptionService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    run = tmp_path_factory.mktemp("run")
    with served(
        service, run=run, examples=[(f"noise {seed}", noise(seed)) for seed in (98, 99)]
    ) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    driver.set_window_size(WIDE, 1000)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, address: str) -> Any:
    """The page, freshly loaded."""
    browser.get(address)
    _until(browser, "#pictures input[type=file]", visible=False)
    return browser


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "noise.png"
    noise(5, (320, 240)).save(path)
    return path


def _until(browser: Any, css: str, count: int = 1, visible: bool = True) -> list[Any]:
    """The elements of a selector, once there are so many."""

    def there(driver: Any) -> list[Any]:
        found = driver.find_elements(By.CSS_SELECTOR, css)
        return found if len(found) >= count and (not visible or found[0].is_displayed()) else []

    return WebDriverWait(browser, PATIENCE).until(there, f"{css} did not come")


def _drop(browser: Any, *paths: Path) -> None:
    (field, *_) = _until(browser, "#pictures input[type=file]", visible=False)
    field.send_keys("\n".join(map(str, paths)))


def _screenshot(browser: Any, name: str) -> None:
    """Keep a picture of the page where VLM_BRIDGE_SCREENSHOTS says, to be looked at."""
    if folder := os.environ.get("VLM_BRIDGE_SCREENSHOTS"):
        height = browser.execute_script("return document.documentElement.scrollHeight")
        browser.set_window_size(browser.get_window_size()["width"], height + 150)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_a_dropped_picture_is_captioned_with_alternatives_and_overlays(
    page: Any, picture: Path, service: CaptionService
) -> None:
    _drop(page, picture)
    (caption,) = _until(page, "#answers .vb-caption")
    expected = service.answer(picture, "noise.png", service.default_request, overlays=True)
    assert caption.text == expected.caption
    alternatives = page.find_elements(By.CSS_SELECTOR, "#answers .vb-alternatives li")
    assert len(alternatives) == len(expected.alternatives) > 1
    assert (
        len(page.find_elements(By.CSS_SELECTOR, "#answers .vb-words img"))
        == len(expected.overlays)
        > 0
    )
    _screenshot(page, "wide")


def test_fewer_beams_give_fewer_alternatives(page: Any, picture: Path) -> None:
    _drop(page, picture)
    assert len(_until(page, "#answers .vb-alternatives li")) > 1
    number = page.find_element(By.CSS_SELECTOR, "#beams input[type=number]")
    number.send_keys(Keys.CONTROL, "a")
    number.send_keys("1", Keys.TAB)
    page.find_element(By.CSS_SELECTOR, "#caption").click()
    WebDriverWait(page, PATIENCE).until(
        lambda driver: (
            len(driver.find_elements(By.CSS_SELECTOR, "#answers .vb-alternatives li")) == 1
        )
    )


def test_several_pictures_have_a_card_each_and_a_bad_one_a_message(
    page: Any, picture: Path, tmp_path: Path
) -> None:
    words, drawing = tmp_path / "words.jpg", tmp_path / "drawing.svg"
    words.write_text("not a picture at all\n" * 20)
    drawing.write_text(SVG)
    _drop(page, picture, words, drawing)
    refused = _until(page, "#answers .vb-error", count=2)
    assert "words.jpg: it is no image" in refused[0].text
    assert "it is an SVG drawing" in refused[1].text
    assert len(page.find_elements(By.CSS_SELECTOR, "#answers .vb-caption")) == 1


def test_a_picture_of_60_mb_is_refused(page: Any, tmp_path: Path) -> None:
    large = tmp_path / "large.jpg"
    large.write_bytes(bytes(60_000_000))
    _drop(page, large)
    WebDriverWait(page, PATIENCE).until(
        lambda driver: "maximum allowed size of 20" in driver.find_element(By.TAG_NAME, "body").text
    )
    assert not page.find_elements(By.CSS_SELECTOR, "#answers .vb-card")
    _screenshot(page, "too-large")


def test_an_example_is_captioned_with_a_click(page: Any) -> None:
    _until(page, "#examples button img")[0].click()
    assert _until(page, "#answers .vb-caption")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_phone(browser: Any, address: str, picture: Path, theme: str) -> None:
    # A window cannot be as narrow as a phone; an emulated screen can.
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": PHONE, "height": 844, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        browser.get(f"{address}/?__theme={theme}")
        _drop(browser, picture)
        _until(browser, "#answers .vb-caption")
        width = browser.execute_script("return document.documentElement.scrollWidth")
        _screenshot(browser, f"phone-{theme}")
        assert width <= PHONE
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_browser_asks_no_other_host(page: Any, address: str) -> None:
    requested = [
        message["params"]["request"]["url"]
        for entry in page.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    assert any(url.startswith(address) for url in requested)
    elsewhere = {
        url for url in requested if not url.startswith((address, "data:", "blob:", "chrome"))
    }
    assert not elsewhere

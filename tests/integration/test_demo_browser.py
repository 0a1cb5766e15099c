"""The demo page in Chromium; skipped without Debian's `chromium` and `chromium-driver`."""

from __future__ import annotations

import base64
import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the demo page needs gradio: pip install 'vlm-bridge[demo]'")
pytest.importorskip("selenium", reason="a browser needs selenium: pip install 'vlm-bridge[dev]'")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from demo_server import noise, tiny_service
from vlm_bridge.demo.server import serving
from vlm_bridge.demo.service import CaptionService

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no browser: apt install chromium chromium-driver"
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE = 90
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}


@pytest.fixture(scope="module")
def service(tiny_vit_dir: Path, tiny_llama_dir: Path) -> CaptionService:
    return tiny_service(tiny_vit_dir, tiny_llama_dir)


@pytest.fixture(scope="module")
def address(service: CaptionService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    run = tmp_path_factory.mktemp("run")
    with serving(service, run=run, examples=[("noise", noise(98))]) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    driver.set_window_size(1280, 1000)
    yield driver
    driver.quit()


def wait(browser: Any, css: str, count: int = 1) -> list[Any]:
    """Return the elements of a selector, once there are so many."""

    def there(driver: Any) -> list[Any]:
        found = driver.find_elements(By.CSS_SELECTOR, css)
        return found if len(found) >= count else []

    return WebDriverWait(browser, PATIENCE).until(there, f"{css} did not come")


def test_dropped_images_have_a_card_each_and_a_bad_one_a_message(
    browser: Any, tmp_path: Path, service: CaptionService, address: str
) -> None:
    image, words = tmp_path / "noise.png", tmp_path / "words.jpg"
    noise(5, (320, 240)).save(image)
    words.write_text("not an image at all\n" * 20)
    browser.get(address)
    wait(browser, "#images input[type=file]")[0].send_keys(f"{image}\n{words}")
    assert "words.jpg: it is no image" in wait(browser, "#answers .vb-error")[0].text
    expected = service.answer(
        image.read_bytes(), "noise.png", service.default_request, overlays=True
    )
    (caption,) = wait(browser, "#answers .vb-caption")
    assert caption.text == expected.captions[0].caption
    alternatives = wait(browser, "#answers .vb-alternatives li")
    assert len(alternatives) == len(expected.captions) > 1
    overlays = wait(browser, "#answers .vb-words img")
    assert len(overlays) == len(expected.overlays) > 0
    assert not alternatives[0].is_displayed() and not overlays[0].is_displayed()
    (download,) = wait(browser, "#answers a[download]")
    encoded = str(download.get_attribute("href")).partition("base64,")[2]
    rows = list(csv.DictReader(base64.b64decode(encoded).decode("utf-8-sig").splitlines()))
    assert [(row["image"], row["caption"]) for row in rows] == [("noise.png", caption.text)]
    button = browser.find_element(By.CSS_SELECTOR, "#answers .vb-copy")
    button.click()
    WebDriverWait(browser, PATIENCE).until(lambda driver: button.text == "Copied")
    assert browser.execute_script("return getSelection().toString()") == caption.text

    messages = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls = {params["request"]["url"] for params in sent}
    assert any(url.startswith(address) for url in urls)
    assert all(url.startswith((address, "data:", "blob:", "chrome")) for url in urls)


def test_an_example_is_captioned_with_a_click_above_the_fold_of_a_phone(
    browser: Any, address: str
) -> None:
    # A window cannot be as narrow as a phone; an emulated screen can.
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        browser.get(address)
        wait(browser, "#examples button img")[0].click()
        (caption,) = wait(browser, "#answers .vb-caption")
        assert caption.rect["y"] + caption.rect["height"] < PHONE["height"]
        width = browser.execute_script("return document.documentElement.scrollWidth")
        assert width <= PHONE["width"]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_settings_open_under_advanced_and_change_the_caption(browser: Any, address: str) -> None:
    browser.get(address)
    wait(browser, "#examples button img")[0].click()
    wait(browser, "#answers a[download]")
    before = len(wait(browser, "#answers .vb-alternatives li"))
    beams, again = (browser.find_element(By.CSS_SELECTOR, css) for css in ("#beams", "#again"))
    assert not beams.is_displayed()
    wait(browser, "#advanced summary")[0].send_keys(Keys.ENTER)
    number = beams.find_element(By.CSS_SELECTOR, "input[type=number]")
    number.send_keys(Keys.CONTROL, "a")
    number.send_keys("1", Keys.TAB)
    again.click()

    def fewer(driver: Any) -> bool:
        found = driver.find_elements(By.CSS_SELECTOR, "#answers .vb-alternatives li")
        return len(found) == 1 < before

    WebDriverWait(browser, PATIENCE).until(fewer)


def test_pasted_images_are_captioned(browser: Any, address: str) -> None:
    browser.get(address)
    wait(browser, "#images input[type=file]")
    browser.execute_async_script(
        """
        const done = arguments[0], canvas = document.createElement("canvas");
        canvas.toBlob((blob) => {
          const clipboardData = new DataTransfer();
          clipboardData.items.add(new File([blob], "pasted.png", {type: "image/png"}));
          document.dispatchEvent(new ClipboardEvent("paste", {clipboardData}));
          done();
        });
        """
    )
    assert wait(browser, "#answers .vb-card img")[0].get_attribute("alt") == "pasted.png"

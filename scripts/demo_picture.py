"""Take the README's screenshot of the demo page, with the caption of a photo of scikit-image.

    python scripts/demo_picture.py [FOLDER]

Writes docs/images/demo.png, and to FOLDER the page of a desktop and a phone, light and dark. Needs
the extras `demo` and `dev`, and Debian's `chromium` and `chromium-driver`.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from vlm_bridge import Captioner
from vlm_bridge.demo.server import serving
from vlm_bridge.demo.service import CaptionService
from vlm_bridge.quickstart import real_photographs

OUTPUT = Path(__file__).parents[1] / "docs" / "images" / "demo.png"
SCREENS = {
    "desktop": {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False},
    "phone": {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True},
}
COFFEE, COLORS, PATIENCE = 2, 256, 90


def screenshot(driver: webdriver.Chrome, address: str, screen: str, theme: str) -> Image.Image:
    """Return the page after a click on an example."""

    def there(css: str) -> list:
        find = lambda driver: driver.find_elements(By.CSS_SELECTOR, css)  # noqa: E731
        return WebDriverWait(driver, PATIENCE).until(find)

    color_scheme = {"name": "prefers-color-scheme", "value": theme}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", SCREENS[screen])
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [color_scheme]})
    driver.get(address)
    there("#examples button img")[COFFEE].click()
    there("#answers a[download]")
    driver.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
    return Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")


def main(folder: str | None = None) -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    examples = [(name.split()[-1].capitalize(), image) for name, image in real_photographs()]
    try:
        with serving(CaptionService(Captioner.from_pretrained()), examples=examples) as address:
            screenshot(driver, address, "desktop", "light").quantize(COLORS).save(
                OUTPUT, optimize=True
            )
            for screen in SCREENS if folder else ():
                for theme in ("light", "dark"):
                    name = Path(str(folder), f"{screen}-{theme}.png")
                    screenshot(driver, address, screen, theme).save(name)
    finally:
        driver.quit()


if __name__ == "__main__":
    main(*sys.argv[1:])

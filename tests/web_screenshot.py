"""Draws docs/web.jpg, the picture of the web page: ``python tests/web_screenshot.py``."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from web_server import browser_path, served

from fastperc.cli.web import SHIPPED, networks_of

ROOT = Path(__file__).resolve().parent.parent
QUALITY = 80


def main() -> None:
    """Paints the example photo in the page, and writes a picture of it."""
    with served(networks_of(SHIPPED, torch.device("cpu"))) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 800})
        page.goto(url)
        page.set_input_files("#paint-photo input[type=file]", ROOT / "examples/chelsea.jpg")
        page.wait_for_selector("#paint-photo img")
        page.wait_for_timeout(1000)  # the sizes have followed the photo
        page.click("#paint-start")
        page.wait_for_selector("#paint-result img")
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)
        shot = page.screenshot(full_page=True)
        browser.close()
    Image.open(io.BytesIO(shot)).convert("RGB").save(ROOT / "docs/web.jpg", quality=QUALITY, optimize=True)


if __name__ == "__main__":
    main()

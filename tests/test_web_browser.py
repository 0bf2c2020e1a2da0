"""The web page in a real browser: upload, paint, compare with the command line's picture, clips, a camera."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from clips import make_film, pictures_of
from pictures import picture
from PIL import Image
from web_server import CAMERA, browser_path, needs, networks_for_tests, served

from fastperc.web.camera import LiveOptions
from fastperc.web.server import LiveSource
from fastperc.web.studio import StyleOptions

for name in ("gradio", "av", "playwright"):
    needs(name)
pytestmark = pytest.mark.filterwarnings("ignore")

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 20_000  # milliseconds: the machines of CI are slow
CLEAR = "button:is([aria-label=Clear], [aria-label='Remove Image'])"


@pytest.fixture(scope="module")
def server():
    source = LiveSource(CAMERA, LiveOptions(StyleOptions("great_wave", 1.0, 64)))
    with served(networks_for_tests(0.4), source=source) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's own sandbox does not work for root, as whom CI runs.
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server, here):
    """The page, opened; nothing may be asked of another server, and no answer may be an error."""
    page = browser.new_page(viewport=DESKTOP)
    page.set_default_timeout(PATIENCE)
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(server)
    page.wait_for_selector("#live-picture")
    yield page
    page.close()
    assert not faults
    elsewhere = [url for url in asked if not url.startswith((server, "data:", "blob:"))]
    assert asked and not elsewhere


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def upload(page, place, path):
    """Gives the file to the part ``place`` of the page, and waits until it is shown."""
    page.set_input_files(f"#{place} input[type=file]", path)
    page.wait_for_selector(f"#{place} {CLEAR}")


def run_tab(page, tab):
    """Presses the start button of a tab, and waits until it can be pressed again. Returns the message."""
    page.click(f"#{tab}-start")
    for disabled in ("true", "false"):
        page.wait_for_function(f"document.querySelector('#{tab}-start').disabled === {disabled}")
    return message(page, tab)


def message(page, tab):
    """The line below the buttons of a tab."""
    return page.locator(f"#{tab}-message .prose").inner_text().strip()


def downloaded(page, tab):
    """The file that the download button of a tab gives."""
    page.wait_for_selector(f"#{tab}-download:not([disabled])")
    with page.expect_download() as download:
        page.click(f"#{tab}-download")
    return Path(download.value.path()).read_bytes(), download.value.suggested_filename


def test_a_photo_is_painted_as_by_the_command_line(page, run):
    image = picture(96, 64, seed=5)
    image.putalpha(Image.linear_gradient("L").resize((96, 64)))
    image.save("mine.png")
    open_tab(page, "Paint")
    upload(page, "paint-photo", "mine.png")
    assert run_tab(page, "paint") == ""
    content, name = downloaded(page, "paint")
    assert run("stylize", "mine.png", "-o", "out.png").status == 0
    assert content == Path("out.png").read_bytes() and name == "mine-great_wave.png"
    assert page.locator("#paint-result img").count() == 2  # before and after
    assert "96 × 64" in page.inner_text("#paint-download")


def test_another_style_strength_size_and_colors(page, run):
    from playwright.sync_api import expect

    picture(96, 64, seed=6).save("mine.jpg", quality=95)
    open_tab(page, "Paint")
    upload(page, "paint-photo", "mine.jpg")
    tab = page.get_by_role("tabpanel").filter(has=page.locator("#paint-start"))
    size = tab.get_by_label("number input for Longer side in pixels")
    expect(size).to_have_value("96", timeout=PATIENCE)  # it follows the photo
    tab.get_by_text("Starry night").click()
    tab.get_by_label("number input for Strength").fill("0.5")
    size.fill("80")
    tab.get_by_label("Keep the colours of the original").check()
    tab.get_by_label("number input for Stroke size").fill("1.5")
    assert run_tab(page, "paint") == ""
    content, name = downloaded(page, "paint")
    options = "--style", "starry_night", "--strength", 0.5, "--size", 80, "--keep-colors", "--stroke", 1.5
    assert run("stylize", "mine.jpg", "-o", "out.jpg", *options).status == 0
    assert content == Path("out.jpg").read_bytes() and name == "mine-starry_night.jpg"


def test_a_photo_is_enlarged_as_by_the_command_line(page, run):
    picture(40, 30, seed=7).save("mine.png")
    open_tab(page, "Enlarge")
    upload(page, "enlarge-photo", "mine.png")
    page.get_by_label("8 times").check()
    page.get_by_label("Sharp").check()
    assert run_tab(page, "enlarge") == ""
    content, name = downloaded(page, "enlarge")
    assert run("sr", "upscale", "mine.png", "-o", "out.png", "--scale", 8, "--method", "feature").status == 0
    assert content == Path("out.png").read_bytes() and name == "mine-x8.png"


def test_a_bad_file_and_then_a_good_one(page):
    Path("bad.png").write_bytes(b"no image")
    open_tab(page, "Paint")
    assert run_tab(page, "paint") == "Choose a photo first."
    upload(page, "paint-photo", "bad.png")
    page.wait_for_function("document.querySelector('#paint-message').innerText.includes('bad.png')")
    assert run_tab(page, "paint") == "bad.png: not an image, or in a format that Pillow cannot read."
    page.click(f"#paint-photo {CLEAR}")
    upload(page, "paint-photo", "photo.png")
    assert run_tab(page, "paint") == ""
    assert downloaded(page, "paint")[1] == "photo-great_wave.png"


def test_a_clip_is_painted_as_by_the_command_line(page, run):
    make_film(Path("mine.mp4"))
    open_tab(page, "Clips")
    upload(page, "clip-video", "mine.mp4")
    assert run_tab(page, "clip") == ""
    page.wait_for_selector("#clip-result video")
    content, name = downloaded(page, "clip")
    Path("downloaded.mp4").write_bytes(content)
    assert run("stylize", "mine.mp4", "-o", "out.mp4", "--smooth", 0.25).status == 0
    for ours, theirs in zip(pictures_of("downloaded.mp4"), pictures_of("out.mp4"), strict=True):
        assert (ours == theirs).all()
    assert name == "mine-great_wave.mp4"


def test_a_clip_is_cancelled(page):
    make_film(Path("mine.mp4"), times=range(0, 4000, 100))  # at 0.4 s a frame: 16 s
    open_tab(page, "Clips")
    upload(page, "clip-video", "mine.mp4")
    page.get_by_role("tabpanel").filter(has=page.locator("#clip-start")).get_by_text("Slow").click()
    page.click("#clip-start")
    page.wait_for_selector("#clip-cancel:not([disabled])")
    page.get_by_text("Painting").first.wait_for()  # the progress
    page.click("#clip-cancel")
    page.wait_for_selector("#clip-start:not([disabled])")
    assert message(page, "clip") == "Cancelled."
    assert page.locator("#clip-result video").count() == 0
    Path("bad.mp4").write_bytes(b"no film")
    page.click(f"#clip-video {CLEAR}")
    upload(page, "clip-video", "bad.mp4")
    assert run_tab(page, "clip").startswith("bad.mp4: not a film, damaged or cut short")


def test_closing_the_page_deletes_its_pictures(page, browser, server):
    other = browser.new_page()
    other.goto(server)
    open_tab(other, "Paint")
    upload(other, "paint-photo", "photo.png")
    run_tab(other, "paint")
    results = Path(os.environ["GRADIO_TEMP_DIR"], "results")
    (painting,) = results.rglob("photo-great_wave.png")
    other.close()
    page.wait_for_timeout(200)
    for _ in range(50):
        if not painting.exists():
            break
        page.wait_for_timeout(200)
    assert not painting.exists() and not painting.parent.exists()


def test_the_camera(page):
    page.wait_for_function("document.querySelector('#live-picture').naturalWidth === 64")
    shots = [np.asarray(Image.open(path)) for path in (shot(page, "1.png"), shot(page, "2.png", 1000))]
    assert shots[0].std() > 10 and (shots[0] != shots[1]).any()  # the test source shows a clock
    page.get_by_role("tabpanel").filter(has=page.locator("#live-picture")).get_by_text("Starry night").click()
    third = np.asarray(Image.open(shot(page, "3.png", 2000)))
    assert np.abs(third.astype(int) - shots[1]).mean() > 10


def shot(page, name, wait=0):
    page.wait_for_timeout(wait)
    page.locator("#live-picture").screenshot(path=name)
    return name


def test_a_phone(page):
    page.set_viewport_size(PHONE)
    for tab in ("Live", "Paint", "Enlarge", "Clips"):
        open_tab(page, tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]

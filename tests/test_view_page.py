"""The explorer's page in a real browser: what its user sees, types and presses."""

import base64
import io
import os
import re
import shutil
import time

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from dnnlib.video import iter_video_frames
from tests.explorer.helpers import FAR, frames_of, make_networks, serving, until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER),
    reason="there is no Chromium with its driver: apt-get install chromium chromium-driver",
)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A session whose server is running."""
    with serving(make_networks(tmp_path_factory.mktemp("models"))[2]) as session:
        yield session


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """Where the browser saves what it is given."""
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads):
    """A headless Chromium."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1440,900"]
    for argument in [*arguments, *(["--no-sandbox"] if os.geteuid() == 0 else [])]:  # it refuses to have one as root
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield driver
    driver.quit()


class Page:
    """One tab, as its user sees it."""

    def __init__(self, browser, session, link=""):
        self.browser = browser
        browser.switch_to.new_window("tab")
        self.handle = browser.current_window_handle
        browser.get(f"http://localhost:{session.port}/{link}")

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def press(self, *keys):
        webdriver.ActionChains(self.browser).send_keys(*keys).perform()

    def type(self, name, text):
        field = self.browser.find_element(By.ID, name)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text, Keys.ENTER)

    def frame(self, kind="sres"):
        """The number of the frame that the canvas shows; None while it is not there."""
        shown = self.run(f"return document.querySelector('#figure-{kind} canvas')?.dataset.frame")
        return int(shown) if shown else None

    def shows(self, frame, kind="sres"):
        until(lambda: self.frame(kind) == frame)
        return self

    def picture(self, kind="sres"):
        return self.run(f"return document.querySelector('#figure-{kind} canvas').toDataURL()")

    def pixels(self, kind="sres"):
        data = base64.b64decode(self.picture(kind).partition(",")[2])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def message(self):
        box = self.browser.find_element(By.ID, "message")
        return box.text if box.is_displayed() else ""

    def complaints(self):
        """What the console says, less the answers of 400 that tests ask for."""
        entries = self.browser.get_log("browser")
        return [
            entry["message"] for entry in entries if "the server responded with a status of 400" not in entry["message"]
        ]


@pytest.fixture
def page(browser, session):
    """Opens tabs; what the page complains about on the console fails the test."""
    first = browser.current_window_handle
    pages = []

    def open_page(link=""):
        pages.append(Page(browser, session, link))
        return pages[-1]

    yield open_page
    complaints = pages[-1].complaints()
    for opened in pages:
        browser.switch_to.window(opened.handle)
        browser.close()
    browser.switch_to.window(first)
    assert complaints == []


@needs_chromium
def test_playing_moves_the_picture(page):
    tab = page("#model=toy&seed=3").shows(0)
    still = tab.picture()
    tab.press(Keys.SPACE)
    until(lambda: (tab.frame() or 0) > 20)
    assert tab.picture() != still
    rate = tab.run("return document.getElementById('rate').textContent")
    assert re.fullmatch(r"\d+\.\d frames/s shown", rate) and float(rate.split()[0]) > 0
    tab.press(Keys.SPACE)
    stopped = tab.run("return new URLSearchParams(location.hash.slice(1)).get('frame')")
    time.sleep(0.2)
    tab.shows(int(stopped))
    tab.press(Keys.ARROW_LEFT)
    tab.shows(int(stopped) - 1)
    tab.browser.find_element(By.CSS_SELECTOR, "#figure-sres .picture").click()
    until(lambda: (tab.frame() or 0) > int(stopped) + 5)


@needs_chromium
def test_the_same_seed_and_frame_show_the_same_pixels(page, session, tmp_path):
    tab = page("#model=toy&seed=3").shows(0)
    tab.type("frame", "10,000,000")
    picture = tab.shows(FAR).picture()
    assert np.array_equal(tab.pixels(), frames_of(session, FAR, 1, kind="sres", seed=3)[0])
    tab.press(Keys.ARROW_UP)
    until(lambda: tab.picture() != picture and tab.frame() == FAR)
    tab.press(Keys.HOME)
    tab.shows(0)
    tab.type("seed", "3")
    tab.type("frame", str(FAR - 20))
    tab.shows(FAR - 20).press(Keys.SPACE)  # come to it by playing
    until(lambda: (tab.frame() or 0) > FAR)
    tab.press(Keys.SPACE)
    tab.type("frame", str(FAR))
    assert tab.shows(FAR).picture() == picture
    link = tab.run("return location.hash")
    assert f"frame={FAR}" in link and "seed=3" in link
    other = page(link).shows(FAR)
    assert other.picture() == picture
    other.browser.save_screenshot(str(tmp_path / "page.png"))
    screen = np.asarray(Image.open(tmp_path / "page.png").convert("L")).astype(int)
    assert screen[150:550, 150:950].mean() > screen[-100:].mean() + 30, "a large picture, with dark controls below"


@needs_chromium
def test_wrong_input_shows_a_message_and_keeps_the_picture(page):
    tab = page("#model=toy&seed=3&frame=7").shows(7)
    picture = tab.picture()
    for name, text, words in (
        ("seed", "abc", "Seed is 'abc': use a whole number"),
        ("grid", "100x100", "A grid of 100x100 was asked for"),
        ("grid", "many", "'many' is not a grid"),
        ("frame", "soon", "Frame is 'soon'"),
    ):
        tab.type(name, text)
        until(lambda words=words: words in tab.message())
        assert tab.picture() == picture and tab.frame() == 7
    tab.type("clip-count", "-5")
    tab.browser.find_element(By.ID, "save-clip").click()
    until(lambda: "-5 frames were asked for" in tab.message())
    tab.type("seed", "4")
    until(lambda: tab.message() == "" and tab.frame() == 7 and tab.picture() != picture)
    wrong = page("#model=gone&seed=x")
    until(lambda: "there is no model 'gone'" in wrong.message().lower())
    wrong.shows(0)


@needs_chromium
def test_views_grids_and_clips(page, browser, session, downloads):
    tab = page("#model=toy&seed=3&frame=40&view=side-by-side").shows(40).shows(40, "lres")
    for kind in ("lres", "sres"):
        assert np.array_equal(tab.pixels(kind), frames_of(session, 40, 1, kind=kind, seed=3)[0])
    tab.press("s", "2", "g")
    until(lambda: tab.pixels().shape == (108, 192, 3) and tab.frame() == 40)
    assert np.array_equal(tab.pixels(), frames_of(session, 40, 1, kind="sres", seed=3, grid="3x3")[0])
    style = "return getComputedStyle(document.querySelector('#figure-sres canvas')).imageRendering"
    assert tab.run(style) == "pixelated"
    tab.type("clip-count", "12")
    tab.press("c")
    path = downloads / "toy_seeds=3-11_start=40_len=12_grid=3x3_sres.mp4"
    until(path.exists)
    assert len(list(iter_video_frames(path))) == 12
    browser.find_elements(By.CSS_SELECTOR, "#figure-sres .cells button")[4].click()
    until(lambda: tab.pixels().shape == (36, 64, 3) and tab.frame() == 40)
    assert np.array_equal(tab.pixels(), frames_of(session, 40, 1, kind="sres", seed=7)[0])


@needs_chromium
def test_tabs_play_side_by_side_and_leave_nothing_behind(page, browser, session):
    tabs = [page("#model=toy&seed=21"), page("#model=toy&seed=22")]
    for tab in tabs:
        browser.switch_to.window(tab.handle)
        tab.shows(0).press(Keys.SPACE)
        until(lambda tab=tab: (tab.frame() or 0) > 5)
    browser.switch_to.window(tabs[0].handle)
    browser.get("about:blank")
    browser.switch_to.window(tabs[1].handle)
    browser.get("about:blank")
    until(lambda: session.worker.num_tasks == 0)

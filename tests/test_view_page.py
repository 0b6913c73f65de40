"""The explorer's page in a real browser."""

import base64
import io
import re
import time

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from dnnlib.video import iter_video_frames
from explorer.session import Entry
from tests.explorer.browser import needs_chromium
from tests.explorer.helpers import FAR, frames_of, make_networks, serving, serving_entries, until
from tests.explorer.toys import Given, Walk, registered


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Return a session whose server is running."""
    with serving(make_networks(tmp_path_factory.mktemp("models"))[2]) as session:
        yield session


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Return a session of the models of toys.py, whose server is running."""
    with registered(tmp_path_factory.mktemp("toys")) as paths:
        entries = [Entry(name, (path,)) for name, path in paths.items()]
        with serving_entries(entries, prompt=Given(num_actions=6_000)) as session:
            yield session


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
        """Return the number of the frame that the canvas shows; None while it is not there."""
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
        """Return what the console says, less the answers of 400 that tests ask for."""
        entries = self.browser.get_log("browser")
        return [
            entry["message"] for entry in entries if "the server responded with a status of 400" not in entry["message"]
        ]


@pytest.fixture
def page(browser, session):
    """Open tabs; what the page complains about on the console fails the test."""
    first = browser.current_window_handle
    pages = []

    def open_page(link="", served=session):
        pages.append(Page(browser, served, link))
        return pages[-1]

    yield open_page
    complaints = pages[-1].complaints()
    for opened in pages:
        browser.switch_to.window(opened.handle)
        browser.close()
    browser.switch_to.window(first)
    assert complaints == []


@needs_chromium
def test_playing_changes_the_image(page):
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
def test_wrong_input_shows_a_message_and_keeps_the_image(page):
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


@needs_chromium
def test_controls_are_made_from_the_options_of_the_model(page, browser, toys):
    tab = page("#model=colours&seed=5&frame=3&contrast=2", toys).shows(3, "video")

    def same(**options):
        wanted = frames_of(toys, 3, 1, model="colours", seed=5, **options)[0]
        until(lambda: tab.frame("video") == 3 and np.array_equal(tab.pixels("video"), wanted))

    def control(name):
        return browser.find_element(By.ID, f"option-{name}")

    same(contrast=2)
    labels = tab.run("return [...document.querySelectorAll('#controls label')].map((label) => label.textContent)")
    assert labels == ["Palette", "Contrast 2.00", "Steps 4", "Inverted", "Note"]
    kinds = tab.run("return [...document.querySelectorAll('#controls input')].map((field) => field.type)")
    assert (
        kinds == ["range", "range", "checkbox", "text"]
        and control("steps").get_attribute("title") == "how many there are"
    )
    assert not browser.find_element(By.ID, "view").is_displayed(), "there is one kind of frames"
    control("palette").send_keys("cold")
    same(contrast=2, palette="cold")
    control("inverted").click()
    control("steps").send_keys(Keys.ARROW_LEFT)
    same(contrast=2, palette="cold", inverted=True, steps=3)
    tab.type("option-note", "a & b")
    same(contrast=2, palette="cold", inverted=True, steps=3, note="a & b")
    link = tab.run("return location.hash")
    assert "palette=cold" in link and "steps=3" in link and "note=a" in link
    control("contrast").send_keys(Keys.ARROW_LEFT)
    same(contrast=1.9, palette="cold", inverted=True, steps=3, note="a & b")
    browser.find_element(By.ID, "reset").click()
    same()
    wrong = page("#model=colours&steps=99", toys)
    until(lambda: "Steps is 99: use a number from 1 to 8" in wrong.message())
    wrong.shows(0, "video")


@needs_chromium
def test_a_rollout_begins_at_frame_0_ends_and_says_how_far_it_is(page, browser, toys):
    tab = page("#model=walk&seed=3&frame=1", toys).shows(1, "video")
    back = browser.find_element(By.CSS_SELECTOR, "[data-step='-1']")
    assert back.is_enabled() and not browser.find_element(By.ID, "options").is_displayed()
    tab.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.PAGE_UP)
    tab.shows(900, "video").press(Keys.PAGE_DOWN, Keys.PAGE_DOWN, Keys.ARROW_LEFT)
    tab.shows(0, "video")
    until(lambda: not back.is_enabled())
    tab.type("frame", "-5")
    until(lambda: "Frame -5 was asked for: videos of walk begin at frame 0" in tab.message())
    Walk.delay_sec = 0.003
    try:
        tab.type("frame", "5000")
        badge = "return document.querySelector('#figure-video .badge').textContent"
        until(lambda: re.fullmatch(r"computing frame [\d,]+ of 5,00\d", tab.run(badge)))
        tab.type("frame", "7")
        tab.shows(7, "video")
    finally:
        Walk.delay_sec = 0.0
    tab.type("frame", "5990")
    tab.shows(5_990, "video").press(Keys.SPACE)
    tab.shows(5_999, "video")
    until(lambda: "playing" not in tab.run("return document.body.className"))
    assert not browser.find_element(By.CSS_SELECTOR, "[data-step='1']").is_enabled()
    cascade = page("#model=cascade&view=side-by-side&frame=30", toys).shows(30, "walk").shows(30, "smooth")
    assert cascade.pixels("smooth").shape == (16, 32, 3)
    cascade.press("1")
    until(lambda: not cascade.browser.find_element(By.ID, "figure-smooth").is_displayed())

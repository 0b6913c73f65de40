"""The page that steers, in a real browser."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from dnnlib.video import iter_video_frames
from explorer.session import Entry
from tests.explorer.browser import needs_chromium
from tests.explorer.helpers import serving_entries, until
from tests.explorer.steered import NAMES, PAST, SIZE, TURN, RingSampler, registered, scene, shift_between, write_dataset


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Return a session of the models of steered.py, whose server is running."""
    folder = tmp_path_factory.mktemp("steered")
    with registered(folder) as paths:
        entries = [Entry(name, (paths[name],)) for name in ("ring", "vectors")]
        for name in ("ring", "vectors"):
            write_dataset(folder / f"{name}.starts", vectors=name == "vectors")
        with serving_entries(entries) as session:
            yield session


class Page:
    """One tab, as its user sees it."""

    def __init__(self, browser, session, link=""):
        self.browser, self.session = browser, session
        browser.switch_to.new_window("tab")
        self.handle = browser.current_window_handle
        browser.get(f"http://localhost:{session.port}/play{link}")

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def press(self, *keys):
        webdriver.ActionChains(self.browser).send_keys(*keys).perform()

    def hold(self, key, num_frames):
        """Hold a key until so many more frames are shown; return the first and the last of them."""
        first = self.frame()
        webdriver.ActionChains(self.browser).key_down(key).perform()
        until(lambda: (self.frame() or 0) >= (first or 0) + num_frames)
        webdriver.ActionChains(self.browser).key_up(key).perform()
        return self.rest()

    def rest(self):
        """Wait until nothing moves; return the number of the frame."""
        self.run("window.lastSeen = null; window.sameFor = 0")
        script = """const now = document.getElementById('world').dataset.frame;
            window.sameFor = now === window.lastSeen ? window.sameFor + 1 : 0;
            window.lastSeen = now;
            return window.sameFor > 20;"""
        until(lambda: self.run(script))
        return self.frame()

    def frame(self):
        """Return the number of the frame that is shown, None before there is one."""
        shown = self.run("return document.getElementById('world').dataset.frame")
        return None if shown is None else int(shown)

    def shows(self, frame):
        until(lambda: self.frame() == frame)
        return self

    def pixels(self):
        data = self.run("return document.getElementById('world').toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB"))

    def text(self, name):
        return self.run("return document.getElementById(arguments[0]).textContent", name)

    def message(self):
        box = self.browser.find_element(By.ID, "message")
        return box.text if box.is_displayed() else ""

    def click(self, name):
        self.browser.find_element(By.ID, name).click()


@pytest.fixture
def page(browser, session):
    """Open tabs; what a page complains about on the console fails the test."""
    first, pages = browser.current_window_handle, []

    def open_page(link=""):
        pages.append(Page(browser, session, link))
        return pages[-1]

    yield open_page
    complaints = [entry["message"] for entry in browser.get_log("browser")]
    for opened in pages:
        browser.switch_to.window(opened.handle)
        browser.close()
    browser.switch_to.window(first)
    RingSampler.delay_sec = 0.0
    assert [text for text in complaints if "the server responded with a status of 400" not in text] == []


def assert_turned(before, after, num_turns):
    """Assert that a picture has moved to the right by so many turns, around the ring."""
    assert (shift_between(before, after) - TURN * num_turns) % SIZE[1] == 0


@needs_chromium
@pytest.mark.parametrize("keys", [("a", "d", "w"), (Keys.ARROW_LEFT, Keys.ARROW_RIGHT, Keys.ARROW_UP)])
def test_a_left_turn_moves_the_picture_to_the_right(page, keys):
    left, right, up = keys
    tab = page("#model=ring&start=walk/1").shows(-1)
    start = tab.pixels()
    assert start.shape == (*SIZE, 3)
    last = tab.hold(left, 3)
    turned = tab.pixels()
    assert_turned(start, turned, last + 1)
    tab.press(left)
    assert tab.rest() == last + 1, "a short press is one step"
    assert shift_between(turned, tab.pixels()) == TURN
    tab.press(right)
    assert tab.rest() == last + 2 and np.array_equal(tab.pixels(), turned)
    tab.hold(up, 5)
    assert shift_between(turned, tab.pixels()) == 0 and tab.pixels().mean() > turned.mean() + 2


@needs_chromium
def test_speed_and_the_time_from_key_to_picture_are_shown(page):
    tab = page("#model=ring&start=walk/1").shows(-1)
    webdriver.ActionChains(tab.browser).key_down("a").perform()
    until(lambda: (tab.frame() or 0) > 20)
    rate, latency = tab.text("rate"), tab.text("latency")
    webdriver.ActionChains(tab.browser).key_up("a").perform()
    assert rate.endswith(" frames/s") and 1 < float(rate.split()[0]) <= 40
    assert latency.endswith(" ms key to picture") and 0 < float(latency.split()[0]) < 2000
    last = tab.rest()
    assert tab.frame() == last, "it stands still without a key"
    assert 0.5 < (last + 1) / 30 < 30


@needs_chromium
def test_two_keys_at_once_take_turns_where_no_action_does_both(page):
    tab = page("#model=ring&start=walk/1").shows(-1)
    webdriver.ActionChains(tab.browser).key_down("a").key_down("w").perform()
    until(lambda: (tab.frame() or 0) > 12)
    webdriver.ActionChains(tab.browser).key_up("a").key_up("w").perform()
    tab.rest()
    actions = saved_actions(tab)[PAST + 2 : PAST + 10]
    assert actions.count("forward") == actions.count("turn_left") == 4


def saved_actions(tab):
    number = tab.run("return window.performance.getEntriesByType('resource').map((entry) => entry.name)")
    walks = [name.split("/walks/")[1].split("/")[0] for name in number if "/walks/" in name]
    address = f"/api/walks/{walks[-1]}/actions"
    return json.loads(tab.browser.execute_async_script(
        "const done = arguments[1]; fetch(arguments[0]).then((answer) => answer.text()).then(done)", address
    ))  # fmt: skip


@needs_chromium
def test_the_pad_steers_as_keys_do(page):
    tab = page("#model=ring&start=walk/1").shows(-1)
    start = tab.pixels()
    button = tab.browser.find_element(By.CSS_SELECTOR, "#pad [data-steer=left]")
    down = tab.browser.find_element(By.CSS_SELECTOR, "#pad [data-steer=down]")
    assert "none" in (down.get_attribute("class") or ""), "the model has no such action"
    webdriver.ActionChains(tab.browser).click_and_hold(button).perform()
    until(lambda: (tab.frame() or 0) > 3)
    assert "on" in (button.get_attribute("class") or "").split()
    webdriver.ActionChains(tab.browser).release().perform()
    last = tab.rest()
    assert_turned(start, tab.pixels(), last + 1)


@needs_chromium
def test_a_gamepad_steers(page):
    tab = page("#model=ring&start=walk/1").shows(-1)
    start = tab.pixels()
    tab.run("""window.axes = [-1, 0];
        navigator.getGamepads = () => [{ axes: window.axes, buttons: [] }, null];""")
    until(lambda: (tab.frame() or 0) > 3)
    tab.run("window.axes = [0.1, 0.05]")
    last = tab.rest()
    assert_turned(start, tab.pixels(), last + 1)
    vectors = page("#model=vectors&start=walk/1").shows(-1)
    vectors.run("navigator.getGamepads = () => [{ axes: [0, -0.5], buttons: [] }]")
    until(lambda: (vectors.frame() or 0) > 3)
    vectors.run("navigator.getGamepads = () => []")
    vectors.rest()
    assert [0.25, 0.0] in saved_actions(vectors), "a stick that is half pushed goes half as far"


@needs_chromium
def test_undo_and_looking_back_lead_another_way(page):
    tab = page("#model=ring&start=walk/1&fps=10").shows(-1)
    tab.hold("a", 15)
    last, end = tab.frame(), tab.pixels()
    tab.press(Keys.BACKSPACE)
    tab.shows(last - 10)
    assert_turned(tab.pixels(), end, 10)
    ways = tab.browser.find_element(By.ID, "ways")
    assert ways.is_displayed() and f"frames {last - 9} to {last}" in ways.text
    at = tab.pixels()
    tab.press("d")
    assert tab.rest() == last - 9 and shift_between(at, tab.pixels()) == -TURN
    tab.run("""const scrub = document.getElementById('scrub');
        scrub.value = 2;
        scrub.dispatchEvent(new Event('input'));""")
    tab.shows(2)
    early = tab.pixels()
    tab.press("d")
    assert tab.rest() == 3 and shift_between(early, tab.pixels()) == -TURN
    tab.run("""const ways = document.getElementById('ways');
        ways.value = 0;
        ways.dispatchEvent(new Event('change'));""")
    tab.shows(last)
    assert np.array_equal(tab.pixels(), end), "the way that was left first"


@needs_chromium
def test_a_walk_and_its_actions_are_saved_and_can_be_replayed(page, downloads):
    tab = page("#model=ring&start=walk/2&seed=1").shows(-1)
    tab.press("a")
    tab.rest()
    tab.press("w")
    last = tab.rest()
    end = tab.pixels()
    assert last == 1
    tab.click("save")
    path = downloads / "ring_seed=1_walk=2.mp4"
    until(path.exists)
    tab.click("save-actions")
    actions = downloads / "ring_seed=1_walk=2.actions.json"
    until(actions.exists)
    assert len(list(iter_video_frames(path))) == PAST + 2
    assert json.loads(actions.read_text()) == ["none", *["turn_left"] * PAST, "forward"][: PAST + 2]
    tab.press("d", "d")
    tab.rest()
    tab.browser.find_element(By.ID, "replay").send_keys(str(actions))
    until(lambda: tab.frame() == 1)
    assert np.array_equal(tab.pixels(), end)
    wrong = downloads / "wrong.json"
    wrong.write_text(json.dumps(["jump"]))
    tab.browser.find_element(By.ID, "replay").send_keys(str(wrong))
    until(lambda: "the model knows none, forward" in tab.message())


@needs_chromium
def test_a_picture_of_ones_own_is_a_start(page, tmp_path):
    Image.fromarray(scene(9)).save(tmp_path / "own.png")
    tab = page("#model=ring&start=walk/1").shows(-1)
    tab.browser.find_element(By.ID, "upload").send_keys(str(tmp_path / "own.png"))
    until(lambda: np.array_equal(tab.pixels(), scene(9)))
    tab.press("a")
    tab.rest()
    assert shift_between(scene(9), tab.pixels()) == TURN
    (tmp_path / "no.png").write_text("nothing")
    tab.browser.find_element(By.ID, "upload").send_keys(str(tmp_path / "no.png"))
    until(lambda: "The file is no image or clip" in tab.message())


@needs_chromium
def test_models_starts_and_keys_can_be_chosen(page):
    tab = page("#model=ring").shows(-1)
    radios = tab.browser.find_elements(By.CSS_SELECTOR, "#starts label")
    assert len(radios) == 3
    before = tab.pixels()
    radios[2].click()
    until(lambda: tab.frame() == -1 and not np.array_equal(tab.pixels(), before))
    assert "start=walk%2F2" in tab.run("return location.hash")
    tab.run("""const select = document.getElementById('key-down');
        select.value = '3';
        select.dispatchEvent(new Event('change'));""")
    at = tab.pixels()
    tab.press("s")
    tab.rest()
    assert shift_between(at, tab.pixels()) == -TURN
    tab.press("1")
    tab.rest()
    assert saved_actions(tab)[-2:] == ["turn_right", NAMES[1]]
    tab.browser.find_element(By.ID, "model").send_keys("vectors")
    tab.shows(-1)
    until(lambda: "vectors" in tab.run("return document.title"))
    assert tab.run("return document.getElementById('key-left').value") == "0,1.5"


@needs_chromium
def test_two_people_play_side_by_side_and_leave_nothing_behind(page, browser, session):
    tabs = [page("#model=ring&start=walk/1"), page("#model=ring&start=walk/2")]
    for tab in tabs:
        browser.switch_to.window(tab.handle)
        tab.shows(-1)
        tab.press("a")
        tab.rest()
    assert len(session.play._walks) >= 2
    for tab in tabs:
        browser.switch_to.window(tab.handle)
        browser.get("about:blank")
    until(lambda: session.worker.num_tasks == 0 and not list(session.folder.glob("walk-*")))


@needs_chromium
def test_it_fits_a_phone(page, browser):
    tab = page("#model=ring&start=walk/1").shows(-1)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        until(lambda: tab.run("return innerWidth") == 390)
        script = """const box = (name) => document.querySelector(name).getBoundingClientRect();
            return [box('.screen').width, box('.screen').bottom, box('#pad').top, box('#pad').bottom,
                    document.documentElement.scrollWidth];"""
        until(lambda: tab.run(script)[0] > 300)
        _, bottom, top, end, wide = tab.run(script)
        assert wide <= 390 and bottom <= top and end <= 844, "picture and pad are seen at once"
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

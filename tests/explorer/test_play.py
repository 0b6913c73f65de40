"""Steering over HTTP: starts, steps and their order, cuts, files that are sent and saved, several tabs, limits."""

import http.client
import io
import json
import threading
import time
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from PIL import Image

from dnnlib.video import VideoWriter, iter_video_frames
from explorer import play, starts, walks
from explorer.actions import ActionSpace, action_space, bindings
from explorer.session import Entry, PromptFiles
from explorer.walks import SteeredPrompt
from tests.explorer.helpers import ask, ask_json, error_of, frames_of, serving_entries, unpack, until
from tests.explorer.steered import NAMES, PAST, SIZE, TURN, RingSampler, registered, scene, shift_between, write_dataset
from tests.explorer.toys import Given
from tests.explorer.toys import registered as registered_toys
from training.data.stream_values import read_stream_file
from training.sampling import Prompt, Request, open_sampler, quantize


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Return paths of the models of steered.py, and of their datasets."""
    folder = tmp_path_factory.mktemp("steered")
    with registered(folder) as found:
        found["data"] = str(write_dataset(folder / "data"))
        found["vector-data"] = str(write_dataset(folder / "vector-data", vectors=True))
        yield found


@pytest.fixture
def serve(paths):
    """Serve models of these."""

    def serve_models(*names, data="data", **options):
        files = PromptFiles(paths[data]) if data else None
        return serving_entries([Entry(name, (paths[name],)) for name in names], prompt_files=files, **options)

    yield serve_models
    RingSampler.delay_sec = 0.0
    RingSampler.gate.set()


def post(session, path, body=b"", headers=None, **values):
    """Return status and body of the answer to a request with a body."""
    connection = http.client.HTTPConnection("127.0.0.1", session.port, timeout=30)
    try:
        connection.request("POST", f"{path}?{urlencode(values)}", body=body, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def error(answer, status=400):
    assert answer[0] == status, answer
    return json.loads(answer[1])["error"]


class Walking:
    """A walk, as a page sees it."""

    def __init__(self, session, tab="a", body=b"", **values):
        self.session, self.steps = session, 0
        values = {"model": "ring", "start": "walk/0", "tab": tab, **values}
        status, answer = post(session, "/api/walks", body, **values)
        assert status == 200, answer
        self.take(json.loads(answer))
        assert self.frames == 0

    def take(self, status):
        self.number, self.turn, self.frames = status["walk"], status["turn"], status["frames"]

    def ask_step(self, action, step, turn=None):
        turn = self.turn if turn is None else turn
        return post(self.session, f"/api/walks/{self.number}/step", action=action, step=step, turn=turn)

    def step(self, *actions):
        """Return the frames after some steps."""
        found = []
        for action in actions:
            status, body = self.ask_step(action, self.steps)
            assert status == 200, body
            frames = unpack(body, self.frames)
            self.frames, self.steps = self.frames + len(frames), self.steps + 1
            found.append(frames)
        return np.concatenate(found)

    def cut(self, frame):
        status, body = post(self.session, f"/api/walks/{self.number}/cut", frame=frame)
        assert status == 200, body
        self.take(json.loads(body))
        self.steps = 0

    def seen(self, start, count):
        status, body = ask(self.session, f"/api/walks/{self.number}/frames?start={start}&count={count}")
        assert status == 200, body
        return unpack(body, start)


def save_walk(session, walk, tmp_path):
    """Return the frames and the path of the actions of a saved walk."""
    number = json.loads(post(session, f"/api/walks/{walk.number}/save", fps=25)[1])["clip"]
    until(lambda: ask_json(session, f"/api/clips/{number}")["finished"])
    (tmp_path / "walk.mp4").write_bytes(ask(session, f"/api/clips/{number}/file")[1])
    actions = tmp_path / "walk.actions.json"
    actions.write_bytes(ask(session, f"/api/walks/{walk.number}/actions")[1])
    name = ask_json(session, f"/api/clips/{number}")["name"]
    assert name == f"ring_seed=0_walk={walk.frames}.mp4"
    return np.stack(list(iter_video_frames(tmp_path / "walk.mp4"))), actions


# ----------------------------------------------------------------------------
# Steps.


def test_a_turn_to_the_left_moves_the_picture_to_the_right(serve):
    with serve("ring") as session:
        walk = Walking(session)
        before = walk.seen(-1, 1)[0]
        left = walk.step("turn_left")
        assert left.shape == (1, *SIZE, 3) and shift_between(before, left[0]) == TURN
        assert shift_between(left[0], walk.step("3")[0]) == -TURN
        ahead = walk.step("forward", "none")
        assert shift_between(before, ahead[1]) == 0 and ahead[0].mean() > before.mean() + 1
        assert np.array_equal(ahead[0], ahead[1])


def test_steps_are_those_of_one_rollout(serve, paths):
    names = ("forward", "turn_left", "turn_left", "none", "turn_right", "forward", "turn_left")
    with serve("ring") as session:
        walk = Walking(session, seed=5)
        made = walk.step(*names)
        assert np.array_equal(walk.seen(0, 50), made)
        before = walk.seen(-1, 1)[0]
    sampler = open_sampler([paths["ring"]])
    found = starts.Starts(sampler, paths["data"], None)
    prompt = SteeredPrompt(found.context("walk/0", action_space(sampler, "ring")), 0, Prompt())
    prompt.actions = [NAMES.index(name) for name in names]
    wanted = torch.cat(list(sampler.video(Request([5], 0, len(names), prompt))), dim=1)[0].numpy()
    assert np.array_equal(made, wanted)
    assert np.array_equal(quantize(prompt.frames(-1, 1, SIZE))[0, 0].numpy(), before)


def test_steps_that_come_out_of_order_are_done_in_order(serve):
    with serve("ring") as session:
        wanted = Walking(session, "b").step("turn_left", "forward", "turn_left", "turn_right")
        walk, answers = Walking(session, "a"), {}

        def fetch(step, action):
            answers[step] = walk.ask_step(action, step)

        names = ("turn_left", "forward", "turn_left", "turn_right")
        threads = [threading.Thread(target=fetch, args=item) for item in reversed(list(enumerate(names)))]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join(20)
        for step in range(4):
            assert np.array_equal(unpack(answers[step][1], step), wanted[step : step + 1])


def test_a_step_that_never_comes_is_not_waited_for_long(serve, monkeypatch):
    monkeypatch.setattr(play, "WAIT_SEC", 0.1)
    with serve("ring") as session:
        walk = Walking(session)
        assert "step 3 was asked for: the next one is 0" in error(walk.ask_step("none", 3))
        walk.step("none")
        assert "step 0 was asked for: the next one is 1" in error(walk.ask_step("none", 0))
        assert error(walk.ask_step("none", 1, turn=walk.turn + 7), 410)


def test_vectors_steer_too(serve):
    with serve("vectors", data="vector-data") as session:
        about = ask_json(session, "/api/play/model", model="vectors")
        assert about["ranges"] == [[0, 0.5], [0, 1.5]] and about["bindings"]["up-left"] == "0.5,1.5"
        assert about["bindings"]["still"] == "0,0" and about["bindings"]["left"] == "0,1.5"
        walk = Walking(session, model="vectors")
        before = walk.seen(-1, 1)[0]
        assert shift_between(before, walk.step("0,1.5")[0]) == round(1.5 * TURN)
        assert shift_between(before, walk.step("0,-1.5")[0]) == 0
        words = "the action has 1 numbers: this model takes 2"
        assert words in error(walk.ask_step("1", 2)) and "as an entry" in error(walk.ask_step("1,nan", 2))
        assert "beyond" in error(walk.ask_step("1,99999999", 2))
        saved = json.loads(ask(session, f"/api/walks/{walk.number}/actions")[1])
        assert saved == [[0, 0], [0.5, 1.5], [0.5, 1.5], [0, 1.5], [0, -1.5]]


def test_options_of_the_sampler_are_those_of_the_walk(serve):
    with serve("ring") as session:
        walk = Walking(session, turn=9)
        assert shift_between(walk.seen(-1, 1)[0], walk.step("turn_left")[0]) == 9
        answer = post(session, "/api/walks", model="ring", start="walk/0", tab="a", turn=99)
        assert "turn is 99: use a number from 1 to 12" in error(answer)


# ----------------------------------------------------------------------------
# Undoing.


def test_a_walk_goes_another_way_from_an_earlier_frame(serve):
    with serve("ring") as session:
        walk = Walking(session)
        made = walk.step(*["turn_left"] * 6)
        walk.cut(4)
        assert walk.frames == 4
        other = walk.step("forward", "turn_right")
        assert np.array_equal(walk.seen(0, 9), np.concatenate([made[:4], other]))
        assert shift_between(made[3], other[1]) == -TURN and other[0].mean() > made[3].mean() + 1
        saved = json.loads(ask(session, f"/api/walks/{walk.number}/actions")[1])
        assert saved[PAST:] == ["turn_left"] * 4 + ["forward", "turn_right"]
        walk.cut(0)
        assert np.array_equal(walk.step("turn_left"), made[:1])
        assert "frame 9 was asked for: the walk has 1 frames" in error(
            post(session, f"/api/walks/{walk.number}/cut", frame=9)
        )


def test_a_cut_drops_steps_in_the_queue_and_says_how_far_it_is(serve):
    with serve("ring") as session:
        walk, answers = Walking(session), []
        made = walk.step(*["turn_left"] * 40)
        RingSampler.delay_sec = 0.02
        walk.cut(30)
        until(lambda: (ask_json(session, "/api/progress", tab="a/play") or {"done": 0})["done"] > 3)
        RingSampler.gate.clear()
        assert ask_json(session, "/api/progress", tab="a/play")["goal"] == 30
        thread = threading.Thread(target=lambda: answers.append(walk.ask_step("forward", 0)))
        thread.start()
        until(lambda: session.worker.num_tasks == 2)
        RingSampler.gate.set()
        walk.cut(20)
        thread.join(20)
        assert answers[0][0] == 410
        RingSampler.delay_sec = 0.0
        assert np.array_equal(walk.step("turn_left"), made[20:21])


def test_a_model_that_makes_several_frames_at_once_is_steered_chunk_by_chunk(tmp_path):
    with registered_toys(tmp_path) as paths:
        with serving_entries([Entry("walk", (paths["walk"],))], prompt=Given()) as session:
            walk = Walking(session, model="walk", start="given")
            made = walk.step("3", "0", "1")
            assert made.shape[0] == 12 and made[:, 0, 0, 0].std() > 10
            saved = json.loads(ask(session, f"/api/walks/{walk.number}/actions")[1])
            assert saved == [1, 0, 1, *[3] * 4, *[0] * 4, *[1] * 4]
            walk.cut(7)
            assert walk.frames == 4, "where a chunk ends"
            again = walk.step("0", "1")
            assert np.array_equal(np.concatenate([made[:4], again]), made)


# ----------------------------------------------------------------------------
# Starts.


def as_file(frame, kind):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, kind)
    return file.getvalue()


def test_starts_are_clips_of_the_dataset(serve):
    with serve("ring") as session:
        about = ask_json(session, "/api/play/model", model="ring")
        assert about["starts"] == ["walk/0", "walk/1", "walk/2"] and about["names"] == list(NAMES)
        assert about["bindings"] == {
            "still": "0", "up": "1", "down": None, "left": "2", "right": "3",
            "up-left": None, "up-right": None, "down-left": None, "down-right": None,
        }  # fmt: skip
        status, body = ask(session, "/api/play/start", model="ring", start="walk/2")
        shown = np.asarray(Image.open(io.BytesIO(body)))
        assert status == 200 and np.array_equal(shown, Walking(session, start="walk/2").seen(-1, 1)[0])
        assert np.abs(shown.astype(int) - np.roll(scene(2), TURN * (PAST - 1), axis=1)).mean() < 4
        answer = post(session, "/api/walks", model="ring", start="/etc/passwd", tab="a")
        assert "there is no start '/etc/passwd': use walk/0, walk/1, walk/2" in error(answer)


def test_a_start_may_be_an_image_or_a_clip(serve, tmp_path):
    with serve("ring", data=None) as session:
        assert ask_json(session, "/api/play/model", model="ring")["starts"] == []
        walk = Walking(session, body=as_file(scene(7), "PNG"), start="upload")
        assert np.array_equal(walk.seen(-1, 1)[0], scene(7))
        assert shift_between(scene(7), walk.step("turn_left")[0]) == TURN
        with VideoWriter(tmp_path / "clip.mp4", *SIZE, fps=30, crf=4, enlarge=True) as writer:
            writer.write(np.stack([scene(7), scene(8)]))
        walk = Walking(session, body=(tmp_path / "clip.mp4").read_bytes(), start="upload")
        assert np.abs(walk.seen(-1, 1)[0].astype(int) - scene(8)).mean() < 6
        assert not list(session.folder.glob("upload*")) and not list(session.folder.glob("tmp*"))


def test_a_dataset_beside_the_model_gives_starts(paths, tmp_path):
    (tmp_path / "mine.pkl").write_bytes(open(paths["ring"], "rb").read())
    write_dataset(tmp_path / "mine.starts")
    with serving_entries([Entry("mine", (str(tmp_path / "mine.pkl"),))]) as session:
        assert ask_json(session, "/api/play/model", model="mine")["starts"][0] == "walk/0"
        # Its videos, which are not steered, begin with the clip of their seed, and end with its actions.
        for seed in (0, 1, 4):
            frames = frames_of(session, 0, 9, model="mine", seed=seed)
            first = np.roll(scene(seed % 3), PAST * TURN + seed, axis=1)
            assert len(frames) == 5 and np.abs(frames[0].astype(int) - first).mean() < 6
            error = error_of(session, model="mine", seed=seed, start=5, count=1)
            assert error == "the video ends before frame 5: use a frame before it"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "is no image or clip that is known here"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "is no image or clip that is known here"),
        (b"", "is no image or clip that is known here"),
        (b"\x89PNG\r\n\x1a\nbroken", "the file cannot be used"),
        (b"\x00\x00\x00\x18ftypmp42" + bytes(200), "the file cannot be used"),
        (as_file(np.zeros((3000, 3000, 3), np.uint8), "PNG"), "3000x3000 pixels: use at most 4 million"),
    ],
)
def test_files_that_are_no_picture_or_too_large_are_refused(serve, body, words):
    with serve("ring") as session:
        answer = post(session, "/api/walks", body, model="ring", start="upload", tab="a")
        assert words in error(answer) and str(session.folder) not in str(answer[1])
        Walking(session)


def test_bodies_are_limited_and_only_taken_from_the_page(serve):
    picture = as_file(np.random.RandomState(0).randint(256, size=(200, 200, 3), dtype=np.uint8), "PNG")
    values = {"model": "ring", "start": "upload", "tab": "a"}
    with serve("ring") as session:
        assert post(session, "/api/walks", picture, **values)[0] == 200
        assert post(session, "/api/walks", picture, {"Origin": "http://evil.example"}, **values)[0] == 403
        assert post(session, "/api/walks", picture, {"Host": "evil.example"}, **values)[0] == 403
        assert post(session, "/api/close", picture, tab="a")[0] == 413
        headers = {"Content-Length": str(starts.UPLOAD_BYTES + 1)}
        assert "use at most 16" in error(post(session, "/api/walks", b"", headers, **values), 413)
        for _ in range(2):
            session.play.uploads.acquire()
        assert post(session, "/api/walks", picture, **values)[0] == 503
        for _ in range(2):
            session.play.uploads.release()


# ----------------------------------------------------------------------------
# Files of actions, and saved walks.


def test_a_saved_walk_is_a_clip_with_an_action_for_each_frame(serve, tmp_path):
    names = ["turn_left", "forward", "turn_left"]
    with serve("ring") as session:
        walk = Walking(session)
        made = walk.step(*names)
        video, path = save_walk(session, walk, tmp_path)
        assert len(video) == PAST + 3
        small = video.reshape(len(video), SIZE[0], video.shape[1] // SIZE[0], SIZE[1], -1, 3).mean(axis=(2, 4))
        assert np.abs(small[PAST:] - made).mean() < 4
        values = read_stream_file(path, "actions", list(NAMES), len(NAMES))
        assert values.tolist() == [0, 2, 2, 2, 1, 2], "those of the context come first"
        status, body = post(session, "/api/play/actions", path.read_bytes(), model="ring", name=path.name)
        actions = json.loads(body)["actions"]
        assert status == 200 and actions == ["2", "1", "2"]
        assert np.array_equal(Walking(session).step(*actions), made), "it can be done again"


@pytest.mark.parametrize(
    ("name", "body", "words"),
    [
        ("a.json", b'["none", "jump"]', "the model knows none, forward, turn_left, turn_right"),
        ("a.json", b"[0, 1, 2]", "has 3 actions, and the first 3 are those of the context"),
        ("a.json", b"[0, 1, 2, 99]", "99 at entry 3"),
        ("a.json", b"{", "cannot be read as actions"),
        ("a.exe", b"[0]", "cannot be read as actions: use .json, .npy"),
        ("../../a.csv", b"0\n0\n0\n1,5\n", "a.csv"),
    ],
)
def test_files_of_other_actions_are_refused(serve, name, body, words):
    with serve("ring") as session:
        answer = post(session, "/api/play/actions", body, model="ring", name=name)
        assert words in error(answer) and str(session.folder) not in str(answer[1])


# ----------------------------------------------------------------------------
# Several tabs, and limits.


def test_people_take_turns(serve):
    with serve("ring") as session:
        first, second = Walking(session, "a"), Walking(session, "b", start="walk/1")
        RingSampler.delay_sec = 0.03
        RingSampler.gate.clear()
        answers = []

        def hold(name, walk, action, step):
            answers.append((name, step, walk.ask_step(action, step)[0]))

        steps = [("a", first, "none", step) for step in range(6)]
        threads = [threading.Thread(target=hold, args=step) for step in [*steps, ("b", second, "turn_left", 0)]]
        for number, thread in enumerate(threads, 1):
            thread.start()
            until(lambda number=number: session.worker.num_tasks == number)
        RingSampler.gate.set()
        for thread in threads:
            thread.join(20)
        assert all(status == 200 for _, _, status in answers)
        assert answers.index(("b", 0, 200)) <= 3, "it does not wait for all steps of the other"


def test_a_tab_has_one_walk_and_all_have_few(serve, monkeypatch):
    monkeypatch.setattr(play, "MAX_WALKS", 2)
    with serve("ring") as session:
        old = Walking(session, "a")
        old.step("none")
        other, new = Walking(session, "b"), Walking(session, "a")
        assert "this walk has ended" in error(old.ask_step("none", 1))
        until(lambda: len(list(session.folder.glob("walk-*"))) == 2)
        answer = post(session, "/api/walks", model="ring", start="walk/0", tab="c")
        assert error(answer, 503) == "2 people are playing: try again in a moment"
        monkeypatch.setattr(play, "IDLE_SEC", 0.0)
        Walking(session, "c").step("none")
        assert "others wanted to play" in error(other.ask_step("none", 0))
        new.step("none")
        assert post(session, "/api/close", tab="a")[0] == post(session, "/api/close", tab="c")[0] == 200
        until(lambda: session.worker.num_tasks == 0 and not list(session.folder.glob("walk-*")))


def test_a_walk_is_bounded(serve, monkeypatch):
    monkeypatch.setattr(walks, "MAX_FRAMES", 3)
    with serve("ring") as session:
        walk = Walking(session)
        walk.step("none", "none", "none")
        assert "has 3 frames, more are not kept" in error(walk.ask_step("none", 3))
        assert "64" in error(ask(session, f"/api/walks/{walk.number}/frames?start=0&count=99"))


def test_walks_outlive_their_model_in_memory(paths, serve, monkeypatch):
    monkeypatch.setattr(play, "IDLE_SEC", 0.0)
    monkeypatch.setattr("explorer.session.MAX_OPEN", 1)
    entries = [Entry(name, (paths["ring"],)) for name in ("ring", "again")]
    with serving_entries(entries, prompt_files=PromptFiles(paths["data"])) as session:
        walk = Walking(session, "a")
        made = walk.step("turn_left", "forward")
        Walking(session, "b", model="again").step("none")
        assert list(session._loaded) == list(session.play.known) == ["again"]
        RingSampler.num_frames = 0
        assert shift_between(made[1], walk.step("turn_left")[0]) == TURN
        assert RingSampler.num_frames == 3, "it was done again"


def test_models_that_are_played_stay_in_memory(paths, monkeypatch):
    monkeypatch.setattr("explorer.session.MAX_OPEN", 1)
    entries = [Entry(name, (paths["ring"],)) for name in ("ring", "again")]
    with serving_entries(entries, prompt_files=PromptFiles(paths["data"])) as session:
        Walking(session, "a").step("none")
        answer = ask(session, "/api/play/model", model="again")
        assert "1 models are being played" in error(answer, 503)


def test_models_without_actions_say_so(tmp_path):
    with registered_toys(tmp_path) as paths, serving_entries([Entry("colours", (paths["colours"],))]) as session:
        words = "colours takes no actions, so there is nothing to steer"
        assert words in error(ask(session, "/api/play/model", model="colours"))
        assert words in error(post(session, "/api/walks", model="colours", start="seed", tab="a"))


def test_a_model_that_needs_frames_can_be_opened_to_be_steered(serve, paths):
    with serve("ring", data=None) as session:
        task = session.worker.submit(session.open_any("ring"))
        task.wait(20)
        task.result()
        assert "ring" in session.play.known and "ring" not in session.about
        message = error(ask(session, "/api/model", model="ring"))
        assert "ring needs more than a seed" in message and message.endswith("; or steer it: see Play")


# ----------------------------------------------------------------------------
# Keys.


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["none", "forward", "left", "right"], {"still": "0", "up": "1", "down": None, "left": "2", "right": "3"}),
        (["left", "right", "forward", "pickup"], {"still": None, "up": "2", "left": "0", "right": "1", "down": None}),
        (["MoveForward", "TurnLeft", "noop"], {"still": "2", "up": "0", "left": "1", "right": None}),
        (["noop", "forward_left", "forward", "back"], {"up": "2", "up-left": "1", "left": None, "down": "3"}),
        (["0", "1", "2"], {"still": "0", "up": "1", "left": "2", "right": None}),
        (["no-op", "jump"], {"still": "0", "up": None}),
    ],
)
def test_keys_get_the_actions_whose_names_suit(names, wanted):
    found = bindings(ActionSpace(tuple(names)))
    assert {intent: found[intent] for intent in wanted} == wanted


def test_keys_of_vectors_lead_ahead_and_turn():
    space = ActionSpace(ranges=((-2.0, 8.0), (-5.0, 5.0), (0.0, 1.0)))
    found = bindings(space)
    assert found["up"] == "8,0,0" and found["down"] == "-2,0,0" and found["left"] == "0,5,0"
    assert found["down-right"] == "-2,-5,0" and space.parse(found["up-left"] or "") == (8.0, 5.0, 0.0)
    one = bindings(ActionSpace(ranges=((-1.0, 1.0),)))
    assert one["up"] is None and one["left"] == "1" and one["up-left"] == "1"

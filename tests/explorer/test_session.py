"""The explorer with samplers of every kind: rollouts, prompts, stages, options, videos that end."""

import json
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import view
from explorer.session import Entry
from tests.explorer.helpers import ask, ask_json, error_of, frames_of, serving_entries, until
from tests.explorer.toys import SIZE, Given, Paint, Walk, registered
from training.sampling import Request, open_sampler, quantize


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Return paths of the models of toys.py."""
    with registered(tmp_path_factory.mktemp("toys")) as paths:
        yield paths


@pytest.fixture
def serve(paths):
    """Serve one of these models, or several."""

    def serve_models(*names, **options):
        return serving_entries([Entry(name, (paths[name],)) for name in names], **options)

    Walk.num_chunks = 0
    yield serve_models
    Walk.delay_sec = 0.0


def rollout(path, seed, count, output="video"):
    chunks = open_sampler([path]).frames(Request([seed], 0, count, Given()))
    return torch.cat([chunk["video"] for chunk in chunks], dim=2)


def walk_frames(session, start, count, **values):
    return frames_of(session, start, count, model="walk", **values)


# ----------------------------------------------------------------------------
# Rollouts.


def test_a_rollout_goes_on_from_where_it_is(serve, paths):
    wanted = quantize(rollout(paths["walk"], 3, 90))[0].numpy()
    assert wanted[:, 0, 0, 0].std() > 10
    Walk.num_chunks = 0
    with serve("walk", prompt=Given()) as session:
        about = ask_json(session, "/api/model", model="walk")
        assert about["first"] == 0 and list(about["kinds"]) == ["video"] and about["kinds"]["video"]["block"] == 6
        assert np.array_equal(walk_frames(session, 0, 12, seed=3), wanted[:12])
        assert Walk.num_chunks == 3
        assert np.array_equal(walk_frames(session, 12, 6, seed=3), wanted[12:18])
        assert Walk.num_chunks == 5, "it went on"
        assert np.array_equal(walk_frames(session, 75, 8, seed=3), wanted[75:83])
        assert Walk.num_chunks == 21, "it computed what lies between, once"
        assert np.array_equal(walk_frames(session, 20, 50, seed=3), wanted[20:70])
        assert np.array_equal(walk_frames(session, 0, 6, seed=3), wanted[:6])
        assert Walk.num_chunks == 21, "and kept it"
        assert not np.array_equal(walk_frames(session, 0, 12, seed=4), wanted[:12])


def test_a_rollout_begins_again_where_the_cache_has_forgotten(serve, paths):
    wanted = quantize(rollout(paths["walk"], 3, 90))[0].numpy()
    Walk.num_chunks = 0
    with serve("walk", prompt=Given(), cache_bytes=2 * 6 * 3 * 8 * 16) as session:
        for start, num_chunks in ((60, 17), (66, 18), (0, 20), (30, 27), (24, 27), (2, 29)):
            assert np.array_equal(walk_frames(session, start, 4, seed=3), wanted[start : start + 4])
            assert Walk.num_chunks == num_chunks
    Walk.num_chunks = 0
    with serve("walk", prompt=Given(), cache_bytes=100) as session:  # no block fits
        assert np.array_equal(walk_frames(session, 0, 12, seed=3), wanted[:12])
        assert Walk.num_chunks == 3


def test_grids_of_rollouts_are_made_of_the_frames_of_their_seeds(serve):
    with serve("walk", prompt=Given()) as session:
        grid = walk_frames(session, 9, 8, seed=1, grid="2x2")
        for index in range(4):
            row, column = divmod(index, 2)
            cell = grid[:, 8 * row : 8 * row + 8, 16 * column : 16 * column + 16]
            assert np.array_equal(cell, walk_frames(session, 9, 8, seed=1 + index))


def test_frames_before_the_first_are_refused(serve):
    with serve("walk", prompt=Given()) as session:
        words = "frame -1 was asked for: videos of walk begin at frame 0"
        assert error_of(session, model="walk", start=-1) == words
        status, body = ask(session, "/api/check", model="walk", frame=-1)
        assert status == 400 and json.loads(body)["error"] == words
        assert ask(session, "/api/clips", method="POST", model="walk", start=-1, count=9)[0] == 400


def test_a_jump_far_ahead_says_how_far_it_is_and_can_be_given_up(serve):
    with serve("walk", prompt=Given()) as session:
        walk_frames(session, 0, 1)
        Walk.delay_sec = 0.005
        answers = []
        values = {"model": "walk", "start": 100_000, "tab": "a", "turn": 1}
        thread = threading.Thread(target=lambda: answers.append(ask(session, "/api/frames", **values)))
        thread.start()
        until(lambda: (ask_json(session, "/api/progress", tab="a") or {"done": 0})["done"] > 20)
        assert ask_json(session, "/api/progress", tab="a")["goal"] == 100_002
        assert ask_json(session, "/api/progress", tab="b") is None
        walk_frames(session, 0, 30, seed=9, tab="a", turn=2)
        thread.join(20)
        assert answers[0][0] == 410
        until(lambda: session.worker.num_tasks == 0)
        assert Walk.num_chunks < 1000
        number = json.loads(ask(session, "/api/clips", method="POST", model="walk", start=50_000, count=3)[1])["clip"]
        until(lambda: (ask_json(session, f"/api/clips/{number}")["progress"] or {"done": 0})["done"] > 20)
        ask(session, f"/api/clips/{number}/cancel", method="POST")
        until(lambda: ask(session, f"/api/clips/{number}")[0] == 410)


# ----------------------------------------------------------------------------
# Prompts, and videos that end.


@pytest.mark.parametrize(
    "prompt, words",
    [
        (None, "walk needs more than a seed: 3 frames of context at 8x16 are needed: give --context"),
        (
            Given(has_actions=False),
            "walk needs more than a seed: the stream 'actions' is needed for 1 frames: give --actions",
        ),
    ],
)
def test_what_is_missing_is_said_by_the_page(serve, prompt, words):
    with serve("walk", "colours", prompt=prompt) as session:
        status, body = ask(session, "/api/model", model="walk")
        assert status == 400 and json.loads(body)["error"] == f"{words}; or steer it: see Play"
        assert error_of(session, model="walk").startswith(words)
        assert ask(session, "/api/model", model="colours")[0] == 200


def test_what_is_missing_is_said_by_the_command_which_lets_one_steer_all_the_same(paths, monkeypatch):
    monkeypatch.setattr(view, "_serve", lambda server, session, stop: None)
    result = CliRunner().invoke(view.main, [f"--model={paths['walk']}", "--device=cpu", "--port=0"])
    assert result.exit_code == 0 and "8x16 are needed: give --context; or steer it: see Play" in result.output


def test_videos_end_where_their_actions_do(serve, tmp_path):
    with serve("walk", prompt=Given(num_actions=22)) as session:
        for _ in range(2):  # computed, then from the cache
            assert len(walk_frames(session, 12, 20)) == 8
            assert len(walk_frames(session, 18, 6)) == 2
            for start in (20, 24, 60):
                assert error_of(session, model="walk", start=start) in (
                    "the video ends before frame 20: use a frame before it",
                    "the actions end at frame 22: give more",
                )
        status, body = ask(session, "/api/clips", method="POST", model="walk", start=2, count=50)
        number = json.loads(body)["clip"]
        until(lambda: ask_json(session, f"/api/clips/{number}")["finished"])
        clip = ask_json(session, f"/api/clips/{number}")
        assert clip["done"] == clip["frames"] == 18 and clip["name"] == "walk_seed=0_start=2_len=18_video.mp4"


def test_a_stage_after_a_rollout_reads_its_frames(serve, paths):
    small = rollout(paths["walk"], 2, 40)
    padded = torch.cat([small[:, :, :1], small], dim=2)
    mean = quantize((padded[:, :, :-2] + padded[:, :, 1:-1] + padded[:, :, 2:]) / 3)[0].numpy()
    with serve("cascade", prompt=Given()) as session:
        about = ask_json(session, "/api/model", model="cascade")
        assert [(name, kind["stage"], kind["block"]) for name, kind in about["kinds"].items()] == [
            ("walk", 0, 6), ("smooth", 1, 2), ("side-by-side", 1, 2),
        ]  # fmt: skip
        for start in (0, 25, 7):
            frames = frames_of(session, start, 5, model="cascade", seed=2)
            assert frames.shape == (5, 16, 32, 3)
            assert np.array_equal(frames[:, ::2, ::2], mean[start : start + 5])
        walk = frames_of(session, 3, 9, model="cascade", seed=2, kind="walk")
        assert np.array_equal(walk, quantize(small)[0, 3:12].numpy())
        both = frames_of(session, 3, 9, model="cascade", seed=2, kind="side-by-side")
        assert both.shape == (9, 16, 64, 3) and np.array_equal(both[:, ::2, :32:2], walk)
        assert error_of(session, model="cascade", start=-1).endswith("begin at frame 0")


# ----------------------------------------------------------------------------
# Options.


def test_live_options_are_described_and_checked(serve):
    with serve("colours", options={"contrast": "2", "hidden": 0}) as session:
        about = ask_json(session, "/api/model", model="colours")
        assert [(option["name"], option["kind"], option["default"]) for option in about["options"]] == [
            ("palette", "choice", "warm"), ("contrast", "number", 2.0), ("steps", "whole", 4),
            ("inverted", "flag", False), ("note", "text", None),
        ]  # fmt: skip
        assert (
            about["options"][0]["choices"] == ["warm", "cold"] and about["options"][2]["help"] == "how many there are"
        )
        assert about["first"] is None and list(about["kinds"]) == ["video"]
        values = {"palette": "cold", "steps": 2, "inverted": "true", "note": "a & b"}
        checked = ask_json(session, "/api/check", model="colours", **values)["options"]
        assert checked == {"palette": "cold", "contrast": 2.0, "steps": 2, "inverted": True, "note": "a & b"}
        refused: tuple[tuple[dict[str, Any], str], ...] = (
            ({"palette": "grey"}, "palette is 'grey': use one of warm, cold"),
            ({"steps": 9}, "steps is 9: use a number from 1 to 8"),
            ({"steps": 1.5}, "option steps is '1.5': use a whole number"),
            ({"inverted": "perhaps"}, "use true or false"),
            ({"hidden": 1}, "'hidden' is nothing that can be given here"),
        )
        for values, words in refused:
            assert words in error_of(session, model="colours", **values)


def test_live_options_reach_the_sampler(serve, paths):
    sampler = open_sampler([paths["colours"]])
    with serve("colours", options={"contrast": "2"}) as session:
        for values in ({}, {"palette": "cold"}, {"steps": 1, "inverted": True}, {"note": "abc", "contrast": 0.5}):
            options = Paint(**{"contrast": 2.0, **values})
            (chunk,) = sampler.with_options(options).frames(Request([5], 3, 4))
            frames = frames_of(session, 3, 4, model="colours", seed=5, **values)
            assert np.array_equal(frames, quantize(chunk["video"])[0].numpy()) and frames.shape == (4, *SIZE, 3)
        names = {name.options for name in session.cache._blocks}
        assert len(names) == 4 and frames_of(session, -5, 2, model="colours").shape == (2, *SIZE, 3)


def test_help_imports_no_torch(repo):
    code = "import sys, view; view.main(['--help'], standalone_mode=False); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=repo, check=True, stdout=subprocess.DEVNULL)

"""view.py over HTTP: responses and rejections of its server, its queue and clips, start and stop."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import view
from dnnlib.video import iter_video_frames
from explorer.requests import Answer
from explorer.server import STATIC, Handler, Server
from explorer.session import MAX_CLIPS, Entry, list_entries
from tests.explorer.helpers import (
    FAR,
    ServedSession,
    ask,
    ask_json,
    close,
    error_of,
    frames_of,
    make_networks,
    sampled,
    serving,
    until,
)
from training import network_file
from training.longvideogan.sampling import Sampling
from training.network_file import ModelPath


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Tiny networks and where they are saved."""
    return make_networks(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def session(networks):
    """Return a session whose server is running."""
    with serving(networks[2]) as session:
        yield session


# ----------------------------------------------------------------------------
# Frames.


@pytest.mark.parametrize("kind", ["lres", "sres"])
def test_frames_are_those_that_sample_gives(session, networks, kind):
    for seed, start, count in ((3, 0, 40), (3, 30, 5), (4, -7, 9), (3, FAR + 1, 6)):
        frames = frames_of(session, start, count, kind=kind, seed=seed)
        assert close(frames, sampled(networks[2], kind, seed, start, count))
        assert frames.std() > 10
    assert not close(frames_of(session, 0, 4, kind=kind, seed=3), frames_of(session, 0, 4, kind=kind, seed=4))


def test_a_frame_has_the_same_bits_whichever_way_one_comes_to_it(session, networks):
    whole = frames_of(session, 20, 60, kind="sres", seed=5)
    with serving(networks[2], cache_bytes=100_000) as other:  # a few blocks, so that most are computed again
        for start in (70, 21, 44, 70, 20):
            assert np.array_equal(frames_of(other, start, 7, kind="sres", seed=5), whole[start - 20 : start - 13])
        assert other.cache.num_bytes <= 100_000
        small = frames_of(other, 64, 3, kind="lres", seed=5)
    assert np.array_equal(frames_of(session, 60, 12, kind="lres", seed=5)[4:7], small)


def test_options_reach_the_networks(session, networks):
    for kind in ("lres", "sres"):
        wanted = sampled(networks[2], kind, 1, 10, 6, Sampling(truncation=0.5, temporal_scale=0.25))
        assert close(frames_of(session, 10, 6, kind=kind, seed=1, truncation=0.5, temporal_scale=0.25), wanted)
        assert not close(frames_of(session, 10, 6, kind=kind, seed=1), wanted)


def test_grids_and_pairs_are_made_of_the_frames_of_their_seeds(session):
    grid = frames_of(session, 8, 3, kind="sres", seed=10, grid="2x3")
    assert grid.shape == (3, 72, 192, 3)
    for index in range(6):
        row, column = divmod(index, 3)
        cell = grid[:, 36 * row : 36 * row + 36, 64 * column : 64 * column + 64]
        assert np.array_equal(cell, frames_of(session, 8, 3, kind="sres", seed=10 + index))
    both = frames_of(session, 8, 3, kind="side-by-side", seed=10)
    assert np.array_equal(both[:, :, 64:], frames_of(session, 8, 3, kind="sres", seed=10))
    assert np.array_equal(both[:, ::2, :64:2], frames_of(session, 8, 3, kind="lres", seed=10))


def test_models_say_what_they_have(session):
    assert ask_json(session, "/api/models")["models"] == ["toy", "small", "broken"]
    about = ask_json(session, "/api/model", model="toy")
    assert list(about["kinds"]) == ["lres", "sres", "side-by-side"] and about["first"] is None
    assert about["kinds"]["lres"] == {
        "height": 18,
        "width": 32,
        "block": 32,
        "stage": 0,
        "shows": ["lres"],
        "title": "Low resolution",
    }
    both = {"height": 36, "width": 128, "block": 4, "stage": 1, "shows": ["lres", "sres"], "title": "Side by side"}
    assert about["kinds"]["side-by-side"] == both
    assert [option["name"] for option in about["options"]] == ["truncation", "temporal_scale"]
    assert about["options"][0].items() >= {"kind": "number", "low": 0, "high": 2, "default": 1.0, "choices": []}.items()
    assert list(ask_json(session, "/api/model", model="small")["kinds"]) == ["lres"]
    checked = ask_json(session, "/api/check", model="toy", seed=" 7", grid="2x2", frame=-3, truncation=" 0.50 ")
    assert checked["seed"] == 7 and checked["frame"] == -3 and checked["grid"] == "2x2" and checked["kind"] == "sres"
    assert checked["options"] == {"truncation": 0.5, "temporal_scale": 1.0}


# ----------------------------------------------------------------------------
# What is refused.


@pytest.mark.parametrize(
    "values, words",
    [
        ({"seed": "abc"}, "seed is 'abc': use a whole number"),
        ({"seed": "1.5"}, "use a whole number"),
        ({"seed": ""}, "seed is ''"),
        ({"seed": "9" * 17}, "use a number from"),
        ({"seed": "9" * 5000}, "seed is '9999"),
        ({"count": -4}, "-4 frames were asked for: use a positive number"),
        ({"count": 0}, "0 frames"),
        ({"count": 100_000}, "use at most 256"),
        ({"start": 10**15}, "use a number from"),
        ({"start": "now"}, "start is 'now'"),
        ({"kind": "hres"}, "one of lres, sres, side-by-side"),
        ({"grid": "100x100"}, "a grid of 100x100 was asked for: use 1 to 36 cells"),
        ({"grid": "big"}, "'big' is not a grid"),
        ({"truncation": "nan"}, "truncation is nan: use a number"),
        ({"truncation": "1e999"}, "truncation is inf: use a number"),
        ({"truncation": "low"}, "option truncation is 'low': use a number"),
        ({"truncation": ""}, "option truncation is '': use a number"),
        ({"truncation": "9" * 5000}, "truncation has 5000 letters: use at most 100"),
        ({"truncation": 9}, "truncation is 9.0: use a number from 0 to 2"),
        ({"temporal_scale": 0}, "temporal scale is 0.0: use a positive number"),
        ({"temporal_scale": 9}, "from 0.05 to 8"),
        ({"rng": "legacy"}, "'rng' is nothing that can be given here"),
        ({"speed": 1}, "'speed' is nothing that can be given here"),
        ({"model": "/etc/passwd"}, "there is no model '/etc/passwd' here: use one of toy, small, broken"),
        ({"model": "../toy"}, "there is no model"),
        ({"model": "small", "kind": "sres"}, "kind is 'sres': use one of lres"),
        ({"model": "broken"}, "is damaged"),
        ({"colour": 1}, "'colour' is nothing that can be given here"),
    ],
)
def test_wrong_input_is_answered_in_a_sentence(session, values, words):
    assert words in error_of(session, **values)


def test_what_is_missing_or_said_twice_is_refused(session):
    assert ask(session, "/api/frames?model=toy")[0] == 400
    assert ask(session, "/api/frames?model=toy&start=0&start=1")[0] == 400
    assert ask(session, "/api/frames?" + "&".join(f"a{index}=1" for index in range(50)))[0] == 400


def test_only_the_page_and_its_requests_are_served(session):
    for path in ("/nothing", "/view.py", "/../view.py", "//etc/passwd", "/page/view.html", "/api/clips/x"):
        status, body = ask(session, path)
        assert status == 404 and "there is nothing at" in json.loads(body)["error"]
    assert ask(session, "/api/models", method="POST")[0] == 404
    assert ask(session, "/api/models", method="DELETE")[0] == 501
    assert ask(session, "/api/close", method="POST", headers={"Content-Length": "99999"})[0] == 413


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:8008"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:9000"}, 200),  # a tunnel
        ({"Host": "[::1]:9000"}, 200),
        ({"Host": "localhost:9000", "Origin": "http://localhost:9000"}, 200),
        ({"Host": "localhost:9000", "Origin": "http://localhost:3000"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_other_pages_get_no_answer(session, headers, status):
    assert ask(session, "/api/models", headers=headers)[0] == status


def test_the_page_needs_nothing_from_elsewhere(session):
    for path in STATIC:
        status, body = ask(session, path)
        assert status == 200
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", body.decode())
    connection = http.client.HTTPConnection("127.0.0.1", session.port, timeout=30)
    connection.request("GET", "/")
    assert "default-src 'none'" in str(connection.getresponse().headers["Content-Security-Policy"])
    connection.close()


# ----------------------------------------------------------------------------
# The queue.


@contextlib.contextmanager
def held(session):
    """Keep the session's thread at one step while the block runs; the model is open before."""
    assert ask(session, "/api/model", model="toy")[0] == 200
    begun, gate = threading.Event(), threading.Event()

    def steps():
        begun.set()
        assert gate.wait(60)
        yield

    session.worker.submit(steps(), "holder")
    assert begun.wait(10)
    try:
        yield
    finally:
        gate.set()


def in_threads(*requests):
    """Start requests; gives the list into which their answers come, and how to wait for them."""
    answers: list[Any] = [None] * len(requests)

    def fetch(index, session, values):
        answers[index] = ask(session, "/api/frames", **{"model": "toy", **values})

    threads = [threading.Thread(target=fetch, args=(index, *request)) for index, request in enumerate(requests)]
    for thread in threads:
        thread.start()
    return answers, lambda: [thread.join(20) for thread in threads]


def test_a_jump_drops_what_the_tab_wanted_before(session):
    with held(session):
        answers, wait = in_threads((session, {"seed": 900, "start": 0, "tab": "a", "turn": 1}))
        until(lambda: session.worker.num_tasks == 2)
        later, wait_later = in_threads(
            (session, {"seed": 901, "start": 0, "tab": "a", "turn": 2}),
            (session, {"seed": 902, "start": 0, "tab": "b", "turn": 1}),
        )
        wait()  # it is answered at once, not after the step at hand
        assert answers[0][0] == 410
    wait_later()
    assert [status for status, _ in later] == [200, 200]
    assert {name.seed for name in session.cache._blocks} & {900, 901, 902} == {901, 902}


def test_requests_of_a_closed_connection_or_tab_are_dropped(session):
    with held(session):
        connection = socket.create_connection(("127.0.0.1", session.port))
        request = "GET /api/frames?model=toy&start=0&seed=910 HTTP/1.1\r\nHost: localhost\r\n\r\n"
        connection.sendall(request.encode())
        answers, wait = in_threads((session, {"seed": 911, "start": 0, "tab": "c"}))
        until(lambda: session.worker.num_tasks == 3)
        connection.close()
        assert ask(session, "/api/close", method="POST", tab="c")[0] == 200
        time.sleep(0.3)  # the thread of the closed connection looks every tenth of a second
    wait()
    assert answers[0][0] == 410
    until(lambda: session.worker.num_tasks == 0)
    assert not {name.seed for name in session.cache._blocks} & {910, 911}


def test_the_queue_is_bounded(session):
    limit = session.worker.max_per_owner
    with held(session):
        answers, wait = in_threads(*[(session, {"seed": 920, "start": 0, "tab": "d", "turn": 1})] * limit)
        until(lambda: session.worker.num_tasks == limit + 1)
        status, body = ask(session, "/api/frames", model="toy", start=0, seed=920, tab="d", turn=1)
        assert status == 503 and "try again" in json.loads(body)["error"]
        assert ask(session, "/api/models")[0] == 200, "what needs no network is answered meanwhile"
    wait()
    assert [status for status, _ in answers] == [200] * limit


@pytest.mark.parametrize(
    ("sent", "wait_sec"),
    [
        (b"", 0.5),
        (b"GET /api/models HTTP/1.1\r\nHost: localhost\r\nX: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", 0.3),
        (b"POST /api/close?tab=a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n" + b"a" * 98, 0.3),
    ],
)
def test_a_slow_request_ends_at_its_deadline(networks, sent, wait_sec):
    """The time is that of the request, however often a byte of it comes."""
    handler = partial(Handler, idle_sec=0.5, request_sec=0.3)
    with serving(networks[2], handler=handler) as session:
        with socket.create_connection(("127.0.0.1", session.port), 10) as client:
            begin = time.monotonic()
            client.settimeout(0.02)
            pieces = iter([sent[: len(sent) // 2], *(bytes([byte]) for byte in sent[len(sent) // 2 :])])
            with contextlib.suppress(ConnectionError):
                while time.monotonic() - begin < 5:
                    client.sendall(next(pieces, b""))
                    with contextlib.suppress(TimeoutError):
                        if not client.recv(1000):
                            break
            assert wait_sec - 0.05 < time.monotonic() - begin < wait_sec + 1
        assert ask_json(session, "/api/models")["models"]


def test_a_slow_reader_ends_at_its_deadline(networks):
    class Large(Handler):
        def route(self, method, path, text):
            return Answer(bytes(32 << 20))

    with serving(networks[2], handler=partial(Large, answer_sec=0.1)) as session, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", session.port))
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(1)
        num_bytes = 0
        with contextlib.suppress(ConnectionError):
            while data := client.recv(1 << 20):
                num_bytes += len(data)
        assert 0 < num_bytes < 32 << 20


def test_connections_are_bounded(networks):
    with ServedSession([Entry("toy", (str(networks[2] / "toy-lres.pkl"),))]) as session:
        with Server("127.0.0.1", 0, partial(Handler, session), max_connections=2) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            session.port = server.server_address[1]
            with contextlib.ExitStack() as stack:
                for _ in range(2):
                    stack.enter_context(socket.create_connection(("127.0.0.1", session.port)))
                with pytest.raises(OSError):
                    ask(session, "/api/models")

            def is_free():
                with contextlib.suppress(OSError, http.client.HTTPException):
                    return ask(session, "/api/models")[0] == 200

            until(is_free)
            server.shutdown()


# ----------------------------------------------------------------------------
# Clips.


def make_clip(session, **values):
    status, body = ask(session, "/api/clips", method="POST", **{"model": "toy", "start": 0, "count": 9, **values})
    assert status == 200, body
    return json.loads(body)["clip"]


def test_a_clip_shows_the_frames(session, tmp_path):
    number = make_clip(session, kind="sres", seed=2, start=FAR, count=11, grid="1x2", fps=25)
    until(lambda: ask_json(session, f"/api/clips/{number}")["finished"])
    about = ask_json(session, f"/api/clips/{number}")
    assert about["name"] == f"toy_seeds=2-3_start={FAR}_len=11_grid=1x2_sres.mp4" and about["done"] == 11
    (tmp_path / "clip.mp4").write_bytes(ask(session, f"/api/clips/{number}/file")[1])
    video = np.stack(list(iter_video_frames(tmp_path / "clip.mp4")))
    frames = frames_of(session, FAR, 11, kind="sres", seed=2, grid="1x2")
    assert video.shape == (11, 36 * 4, 128 * 4, 3)
    assert np.abs(video.reshape(11, 36, 4, 128, 4, 3).mean(axis=(2, 4)) - frames).mean() < 3


def test_clips_can_be_given_up_and_are_bounded(session):
    with held(session):
        number = make_clip(session, seed=930)
        status, body = ask(session, f"/api/clips/{number}/file")
        assert status == 400 and "0 of 9 frames so far" in json.loads(body)["error"]
        ask(session, f"/api/clips/{number}/cancel", method="POST")
    until(lambda: ask(session, f"/api/clips/{number}")[0] == 410)
    for seed in range(MAX_CLIPS + 2):
        last = make_clip(session, seed=seed)
        until(lambda number=last: ask_json(session, f"/api/clips/{number}")["finished"])
    assert ask(session, f"/api/clips/{number}")[0] == 400, "the oldest is forgotten"
    assert len(list(session.folder.iterdir())) == MAX_CLIPS
    for values in ({"count": -1}, {"count": 10**6}, {"fps": 0}, {"format": "exe"}, {"model": "x"}, {"seed": "a"}):
        status, body = ask(session, "/api/clips", method="POST", **{"model": "toy", "start": 0, "count": 9, **values})
        assert status == 400, body


# ----------------------------------------------------------------------------
# The command.


def test_models_are_found_by_their_names(networks, tmp_path, monkeypatch):
    folder = networks[2]
    monkeypatch.setattr(network_file, "MODELS", folder)
    assert [(entry.name, len(entry.files)) for entry in list_entries()] == [("broken", 1), ("small", 1), ("toy", 2)]
    files = (ModelPath("runs/a/toy-lres.pkl", "lres"), ModelPath("b.pkl"))
    assert list_entries(files) == [Entry("toy", files)]
    monkeypatch.setattr(network_file, "MODELS", tmp_path)
    result = CliRunner().invoke(view.main, [])
    assert result.exit_code == 1 and "there is no model in" in result.output


def test_what_does_not_start_says_why(networks):
    folder = networks[2]
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    lres = f"--lres={folder / 'toy-lres.pkl'}"
    for arguments, words in (
        ([f"--sres={folder / 'toy-sres.pkl'}"], "frames of context at 18x32 are needed: give --context"),
        ([f"--model={folder / 'toy-sres.pkl'}"], "toy needs more than a seed"),
        ([lres, f"--model={folder / 'small-lres.pkl'}"], "holds a second low-resolution generator: give one"),
        ([lres, "--context=clip.mp4"], "a context was given, but the model takes none"),
        ([lres, "-o", "truncation=low"], "option truncation is 'low': use a number"),
        ([lres, "-o", "rng=legacy"], "depend on the length of the video: leave them out"),
        ([f"--lres={folder / 'missing.pkl'}"], "there is no file"),
        ([lres, f"--port={port}"], "use another --port"),
        ([lres, "--port=99999"], "port 99999 does not exist"),
        ([lres, "--precision=tf32"], "tf32 is for CUDA"),
    ):
        result = CliRunner().invoke(view.main, [*arguments, "--device=cpu"])
        assert result.exit_code != 0 and words in result.output, result.output
    taken.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_starts_and_stops(repo, networks, tmp_path, number):
    folder = networks[2]
    process = subprocess.Popen(
        [
            sys.executable,
            "view.py",
            f"--lres={folder / 'toy-lres.pkl'}",
            f"--sres={folder / 'toy-sres.pkl'}",
            "--port=0",
        ],
        cwd=repo,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        match = re.search(r"Explorer of toy \(\w+, auto\): http://127\.0\.0\.1:(\d+)", first)
        assert match, first + process.stdout.read()
        connection = http.client.HTTPConnection("127.0.0.1", int(match[1]), timeout=30)
        connection.request("POST", "/api/clips?model=toy&kind=sres&start=0&count=9000")  # it is stopped in the middle
        assert connection.getresponse().status == 200
        time.sleep(0.3)
        process.send_signal(number)
        begin = time.monotonic()
        rest = process.communicate(timeout=30)[0]
        assert time.monotonic() - begin < 15
        assert process.returncode == 0 and "Stopped." in rest and "Next: python generate.py" in rest, rest
        assert "Traceback" not in rest and list(tmp_path.glob("longtake*")) == []
    finally:
        process.kill()
        process.wait()

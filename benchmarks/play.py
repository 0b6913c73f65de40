"""Time steering through the explorer's server: frames a second, and the time from a key to its picture, end to end.

python -m benchmarks.play --model PREDICTOR.pkl --context data/labdoom-val
python -m benchmarks.play --model PREDICTOR.pkl --context data/labdoom-val --browser     the same by Chromium's page

Players are processes of their own. Each asks for a step, receives the picture, decodes it, and asks for the next one.
"""

from __future__ import annotations

import http.client
import io
import json
import shutil
import statistics
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any
from urllib.parse import urlencode

import click
import numpy as np
import torch
from PIL import Image

from benchmarks import harness
from explorer.play import Playable
from explorer.server import Handler, Server
from explorer.session import PromptFiles, Session, list_entries
from training.command_line import AUTO, PRECISIONS, model_options, take_model

HEADER = struct.Struct(">qI")  # number of a frame and bytes of its file, as the server sends them
WARM_UP = 8  # steps before the clock starts
INTENTS = ("up", "left", "up", "right")  # what is held in turn
HELD = 10  # steps
TARGETS = {"cpu": (30.0, 60.0), "cuda": (200.0, 60.0)}  # frames a second, and ms from key to picture


@dataclass(frozen=True)
class Player:
    """What a player's process is told."""

    port: int
    values: Mapping[str, Any]  # of the walk
    actions: tuple[str, ...]
    num_steps: int


@dataclass(frozen=True)
class Times:
    """Milliseconds of each step: from the key to the decoded picture, and of these in the queue and in the model."""

    steps: list[float]
    queue: list[float]
    model: list[float]
    num_frames: int
    seconds: float


def play(player: Player) -> Times:
    """Take the steps of one player."""
    connection = http.client.HTTPConnection("127.0.0.1", player.port, timeout=120)

    def post(path: str, **values: Any) -> http.client.HTTPResponse:
        connection.request("POST", f"{path}?{urlencode(values)}")
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(json.loads(response.read())["error"])
        return response

    status = json.loads(post("/api/walks", **player.values).read())
    steps, queue, model, num_frames, begin = [], [], [], 0, 0.0
    for step in range(WARM_UP + player.num_steps):
        pressed = time.perf_counter()
        if step == WARM_UP:
            begin = pressed
        action = player.actions[step // HELD % len(player.actions)]
        response = post(f"/api/walks/{status['walk']}/step", action=action, turn=status["turn"], step=step)
        pictures = decode(response.read())
        took = 1e3 * (time.perf_counter() - pressed)
        if step >= WARM_UP:
            parts = dict(part.split(";dur=") for part in response.headers["Server-Timing"].split(", "))
            steps.append(took)
            queue.append(float(parts["queue"]))
            model.append(float(parts["model"]))
            num_frames += len(pictures)
    return Times(steps, queue, model, num_frames, time.perf_counter() - begin)


def decode(body: bytes) -> list[np.ndarray]:
    """Return the pictures of an answer, uint8 (H, W, 3) each."""
    found, at = [], 0
    while at < len(body):
        _, size = HEADER.unpack_from(body, at)
        at += HEADER.size
        found.append(np.asarray(Image.open(io.BytesIO(body[at : at + size]))))
        at += size
    return found


def measure(port: int, found: Playable, model: str, num_steps: int, num_people: int) -> list[Times]:
    """Return the times of players who steer at once."""
    keys = found.facts()["bindings"]
    actions = tuple(filter(None, (keys[intent] for intent in INTENTS))) or ("0",)
    start = found.starts.names[0]
    values = [{"model": model, "start": start, "seed": seed, "tab": f"player-{seed}"} for seed in range(num_people)]
    players = [Player(port, own, actions, num_steps) for own in values]
    with ProcessPoolExecutor(num_people, mp_context=get_context("spawn")) as pool:
        return list(pool.map(play, players))


def row(what: str, found: Sequence[Times]) -> list[harness.Cell]:
    """Return a row of the table for players who steered at once."""
    steps = [value for times in found for value in times.steps]
    rates = [times.num_frames / times.seconds for times in found]
    outside = [a - b - c for times in found for a, b, c in zip(times.steps, times.queue, times.model, strict=True)]
    model = [value for times in found for value in times.model]
    late = float(np.quantile(steps, 0.95))
    return [what, min(rates), statistics.median(steps), late, statistics.median(model), statistics.median(outside)]


# ----------------------------------------------------------------------------
# The page.


def measure_page(port: int, model: str, start: str, seconds: float) -> tuple[float, float]:
    """Return frames a second and ms from key to picture as the page shows them, while keys are pressed in Chromium."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.get(f"http://localhost:{port}/play#{urlencode({'model': model, 'start': start, 'fps': 60})}")
        until(lambda: driver.execute_script("return document.getElementById('world').dataset.frame") is not None)
        end, keys = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            key = "wawd"[keys % 4]
            webdriver.ActionChains(driver).key_down(key).pause(0.4).key_up(key).pause(0.1).perform()
            keys += 1
        webdriver.ActionChains(driver).key_down("w").pause(2.5).perform()
        texts = [driver.execute_script(f"return document.getElementById('{name}').textContent") for name in PARTS]
        webdriver.ActionChains(driver).key_up("w").perform()
        return float(texts[0].split()[0]), float(texts[1].split()[0])
    finally:
        driver.quit()


PARTS = ("rate", "latency")


def until(condition: Any) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            raise click.ClickException("the page shows no picture after a minute: see the server's messages")
        time.sleep(0.05)


# ----------------------------------------------------------------------------
# The command.


def choose(session: Session) -> str:
    """Return the first model that can be steered, which is opened."""
    reasons = []
    for name in session.models:
        task = session.worker.submit(session.play.open(name))
        task.wait()
        try:
            found = task.result()
        except ValueError as error:
            reasons.append(str(error))
            continue
        if found.starts.names:
            return name
        reasons.append(f"{name} needs frames to begin from: give a dataset as --context")
    raise click.ClickException("; ".join(reasons))


@click.command(help="Time steering through the explorer's server: frames a second, time from a key to its picture.")
@model_options("model", default="the included ones")
@click.option("--context", help="Dataset whose clips walks begin from, as for view.py", metavar="PATH")
@click.option("--steps", help="Steps of each player", type=click.IntRange(min=1), default=300, show_default=True)
@click.option(
    "--people", help="Players at once, in a second row", type=click.IntRange(1, 8), default=2, show_default=True
)
@click.option(
    "--precision", help="As for view.py  [default: auto]", type=click.Choice([AUTO, *PRECISIONS]), default=AUTO
)
@click.option("--browser", help="Also press keys in Chromium and read what its page shows", is_flag=True)
@harness.options(rounds=None)
def main(
    context: str | None, steps: int, people: int, precision: str, browser: bool, json_path: Any, quick: bool,
    threads: int, device: str, **arguments: Any,
) -> None:  # fmt: skip
    """See the module's docstring."""
    given = take_model(arguments)
    steps = min(steps, 12) if quick else steps
    try:
        entries = list_entries(given.models)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    report = harness.begin("play", device, threads, steps=steps, precision=precision)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    files = PromptFiles(context)
    with (
        Session(entries, device, precision, options=given.options, prompt_files=files) as session,
        Server("127.0.0.1", 0, partial(Handler, session)) as server,
    ):
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        model, port = choose(session), server.server_address[1]
        found = session.play.known[model]
        height, width = found.sampler.size
        columns = ["players", "frames/s each", "key to picture, ms", "95 % within, ms", "of it the model", "the rest"]
        note = "The rest is the request, the picture as PNG, and decoding it. Frames are asked for one after another."
        table = harness.Table(f"{model}, {height}x{width}", columns, note=note)
        for number in sorted({1, people}):
            table.rows.append(row(str(number), measure(port, found, model, steps, number)))
        report.add(table)
        if browser:
            shown = measure_page(port, model, found.starts.names[0], 3 if quick else 12)
            page = harness.Table("What the page shows", ["frames/s, at most 60", "key to picture, ms"], [list(shown)])
            report.add(page)
        rate, late = TARGETS[device]
        if not quick:
            first = table.rows[0]
            report.bars.append(harness.Bar("frames a second", rate, float(first[1] or 0)))  # type: ignore[arg-type]
            report.bars.append(harness.Bar("key to picture, 1000 / ms", 1000 / late, 1000 / float(first[2] or 1)))  # type: ignore[arg-type]
        server.shutdown()
    report.finish(json_path)


if __name__ == "__main__":
    main()

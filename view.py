"""Explore the videos of trained networks in a browser: play, jump to any frame, compare seeds, save clips.

# The models that come along, or your own
python view.py
python view.py --lres=LRES.pkl --sres=SRES.pkl

# On a machine without a screen: start it there, make a tunnel here, and open http://localhost:8008
ssh -N -L 8008:127.0.0.1:8008 USER@MACHINE

Networks are paths, URLs or names, as for generate.py; the browser chooses among them, and reaches no other file. The
page needs nothing but this server. docs/explorer.md tells the rest.
"""

import contextlib
import dataclasses
import io
import ipaddress
import os
import re
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

import click
import numpy as np
import torch
from PIL import Image

from explorer import local_server
from explorer import session as studio
from explorer.local_server import LOOK_SEC, Answer, Query, Refused, Server, as_json, shown
from explorer.session import Studio, View, list_models
from generate import check_device, parse_grid
from torch_utils import host_memory
from torch_utils.precision import PRECISIONS
from training.video_files import Plan

PAGE = Path(studio.__file__).with_name("page")
STATIC = {
    "/": ("view.html", "text/html"),
    "/view.css": ("view.css", "text/css"),
    "/view.js": ("view.js", "text/javascript"),
}

FRAME_HEADER = struct.Struct(">qI")  # number of a frame, bytes of the PNG file that follows


# ----------------------------------------------------------------------------
# What is asked, and what is answered.


def read_view(query: Query) -> View:
    """Which videos are meant."""
    return View(
        model=query.text("model"),
        seed=query.whole("seed", 0),
        kind=query.text("kind", "lres"),
        grid=parse_grid(query.text("grid", "1x1")),
        truncation=query.number("truncation", 1.0),
        speed=query.number("speed", 1.0),
    )


def pack(frames: np.ndarray, start: int) -> bytes:
    """uint8 (T, H, W, 3) -> each frame as its number, the size of its PNG file, and this file."""
    parts = []
    for index, frame in enumerate(frames):
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "PNG", compress_level=1)
        parts += [FRAME_HEADER.pack(start + index, file.tell()), file.getvalue()]
    return b"".join(parts)


class Handler(local_server.Handler):
    """Answers the requests of one connection. Nothing is computed here: that is the work of the studio's thread."""

    def __init__(self, studio: Studio, *arguments: Any) -> None:
        self.studio = studio
        super().__init__(*arguments)

    def explain(self, error: Exception) -> Answer:
        """See the base class."""
        if isinstance(error, torch.OutOfMemoryError):
            return as_json({"error": "the GPU has too little memory for this: start with --device=cpu"}, 503)
        return super().explain(error)

    def route(self, method: str, path: str, text: str) -> Answer:
        """The answer to a request."""
        if method == "GET" and path in STATIC:
            name, content_type = STATIC[path]
            return Answer((PAGE / name).read_bytes(), f"{content_type}; charset=utf-8")
        clip = re.fullmatch(r"/api/clips/([0-9]{1,9})(/file|/cancel|)", path)
        name = re.sub(r"/[0-9]+", "/N", path) if clip else path
        handle = {
            "GET /api/models": self.models,
            "GET /api/model": self.model,
            "GET /api/check": self.check,
            "GET /api/frames": self.frames,
            "POST /api/clips": self.make_clip,
            "GET /api/clips/N": self.clip,
            "GET /api/clips/N/file": self.clip_file,
            "POST /api/clips/N/cancel": self.cancel_clip,
            "POST /api/close": self.close_tab,
        }.get(f"{method} {name}")
        if handle is None:
            raise Refused(404, f"there is nothing at {method} {shown(path)}")
        query = Query(text)
        return handle(query, int(clip[1])) if clip else handle(query)

    def models(self, query: Query) -> Answer:
        """What may be looked at."""
        query.finish()
        return as_json({"models": list(self.studio.models), "formats": studio.VIDEO_FORMATS, "fps": Plan.fps})

    def model(self, query: Query) -> Answer:
        """Open a model: what kinds of frames it has, how large they are, how many are computed together."""
        name = query.text("model")
        query.finish()
        about = self.wait(self.studio.worker.submit(self.studio.open(name), f"model {name}"))
        kinds = {
            kind: {"height": height, "width": width, "block": about.blocks[kind]}
            for kind, (height, width) in about.sizes.items()
        }
        limits = {"max_frames": studio.MAX_ANSWER_FRAMES, "max_bytes": studio.MAX_ANSWER_BYTES}
        return as_json({"model": name, "kinds": kinds, **limits})

    def check(self, query: Query) -> Answer:
        """Whether values make sense: gives them back as they are understood, and computes nothing."""
        view, frame = read_view(query), query.whole("frame", 0)
        query.finish()
        self.studio.check_model(view.model)
        studio.check_frames(frame, 1)
        return as_json({**dataclasses.asdict(view), "grid": "{}x{}".format(*view.grid), "frame": frame})

    def frames(self, query: Query) -> Answer:
        """Frames [start, start + count), see `pack`. A later `turn` of a `tab` takes the place of earlier ones."""
        view, start, count = read_view(query), query.whole("start"), query.whole("count", 1)
        tab, turn = query.text("tab", ""), query.whole("turn", 0)
        query.finish()
        frames = self.studio.cached(view, start, count)
        if frames is None:
            steps = self.studio.frames(view, start, count)
            frames = self.wait(self.studio.worker.submit(steps, tab or f"{self.client_address}", turn))
        return Answer(pack(frames, start), "application/octet-stream")

    def make_clip(self, query: Query) -> Answer:
        """Begin a file of frames [start, start + count)."""
        view, start, count = read_view(query), query.whole("start"), query.whole("count")
        fps, file_format, tab = query.number("fps", Plan.fps), query.text("format", "mp4"), query.text("tab", "")
        query.finish()
        return as_json({"clip": self.studio.film(view, start, count, fps, file_format, tab).number})

    def clip(self, query: Query, number: int) -> Answer:
        """How far a clip is."""
        query.finish()
        clip = self.studio.clip(number)
        if clip.task is not None and clip.task.has_ended:
            clip.task.result()
        is_finished = clip.task is not None and clip.task.has_ended
        return as_json({"name": clip.name, "done": clip.done, "frames": clip.num_frames, "finished": is_finished})

    def clip_file(self, query: Query, number: int) -> Answer:
        """The file, once it is finished."""
        query.finish()
        clip = self.studio.clip(number)
        if clip.task is None or not clip.task.has_ended:
            raise ValueError(f"clip {number} has {clip.done} of {clip.num_frames} frames so far: wait for the others")
        clip.task.result()
        disposition = f"attachment; filename*=UTF-8''{quote(clip.name)}"
        return Answer(clip.path, "application/octet-stream", headers={"Content-Disposition": disposition})

    def cancel_clip(self, query: Query, number: int) -> Answer:
        """Give a clip up."""
        query.finish()
        task = self.studio.clip(number).task
        if task is not None:
            task.cancel()
        return as_json({})

    def close_tab(self, query: Query) -> Answer:
        """A tab says good-bye."""
        tab = query.text("tab")
        query.finish()
        self.studio.drop(tab)
        return as_json({})


# ----------------------------------------------------------------------------
# The command.


@click.command(help=re.sub(r"^# ", "\b\n", str(__doc__), flags=re.MULTILINE))
@click.option("--lres", help="Low-resolution network  [default: all models in models/]", metavar="PATH|URL|NAME")
@click.option("--sres", help="Super-resolution network; low resolution only without", metavar="PATH|URL|NAME")
@click.option("--port", help="Where the page is; 0: any that is free", default=8008, show_default=True, type=int)
@click.option(
    "--host", help="The address to listen at; 0.0.0.0 lets the whole network in", default="127.0.0.1", show_default=True
)
@click.option(
    "--cache",
    "cache_mib",
    help="Memory for frames that have been made, in MiB",
    default=512,
    show_default=True,
    type=click.IntRange(min=16),
)
@click.option("--device", help="[default: cuda if there is a GPU]", type=click.Choice(["cpu", "cuda", "mps"]))
@click.option(
    "--precision",
    help="As for generate.py",
    default="fp32",
    show_default=True,
    type=click.Choice(PRECISIONS),
)
@click.option("--trust", help="Run the code that came with the networks: only for files of your own", is_flag=True)
def main(
    lres: str | None,
    sres: str | None,
    port: int,
    host: str,
    cache_mib: int,
    device: str | None,
    precision: str,
    trust: bool,
) -> None:
    """See the module's docstring."""
    device = check_device(device, precision)
    host_memory.keep_freed(device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        models = list_models(lres, sres)
        with stopping() as stop, Studio(models, device, precision, trust, cache_mib << 20) as studio:
            if lres is not None:  # tell at once what is wrong with what was given
                opening = studio.worker.submit(studio.open(models[0].name))
                while not opening.wait(LOOK_SEC) and not stop.is_set():
                    pass
                if opening.has_ended:
                    opening.result()
            with Server(host, port, partial(Handler, studio)) as server:
                _serve(server, studio, stop)
    except (ValueError, OSError, OverflowError) as error:
        raise click.ClickException(_explain(error, host, port)) from error
    click.echo("\nStopped.")
    networks = f"--lres={models[0].lres}" + (f" --sres={models[0].sres}" if models[0].sres else "")
    click.echo(f"Next: python generate.py --outdir=outputs --seed=0 --len=301 {networks}")
    if not studio.has_stopped:  # a network is still at work, in a thread that cannot be interrupted
        sys.stdout.flush()
        os._exit(0)


@contextlib.contextmanager
def stopping() -> Iterator[threading.Event]:
    """Gives an event that Ctrl-C and SIGTERM set, in the main thread; the second one is a KeyboardInterrupt."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(server: Server, studio: Studio, stop: threading.Event) -> None:
    """Answer until told to stop."""
    host, port = server.server_address[:2]
    click.echo(f"Explorer of {', '.join(studio.models)} ({studio.device}, {studio.precision}): {server.url}")
    if is_loopback(str(host)):
        click.echo(
            f"From another machine: ssh -N -L {port}:{host}:{port} {socket.gethostname()}, then the same address"
        )
    else:
        click.echo("Whoever reaches this port may use it: the server knows no passwords.")
    click.echo("Ctrl-C ends it.")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": LOOK_SEC}, daemon=True)
    thread.start()
    stop.wait()
    server.shutdown()


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    return host == "localhost" or ipaddress.ip_address(host).is_loopback


def _explain(error: Exception, host: str, port: int) -> str:
    """One sentence about why it does not start."""
    if isinstance(error, OverflowError):
        return f"port {port} does not exist: use --port from 0 to 65535"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot listen at {host}, port {port} ({error.strerror}): use another --port or --host"
    return str(error)


if __name__ == "__main__":
    main()

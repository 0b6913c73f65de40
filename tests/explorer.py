"""A studio of tiny networks behind a real server, and how its answers are asked for and read."""

import contextlib
import http.client
import io
import json
import threading
import time
from functools import partial
from urllib.parse import urlencode

import numpy as np
import torch
from PIL import Image

import view
from explorer.local_server import Server
from explorer.session import Entry, Studio
from training.checkpoint import save_network
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sampling import Sampling, make_source
from training.longvideogan.sres.generator import SuperResGenerator

FAR = 10_000_000


def make_networks(folder):
    """A pair of tiny networks, saved in a folder among others; and the folder."""
    torch.manual_seed(0)
    lres = LowResGenerator(
        18, 32, 16, 4, 10, 60, 8, 8, temporal_channels=(8, 8, 6, 6), spatial_channels=(4, 4, 4, 4), output_scale=8.0
    )
    sres = SuperResGenerator(36, 64, 18, 32, 2, 8, 8, num_layers=8, channel_base=256, channel_max=4)
    with torch.no_grad():  # untrained networks make pictures of hardly any contrast
        dict(sres.named_parameters())["SG3.synthesis.L8_64_36_3.weight"].mul_(6)
    save_network(lres, folder / "toy-lres.pkl")
    save_network(sres, folder / "toy-sres.pkl")
    save_network(lres, folder / "small-lres.pkl")
    (folder / "broken-lres.pkl").write_bytes(b"no network")
    return lres.eval().requires_grad_(False), sres.eval().requires_grad_(False), folder


class ServedStudio(Studio):
    """A studio that knows where its server is."""

    port = 0


@contextlib.contextmanager
def serving(folder, **options):
    """A studio of the models in a folder and a server for it: gives the studio, which knows its `port`."""
    pair = (str(folder / "toy-lres.pkl"), str(folder / "toy-sres.pkl"))
    entries = [Entry("toy", *pair), Entry("small", str(folder / "small-lres.pkl"))]
    entries.append(Entry("broken", str(folder / "broken-lres.pkl")))
    with ServedStudio(entries, **options) as studio, Server("127.0.0.1", 0, partial(view.Handler, studio)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        studio.port = server.server_address[1]
        yield studio
        server.shutdown()
        thread.join()
    assert studio.has_stopped and not studio.folder.exists()


def ask(studio, path, method="GET", headers=None, **values):
    """Status and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", studio.port, timeout=30)
    try:
        connection.request(method, f"{path}?{urlencode(values)}" if values else path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def ask_json(studio, path, **values):
    status, body = ask(studio, path, **values)
    assert status == 200, body
    return json.loads(body)


def unpack(body, start):
    """uint8 (T, H, W, 3) of what the server sends."""
    file, frames = io.BytesIO(body), []
    while header := file.read(view.FRAME_HEADER.size):
        number, size = view.FRAME_HEADER.unpack(header)
        assert number == start + len(frames)
        frames.append(np.asarray(Image.open(io.BytesIO(file.read(size)))))
    return np.stack(frames)


def frames_of(studio, start, count, **values):
    status, body = ask(studio, "/api/frames", model="toy", start=start, count=count, **values)
    assert status == 200, body
    return unpack(body, start)


def sampled(networks, kind, seed, start, count, sampling=None):
    source = make_source(networks[0], networks[1] if kind == "sres" else None, sampling or Sampling())
    return torch.cat(list(source.sample([seed], start, count)), dim=1)[0].numpy()


def close(a, b):
    """Equal but for the rounding of frames that were computed in other pieces."""
    difference = np.abs(a.astype(int) - b)
    return a.shape == b.shape and difference.max() <= 1 and (difference > 0).mean() < 1e-3


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)

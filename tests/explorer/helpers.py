"""Sessions of tiny networks behind a real server, and helpers that request and parse their answers."""

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

from explorer.requests import FRAME_HEADER
from explorer.server import Handler, Server
from explorer.session import Entry, Session
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sampling import Sampling, open_sampler
from training.longvideogan.sres.generator import SuperResGenerator
from training.network_file import load_bundle, save_network
from training.sampling import Request

FAR = 10_000_000


def make_networks(folder):
    """Save a pair of tiny networks in a folder among others; return the pair and the folder."""
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


class ServedSession(Session):
    """A session that knows where its server is."""

    port = 0


@contextlib.contextmanager
def serving_entries(entries, handler=Handler, **options):
    """Serve models; give the session, which knows its `port`."""
    with ServedSession(entries, **options) as session, Server("127.0.0.1", 0, partial(handler, session)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        session.port = server.server_address[1]
        yield session
        server.shutdown()
        thread.join()
    assert session.has_stopped and not session.folder.exists()


def serving(folder, **options):
    """Serve the models that `make_networks` has saved in a folder."""
    pair = (str(folder / "toy-lres.pkl"), str(folder / "toy-sres.pkl"))
    entries = [Entry("toy", pair), Entry("small", (str(folder / "small-lres.pkl"),))]
    return serving_entries([*entries, Entry("broken", (str(folder / "broken-lres.pkl"),))], **options)


def ask(session, path, method="GET", headers=None, **values):
    """Return status and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", session.port, timeout=30)
    try:
        connection.request(method, f"{path}?{urlencode(values)}" if values else path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def ask_json(session, path, **values):
    status, body = ask(session, path, **values)
    assert status == 200, body
    return json.loads(body)


def unpack(body, start):
    """Return what the server sends as uint8 (T, H, W, 3)."""
    file, frames = io.BytesIO(body), []
    while header := file.read(FRAME_HEADER.size):
        number, size = FRAME_HEADER.unpack(header)
        assert number == start + len(frames)
        frames.append(np.asarray(Image.open(io.BytesIO(file.read(size)))))
    return np.stack(frames)


def frames_of(session, start, count, **values):
    status, body = ask(session, "/api/frames", **{"model": "toy", "start": start, "count": count, **values})
    assert status == 200, body
    return unpack(body, start)


def error_of(session, path="/api/frames", **values):
    """Return the sentence with which a request is refused."""
    status, body = ask(session, path, **{"model": "toy", "start": 0, **values})
    error = json.loads(body)["error"]
    assert status == 400 and len(error) < 300 and "\n" not in error, (status, body)
    return error


def sampled(folder, kind, seed, start, count, sampling=None):
    """Return frames as the sampler of the tiny pair makes them, in one stream."""
    bundles = [load_bundle(folder / f"toy-{name}.pkl") for name in ("lres", "sres")[: 1 + (kind == "sres")]]
    sampler = open_sampler(bundles, vars(sampling or Sampling()))
    return torch.cat(list(sampler.video(Request([seed], start, count))), dim=1)[0].numpy()


def close(a, b):
    """Return whether frames are equal but for the rounding of frames that were computed in other pieces."""
    difference = np.abs(a.astype(int) - b)
    return a.shape == b.shape and difference.max() <= 1 and (difference > 0).mean() < 1e-3


def until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)

"""Two systems that are steered, with pictures that tell what was done: the view turns, and time makes it brighter.

The world is the last frame of the context, bent into a ring. A turn to the left shows what lies to the left, so the
picture moves to the right.
"""

import collections
import contextlib
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dataset_tools import archive
from dataset_tools.frames import encode_jpeg
from training import registry
from training.contract import Bundle
from training.network_file import save_bundle
from training.registry import Spec
from training.sampling import Needs, Sampler, pieces, resolve_options, sampler_option

SIZE, PAST, TURN = (32, 48), 3, 4
NAMES: tuple[str, ...] = ("none", "forward", "turn_left", "turn_right")


class Ring(nn.Module):
    """A network of one number, the brightness that a step forward adds."""

    def __init__(self, step=0.02):
        super().__init__()
        self.options = {"step": step}
        self.step = nn.Parameter(torch.tensor(float(step)))


class VectorRing(Ring):
    """The same as a file of another system."""


@dataclass(frozen=True)
class Steering:
    """Options of the sampler."""

    turn: int = sampler_option(TURN, "pixels that a turn moves the picture", low=1, high=12, live=True)


class RingSampler(Sampler):
    """Turns the ring by the actions; each seed begins at another place of it."""

    Options = Steering
    random_access, block, fps = False, 4, 30.0
    needs = Needs(past=PAST, size=SIZE, streams=("actions",))
    num_frames, delay_sec = 0, 0.0
    gate = threading.Event()  # no frame is made while it is not set
    gate.set()

    def __init__(self, network, options=Steering()):
        self.networks, self.outputs, self.options = [network], {"video": SIZE}, options
        self.num_actions = len(NAMES)

    def frames(self, request):
        (step,) = self.networks[0].parameters()
        ring = request.prompt.frames(-PAST, PAST, SIZE)[:, :, -1]
        before = request.prompt.stream("actions", -PAST, PAST)
        assert before.shape[1] == PAST
        turned, light, frame = list(request.seeds), 0.0, 0
        for count in pieces(request.num_frames, self.block):
            chunk = []
            for _ in range(count):
                time.sleep(RingSampler.delay_sec)
                assert RingSampler.gate.wait(60)
                RingSampler.num_frames += 1
                ahead, left = self.moves(request.prompt.stream("actions", frame, 1)[0, 0])
                light += float(step) * ahead
                turned = [place + round(self.options.turn * left) for place in turned]
                views = [torch.roll(ring[n % len(ring)], place, dims=-1) for n, place in enumerate(turned)]
                chunk.append(torch.stack(views) + light)
                frame += 1
            yield {"video": torch.stack(chunk, dim=2)}

    def moves(self, action):
        return float(action == 1), float(action == 2) - float(action == 3)


class VectorRingSampler(RingSampler):
    """The same, with actions of how far it goes ahead and turns to the left."""

    def __init__(self, network, options=Steering()):
        super().__init__(network, options)
        self.num_actions, self.action_values = None, 2

    def moves(self, action):
        return float(action[0]), float(action[1])


def open_ring(bundles, options):
    return RingSampler(bundles[0].networks["network"], resolve_options(Steering, options, "ring"))


def open_vectors(bundles, options):
    return VectorRingSampler(bundles[0].networks["network"], resolve_options(Steering, options, "vectors"))


HERE = "tests.explorer.steered"
RING = Spec("ring", "a ring", "", "", {f"{HERE}:Ring": "ring"}, f"{HERE}:open_ring")
VECTORS = Spec("vectors", "a ring under vectors", "", "", {f"{HERE}:VectorRing": "ring"}, f"{HERE}:open_vectors")


@contextlib.contextmanager
def registered(folder):
    """Register the systems and save a model of each in a folder; give the paths by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.SYSTEMS, "ring", f"{HERE}:RING")
        patch.setitem(registry.SYSTEMS, "vectors", f"{HERE}:VECTORS")
        paths = {}
        for name, network in (("ring", Ring()), ("vectors", VectorRing())):
            paths[name] = str(folder / f"{name}.pkl")
            vocabularies = {"actions": list(NAMES)} if name == "ring" else {}
            save_bundle(Bundle({"network": network}, name, fps=30.0, vocabularies=vocabularies), paths[name])
        yield paths


def scene(seed=0, size=SIZE):
    """Return a picture uint8 (H, W, 3) in which every place looks different, and that is a ring."""
    height, width = size
    noise = np.random.RandomState(seed).random_sample((height // 4, width // 4, 3))
    picture = Image.fromarray((255 * np.tile(noise, (1, 3, 1))).astype(np.uint8))
    large = picture.resize((3 * width, height), Image.Resampling.BICUBIC)
    return np.asarray(large)[:, width : 2 * width]


def write_dataset(root, vectors=False, num_frames=8):
    """Write three clips of different scenes, in which a player turns to the left; return the root."""
    left = [0.5, 1.5] if vectors else "turn_left"
    with archive.ShardWriter(root, [SIZE], 0) as writer:
        for clip in range(3):
            actions = [None, *[left] * (num_frames - 1)]
            with writer.clip(f"walk/{clip}", facts={}, actions=actions) as add:
                for frame in range(num_frames):
                    add([encode_jpeg(np.roll(scene(clip), TURN * frame, axis=1), 95)])
    facts = {} if vectors else {"actions": list(NAMES)}
    archive.describe_dataset(root, [writer.report(collections.Counter({30: 3}))], 1, (), source="ring", **facts)
    return root


def shift_between(before, after):
    """Return by how many pixels a picture has moved to the right, by phase correlation of grey values (H, W, 3)."""
    spectra = [np.fft.fft2(picture.astype(float).mean(axis=2) - picture.mean()) for picture in (before, after)]
    cross = np.conj(spectra[0]) * spectra[1]
    peak = np.fft.ifft2(cross / np.maximum(np.abs(cross), 1e-9)).real
    width = before.shape[1]
    shift = int(np.unravel_index(peak.argmax(), peak.shape)[1])
    return shift - width if shift > width // 2 else shift

"""Systems with fast samplers: a rollout that needs a prompt, one with two stages, and one with options."""

import contextlib
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from training import registry
from training.contract import Bundle
from training.network_file import save_bundle
from training.registry import Spec
from training.sampling import Needs, Prompt, Sampler, pieces, resolve_options, sampler_option

SIZE = (8, 16)


class Toy(nn.Module):
    """A network of one number, by which frames are shifted."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.options = {"shift": shift}
        self.shift = nn.Parameter(torch.tensor(float(shift)))


class OtherToy(Toy):
    """The same as a file of another system."""


class CascadeToy(Toy):
    """The same as a file of a third system."""


class Walk(Sampler):
    """Frames of one brightness, which decays from the context's and grows by the actions; chunks of four."""

    needs = Needs(past=3, size=SIZE, streams=("actions",))
    random_access, block, num_actions = False, 6, 4
    num_chunks, delay_sec = 0, 0.0

    def __init__(self, network):
        self.networks, self.outputs = [network], {"video": SIZE}

    def frames(self, request):
        assert request.starts == [0] * len(request.seeds)
        (shift,) = self.networks[0].parameters()
        values = request.prompt.frames(-3, 3, SIZE).mean(dim=(1, 2, 3, 4)) + torch.tensor(request.seeds) / 50
        done = 0
        for count in pieces(request.num_frames, 4):
            time.sleep(Walk.delay_sec)
            Walk.num_chunks += 1
            actions = request.prompt.stream("actions", done, count)
            chunk = []
            for index in range(count):
                values = 0.8 * values + 0.3 * actions[:, index] + shift
                chunk.append(values[:, None, None, None].expand(-1, 3, *SIZE).sin())
            yield {"video": torch.stack(chunk, dim=2)}
            done += count


class LabelledWalk(Walk):
    """The first stage of `Cascade`."""

    @property
    def labels(self):
        return {"video": "walk"}


class Smooth(Sampler):
    """Enlarges frames of another stage, each with its neighbours."""

    needs = Needs(past=1, future=1, size=SIZE, follows=True)
    block, live_block = 8, 2

    def __init__(self):
        self.outputs = {"small": SIZE, "video": (16, 32)}

    @property
    def labels(self):
        return {"small": "walk", "video": "smooth"}

    def frames(self, request):
        first, count = request.starts[0], request.num_frames or 0
        window = request.prompt.frames(first - 1, count + 2, SIZE)
        small = window[:, :, 1:-1]
        mean = (window[:, :, :-2] + small + window[:, :, 2:]) / 3
        yield {"small": small, "video": mean.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)}


class Cascade(Sampler):
    """A rollout and what enlarges it."""

    needs, random_access = Walk.needs, False

    def __init__(self, network):
        self.networks, self.both = [network], (LabelledWalk(network), Smooth())
        self.outputs = self.both[1].outputs

    @property
    def stages(self):
        return self.both

    @property
    def labels(self):
        return self.both[1].labels


@dataclass(frozen=True)
class Paint:
    """Options of every kind."""

    palette: str = sampler_option("warm", "which colours", choices=("warm", "cold"), live=True)
    contrast: float = sampler_option(1.0, "how strong they are", low=0.1, high=8, live=True)
    steps: int = sampler_option(4, "how many there are", low=1, high=8, live=True)
    inverted: bool = sampler_option(False, "dark for light", live=True)
    note: str | None = sampler_option(None, "what is written", live=True)
    hidden: int = sampler_option(0, "not for the page")


class Colours(Sampler):
    """Frames of one colour, which depends on all options."""

    Options = Paint
    fps = 12.0

    def __init__(self, network, options):
        self.networks, self.outputs, self.options = [network], {"video": SIZE}, options

    def frames(self, request):
        o = self.options
        time_ = request.starts[0] + torch.arange(request.num_frames or 0) + len(o.note or "")
        value = (
            ((time_ + request.seeds[0]).double().mul(0.3).sin() * o.steps).round().div(o.steps).float() * o.contrast / 8
        )
        value = (-value if o.inverted else value) + o.hidden
        colour = torch.tensor([1.0, 0.5, 0.0] if o.palette == "warm" else [0.0, 0.5, 1.0])
        yield {"video": (colour[None, :, None, None, None] * value[None, None, :, None, None]).expand(1, 3, -1, *SIZE)}


def open_walk(bundles, options):
    return Walk(bundles[0].networks["network"])


def open_cascade(bundles, options):
    return Cascade(bundles[0].networks["network"])


def open_colours(bundles, options):
    return Colours(bundles[0].networks["network"], resolve_options(Paint, options, "colours"))


HERE = "tests.explorer.toys"
WALK = Spec("walk", "a walk", "", "", {f"{HERE}:Toy": "walk"}, f"{HERE}:open_walk")
CASCADE = Spec("cascade", "a walk, enlarged", "", "", {f"{HERE}:CascadeToy": "cascade"}, f"{HERE}:open_cascade")
COLOURS = Spec("colours", "colours", "", "", {f"{HERE}:OtherToy": "colours"}, f"{HERE}:open_colours")


class Given(Prompt):
    """A context of one brightness, and actions up to a frame."""

    def __init__(self, num_actions=10**9, has_actions=True):
        self.num_actions, self.has_actions = num_actions, has_actions

    def frames(self, start, count, size):
        assert start == -3 and count == 3
        return torch.full((1, 3, count, *size), 0.25)

    def stream(self, name, start, count):
        if not self.has_actions:
            return super().stream(name, start, count)
        assert isinstance(start, int)
        if start + count > self.num_actions:
            raise ValueError(f"the actions end at frame {self.num_actions}: give more")
        return torch.arange(start, start + count).square().remainder(4)[None]


@contextlib.contextmanager
def registered(folder):
    """Register the systems and save a model of each in a folder; give the paths by name."""
    with pytest.MonkeyPatch.context() as patch:
        for spec in ("WALK", "CASCADE", "COLOURS"):
            patch.setitem(registry.SYSTEMS, spec.lower(), f"{HERE}:{spec}")
        paths = {}
        for name, network in (("walk", Toy(0.01)), ("cascade", CascadeToy(0.01)), ("colours", OtherToy())):
            paths[name] = str(folder / f"{name}.pkl")
            save_bundle(Bundle({"network": network}, name), paths[name])
        yield paths

"""A tiny system with steps of a millisecond, and helpers of the tests of the loop.

The file is a script as well, `python tiny_gan.py OPTIONS_JSON`, for the tests that need separate processes.
"""

import copy
import dataclasses
import io
import json
import math
import os
import signal
import sys
import time
import zipfile

import numpy as np
import torch
from PIL import Image

from torch_utils import distributed, persistence, training_stats
from training import checkpoint
from training.config import TrainOptions, resolve
from training.contract import BatchSpec, Bundle, FrameClip, Info, Inputs, System
from training.loop import train
from training.random import random_state
from training.sampling import Needs, Sampler, pieces

NUM_FRAMES, SMALL, LARGE = 4, (8, 16), (16, 32)


@persistence.persistent_class
class TinyGenerator(torch.nn.Module):
    """(z, time) -> frames: (N, 4), (T,) -> (N, 3, T, 8, 16)."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 3 * 8 * 16) / 6)
        self.num_calls: torch.Tensor
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, z, time):
        phase = torch.stack([time.sin(), time.cos()], dim=1).to(z)
        z, phase = z[:, None].expand(-1, len(time), -1), phase.expand(len(z), -1, -1)
        frames = torch.cat([z, phase], dim=2) @ self.weight  # (N, T, 3 * 8 * 16)
        return frames.tanh().unflatten(2, (3, 8, 16)).movedim(1, 2)


@dataclasses.dataclass
class TinyOptions:
    gamma: float = 1.0
    lr: float = 0.01
    nan_from: int = 10**9
    enlarges: bool = False  # whether its sampler repeats the pixels of a prompt
    fails_on_rank: int = -1
    signal_step: int = -1
    sleep_sec: float = 0.0


class TinySampler(Sampler):
    """Frames of the generator; or those of its prompt, each pixel repeated, where it enlarges."""

    block = 8

    def __init__(self, network, enlarges):
        self.network, self.networks, self.enlarges = network, [network], enlarges
        self.outputs = {"video": LARGE if enlarges else SMALL}
        if enlarges:
            self.needs = Needs(1, 1, SMALL, follows=True)
            self.outputs = {"small": SMALL, "video": LARGE}

    def frames(self, request):
        z = torch.stack([torch.full((4,), seed / 4) for seed in request.seeds]).to(self.network.weight.device)
        assert len(set(request.starts)) == 1
        first = request.starts[0]
        for count in pieces(request.num_frames, self.block):
            if self.enlarges:
                low = request.prompt.frames(first - 1, count + 2, SMALL)[:, :, 1:-1]
                video = torch.nn.functional.interpolate(low, scale_factor=(1.0, 2.0, 2.0))
                yield {"small": low, "video": video}
            else:
                yield {"video": self.network(z, torch.arange(first, first + count)).detach()}
            first += count


class TinyGAN(System):
    """Honours the contract of a system, with a second batch every other step and a state of its own."""

    Options = TinyOptions
    flips = True

    def __init__(self, options, run):
        super().__init__(options, run)
        if options.fails_on_rank == distributed.get_rank():
            raise ValueError("this machine has no such file")
        torch.manual_seed(run.seed)
        self.G = TinyGenerator().to(run.device)
        self.D = torch.nn.Linear(3 * NUM_FRAMES * 8 * 16, 1).to(run.device)
        self.G_ema = copy.deepcopy(self.G).eval()
        self.modules = {"G": self.G, "D": self.D, "G_ema": self.G_ema}
        self.optimizers = {
            "G": torch.optim.Adam(self.G.parameters(), lr=options.lr),
            "D": torch.optim.Adam(self.D.parameters(), lr=0.01),
        }
        self.strength = 0.0
        self.collector = training_stats.Collector("loss/D_score_real")

    def inputs(self):
        return Inputs(sizes=(LARGE, SMALL) if self.options.enlarges else (SMALL,))

    def batch_spec(self, step):
        return [BatchSpec(NUM_FRAMES, (FrameClip("video", *SMALL, 0, NUM_FRAMES),))] * (1 if step % 2 else 2)

    def step(self, batches, step):
        if step == self.options.signal_step:
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.options.sleep_sec:
            print("sleeping", flush=True)
            time.sleep(self.options.sleep_sec)
        real = next(batches)["video"]
        assert real.dtype == torch.float32 and real.shape[1:] == (3, NUM_FRAMES, *SMALL) and real.abs().max() <= 1
        first = len(real) * distributed.get_rank()
        draws = [random_state("tiny", self.run.seed, f"{step}:{first + i}") for i in range(len(real))]
        z = torch.from_numpy(np.stack([draw.standard_normal(4) for draw in draws])).to(real)
        fake = self.G(z, torch.arange(NUM_FRAMES))
        logits = self.D(fake.flatten(1))
        g_loss = torch.nn.functional.softplus(-logits)
        self._update("G", g_loss)
        score = self.D(real.flatten(1))
        d_loss = torch.nn.functional.softplus(self.D(fake.detach().flatten(1))) + torch.nn.functional.softplus(-score)
        if step % 2 == 0:
            d_loss = d_loss + self.D(next(batches)["video"].flatten(1)).square()
        self._update("D", d_loss * (1 + self.strength))
        with torch.no_grad():
            self.G.num_calls.add_(1)
            self.G_ema.weight.lerp_(self.G.weight, 0.1)
        training_stats.report("loss/D_score_real", score.detach())
        if step % 3 == 2:  # as ADA does: the values of three steps decide about the next ones
            self.collector.update()
            self.strength += 0.1 * self.collector["loss/D_score_real"]
        nan = math.nan if step >= self.options.nan_from else 0.0
        return {
            "loss/G_loss": g_loss.detach(),
            "loss/D_loss": d_loss.detach() + nan,
            "progress/nonfinite_gradients": torch.tensor(2.0 * (step == 3)),
        }

    def _update(self, name, loss):
        self.optimizers[name].zero_grad()
        loss.mean().backward()
        assert distributed.sync_grads(self.modules[name].parameters()) == 0
        self.optimizers[name].step()

    def state_dict(self):
        return {"strength": self.strength, "collector": self.collector.state_dict()}

    def load_state_dict(self, state):
        self.strength = state["strength"]
        self.collector.load_state_dict(state["collector"])

    def init_from(self, source):
        self.G.load_state_dict(source["G"])
        self.G_ema.load_state_dict(source["G_ema"])

    def info(self):
        return Info(f"{float(self.options.gamma)}gamma", preview_frames=20, preview_videos=4)

    def sampler(self):
        return TinySampler(self.G_ema, self.options.enlarges)

    def export(self):
        return Bundle({"network": self.G_ema}, "tiny")


def write_dataset(root, numbers=range(6)):
    """Return clips of 16 frames at two sizes, the larger being the smaller with each pixel repeated."""
    rng = np.random.RandomState(0)
    clips = [rng.randint(0, 256, (16, *SMALL, 3)).astype(np.uint8) for _ in range(max(numbers) + 1)]
    clips = {f"clip{i}": clips[i] for i in numbers}
    for factor, (height, width) in ((1, SMALL), (2, LARGE)):
        folder = root / f"{height:04d}x{width:04d}"
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "part-0.zip", "w") as archive:
            for clip, frames in clips.items():
                for t, frame in enumerate(frames.repeat(factor, axis=1).repeat(factor, axis=2)):
                    data = io.BytesIO()
                    Image.fromarray(frame).save(data, "PNG")
                    archive.writestr(f"{clip}/{t:04d}.png", data.getvalue())
            names = {clip: [f"{t:04d}.png" for t in range(16)] for clip in clips}
            archive.writestr("frame_paths.json", json.dumps(names))
    (root / "dataset.json").write_text('{"fps": 10}')
    return root


def option_maker(dataset, outdir):
    """Return a function that makes the options of a short run below a folder."""

    def make(**changes):
        values = {"steps": 4, "batch": 4, "tick_steps": 2, "checkpoint_steps": 2, "sample_steps": 0, "workers": 0}
        values |= {"outdir": str(outdir), "dataset": str(dataset), "system": "tiny", "model": {"gamma": 1}}
        return resolve(TrainOptions, values | changes)

    return make


def final_state(run_dir, step):
    return checkpoint.load_train_state(checkpoint.train_state_path(run_dir, step))


def assert_equal(first, second, path="state"):
    """Assert that two nested states agree bit for bit."""
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert list(first) == list(second), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), path
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_equal(a, b, f"{path}[{i}]")
    else:
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second, path


def stats_lines(run_dir):
    return [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]


def failing_metric(names, system):
    if "fails" in names:
        raise RuntimeError("on all")
    if distributed.get_rank() == 1:
        raise RuntimeError("on one")
    return [{"results": {name: 0.0}} for name in names]


if __name__ == "__main__":
    train(TinyGAN, resolve(TrainOptions, json.loads(sys.argv[1])), failing_metric)
    distributed.shutdown()

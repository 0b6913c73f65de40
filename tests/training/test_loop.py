"""The loop with a real, tiny GAN: resuming, checkpoints, signals, ranks, previews and what a run leaves behind.

The file is a script as well, `python test_loop.py OPTIONS_JSON`, for the tests that need processes of their own.
"""

import contextlib
import copy
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import IO, cast

import numpy as np
import pytest
import torch
from PIL import Image

from torch_utils import distributed, persistence, training_stats
from training import checkpoint
from training.config import TrainOptions, resolve
from training.dataset import BatchSpec, ClipPart
from training.loop import train
from training.random import random_state

ROOT = Path(__file__).parents[2]
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


class TinyGAN:
    """Honours the contract of a system, with a second batch every other step and a state of its own."""

    def __init__(self, options, device):
        self.options, self.device = {"batch": 4, "seed": 0, "nan_from": 10**9, "enlarges": False} | options, device
        if self.options.get("fails_on_rank") == distributed.get_rank():
            raise ValueError("this machine has no such file")
        torch.manual_seed(self.options["seed"])
        self.G = TinyGenerator().to(device)
        self.D = torch.nn.Linear(3 * NUM_FRAMES * 8 * 16, 1).to(device)
        self.G_ema = copy.deepcopy(self.G).eval()
        self.modules = {"G": self.G, "D": self.D, "G_ema": self.G_ema}
        self.optimizers = {
            "G": torch.optim.Adam(self.G.parameters(), lr=self.options.get("lr", 0.01)),
            "D": torch.optim.Adam(self.D.parameters(), lr=0.01),
        }
        self.strength = 0.0
        self.collector = training_stats.Collector("loss/D_score_real")
        self.needs_condition = self.options["enlarges"]
        self.context = 1
        self.dataset_sizes = [LARGE, SMALL] if self.needs_condition else [SMALL]

    def batch_spec(self, step):
        return [BatchSpec(NUM_FRAMES, (ClipPart("video", *SMALL, 0, NUM_FRAMES),))] * (1 if step % 2 else 2)

    def step(self, batches, step):
        if step == self.options.get("signal_step"):
            os.kill(os.getpid(), signal.SIGUSR1)
        if "sleep_sec" in self.options:
            print("sleeping", flush=True)
            time.sleep(self.options["sleep_sec"])
        real = next(batches)["video"]
        assert real.dtype == torch.float32 and real.shape[1:] == (3, NUM_FRAMES, *SMALL) and real.abs().max() <= 1
        first = len(real) * distributed.get_rank()
        draws = [random_state("tiny", self.options["seed"], f"{step}:{first + i}") for i in range(len(real))]
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
        nan = math.nan if step >= self.options["nan_from"] else 0.0
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

    def preview_spec(self):
        return {"num_frames": 20, "num_videos": 4}

    def sample(self, seeds, start, num_frames, condition=None):
        z = torch.stack([torch.full((4,), seed / 4) for seed in seeds]).to(self.device)
        for first in range(start, start + num_frames, 8):
            count = min(8, start + num_frames - first)
            video = self.G_ema(z, torch.arange(first, first + count)).detach()
            if condition is not None:
                low = condition([first - self.context] * len(seeds), count + 2 * self.context)
                video = torch.nn.functional.interpolate(low[:, :, 1:-1], scale_factor=(1.0, 2.0, 2.0))
            yield (video * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)

    def export(self):
        return self.G_ema


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Six clips of 16 frames at two sizes, the larger being the smaller with each pixel repeated."""
    root = tmp_path_factory.mktemp("data") / "stripes"
    rng = np.random.RandomState(0)
    clips = {f"clip{i}": rng.randint(0, 256, (16, *SMALL, 3)).astype(np.uint8) for i in range(6)}
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


@pytest.fixture
def options(dataset, tmp_path):
    """A function that makes the options of a short run in a folder of the test's own."""

    def make(**changes):
        values = {"steps": 4, "batch": 4, "tick_steps": 2, "checkpoint_steps": 2, "sample_steps": 0, "workers": 0}
        values |= {"outdir": str(tmp_path / "runs"), "dataset": str(dataset), "system": "tiny", "model": {"gamma": 1}}
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


def test_a_run_leaves_what_it_promises(options, capsys):
    result = train(TinyGAN, options(sample_steps=4))
    assert result.finished and result.step == 4
    run_dir = result.run_dir
    assert run_dir.name == "00000-stripes-4batch-1accum-1.0gamma"
    names = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    assert names == {
        "options.json",
        "environment.txt",
        "log.txt",
        "stats.jsonl",
        "curves.png",
            *(f"checkpoints/ckpt-{step:08d}-{kind}" for step in (0, 2, 4) for kind in ("G-ema.pkl", "train.pt")),
        *(f"samples/{name}.{kind}" for name in ("real-0008x0016", "fake-00000000", "fake-00000004")
          for kind in ("mp4", "png")),
    }  # fmt: skip
    log = (run_dir / "log.txt").read_text()
    assert capsys.readouterr().out.endswith(log)
    assert [line.endswith("nonfinite gradients 2") for line in log.splitlines() if line.startswith("step ")] == [
        False,
        False,
        True,
    ]
    line = next(line for line in log.splitlines() if line.startswith("step 2"))
    assert "  sec/step 0.0" in line and "  eta 0s" in line and "  loss/D_loss " in line and "cpumem" in line
    assert "  kimg/s " in line and "  data wait " in line
    lines = stats_lines(run_dir)
    assert [line["progress/step"]["mean"] for line in lines] == [0, 2, 4]
    assert [line["progress/tick"]["mean"] for line in lines] == [0, 1, 2]
    assert lines[1]["loss/D_loss"]["num"] == 8 and lines[1]["loss/D_loss"]["std"] > 0
    assert "loss/D_loss" not in lines[0] or lines[0]["loss/D_loss"]["num"] == 0
    assert lines[1]["timing/sec_per_step"]["mean"] > 0 and lines[2]["timing/total_sec"]["mean"] > 0
    sec, speed = lines[1]["timing/sec_per_step"]["mean"], lines[1]["progress/kimg_per_sec"]["mean"]
    assert speed == pytest.approx(4 / 1000 / sec, rel=1e-5) and 0 < lines[1]["timing/data_wait_sec"]["mean"] < 2 * sec
    assert json.loads((run_dir / "options.json").read_text()) == final_state(run_dir, 4)["options"]
    assert torch.__version__ in (run_dir / "environment.txt").read_text()


def test_previews_show_the_videos(options, dataset):
    samples = train(TinyGAN, options(steps=1, model={"enlarges": True})).run_dir / "samples"
    fake, small, large = (
        np.asarray(Image.open(samples / f"{name}.png")).astype(int)
        for name in ("fake-00000001", "real-0008x0016", "real-0016x0032")
    )
    # Four rows of eight frames. The tiny system only repeats the pixels of its condition, as the larger clips do.
    assert large.shape == fake.shape == (4 * 16, 8 * 32, 3) and large.std() > 50
    assert np.array_equal(small.repeat(2, axis=0).repeat(2, axis=1), large)
    assert np.abs(fake - large).max() <= 1
    assert len(np.unique(large.reshape(4, 16, 8, 32, 3).swapaxes(1, 2).reshape(32, -1), axis=0)) == 32
    assert (samples / "fake-00000001.mp4").stat().st_size > 1000


def test_a_resumed_run_equals_an_uninterrupted_one(options, tmp_path):
    whole = train(TinyGAN, options(steps=7, checkpoint_steps=0, outdir=str(tmp_path / "whole"))).run_dir
    for steps in (2, 5, 7):
        result = train(TinyGAN, options(steps=steps, workers=steps % 2))
    assert [path.name for path in result.run_dir.parent.iterdir()] == [result.run_dir.name]
    resumed_state, whole_state = final_state(result.run_dir, 7), final_state(whole, 7)
    for part in ("modules", "optimizers", "system"):
        assert_equal(resumed_state[part], whole_state[part], part)
    assert resumed_state["loop"]["num_batches"] == whole_state["loop"]["num_batches"] == 11
    assert whole_state["system"]["strength"] != 0
    assert [line["step"] for line in stats_lines(whole)] == [0, 2, 4, 6, 7]
    assert [line["step"] for line in stats_lines(result.run_dir)] == [0, 2, 4, 5, 6, 7]
    assert (result.run_dir / "environment.txt").read_text().count("command ") == 3


def test_a_finished_run_stays_as_it_is(options):
    run_dir = train(TinyGAN, options()).run_dir
    before = {path: path.read_bytes() for path in run_dir.rglob("*train.pt")}
    stats = (run_dir / "stats.jsonl").read_text()
    result = train(TinyGAN, options())
    assert result.finished and result.step == 4 and result.run_dir == run_dir
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*train.pt")}
    assert (run_dir / "stats.jsonl").read_text() == stats


def test_a_truncated_checkpoint_falls_back_to_the_one_before(options, capsys):
    run_dir = train(TinyGAN, options()).run_dir
    expected = final_state(run_dir, 4)
    newest = checkpoint.train_state_path(run_dir, 4)
    newest.write_bytes(newest.read_bytes()[:-100])
    assert train(TinyGAN, options()).run_dir == run_dir
    assert "ckpt-00000004-train.pt is not a whole training state" in capsys.readouterr().out
    assert_equal(final_state(run_dir, 4)["modules"], expected["modules"])
    assert [line["step"] for line in stats_lines(run_dir)] == [0, 2, 4]


def test_a_run_that_died_before_its_first_checkpoint_begins_anew_in_place(options):
    run_dir = train(TinyGAN, options()).run_dir
    for path in run_dir.glob("checkpoints/*"):
        path.unlink()
    assert train(TinyGAN, options()).run_dir == run_dir
    assert [line["step"] for line in stats_lines(run_dir)] == [0, 2, 4]


def test_other_options_are_another_run(options):
    first = train(TinyGAN, options(steps=1)).run_dir
    assert train(TinyGAN, options(steps=1, seed=1)).run_dir.name.startswith("00001-")
    assert train(TinyGAN, options(steps=2)).run_dir == first
    assert train(TinyGAN, options(steps=1, resume="never")).run_dir.name.startswith("00002-")
    changed = options(batch=8, model={"gamma": 2, "lr": 1}, resume=str(first))
    message = (
        r"(?s)model.gamma: 1 in the run, 2 .*model.lr: \(absent\) in the run, 1 .*batch: 4 in the run, 8 asked for"
    )
    with pytest.raises(ValueError, match=message):
        train(TinyGAN, changed)
    with pytest.raises(ValueError, match="seed: 0 in the run, 5 asked for"):
        train(TinyGAN, options(seed=5, resume="latest"))
    with pytest.raises(ValueError, match="no run directory"):
        train(TinyGAN, options(resume=str(first / "samples")))
    assert len(list(first.parent.iterdir())) == 3


def test_overriding_changes_the_run_from_here_on(options, tmp_path):
    run_dir = train(TinyGAN, options(steps=2)).run_dir
    changed = {"steps": 4, "resume": "latest", "model": {"gamma": 1, "lr": 0.5}}
    with pytest.raises(ValueError, match=r"model.lr: \(absent\) in the run, 0.5 asked for"):
        train(TinyGAN, options(**changed))
    assert train(TinyGAN, options(**changed, override=True)).run_dir == run_dir
    assert "override model.lr: (absent) in the run, 0.5 asked for" in (run_dir / "log.txt").read_text()
    state = final_state(run_dir, 4)
    assert (
        state["optimizers"]["G"]["param_groups"][0]["lr"] == 0.5 and state["optimizers"]["G"]["state"][0]["step"] == 4
    )
    assert train(TinyGAN, options(steps=5, model=changed["model"])).run_dir == run_dir


def test_one_training_state_begins_a_branch_that_is_continued(options):
    trunk = train(TinyGAN, options(steps=4)).run_dir
    origin = checkpoint.train_state_path(trunk, 2)
    branch = train(TinyGAN, options(steps=3, resume=str(origin), checkpoint_steps=0)).run_dir
    assert branch != trunk and json.loads((branch / "options.json").read_text())["origin"] == str(origin)
    assert [step for step, _ in checkpoint.list_checkpoints(branch)] == [2, 3]
    origin.unlink()  # as pruning the trunk may do
    assert train(TinyGAN, options(steps=4, resume=str(origin))).run_dir == branch
    for part in ("modules", "optimizers", "system"):
        assert_equal(final_state(branch, 4)[part], final_state(trunk, 4)[part], part)
    assert train(TinyGAN, options(steps=5)).run_dir == trunk and len(list(trunk.parent.iterdir())) == 2
    with pytest.raises(ValueError, match="seed: 0 in the run, 1 asked for"):
        train(TinyGAN, options(resume=str(checkpoint.train_state_path(trunk, 4)), seed=1))
    changed = {"resume": str(checkpoint.train_state_path(trunk, 4)), "override": True, "seed": 1}
    other = train(TinyGAN, options(**changed)).run_dir
    assert train(TinyGAN, options(**changed)).run_dir == other and len(list(trunk.parent.iterdir())) == 3
    with pytest.raises(
        ValueError, match="ckpt-00000009-train.pt is not a whole.*before it there is .*00000005-train.pt"
    ):
        train(TinyGAN, options(resume=str(checkpoint.train_state_path(trunk, 9))))
    assert len(list(trunk.parent.iterdir())) == 3


def test_a_new_run_may_begin_with_weights_of_another(options):
    source = final_state(train(TinyGAN, options(steps=3)).run_dir, 3)
    path = str(checkpoint.train_state_path(Path(options().outdir) / "00000-stripes-4batch-1accum-1.0gamma", 3))
    tuned = train(TinyGAN, options(steps=0, init_from=path)).run_dir
    begun = final_state(tuned, 0)
    assert_equal(begun["modules"]["G_ema"], source["modules"]["G_ema"])
    assert begun["optimizers"]["G"]["state"] == {} and begun["loop"]["step"] == 0
    with pytest.raises(ValueError, match="is a folder, expected a network: pass"):
        train(TinyGAN, options(init_from=str(Path(path).parent), resume="never"))
    assert len(list(tuned.parent.iterdir())) == 2, "a run that cannot begin leaves no directory"
    Path(path).unlink()  # only a run that begins needs it
    assert train(TinyGAN, options(steps=1, init_from=path)).run_dir == tuned


def test_checkpoints_are_written_by_the_clock(options):
    asked = options(steps=3, checkpoint_steps=0, checkpoint_minutes=1e-9, keep=9)
    assert [step for step, _ in checkpoint.list_checkpoints(train(TinyGAN, asked).run_dir)] == [0, 1, 2, 3]


def test_a_metric_that_fails_is_logged_and_measured_again_at_the_next_start(options):
    failing = [True]

    def metric_fn(names, system):
        if failing[0]:
            raise RuntimeError("no memory left")
        return [{"results": {name: 1.0}} for name in names]

    asked = options(metrics=("distance",))
    run_dir = train(TinyGAN, asked, metric_fn).run_dir
    assert (
        "step 4  metric/distance failed (RuntimeError: no memory left); training goes on"
        in (run_dir / "log.txt").read_text()
    )
    failing[0] = False
    train(TinyGAN, asked, metric_fn)
    lines = [json.loads(line) for line in (run_dir / "metric-distance.jsonl").read_text().splitlines()]
    assert [line.get("error") for line in lines] == ["RuntimeError: no memory left"] * 2 + [None]


def test_metrics_share_one_pass_and_one_that_fails_costs_no_other(options):
    asked = []

    def metric_fn(names, system):
        asked.append(tuple(names))
        if "broken" in names:
            raise ValueError("clips are too short")
        return [{"results": {name: 2.0}} for name in names]

    run_dir = train(TinyGAN, options(metrics=("distance", "broken", "other")), metric_fn).run_dir
    assert asked[:4] == [("distance", "broken", "other"), ("distance",), ("broken",), ("other",)]
    texts = {name: (run_dir / f"metric-{name}.jsonl").read_text() for name in asked[0]}
    assert "clips are too short" in texts["broken"]
    for name in ("distance", "other"):
        assert json.loads(texts[name].splitlines()[-1])["results"] == {name: 2.0}

    asked.clear()
    assert train(TinyGAN, options(metrics=("distance", "more", "other", "third")), metric_fn).run_dir == run_dir
    assert asked == [("more", "third")]


def test_old_checkpoints_are_pruned_and_the_best_stays(options):
    measured = []

    def metric_fn(names, system):
        measured.append((*names, int(system.G.num_calls)))
        return [{"results": {name: abs(system.G.num_calls.item() - 3)}, "num_fake": 1} for name in names]

    asked = options(steps=7, checkpoint_steps=1, metric_steps=1, keep=2, metrics=("distance",))
    run_dir = train(TinyGAN, asked, metric_fn).run_dir
    assert [step for step, _ in checkpoint.list_checkpoints(run_dir)] == [3, 6, 7]
    assert sorted(path.name[5:13] for path in run_dir.glob("checkpoints/*.pkl")) == ["00000003", "00000006", "00000007"]
    lines = [json.loads(line) for line in (run_dir / "metric-distance.jsonl").read_text().splitlines()]
    assert [(line["step"], line["results"]["distance"]) for line in lines] == [(s, abs(s - 3)) for s in range(8)]
    assert lines[3]["checkpoint"] == "ckpt-00000003-G-ema.pkl"
    log = (run_dir / "log.txt").read_text()
    assert [step for step in range(8) if f"step {step}  metric/distance {abs(step - 3)}  best so far" in log] == [
        0,
        1,
        2,
        3,
    ]
    assert json.loads((run_dir / "best.json").read_text()) == {
        "metric": "distance",
        "step": 3,
        "checkpoint": "checkpoints/ckpt-00000003-G-ema.pkl",
        "results": {"distance": 0.0},
    }

    # A metric asked for later is measured at the end of the finished run; what is known is not measured again.
    measured.clear()
    train(TinyGAN, options(steps=7, checkpoint_steps=1, metrics=("distance", "other")), metric_fn)
    assert measured == [("other", 7)]

    # It stays the best, and is kept, where nothing is measured any more.
    train(TinyGAN, options(steps=9, checkpoint_steps=1, keep=1), metric_fn)
    assert [step for step, _ in checkpoint.list_checkpoints(run_dir)] == [3, 9]

    # Another metric given first decides from then on; the run goes back to the step that is left.
    (checkpoint.train_state_path(run_dir, 9)).unlink()
    train(TinyGAN, options(steps=4, metrics=("other",)), metric_fn)
    assert json.loads((run_dir / "best.json").read_text())["metric"] == "other"


def test_a_loss_that_stays_nan_stops_the_run(options):
    asked = options(steps=12, model={"nan_from": 5}, checkpoint_steps=1, keep=2)
    with pytest.raises(ValueError, match=r"loss/D_loss has not been finite since step 6.*ckpt-00000004-train.pt"):
        train(TinyGAN, asked)
    (run_dir,) = Path(asked.outdir).iterdir()
    assert [step for step, _ in checkpoint.list_checkpoints(run_dir)] == [4, 6, 7], "the last good one is kept"
    lines = stats_lines(run_dir)
    assert lines[3]["loss/D_loss"]["nonfinite"] == 4 and lines[3]["loss/D_loss"]["num"] == 4
    assert lines[4]["loss/D_loss"]["mean"] is None


def test_what_does_not_fit_is_refused_before_anything_is_written(options):
    for changes, message in [
        ({"batch": 5, "grad_accum": 2}, "batch of 5 does not divide by 1 ranks x 2 rounds.*use a batch of 4 or 6"),
        ({"resume": "latest"}, "no run to resume"),
        ({"dataset": "/nowhere"}, "/nowhere is not a folder"),
        ({"log": ("wandbb",)}, "did you mean wandb"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(TinyGAN, options(**changes))
    with pytest.raises(ValueError, match="did you mean longvideogan-lres"):
        train("longvideogan-lers", options())
    assert not Path(options().outdir).exists()


def test_a_signal_ends_the_run_after_the_step_and_changes_nothing(options, capsys, tmp_path):
    model = {"signal_step": 2}
    handlers = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGINT)
    stopped = train(TinyGAN, options(checkpoint_steps=0, model=model))
    assert not stopped.finished and stopped.step == 3
    assert handlers == (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGINT))
    assert "Stopped at step 3, everything is saved; to continue: python " in capsys.readouterr().out
    finished = train(TinyGAN, options(checkpoint_steps=0, model=model))
    assert finished.finished and finished.run_dir == stopped.run_dir
    whole = train(TinyGAN, options(outdir=str(tmp_path / "whole")))
    for part in ("modules", "optimizers", "system"):
        assert_equal(final_state(finished.run_dir, 4)[part], final_state(whole.run_dir, 4)[part], part)
    # The tick that the signal fell into counts all of its steps.
    assert [line["loss/D_loss"] for line in stats_lines(finished.run_dir)[1:]] == [
        line["loss/D_loss"] for line in stats_lines(whole.run_dir)[1:]
    ]


@contextlib.contextmanager
def start(options, *launcher, limit_bytes=None):
    """A process that runs this file as a script with the options given, its output in one stream."""

    def limit():
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    command = [sys.executable, *launcher, __file__, json.dumps(vars(options))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, text=True, preexec_fn=limit, **pipes) as process:
        try:
            yield process, cast(IO[str], process.stdout)
        finally:
            process.kill()


def read_until(stream, text):
    lines = []
    for line in stream:
        lines.append(line)
        if text in line:
            return
    raise AssertionError("".join(lines))


@pytest.mark.slow
def test_a_terminated_process_leaves_a_run_that_can_be_continued(options):
    asked = options(steps=10**6, tick_steps=50, checkpoint_steps=0)
    with start(asked) as (process, stream):
        read_until(stream, "step 50 ")
        process.send_signal(signal.SIGTERM)
        output = stream.read()
        assert process.wait(60) == 0
    assert f"to continue: python {__file__} " in output
    (run_dir,) = Path(asked.outdir).iterdir()
    (step, _), *_ = checkpoint.list_checkpoints(run_dir)
    assert step > 50 and f"Stopped at step {step}" in output
    assert not list(run_dir.glob("checkpoints/.*")) and checkpoint.network_path(run_dir, step).is_file()
    result = train(TinyGAN, options(steps=step + 1, tick_steps=50, checkpoint_steps=0))
    assert result.run_dir == run_dir and result.finished


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(options):
    with start(options(steps=10**6, tick_steps=50, model={"sleep_sec": 60})) as (process, stream):
        read_until(stream, "sleeping")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        read_until(stream, "twice stops at once")
        time.sleep(1.5)  # two at once are one: torchrun passes on what the terminal has sent already
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in stream.read()
        assert process.wait(60) != 0


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint_and_no_training(options, tmp_path):
    run_dir = train(TinyGAN, options(steps=2)).run_dir
    before = {path: path.read_bytes() for path in run_dir.glob("checkpoints/*")}
    with start(options(steps=6), limit_bytes=20_000) as (process, stream):
        output = stream.read()
        assert process.wait(60) == 1
    assert "Step 4 was not saved in" in output and "File too large" in output and "Training goes on" in output
    assert "Step 6 was not saved in" in output.splitlines()[-1] and "ckpt-00000002-train.pt. Make room" in output
    assert before == {path: path.read_bytes() for path in run_dir.glob("checkpoints/*")}
    assert not list(run_dir.glob("checkpoints/.*"))
    assert train(TinyGAN, options(steps=6)).run_dir == run_dir
    whole = train(TinyGAN, options(steps=6, outdir=str(tmp_path / "whole"))).run_dir
    assert_equal(final_state(run_dir, 6)["modules"], final_state(whole, 6)["modules"])


@pytest.mark.slow
def test_a_rank_that_cannot_begin_does_not_leave_the_others_waiting(options):
    asked = options(model={"fails_on_rank": 1})
    with start(asked, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2") as (ranks, stream):
        output = stream.read()
        assert ranks.wait(60) != 0
    assert "SharedError: this machine has no such file" in output
    assert "SharedError: rank 1: this machine has no such file" in output
    assert not Path(asked.outdir).exists()


@pytest.mark.slow
def test_two_ranks_equal_one(options, tmp_path):
    one = train(TinyGAN, options(steps=5, outdir=str(tmp_path / "one"))).run_dir
    asked = options(steps=5, metrics=("fails", "fails-on-1"))
    with start(asked, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2") as (ranks, stream):
        output = stream.read()
        assert ranks.wait(60) == 0, output
    assert output.count("step 5  metric/fails failed (RuntimeError: on all); training goes on") == 1
    assert output.count("step 5  metric/fails-on-1 failed (RuntimeError: rank 1: on one); training goes on") == 1
    (two,) = Path(options().outdir).iterdir()
    assert "batch    4 clips: 2 ranks" in output and output.count("Finished 5 steps") == 1
    states = final_state(one, 5), final_state(two, 5)
    for name, module in states[0]["modules"].items():
        for key, tensor in module.items():
            assert torch.allclose(tensor, states[1]["modules"][name][key], rtol=0, atol=1e-5), (name, key)
    assert states[0]["system"]["strength"] == pytest.approx(states[1]["system"]["strength"], rel=1e-4) != 0
    assert stats_lines(one)[1]["loss/D_loss"] == pytest.approx(stats_lines(two)[1]["loss/D_loss"], rel=1e-5)

    # The run of two ranks goes on with one.
    assert train(TinyGAN, options(steps=6)).run_dir == two


def failing_metric(names, system):
    if "fails" in names:
        raise RuntimeError("on all")
    if distributed.get_rank() == 1:
        raise RuntimeError("on one")
    return [{"results": {name: 0.0}} for name in names]


if __name__ == "__main__":
    train(TinyGAN, resolve(TrainOptions, json.loads(sys.argv[1])), failing_metric)
    distributed.shutdown()

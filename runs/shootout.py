"""Train all systems at one size and for one time on the same clips, and measure them alike: JSON lines for a page.

# Everything, from recording to docs/results.md
bash runs/shootout.sh

# This part of it
python -m runs.shootout --train=data/shootout/train --val=data/shootout/val --out=runs/shootout --minutes=20

A system takes part if its presets have a row `shootout`; they share the tokenizer of the preset of that name. The
budget of each is CPU time of the training process from its first step on (--device=cuda: seconds). Threads that wait
for each other sleep, so that other work on the machine does not use it up. Training stops after equal parts of the
budget, the network is measured, and training continues. What is finished is in OUT/parts and not done again: repeat
the command to go on. OUT/results.jsonl has all of it.
"""

import dataclasses
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from PIL import Image

from calc_metrics import PRECISIONS
from dnnlib.text import quote
from dnnlib.util import atomic_path
from torch_utils import host_memory
from training import registry
from training.checkpoint import list_networks
from training.data.dataset import ClipDataset
from training.data.prompts import ClipPrompt
from training.network_file import load_bundle
from training.sampling import Request, Sampler, open_sampler
from training.side_files import read_lines, read_object

REPO = Path(__file__).parents[1]
TOKENIZER = "tokenizer"  # the system whose network the others share
PROTOCOL, CONTEXT, HORIZON = "labdoom-36to264", 36, 264  # and its frames
CONTINUING = {"mebt": ("given=36",)}  # options of samplers that continue a video only if asked to
SHORT = {"mebt": ("window=16",)}  # of those that would make longer clips than are measured
SHEET_FRAMES = (0, 15, 31, 63, 127, 255)
POLL_SEC = 0.1
LOG_LINES = 12  # of a command that failed

Part = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What decides the results; those of other settings are in another folder."""

    train: str
    val: str
    budget_sec: float
    stages: int
    preset: str
    systems: tuple[str, ...]
    clips: int
    long_clips: int
    frames: int
    turn_frames: int
    action_steps: int
    device: str
    precision: str
    seed: int


# ----------------------------------------------------------------------------
# Finished parts.


class Results:
    """The finished parts below a folder, a JSON file each.

    Raises `ValueError` if the folder has parts of other settings.
    """

    def __init__(self, out: Path, settings: Settings) -> None:
        self.folder, self.out = out / "parts", out
        self.folder.mkdir(parents=True, exist_ok=True)
        stated, path = json.loads(json.dumps(dataclasses.asdict(settings))), out / "settings.json"
        known = read_object(path)
        if known and known != stated:
            names = ", ".join(name for name in stated if known.get(name) != stated[name])
            raise ValueError(f"{out} has results of other settings ({names}): give another --out, or delete it")
        _write_json(path, stated)

    def part(self, name: str, make: Callable[[], Part]) -> Part:
        """Return a part, made unless it is finished."""
        path = self.folder / f"{name}.json"
        found = read_object(path)
        if found:
            click.echo(f"Done before: {name}")
            return found
        found = {"part": name, **make()}
        _write_json(path, found)
        return found

    def gather(self) -> Path:
        """Write all parts to one file of JSON lines, in the order in which they were finished, and return its path."""
        path = self.out / "results.jsonl"
        parts = sorted(self.folder.glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(read_object(part)) + "\n" for part in parts))
        return path


def _write_json(path: Path, value: Part) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value) + "\n")


# ----------------------------------------------------------------------------
# Commands.


def run(*command: str) -> None:
    """Print a command of this project and run it. Raises `ValueError` if it fails."""
    click.echo(f"$ {shlex.join(['python', *command])}")
    if subprocess.run([sys.executable, *command], cwd=REPO).returncode:
        raise ValueError(f"this command failed, see above: python {shlex.join(command)}")


class Meter:
    """The time that a training process has used, which a file keeps from one process to the next."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        self.before = float(read_object(path).get("used_sec", 0.0))
        self.used = self.before

    def follow(self, process: subprocess.Popen[bytes], has_begun: Callable[[], bool], limit: float) -> int:
        """Let a process train until it has used `limit` seconds, counted over all processes; return its exit code.

        It is then asked to save and to end. So it is if this process is interrupted.
        """
        base: float | None = None
        is_told = False
        try:
            while process.poll() is None:
                now = time.monotonic() if self.device == "cuda" else cpu_seconds(process.pid)
                if base is None and has_begun():
                    base = now
                if base is not None and now is not None:
                    self.used = max(self.used, self.before + now - base)
                    _write_json(self.path, {"used_sec": self.used})
                if base is not None and self.used >= limit and not is_told:
                    process.send_signal(signal.SIGTERM)
                    is_told = True
                time.sleep(POLL_SEC)
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
        self.before = self.used
        return process.wait()


def cpu_seconds(pid: int) -> float | None:
    """Return the CPU time in seconds of a process and those that it has started; None if it has ended."""
    try:
        first = psutil.Process(pid)
        processes = [first, *first.children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in processes)
    except psutil.Error:
        return None


def train(name: str, outdir: Path, limit: float, settings: Settings, tokenizer: str | None) -> Part:
    """Train a system until its run has used `limit` seconds, and describe the network that it then has."""
    command = [
        "train.py", name, f"--preset={settings.preset}", f"--dataset={settings.train}", f"--outdir={outdir}",
        "--keep=1000", "--tick-steps=1", "--sample-steps=0", "--checkpoint-steps=0", "--checkpoint-minutes=5",
        f"--device={settings.device}", f"--seed={settings.seed}", *([f"--tokenizer={tokenizer}"] if tokenizer else []),
    ]  # fmt: skip
    click.echo(f"$ {shlex.join(['python', *command])}   until {limit:g} s")
    outdir.mkdir(parents=True, exist_ok=True)
    meter, log = Meter(outdir / "used.json", settings.device), outdir / "train.log"
    if meter.used < limit or not _networks(outdir):
        ticks = _ticks(outdir)
        with open(log, "ab") as file:
            process = subprocess.Popen([sys.executable, *command], cwd=REPO, stdout=file, stderr=subprocess.STDOUT)
            code = meter.follow(process, lambda: _ticks(outdir) > ticks, limit)
        if code not in (0, 128 + signal.SIGTERM):
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise ValueError(f"training of {name} has failed with exit code {code}; the end of {log} says:\n{tail}")
    step, network = _networks(outdir)[-1]
    bundle = load_bundle(network)
    counts = {
        role: sum(parameter.numel() for parameter in part.parameters())
        for role, part in bundle.networks.items()
        if name == TOKENIZER or role != TOKENIZER
    }
    kind = "tokenizer" if name == TOKENIZER else "train"
    return {
        "kind": kind, "system": name, "network": str(network), "step": step, "used_sec": meter.used,
        "parameters": sum(counts.values()), "batch": _batch(outdir),
    }  # fmt: skip


def _networks(outdir: Path) -> list[tuple[int, Path]]:
    """Return the steps and networks of the only run in a folder."""
    return [item for path in sorted(outdir.glob("0*")) for item in list_networks(path)]


def _ticks(outdir: Path) -> int:
    """Return the number of bytes of statistics, which grow when training begins."""
    return sum(path.stat().st_size for path in outdir.glob("0*/stats.jsonl"))


def _batch(outdir: Path) -> int | None:
    return read_object(sorted(outdir.glob("0*"))[0] / "options.json").get("batch")


# ----------------------------------------------------------------------------
# Measures.


def measure(network: str, options: Sequence[str], metrics: Sequence[str], more: Sequence[str], place: Path,
            settings: Settings) -> list[Part]:  # fmt: skip
    """Return the results of calc_metrics.py for a network."""
    place.unlink(missing_ok=True)
    run(
        "calc_metrics.py", f"--dataset={settings.val}", f"--model={network}", f"--path={place}",
        *(word for name in metrics for word in ("-m", name)),
        *(word for option in options for word in ("-o", option)), *more,
        f"--device={settings.device}", f"--precision={settings.precision}", f"--seed={settings.seed}",
    )  # fmt: skip
    lines = read_lines(place, metric=str)
    place.unlink()
    return lines


def final_measures(
    name: str, trained: Part, short: Part, sampler: Sampler, action_network: str, place: Path, settings: Settings
) -> dict[str, Callable[[], Part]]:
    """Return by name the measurements of a finished network: alone, under the protocol, and there and back.

    `short` has those of its short clips. Those that a system cannot have say so under "cannot".
    """
    s, long = settings, [f"--num-videos={settings.long_clips}", f"--num-frames={settings.frames}"]
    network, options = trained["network"], CONTINUING.get(name, ())
    follows = "actions" in sampler.needs.streams
    continues = bool(sampler.needs.past or options) and not sampler.needs.follows

    def alone() -> Part:
        lines = measure(network, (), ["fvd_drift", "motion_energy", "flat_frames"], long, place, s)
        found = {"kind": "measure", "system": name, "protocol": "lvg", "prompted": sampler.needs.past}
        return {**found, "lines": [*short["lines"], *lines]}

    def protocol() -> Part:
        found = {"kind": "measure", "system": name, "protocol": PROTOCOL}
        if not continues:
            return {**found, "cannot": "it makes videos from noise alone, and continues none"}
        metrics = [f"{item}{s.long_clips}_{s.frames}f" for item in ("psnr", "ssim", "lpips")]
        metrics += [f"fvd{s.long_clips}_{CONTEXT + s.frames}f_context{CONTEXT}"]
        more = [*long, f"--protocol={PROTOCOL}", f"--horizon={s.frames}"]
        if follows:
            metrics += ["revisit", "revisit_lpips", "turning", "action_following"]
            more.append(f"--detector-path=action-network={action_network}")
        return {**found, "lines": measure(network, options, metrics, more, place, s)}

    def back() -> Part:
        found = {"kind": "measure", "system": name, "protocol": "there-and-back"}
        if not follows:
            return {**found, "cannot": "it follows no actions"}
        more = [f"--num-videos={s.long_clips}", f"--num-frames={s.turn_frames}"]
        more += [f"--protocol={PROTOCOL}", f"--horizon={s.turn_frames}"]
        return {**found, "lines": measure(network, options, ["there_and_back", "there_and_back_lpips"], more, place, s)}

    return {"alone": alone, "protocol": protocol, "back": back}


def sample(name: str, sampler: Sampler, sheet: Path, settings: Settings) -> Part:
    """Make one video after a context of the validation clips, write a row of its frames, and say what a frame costs."""
    size, needs = sampler.size, sampler.needs
    dataset = ClipDataset(settings.val, [size], streams=needs.streams, vocabularies=sampler.vocabularies)
    clip = dataset.eligible(CONTEXT + settings.frames)[0]
    prompt = ClipPrompt(dataset, [(clip, CONTEXT)], {key: store.read for key, store in dataset.streams.items()})
    wanted, picked, done = sheet_frames(settings), [], 0
    begin, clock = time.process_time(), time.monotonic()
    for chunk in sampler.video(Request([settings.seed], 0, wanted[-1] + 1, prompt)):
        frames = chunk[0].cpu().numpy()
        picked += [frames[frame - done] for frame in wanted if done <= frame < done + len(frames)]
        done += len(frames)
    cpu, wall = time.process_time() - begin, time.monotonic() - clock
    _write_row(sheet, picked)
    return {
        "kind": "cost", "system": name, "frames": done, "cpu_sec_per_frame": cpu / done,
        "sec_per_frame": wall / done, "sheet": str(sheet), "costs": dict(sampler.costs), "prompted": needs.past,
    }  # fmt: skip


def sample_real(size: tuple[int, int], sheet: Path, settings: Settings) -> Part:
    """Write the same row of the recorded clip."""
    dataset = ClipDataset(settings.val, [size])
    clip, wanted = dataset.eligible(CONTEXT + settings.frames)[0], sheet_frames(settings)
    _write_row(sheet, list(dataset.read(clip, size, [CONTEXT + frame for frame in wanted])))
    return {"kind": "real", "system": "real", "sheet": str(sheet), "frames": wanted}


def sheet_frames(settings: Settings) -> list[int]:
    """Return the frames of a row of the contact sheet."""
    return [frame for frame in SHEET_FRAMES if frame < settings.frames]


def _write_row(path: Path, frames: Sequence[np.ndarray]) -> None:
    with atomic_path(path) as temporary:
        Image.fromarray(np.concatenate(frames, axis=1)).save(temporary, "png")


# ----------------------------------------------------------------------------
# All of it.


def contestants(preset: str) -> list[str]:
    """Return the names of the systems that have a preset, but for tokenizers."""
    names = [spec.name for spec in registry.specs() if preset in registry.resolve(spec.presets)]
    return [name for name in names if name != TOKENIZER]


def takes_tokenizer(name: str) -> bool:
    """Return whether a system is trained on a tokenizer."""
    return any(field.name == "tokenizer" for field in dataclasses.fields(registry.options(registry.spec(name))))


def shoot(out: Path, settings: Settings) -> Path:
    """Train and measure all systems; return the file of results. What is finished is not done again."""
    s, results = settings, Results(out, settings)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of the commands, which count as CPU time what threads wait
    host_memory.keep_freed(torch.device(s.device))
    tokenizer = ""
    if any(takes_tokenizer(name) for name in s.systems):
        found = results.part("tokenizer", lambda: train(TOKENIZER, out / TOKENIZER, s.budget_sec, s, None))
        tokenizer = found["network"]
        results.part("codes", lambda: encode(tokenizer, s))
    action_network = out / "action-network.pkl"
    results.part("action-network", lambda: train_action_network(action_network, s))
    for name in s.systems:
        _shoot_one(name, tokenizer if takes_tokenizer(name) else None, str(action_network), results, s)
    return results.gather()


def _shoot_one(name: str, tokenizer: str | None, action_network: str, results: Results, settings: Settings) -> None:
    """Train and measure one system."""
    s, out, trained, short = settings, results.out, Part(), Part()
    for stage in range(1, s.stages + 1):
        limit = s.budget_sec * stage / s.stages
        trained = results.part(f"{name}-{stage}", functools.partial(train, name, out / name, limit, s, tokenizer))
        short = results.part(f"{name}-{stage}-curve", functools.partial(curve, name, trained, out, s))
    sampler = open_sampler([trained["network"]], {}, s.device)
    for key, make in final_measures(name, trained, short, sampler, action_network, out / "measures.jsonl", s).items():
        results.part(f"{name}-{key}", make)
    options = dict(option.split("=") for option in CONTINUING.get(name, ()))
    sampler = open_sampler([trained["network"]], options, s.device)
    results.part(f"{name}-sample", functools.partial(sample, name, sampler, out / f"{name}.png", s))
    results.part("real-sample", functools.partial(sample_real, sampler.size, out / "real.png", s))
    results.gather()


def curve(name: str, trained: Part, out: Path, settings: Settings) -> Part:
    """Measure the network of a stage."""
    options = SHORT.get(name, ())
    lines = measure(trained["network"], options, [f"fvd{settings.clips}_16f"], (), out / "measures.jsonl", settings)
    return {
        "kind": "curve", "system": name, "used_sec": trained["used_sec"], "step": trained["step"],
        "options": options, "lines": lines,
    }  # fmt: skip


def encode(tokenizer: str, settings: Settings) -> Part:
    """Store the codes of the training clips."""
    run("-m", "dataset_tools.encode_dataset", settings.train, f"--tokenizer={tokenizer}", f"--device={settings.device}")
    return {"kind": "codes"}


def train_action_network(path: Path, settings: Settings) -> Part:
    """Train the network that reads actions from video."""
    run(
        "-m", "metrics.action_network", "train", f"--dataset={settings.train}", f"--val-dataset={settings.val}",
        f"--out={path}", f"--steps={settings.action_steps}", f"--device={settings.device}",
    )  # fmt: skip
    return {"kind": "action-network", "network": str(path)}


@click.command(help=str(__doc__).replace("\n# ", "\n\n\b\n# "))
# fmt: off
@click.option(
    "--train",
    help="Dataset to train on, with actions and poses",
    required=True,
    type=click.Path(exists=True, file_okay=False),
)
@click.option(
    "--val",
    help="Held-out clips, of at least 36 frames more than --frames",
    required=True,
    type=click.Path(exists=True, file_okay=False),
)
@click.option("--out", help="Folder of networks and results", required=True, type=click.Path(path_type=Path))
@click.option(
    "--minutes",
    help="Budget of each system, and of the tokenizer",
    default=20.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
)
@click.option("--budget-seconds", help="The same in seconds, for a trial", type=click.FloatRange(min=0, min_open=True))
@click.option(
    "--stages", help="Measurements along the budget", default=4, show_default=True, type=click.IntRange(min=1)
)
@click.option("--system", "systems", help="Only this system; repeatable  [default: all with the preset]", multiple=True)
@click.option("--preset", help="Preset of all systems and of the tokenizer", default="shootout", show_default=True)
@click.option("--clips", help="Clips of 16 frames a side", default=128, show_default=True, type=click.IntRange(min=2))
@click.option(
    "--long-clips", help="Long clips and videos a side", default=32, show_default=True, type=click.IntRange(min=2)
)
@click.option(
    "--frames",
    help="Frames of these, after the context",
    default=HORIZON,
    show_default=True,
    type=click.IntRange(min=32),
)
@click.option("--turn-frames", help="Frames there and back", default=64, show_default=True, type=click.IntRange(min=4))
@click.option(
    "--action-steps",
    help="Training steps of the network that reads actions",
    default=3000,
    show_default=True,
    type=click.IntRange(min=1),
)
@click.option("--device", help="[default: cuda if there is a GPU]", type=click.Choice(["cpu", "cuda"]))
@click.option(
    "--precision",
    help="Of generation when it is measured, as for calc_metrics.py",
    default="auto",
    show_default=True,
    type=click.Choice(PRECISIONS),
)
@click.option("--seed", help="Of weights, data and clips", default=0, show_default=True)
# fmt: on
def main(
    train: str, val: str, out: Path, minutes: float, budget_seconds: float | None, systems: Sequence[str], preset: str,
    device: str | None, **values: Any,
) -> None:  # fmt: skip
    """See the module's docstring."""
    known = contestants(preset)
    unknown = [name for name in systems if name not in known]
    if unknown or not known:
        name = f"{unknown[0]} is no system that" if unknown else "No system"
        raise click.UsageError(f"{name} has the preset {preset}: take {', '.join(known) or 'another preset'}")
    settings = Settings(
        train=os.path.abspath(train), val=os.path.abspath(val), budget_sec=budget_seconds or 60 * minutes,
        preset=preset, systems=tuple(systems or known),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"), **values,
    )  # fmt: skip
    try:
        found = shoot(out.resolve(), settings)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Next: python -m runs.shootout_report {quote(str(found))}")


if __name__ == "__main__":
    main()

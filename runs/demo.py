"""Run the whole workflow on a CPU, with the user's commands: record, train, resume, generate, measure.

# make demo, or
python -m runs.demo --outdir outputs/demo

LabDoom is recorded at 48x64 with soft textures, a tokenizer is trained on its frames, and a world model on their
latents, for minutes each. The world model then continues held-out clips under their actions. The page
outputs/demo/index.html shows them below the real frames, beside those of the included world model where there is one,
with metrics and the command to walk through these worlds.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from dataset_tools.archive import read_description
from dnnlib.text import quote
from dnnlib.util import atomic_path, format_time
from runs import demo_page, strip
from torch_utils.precision import cpu_has_bf16
from training.data.dataset import ClipDataset
from training.network_file import list_models
from training.random import random_state
from training.sampling import open_sampler

SIZE = (48, 64)
INCLUDED = "labdoom-walk"  # compared if it is in models/
TRAINED = "the model just trained"
AUTOENCODER, STILL = "its autoencoder alone", "the last frame, repeated"
NOISE, OTHER = "noise", "real clips of other mazes"
# Of the look that the included model knows: stone walls between a meadow and the sky, and violet rooms.
FOOTAGE = [
    "--walker=person", "--textures=soft", f"--sizes={SIZE[0]}x{SIZE[1]}", "--difficulty=easy", "--looks=1", "--seed=12",
]  # fmt: skip
TRAIN_FRAMES, VAL_FRAMES, VAL_CLIPS = 224, 364, 16
CLIP_FRAMES = 16  # of a clip that is measured
NUM_FRAMES = 300  # ten seconds
STRIP_FRAMES = 90
MIN_PREVIEW_CHANGE = 10  # minimum change in grey levels of the previews of the same clips by training


def run(title: str, *command: str) -> None:
    """Print a command and run it; a failure ends the demo."""
    click.secho(f"\n== {title}", bold=True)
    click.echo(f"$ {shlex.join(['python', *command])}")
    subprocess.run([sys.executable, *command], check=True)


def record(data: Path, split: str, num_clips: int, num_frames: int) -> None:
    """Record one split of LabDoom, unless it exists and is complete."""
    known = read_description(data / split)
    if known is None or len(known["partitions"]) < known["num_partitions"]:
        options = [f"--clips={num_clips}", f"--frames={num_frames}", f"--split={split}", *FOOTAGE]
        run(
            f"Record {num_clips} clips for the {split} split",
            *["-m", "dataset_tools.make_dataset_from_vizdoom", str(data / split), *options],
        )


def train(title: str, system: str, data: Path, outdir: Path, num_steps: int, every: int, *options: str) -> Path:
    """Train a system up to `num_steps`, with previews and checkpoints as often as said; return its run directory."""
    half = ["--precision=bf16"] if cpu_has_bf16() and not torch.cuda.is_available() else []
    run(
        title,
        *["train.py", system, f"--outdir={outdir}", f"--dataset={data / 'train'}", "--preset=labdoom-soft", *options],
        *[f"--steps={num_steps}", f"--sample-steps={every}", f"--checkpoint-steps={every}", "--tick-steps=50", *half],
    )
    return sorted(outdir.glob("0*"))[-1]


def train_tokenizer(data: Path, outdir: Path, num_steps: int) -> Path:
    """Train the tokenizer, encode the training split with it, and return its run directory."""
    options = ["--batch=16", f"--warmup-steps={min(50, num_steps // 4)}"]
    run_dir = train("Train the tokenizer", "tokenizer", data, outdir, num_steps, max(num_steps // 2, 1), *options)
    run(
        "Encode the training split",
        *["-m", "dataset_tools.encode_dataset", str(data / "train"), f"--tokenizer={network(run_dir)}", "--latents"],
    )
    return run_dir


def train_world(data: Path, outdir: Path, tokenizer: Path, num_steps: int) -> Path:
    """Train the world model in two goes, and return its run directory.

    The learning rate is constant, so that it does not depend on the number of steps, of which the second command has
    more; the average of the weights takes the place of its decay.
    """
    options = [f"--tokenizer={tokenizer}", "--batch=8", "--width=160", "--heads=5", "--schedule=constant"]
    options += ["--ema-beta=0.99", f"--warmup-steps={min(50, num_steps // 4)}"]
    half = max(num_steps // 2, 1)
    train("Train the world model to half of its steps", "world", data, outdir, half, half, *options)
    return train("Resume by the same command", "world", data, outdir, num_steps, half, *options)


def network(run_dir: Path) -> Path:
    """Return the newest EMA generator of a run."""
    return sorted((run_dir / "checkpoints").glob("ckpt-*-G-ema.pkl"))[-1]


def preview_change(run_dir: Path) -> float:
    """Return the mean difference, in grey levels, between the first and the last preview of the same clips."""
    first, *_, last = sorted((run_dir / "samples").glob("fake-*.png"))
    images = [np.asarray(Image.open(path), dtype=np.float64) for path in (first, last)]
    return float(np.abs(images[0] - images[1]).mean())


def generate(data: Path, outdir: Path, name: str, model: str) -> demo_page.Continuation:
    """Continue a held-out clip for ten seconds under its own actions; return it with the real frames."""
    past = open_sampler([model]).needs.past
    dataset = ClipDataset(data / "val", [SIZE])
    (clip,) = strip.choose_clips(dataset, past + NUM_FRAMES, 1, seed=0)
    context = f"{data / 'val'}:{dataset.clips[clip].path}"
    run(
        f"Continue a held-out clip with {name}",
        *["generate.py", f"--outdir={outdir}", "--seed=0", f"--len={NUM_FRAMES}", f"--context={context}"],
        *[f"--model={model}", "--precision=auto"],
    )
    (video,) = outdir.glob(f"*_seed=0_len={NUM_FRAMES}_video.mp4")
    return demo_page.Continuation(name, video, dataset.read(clip, SIZE, range(past, past + NUM_FRAMES)))


def measure(outdir: Path, data: Path, models: dict[str, str], num_clips: int) -> list[demo_page.Row]:
    """Return the measures of models on held-out clips, and for reference those of noise and of other real clips."""
    distance, psnr = f"fvd{num_clips}_{CLIP_FRAMES}f", f"psnr{num_clips}_{CLIP_FRAMES}f"
    path, noise = outdir / "metrics.jsonl", outdir / "noise.npz"
    path.unlink(missing_ok=True)
    shape = (num_clips, CLIP_FRAMES, *SIZE, 3)
    with atomic_path(noise) as temporary, open(temporary, "wb") as file:
        np.savez(file, videos=random_state("demo-noise", 0, 0).randint(0, 256, shape).astype(np.uint8))

    def results(title: str, *options: str) -> list[dict[str, Any]]:
        num_old = len(path.read_text().splitlines()) if path.exists() else 0
        run(title, "calc_metrics.py", *options, f"--metric={distance}", f"--path={path}", "--verbose=False")
        return [json.loads(line) for line in path.read_text().splitlines()[num_old:]]

    rows = []
    for name, model in models.items():
        options = [f"--dataset={data / 'val'}", f"--model={model}", f"--metric={psnr}"]
        bound = ["--bound=true"] if name == TRAINED else []
        found = results(f"Measure {name} on held-out clips", *options, *bound)
        values = {line["metric"]: line for line in found}
        (still,) = values[psnr]["baselines"].values()
        gain = values[psnr]["results"][psnr] - still[psnr]
        rows.append(demo_page.Row(name, values[distance]["results"][distance], gain))
        if bound:
            (still,) = values[distance]["baselines"].values()
            rows.append(demo_page.Row(AUTOENCODER, values[f"r{distance}"]["results"][f"r{distance}"]))
            rows.append(demo_page.Row(STILL, still[distance], 0.0))
    for name, fake in ((OTHER, data / "train"), (NOISE, noise)):
        (line,) = results(f"For reference: {name}", f"--real={data / 'val'}", f"--fake={fake}")
        rows.append(demo_page.Row(name, line["results"][distance]))
    return rows


def failures(rows: list[demo_page.Row], changes: dict[str, float]) -> list[str]:
    """Return what shows that training failed, one clause each."""
    distances = {row.name: row.distance for row in rows}
    found = [f"the previews of the {stage} hardly changed" for stage, x in changes.items() if x < MIN_PREVIEW_CHANGE]
    if distances[TRAINED] >= distances[NOISE]:
        found.append("generated video is not nearer to real video than noise")
    return found


@click.command(help=str(__doc__).replace("# ", "\b\n"))
@click.option("--outdir", help="Output folder", default="outputs/demo", show_default=True, type=Path)
@click.option("--tokenizer-steps", help="Steps of the tokenizer", default=500, show_default=True)
@click.option("--world-steps", help="Steps of the world model", default=480, show_default=True)
@click.option("--clips", help="Clips to train on", default=48, show_default=True, type=click.IntRange(min=3))
@click.option("--eval-clips", help="Clips that are measured", default=32, show_default=True, type=click.IntRange(min=4))
@click.option("--fresh", help="Remove the results of an earlier demo and start again", is_flag=True)
def main(outdir: Path, tokenizer_steps: int, world_steps: int, clips: int, eval_clips: int, fresh: bool) -> None:
    """Run the demo; the help text is the module's docstring."""
    begin = time.monotonic()
    if fresh:
        shutil.rmtree(outdir, ignore_errors=True)
    data = outdir / "data"
    record(data, "train", clips, TRAIN_FRAMES)
    record(data, "val", VAL_CLIPS, VAL_FRAMES)
    tokenizer = train_tokenizer(data, outdir / "tokenizer", tokenizer_steps)
    world = train_world(data, outdir / "world", network(tokenizer), world_steps)

    models = {TRAINED: str(network(world))} | ({INCLUDED: INCLUDED} if INCLUDED in list_models() else {})
    videos = [
        generate(data, outdir / ("generated" if name == TRAINED else name), name, model)
        for name, model in models.items()
    ]
    rows = measure(outdir, data, models, eval_clips)
    strips = {}
    for name, model in models.items():
        strips[name] = outdir / f"strip-{'trained' if name == TRAINED else name}.webp"
        strip.write_strip(strips[name], data / "val", [model], num_frames=STRIP_FRAMES)

    runs = {"tokenizer": tokenizer, "world model": world}
    changes = {name: preview_change(run_dir) for name, run_dir in runs.items()}
    play = f"python view.py --model={INCLUDED}" if INCLUDED in models else ""
    play = play or f"python view.py --model={quote(models[TRAINED])} --context={quote(str(data / 'val'))}"
    demo_page.write_page(outdir, videos, strips, rows, runs, play)
    click.secho(f"\n== Done in {format_time(time.monotonic() - begin)}", bold=True)
    click.echo(demo_page.table(rows, eval_clips, CLIP_FRAMES))
    click.echo(f"Open {outdir / 'index.html'} (or {outdir / 'overview.png'}).")
    click.echo(f"Walk through a world: {play}, then open {demo_page.PLAY_URL}")
    problems = failures(rows, changes)
    if problems:
        raise click.ClickException("; ".join(problems))


if __name__ == "__main__":
    main()

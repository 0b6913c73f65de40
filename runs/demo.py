"""Run the whole workflow at toy size on a CPU, with the user's commands: record, train, resume, generate, evaluate.

# make demo, or
python -m runs.demo --outdir outputs/demo

All steps are real but small: LabDoom videos at 18x32 and 72x128, networks of less than a million parameters, minutes of
training. The page outputs/demo/index.html shows samples and metrics, compared with those of the included pair of
networks, which was trained on the same kind of videos for an hour and a half.
"""

import html
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset_tools.archive import read_description
from dnnlib.util import atomic_path, format_time
from dnnlib.video import iter_video_frames
from metrics.detectors import i3d
from metrics.families import ClipShape
from metrics.frechet import frechet_distance_from_features
from metrics.samplers import real_clips
from training.data.dataset import ClipDataset
from training.network_file import DEFAULT_MODEL
from training.preview import contact_sheet

LRES_SIZE, SRES_SIZE = (18, 32), (72, 128)
SIZES = ",".join(f"{height}x{width}" for height, width in (LRES_SIZE, SRES_SIZE))
METRIC, NUM_CLIPS, CLIP_FRAMES = "fvd32_16f", 32, 16
VAL_CLIPS = 16  # each gives two of the clips for metrics
NUM_FRAMES = 300  # ten seconds
GENERATED = "the toy pair"
FOOTAGE = ["--difficulty=easy", "--looks=1", "--seed=6"]  # the training data of the included model
MIN_PREVIEW_CHANGE = 10  # minimum change in grey levels of the previews of the same seeds by training


def run(title: str, *command: str) -> None:
    """Print a command and run it; a failure ends the demo."""
    click.secho(f"\n== {title}", bold=True)
    click.echo(f"$ {shlex.join(['python', *command])}")
    subprocess.run([sys.executable, *command], check=True)


def record(data: Path, split: str, num_clips: int) -> None:
    """Record one split of LabDoom, unless it exists and is complete."""
    known = read_description(data / split)
    if known is None or len(known["partitions"]) < known["num_partitions"]:
        options = [f"--clips={num_clips}", "--frames=300", f"--sizes={SIZES}", f"--split={split}", *FOOTAGE]
        run(
            f"Record {num_clips} clips for the {split} split",
            *["-m", "dataset_tools.make_dataset_from_vizdoom", str(data / split), *options],
        )


def train(stage: str, data: Path, outdir: Path, num_steps: int, title: str) -> Path:
    """Train a stage up to `num_steps` and return its run directory."""
    every = max(num_steps // 4, 1)
    run(
        title,
        *[f"train_{stage}.py", f"--outdir={outdir}", f"--dataset={data / 'train'}", "--preset=toy"],
        *[f"--steps={num_steps}", f"--sample-steps={every}", f"--checkpoint-steps={every}"],
    )
    return sorted(outdir.glob("0*"))[-1]


def network(run_dir: Path) -> Path:
    """Return the newest EMA generator of a run."""
    return sorted((run_dir / "checkpoints").glob("ckpt-*-G-ema.pkl"))[-1]


def preview_change(run_dir: Path) -> float:
    """Return the mean difference, in grey levels, between the first and the last preview of the same seeds."""
    first, *_, last = sorted((run_dir / "samples").glob("fake-*.png"))
    images = [np.asarray(Image.open(path), dtype=np.float64) for path in (first, last)]
    return float(np.abs(images[0] - images[1]).mean())


def generate(title: str, outdir: Path, *networks: str) -> Path:
    """Generate ten seconds with the given pair, by default the included one; return the video at full size."""
    run(title, "generate.py", f"--outdir={outdir}", "--seed=0", f"--len={NUM_FRAMES}", "--save-lres=True",
        "--precision=auto", *networks)  # fmt: skip
    return outdir / f"seed=0_len={NUM_FRAMES}_sres.mp4"


def measure(outdir: Path, data: Path, pairs: dict[str, list[str]]) -> dict[str, float]:
    """Return the FVD of pairs to held-out videos and, as references, of noise and of other real videos."""
    path = outdir / "metrics.jsonl"
    path.unlink(missing_ok=True)
    values: dict[str, float] = {}
    for name, networks in pairs.items():
        run(
            f"Measure {name} against held-out videos",
            *["calc_metrics.py", f"--dataset={data / 'val'}", *networks],
            *[f"--metric={METRIC}", f"--path={path}", "--verbose=True"],
        )
        values[name] = json.loads(path.read_text().splitlines()[-1])["results"][METRIC]
    click.secho("\n== For reference: the same distance of noise, and of videos of other mazes", bold=True)
    shape = ClipShape(CLIP_FRAMES, 1)

    def clips(split: str) -> Tensor:
        dataset = ClipDataset(data / split, [SRES_SIZE])
        return torch.cat([batch for _, batch in real_clips(dataset, SRES_SIZE, shape, range(NUM_CLIPS), 0, batch=8)])

    detector = i3d.load()

    def features(clips: Tensor) -> Tensor:
        return torch.cat([detector.features(batch) for batch in clips.split(4)])

    held_out = clips("val")
    noise = torch.from_numpy(np.random.RandomState(0).randint(0, 256, held_out.shape).astype(np.uint8))
    real = features(held_out)
    values["noise"] = frechet_distance_from_features(real, features(noise))
    values["training footage"] = frechet_distance_from_features(real, features(clips("train")))
    for name, value in values.items():
        click.echo(f"{METRIC} of {name:16s} {value:9.1f}")
    return values


def dataset_sheet(data: Path, path: Path) -> None:
    """Write eight frames of each of three clips of the dataset."""
    dataset = ClipDataset(data / "train", [SRES_SIZE])
    frames = [frame for clip in range(3) for frame in dataset.read(clip, SRES_SIZE, range(0, 240, 30))]
    with atomic_path(path) as temporary:
        Image.fromarray(contact_sheet(frames, 8)).save(temporary)


def overview(outdir: Path, videos: Sequence[Path]) -> None:
    """Write one image: rows of real frames above those of videos, equally spaced in time."""
    real = np.asarray(Image.open(outdir / "dataset.png"))
    bar = np.full((8, real.shape[1], 3), 255, np.uint8)
    parts = [real]
    for video in videos:
        frames = list(iter_video_frames(video))[:: NUM_FRAMES // 24][:24]
        frames = [
            np.asarray(Image.fromarray(frame).resize((SRES_SIZE[1], SRES_SIZE[0]), Image.Resampling.BOX))
            for frame in frames
        ]
        parts += [bar, contact_sheet(frames, 8)]
    with atomic_path(outdir / "overview.png") as temporary:
        Image.fromarray(np.concatenate(parts)).save(temporary)


def write_page(outdir: Path, videos: dict[str, Path], runs: dict[str, Path], numbers: dict[str, float]) -> None:
    """Write index.html: dataset, videos, metrics, previews over training."""
    parts = ["<h2>Recorded videos</h2>", '<img src="dataset.png">']
    for title, video in videos.items():
        name = str(video.relative_to(outdir)).removesuffix("_sres.mp4")
        parts.append(f"<h2>Ten seconds {html.escape(title)}</h2>")
        for kind in ("sres", "lres"):
            parts.append(f'<video src="{name}_{kind}.mp4" controls loop autoplay muted></video>')
        parts.append(f'<br><img src="{name}_sheet.png">')
    parts.append("<h2>Numbers</h2><table>")
    parts += [f"<tr><td>{html.escape(name)}</td><td>{value:.1f}</td></tr>" for name, value in numbers.items()]
    parts.append("</table>")
    for stage, run_dir in runs.items():
        parts.append(f"<h2>The same seeds while the {stage} stage trains</h2>")
        for path in sorted((run_dir / "samples").glob("fake-*.png")):
            step = int(path.stem.split("-")[1])
            parts.append(f'<p>step {step}</p><img src="{path.relative_to(outdir)}">')
    style = "body{font:16px sans-serif;max-width:1100px;margin:2em auto}img,video{max-width:100%}td{padding:0 1em}"
    page = f"<!doctype html><meta charset=utf-8><title>Longtake demo</title><style>{style}</style>"
    page += "<h1>Longtake demo</h1>" + "\n".join(parts) + "\n"
    with atomic_path(outdir / "index.html") as temporary:
        temporary.write_text(page)


@click.command(help=str(__doc__).replace("# ", "\b\n"))
@click.option("--outdir", help="Output folder", default="outputs/demo", show_default=True, type=Path)
@click.option("--lres-steps", help="Steps of the low-resolution stage", default=280, show_default=True)
@click.option("--sres-steps", help="Steps of the super-resolution stage", default=160, show_default=True)
@click.option("--clips", help="Clips to train on", default=32, show_default=True, type=click.IntRange(min=3))
@click.option("--fresh", help="Remove the results of an earlier demo and start again", is_flag=True)
def main(outdir: Path, lres_steps: int, sres_steps: int, clips: int, fresh: bool) -> None:
    """Run the demo; the help text is the module's docstring."""
    begin = time.monotonic()
    if fresh:
        shutil.rmtree(outdir, ignore_errors=True)
    data = outdir / "data"
    record(data, "train", clips)
    record(data, "val", VAL_CLIPS)
    dataset_sheet(data, outdir / "dataset.png")

    train("lres", data, outdir / "lres", lres_steps // 2, "Train the low-resolution stage to half of its steps")
    lres = train("lres", data, outdir / "lres", lres_steps, "Resume by the same command")
    sres = train("sres", data, outdir / "sres", sres_steps, "Train the super-resolution stage")
    toy = [f"--lres={network(lres)}", f"--sres={network(sres)}"]

    videos = {
        f"of {DEFAULT_MODEL}, which is included": generate("Generate with the included model", outdir / DEFAULT_MODEL),
        "of the pair that was just trained": generate("Generate with the pair just trained", outdir, *toy),
    }
    pairs = {DEFAULT_MODEL: [f"--lres={DEFAULT_MODEL}", f"--sres={DEFAULT_MODEL}"], GENERATED: toy}
    values = measure(outdir, data, pairs)
    numbers = {f"{METRIC}: {name}": value for name, value in values.items()}
    changes = {stage: preview_change(run_dir) for stage, run_dir in (("lres", lres), ("sres", sres))}
    numbers |= {f"change of the {stage} previews, grey levels": value for stage, value in changes.items()}

    overview(outdir, list(videos.values()))
    write_page(outdir, videos, {"low-resolution": lres, "super-resolution": sres}, numbers)
    click.secho(f"\n== Done in {format_time(time.monotonic() - begin)}", bold=True)
    for name, value in numbers.items():
        click.echo(f"{name:45s} {value:9.1f}")
    click.echo(f"Open {outdir / 'index.html'} (or {outdir / 'overview.png'}).")
    click.echo("Next: record 36x64,144x256 videos and train without --preset=toy, on a GPU; see the README.")
    failures = [f"the previews of {stage} hardly changed" for stage, x in changes.items() if x < MIN_PREVIEW_CHANGE]
    if values[GENERATED] >= values["noise"]:
        failures.append("generated video is not closer to real videos than noise")
    if failures:
        raise click.ClickException("; ".join(failures))


if __name__ == "__main__":
    main()

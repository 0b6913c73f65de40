"""Generate a video of any length from trained networks, straight to a file.

# Smallest command (a CPU, low resolution only)
python generate.py --outdir=outputs --seed=0 --len=64 --lres=LRES.pkl

# Both stages: ten seconds at full size, with two frames as pictures
python generate.py --outdir=outputs --seed=0 --len=301 --lres=LRES.pkl --sres=SRES.pkl -i 0 -i 150

Networks are paths or URLs of pickles, ours or published ones; opening them never runs code they carry. Frames go to
the encoder as they are made, so memory does not grow with the length. Frame t of a seed is the same for every --len.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from dnnlib.util import atomic_path
from dnnlib.video import VideoWriter
from training.longvideogan.sampling import LowResSource, Pair, Source, open_source, quantize
from training.preview import contact_sheet

SHEET_FRAMES = 24


def stream(source: LowResSource | Pair, seed: int, num_frames: int) -> Iterator[dict[str, np.ndarray]]:
    """Successive frames of both resolutions: {"lres": uint8 (T, h, w, 3), "sres": uint8 (T, H, W, 3)}."""

    def first(frames: torch.Tensor) -> np.ndarray:
        return quantize(frames)[0].cpu().numpy()

    if isinstance(source, Pair):
        for lres, sres in source.both([seed], 0, num_frames):
            yield {"lres": first(lres), "sres": first(sres)}
    else:
        for lres in source.frames([seed], 0, num_frames):
            yield {"lres": first(lres)}


def write_picture(path: Path, frame: np.ndarray) -> None:
    """uint8 (H, W, 3) -> a PNG file."""
    with atomic_path(path) as temporary:
        Image.fromarray(frame).save(temporary)


def frame_size(source: Source, kind: str) -> tuple[int, int]:
    """Height and width of the frames of `kind`, "lres" or "sres"."""
    part = source.lres if isinstance(source, Pair) and kind == "lres" else source
    return part.height, part.width


def generate(
    source: LowResSource | Pair,
    outdir: Path,
    seed: int,
    num_frames: int,
    kinds: Sequence[str],
    save_index: Sequence[int] = (),
    fps: float = 30.0,
) -> list[Path]:
    """Write the video of `seed` in each of `kinds`, the frames asked for and a contact sheet; returns the files.

    Pictures show the last of `kinds`. A file appears only once it is whole.
    """
    stem = f"seed={seed}_len={num_frames}"
    picks = set(np.linspace(0, num_frames - 1, min(SHEET_FRAMES, num_frames)).round().astype(int).tolist())
    sheet: list[np.ndarray] = []
    files: list[Path] = []
    outdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        writers: dict[str, VideoWriter] = {}
        for kind in kinds:
            files.append(outdir / f"{stem}_{kind}.mp4")
            writer = VideoWriter(files[-1], *frame_size(source, kind), fps, enlarge=True)
            writers[kind] = stack.enter_context(writer)
        bar = stack.enter_context(click.progressbar(length=num_frames, label=f"Seed {seed}", show_pos=True))
        done = 0
        for frames in stream(source, seed, num_frames):
            for kind, writer in writers.items():
                writer.write(frames[kind])
            for offset, frame in enumerate(frames[kinds[-1]]):
                if done + offset in picks:
                    sheet.append(frame.copy())
                if done + offset in save_index:
                    files.append(outdir / f"{stem}_frame={done + offset:04d}.png")
                    write_picture(files[-1], frame)
            count = len(frames[kinds[-1]])
            done += count
            bar.update(count)
    files.append(outdir / f"{stem}_sheet.png")
    write_picture(files[-1], contact_sheet(sheet, columns=math.ceil((1.5 * len(sheet)) ** 0.5)))
    return files


@click.command(help=str(__doc__).replace("# ", "\b\n"))
@click.option("--outdir", help="Where the files go", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", help="Which video", required=True, type=int)
@click.option("--lres", "lres_path", help="Low-resolution network", required=True, metavar="PATH|URL")
@click.option("--sres", "sres_path", help="Super-resolution network; low resolution only without", metavar="PATH|URL")
@click.option("--len", "num_frames", help="Frames", default=301, show_default=True, type=click.IntRange(min=1))
@click.option("--save-lres", help="Also write the low-resolution video", default=False, show_default=True, type=bool)
@click.option("--save-index", "-i", help="Also write this frame as PNG; repeatable", multiple=True, type=int)
@click.option("--fps", help="Frames a second", default=30.0, show_default=True, type=click.FloatRange(min=1))
@click.option("--device", help="[default: cuda if there is a GPU]", type=click.Choice(["cpu", "cuda"]))
@click.option("--trust", help="Run the code that came with the networks: only for files of your own", is_flag=True)
def main(
    outdir: Path,
    seed: int,
    lres_path: str,
    sres_path: str | None,
    num_frames: int,
    save_lres: bool,
    save_index: Sequence[int],
    fps: float,
    device: str | None,
    trust: bool,
) -> None:
    """See the module's docstring."""
    outside = [index for index in save_index if not 0 <= index < num_frames]
    if outside:
        raise click.BadParameter(
            f"frame {outside[0]} was asked for, but the video has frames 0 to {num_frames - 1}; "
            "use a smaller index or a larger --len",
            param_hint="-i",
        )
    kinds = (["lres"] if save_lres or not sres_path else []) + (["sres"] if sres_path else [])
    try:
        source = open_source(lres_path, sres_path, device or ("cuda" if torch.cuda.is_available() else "cpu"), trust)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    assert isinstance(source, LowResSource | Pair), "--lres is required"
    files = generate(source, outdir, seed, num_frames, kinds, save_index, fps)
    for path in files:
        click.echo(f"{os.fspath(path)}  {path.stat().st_size / 2**20:.2f} MiB")
    networks = f"--lres={lres_path}" + (f" --sres={sres_path}" if sres_path else "")
    click.echo(f"Next: python calc_metrics.py --dataset=DATASET {networks} -m fvd2048_16f")


if __name__ == "__main__":
    main()

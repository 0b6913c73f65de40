"""Pictures of how training goes: real clips once, the same seeds again and again, and the curves of what was logged.

# Draw the curves of a run, also while it trains
python -m training.preview runs/lres/00000-labdoom-4batch-1accum-20.0gamma

# Draw several runs over each other
python -m training.preview runs/lres/00000-* runs/lres/00001-* --out=compared.png

The picture is drawn from stats.jsonl and metric-*.jsonl alone, as RUN_DIR/curves.png unless --out says otherwise.
"""

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from dnnlib.util import atomic_path, format_time
from dnnlib.video import VideoWriter
from training.data.dataset import ClipDataset, Size
from training.data.prompts import ClipPrompt
from training.logger import metric_values, read_lines
from training.plot import Chart, Line, draw_charts
from training.random import random_state
from training.sampling import Needs, Prompt

CHUNK_FRAMES = 16  # frames of real clips read at once
SHEET_COLUMNS = 8

# Charts of a run: title, statistics and how they are called, further arguments of the chart.
CURVES: tuple[tuple[str, dict[str, str], dict[str, Any]], ...] = (
    ("Loss", {"loss/G_loss": "G", "loss/D_loss": "D"}, {"guide": 2 * math.log(2)}),  # D's where it tells nothing apart
    ("R1", {"loss/r1_loss": "loss", "loss/r1_penalty": "penalty"}, {"log": True}),
    (
        "Logits of D",
        {"loss/D_score_real": "real", "loss/D_score_fake": "fake", "loss/G_score": "fake in G's step"},
        {"guide": 0.0},
    ),
    (
        "Signs of D's logits",
        {"loss/D_sign_real": "real", "loss/D_sign_fake": "fake", "loss/G_sign": "fake in G's step"},
        {"guide": 0.0, "limits": (-1.0, 1.0)},
    ),
    ("Strength of augmentation", {"progress/augment_p": "p"}, {}),
    (
        "Norm of gradients",
        {"progress/G_grad_norm": "G", "progress/D_grad_norm": "D", "progress/R1_grad_norm": "R1"},
        {"log": True},
    ),
    ("Not finite", {"progress/nonfinite_gradients": "gradients a step", "nonfinite": "values a tick"}, {"exact": True}),
    ("Seconds a step", {"timing/sec_per_step": "all", "wait": "waiting for data"}, {}),
    ("Memory in GiB", {"resources/cpu_mem_gb": "CPU", "resources/peak_gpu_mem_gb": "GPU, peak"}, {}),
)


class RealClips:
    """A few fixed clips of a dataset, for comparison and as the prompt of previews.

    Frame 0 of the preview is frame `needs.past` of a clip, so that the frames which a sampler needs before and after
    the preview are real. `num_frames` is less than asked for where no clip of the dataset is long enough.
    """

    def __init__(
        self, dataset: ClipDataset, sizes: Sequence[Size], num_videos: int, num_frames: int, needs: Needs, seed: int
    ):
        longest = max(clip.num_frames for clip in dataset.clips)
        self.dataset, self.sizes, self.needs = dataset, sizes, needs
        around = needs.past + needs.future
        limits = needs.frames or needs.streams
        self.num_frames = min(num_frames, longest - around)
        assert self.num_frames > 0, f"no clip has more than {around} frames"
        eligible = dataset.eligible(self.num_frames + around)
        self.generated_frames = self.num_frames if limits else num_frames
        self.clips = np.resize(random_state("preview", seed, 0).permutation(eligible), num_videos).tolist()

    def chunks(self, size: Size) -> Iterator[np.ndarray]:
        """Yield all frames of the preview at (height, width), in pieces: uint8 (N, T, H, W, 3)."""
        for start in range(self.needs.past, self.needs.past + self.num_frames, CHUNK_FRAMES):
            frames = range(start, min(start + CHUNK_FRAMES, self.needs.past + self.num_frames))
            yield np.stack([self.dataset.read(clip, size, frames) for clip in self.clips])

    def prompt(self) -> Prompt:
        """Return the real frames and streams as the prompt of a sampler."""
        return ClipPrompt(self.dataset, [(clip, self.needs.past) for clip in self.clips], self.dataset.streams)


def write_preview(stem: Path, chunks: Iterable[np.ndarray | torch.Tensor], num_frames: int, fps: float) -> None:
    """Write `<stem>.mp4`, all videos in a grid, and `<stem>.png`, a row of evenly spaced frames for each video.

    `chunks` are successive uint8 (N, T, H, W, 3) of `num_frames` frames in all; one chunk is held at a time.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    arrays = (chunk.cpu().numpy() if isinstance(chunk, torch.Tensor) else chunk for chunk in chunks)
    head = next(arrays)
    num_videos, _, height, width, _ = head.shape
    rows = max(row for row in range(1, math.isqrt(num_videos) + 1) if num_videos % row == 0)
    picks = np.unique(np.linspace(0, num_frames - 1, SHEET_COLUMNS).round().astype(int))
    columns = []
    done = 0
    with VideoWriter(stem.with_suffix(".mp4"), height * rows, width * num_videos // rows, fps, enlarge=True) as writer:
        for chunk in itertools.chain([head], arrays):
            writer.write(_tile(chunk, rows))
            columns += [chunk[:, pick - done] for pick in picks if done <= pick < done + chunk.shape[1]]
            done += chunk.shape[1]
        assert done == num_frames, f"expected {num_frames} frames, got {done}"
    sheet = np.stack(columns, axis=2).reshape(num_videos * height, len(columns) * width, 3)
    sheet = sheet.repeat(writer.factor, axis=0).repeat(writer.factor, axis=1)
    with atomic_path(stem.with_suffix(".png")) as path:
        Image.fromarray(sheet).save(path)


def contact_sheet(frames: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures uint8 (H, W, 3) side by side, row after row -> uint8 (rows * H, columns * W, 3); gaps are black."""
    height, width, _ = frames[0].shape
    rows = -(-len(frames) // columns)
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for index, frame in enumerate(frames):
        row, column = divmod(index, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = frame
    return sheet


# ----------------------------------------------------------------------------
# Curves.


def draw_curves(run_dirs: Path | Sequence[Path], out: Path | None = None) -> Path:
    """Draw what the log files of a run say, or those of several runs over each other, and return the picture's path.

    One run is drawn into RUN_DIR/curves.png, several into curves.png in the folder that holds them all, if `out` names
    no other place. Raises `ValueError` for a directory without statistics.
    """
    run_dirs = [run_dirs] if isinstance(run_dirs, Path) else list(run_dirs)
    runs = {name: curves_of(run_dir) for name, run_dir in zip(_short_names(run_dirs), run_dirs, strict=True)}
    charts = []
    for title in dict.fromkeys(title for curves in runs.values() for title in curves):
        parts = {run: curves[title] for run, curves in runs.items() if title in curves}
        if len(runs) == 1:
            charts += parts.values()
            continue
        # A colour is a run then, so each statistic gets a chart of its own.
        for label in dict.fromkeys(line.label for chart in parts.values() for line in chart.lines):
            lines = [
                Line(run, line.x, line.y) for run, chart in parts.items() for line in chart.lines if line.label == label
            ]
            like = next(iter(parts.values()))
            charts.append(dataclasses.replace(like, title=f"{title}: {label}", lines=tuple(lines)))
    folder = Path(os.path.commonpath([run_dir.resolve() for run_dir in run_dirs]))
    out = out or (run_dirs[0] if len(run_dirs) == 1 else folder) / "curves.png"
    title = run_dirs[0].resolve().name if len(run_dirs) == 1 else f"{len(run_dirs)} runs"
    subtitle = "      ".join(_describe_run(name, run_dir) for name, run_dir in zip(runs, run_dirs, strict=True))
    picture = draw_charts(charts, title, subtitle)
    with atomic_path(out) as path:
        picture.save(path, "PNG")
    return out


def curves_of(run_dir: Path) -> dict[str, Chart]:
    """The charts of a run by title: those of `CURVES` that it has values for, its other losses, and its metrics."""
    ticks = _by_step(run_dir / "stats.jsonl")
    if not ticks:
        raise ValueError(
            f"{run_dir} holds no statistics (stats.jsonl): expected a run directory, such as runs/lres/00000-..., that "
            "has trained for a step."
        )
    lines = list(ticks.values())
    for before, line in zip([{"step": -1}, *lines], lines, strict=False):
        num_nonfinite = sum(entry.get("nonfinite", 0) for entry in line.values() if isinstance(entry, dict))
        wait = _value(line, "timing/data_wait_sec") / (line["step"] - before["step"])
        line |= {"nonfinite": {"mean": num_nonfinite}, "wait": {"mean": wait}}
    known = {name for _, names, _ in CURVES for name in names}
    others = dict.fromkeys(name for line in lines for name in line if name.startswith("loss/") and name not in known)
    rows = [*CURVES, *((name.removeprefix("loss/"), {name: "mean"}, {"log": True}) for name in others)]
    charts = {}
    for title, names, arguments in rows:
        drawn = {label: [_value(line, name) for line in lines] for name, label in names.items()}
        _add_chart(charts, title, ticks, drawn, arguments)
    for path in sorted(run_dir.glob("metric-*.jsonl")):
        results = {step: metric_values(line) for step, line in _by_step(path).items()}
        labels = dict.fromkeys(label for values in results.values() for label in values)
        drawn = {label: [values.get(label, math.nan) for values in results.values()] for label in labels}
        _add_chart(charts, path.stem, results, drawn, {"log": True})
    return charts


def _by_step(path: Path) -> dict[int, dict[str, Any]]:
    """The lines of a log file in ascending steps; of a step that was told twice, the last."""
    lines = {line["step"]: line for line in read_lines(path)}
    return dict(sorted(lines.items()))


def _add_chart(
    charts: dict[str, Chart],
    title: str,
    steps: Iterable[int],
    drawn: Mapping[str, Sequence[float]],
    arguments: Mapping[str, Any],
) -> None:
    """Add a chart of the lines that have a finite value, if any has."""
    lines = [Line(label, list(steps), values) for label, values in drawn.items() if np.isfinite(values).any()]
    if lines:
        charts[title] = Chart(title, tuple(lines), **arguments)


def _value(line: Mapping[str, Any], name: str) -> float:
    """The mean of a statistic in a line of stats.jsonl, NaN where it has none."""
    mean = line.get(name, {}).get("mean")
    if mean is None or (mean == 0 and name == "timing/sec_per_step"):  # the first tick comes before any step
        return math.nan
    return mean


def _short_names(run_dirs: Sequence[Path]) -> list[str]:
    """The numbers of the runs, with their folders where numbers are equal, their paths where those are too."""
    paths = [run_dir.resolve() for run_dir in run_dirs]
    numbers = [path.name.partition("-")[0] for path in paths]
    for names in (numbers, [f"{path.parent.name}/{number}" for path, number in zip(paths, numbers, strict=True)]):
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _describe_run(name: str, run_dir: Path) -> str:
    """How far a run is, in one line."""
    *_, last = _by_step(run_dir / "stats.jsonl").values()
    options = json.loads((run_dir / "options.json").read_text()) if (run_dir / "options.json").is_file() else {}
    steps = f" of {options['steps']}" if "steps" in options else ""
    total_sec = _value(last, "timing/total_sec")
    parts = [
        *([options["system"]] if "system" in options else []),
        f"step {last['step']}{steps}",
        *([f"trained {format_time(total_sec)}"] if math.isfinite(total_sec) else []),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(last["timestamp"])),
    ]
    return f"{name}:  {', '.join(parts)}"


@click.command(help=str(__doc__).replace("# ", "\b\n"))
@click.argument("run_dirs", metavar="RUN_DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", help="Picture to write  [default: curves.png in the run directory]", type=click.Path(path_type=Path)
)
def main(run_dirs: tuple[Path, ...], out: Path | None) -> None:
    """See the module's docstring."""
    try:
        click.echo(draw_curves(run_dirs, out))
    except ValueError as error:
        raise click.ClickException(str(error)) from error


def _tile(videos: np.ndarray, rows: int) -> np.ndarray:
    """(N, T, H, W, 3) -> (T, rows * H, N / rows * W, 3), laid out column by column."""
    num_videos, num_frames, height, width, channels = videos.shape
    grid = videos.reshape(num_videos // rows, rows, num_frames, height, width, channels)
    grid = grid.transpose(2, 1, 3, 0, 4, 5)  # (T, rows, H, columns, W, 3)
    return grid.reshape(num_frames, rows * height, num_videos // rows * width, channels)


if __name__ == "__main__":
    main()

"""The page of the demo: videos below the real ones, measures, previews, and how to walk through the worlds."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dnnlib.util import atomic_path
from dnnlib.video import VideoWriter, iter_video_frames
from runs.strip import arrange
from training.preview import contact_sheet

FPS = 30.0
ENLARGE = 4  # times, of the videos that are compared
SHEET_COLUMNS = 12
PLAY_URL = "http://localhost:8008/play"
STYLE = (
    "body{font:16px sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}img,video{max-width:100%}"
    "td,th{padding:0 1em;text-align:right}td:first-child,th:first-child{text-align:left}"
    "pre{background:#eee;padding:.7em;overflow:auto}.columns{display:flex;gap:24px}.columns b{flex:1}"
)


@dataclass(frozen=True)
class Continuation:
    """A video that continues a clip, and the frames of the clip in its place: uint8 (T, H, W, 3)."""

    name: str
    video: Path
    real: np.ndarray


@dataclass(frozen=True)
class Row:
    """Measures of a model or a reference: Frechet distance, and PSNR above that of repeating the last frame, in dB."""

    name: str
    distance: float
    gain: float | None = None


def table(rows: Sequence[Row], num_clips: int, clip_frames: int) -> str:
    """Return the measures as lines of text."""
    lines = [f"{'fvd' + str(num_clips) + '_' + str(clip_frames) + 'f':>42s} {'PSNR over copying':>20s}"]
    for row in rows:
        gain = "" if row.gain is None else f"{row.gain:+.2f} dB"
        lines.append(f"{row.name:32s} {row.distance:9.1f} {gain:>20s}")
    return "\n".join(lines)


def compare(path: Path, videos: Sequence[Continuation]) -> np.ndarray:
    """Write a video with a column for each continuation, real frames above, and return its frames, not enlarged."""
    real = np.stack([video.real for video in videos])
    generated = np.stack([np.stack(list(iter_video_frames(video.video))) for video in videos])
    frames = arrange(real, generated, ENLARGE)
    _, height, width, _ = frames.shape
    with VideoWriter(path, height, width, FPS) as writer:
        writer.write(frames)
    return arrange(real, generated, 1)


def write_overview(path: Path, frames: np.ndarray) -> None:
    """Write equally spaced frames of a video, uint8 (T, H, W, 3), as one image, in which time goes along rows."""
    picks = np.linspace(0, len(frames) - 1, 2 * SHEET_COLUMNS).round().astype(int)
    padded = np.pad(frames[picks], ((0, 0), (0, 6), (0, 6), (0, 0)), constant_values=255)
    sheet = contact_sheet(list(padded), SHEET_COLUMNS).repeat(2, axis=0).repeat(2, axis=1)
    with atomic_path(path) as temporary:
        Image.fromarray(sheet).save(temporary)


def write_page(
    outdir: Path, videos: Sequence[Continuation], strips: Mapping[str, Path], rows: Sequence[Row],
    runs: Mapping[str, Path], play: str,
) -> None:  # fmt: skip
    """Write index.html, comparison.mp4 and overview.png; paths are below `outdir`, `runs` are run directories."""
    write_overview(outdir / "overview.png", compare(outdir / "comparison.mp4", videos))
    parts = ["<p>Held-out clips: real frames above; below frames generated under the same actions.</p>"]
    for name, path in strips.items():
        parts.append(f'<h2>Three seconds: {html.escape(name)}</h2><img src="{path.relative_to(outdir)}">')
    names = "".join(f"<b>{html.escape(video.name)}</b>" for video in videos)
    parts.append(f'<h2>Ten seconds</h2><div class="columns">{names}</div>')
    parts.append('<video src="comparison.mp4" controls loop autoplay muted></video>')
    parts.append('<p>The same at equal distances in time:</p><img src="overview.png">')
    parts.append(f"<h2>Walk</h2><pre>{html.escape(play)}</pre>")
    parts.append(f'<p>Then steer with the arrow keys at <a href="{PLAY_URL}">{PLAY_URL}</a>.</p>')
    parts.append("<h2>Measures</h2><table><tr><th></th><th>FVD</th><th>PSNR over copying the last frame</th></tr>")
    for row in rows:
        gain = "" if row.gain is None else f"{row.gain:+.2f} dB"
        parts.append(f"<tr><td>{html.escape(row.name)}</td><td>{row.distance:.1f}</td><td>{gain}</td></tr>")
    parts.append("</table>")
    for name, run_dir in runs.items():
        parts.append(f"<h2>The same clips while the {html.escape(name)} trains</h2>")
        for path in sorted((run_dir / "samples").glob("fake-*.png")):
            step = int(path.stem.split("-")[1])
            parts.append(f'<p>step {step}</p><img src="{path.relative_to(outdir)}">')
    page = f"<!doctype html><meta charset=utf-8><title>Longtake demo</title><style>{STYLE}</style>"
    page += "<h1>Longtake demo</h1>" + "\n".join(parts) + "\n"
    with atomic_path(outdir / "index.html") as temporary:
        temporary.write_text(page)

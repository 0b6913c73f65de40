"""Grid videos and contact sheets, read back and compared with the frames that went in."""

import io
import json
import math
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from dnnlib.video import iter_video_frames, probe
from training.data.dataset import ClipDataset
from training.logger import append_line
from training.preview import RealClips, curves_of, draw_curves, main, write_preview

SIZE = (16, 32)


@pytest.fixture
def dataset(tmp_path):
    """Clips of 6, 12 and 12 frames; each pixel of frame t of clip c is (20 c, 10 t, 0)."""
    (tmp_path / "data" / "0016x0032").mkdir(parents=True)
    lengths = {"a": 6, "b": 12, "c": 12}
    with zipfile.ZipFile(tmp_path / "data" / "0016x0032" / "0.zip", "w") as archive:
        for index, (clip, length) in enumerate(lengths.items()):
            for t in range(length):
                data = io.BytesIO()
                Image.new("RGB", (SIZE[1], SIZE[0]), (20 * index, 10 * t, 0)).save(data, "PNG")
                archive.writestr(f"{clip}/{t}.png", data.getvalue())
        names = {clip: [f"{t}.png" for t in range(length)] for clip, length in lengths.items()}
        archive.writestr("frame_paths.json", json.dumps(names))
    (tmp_path / "data" / "dataset.json").write_text('{"fps": 12}')
    return ClipDataset(tmp_path / "data", [SIZE])


def test_videos_are_tiled_column_by_column_and_sheets_row_by_row(tmp_path):
    colours = np.random.RandomState(0).randint(0, 256, (6, 20, 1, 1, 3))
    videos = np.broadcast_to(colours, (6, 20, 16, 32, 3)).astype(np.uint8)
    chunks = [torch.from_numpy(videos[:, :7]), videos[:, 7:8], torch.from_numpy(videos[:, 8:])]
    write_preview(tmp_path / "new" / "fake-00000003", iter(chunks), 20, fps=12)

    info = probe(tmp_path / "new" / "fake-00000003.mp4")
    assert (info.height, info.width, info.fps) == (32, 96, 12)
    frames = np.stack(list(iter_video_frames(tmp_path / "new" / "fake-00000003.mp4")))
    assert len(frames) == 20
    for video in range(6):
        row, column = video % 2, video // 2
        tile = frames[:, 16 * row + 4 : 16 * row + 12, 32 * column + 8 : 32 * column + 24].astype(float)
        assert np.abs(tile.mean(axis=(1, 2)) - colours[video, :, 0, 0]).mean() < 8  # the codec's loss

    sheet = np.asarray(Image.open(tmp_path / "new" / "fake-00000003.png"))
    picks = [0, 3, 5, 8, 11, 14, 16, 19]
    expected = videos[:, picks].swapaxes(1, 2).reshape(6 * 16, 8 * 32, 3)
    assert np.array_equal(sheet, expected)


def test_small_frames_are_enlarged_and_short_videos_have_fewer_columns(tmp_path):
    video = np.random.RandomState(0).randint(0, 256, (1, 3, 4, 8, 3)).astype(np.uint8)
    write_preview(tmp_path / "small", [video], 3, fps=30)
    sheet = np.asarray(Image.open(tmp_path / "small.png"))
    assert sheet.shape == (16, 3 * 32, 3)
    assert np.array_equal(sheet[::4, ::4], video[0].swapaxes(0, 1).reshape(4, 24, 3))


def test_real_clips_start_after_their_context(dataset):
    clips = RealClips(dataset, num_videos=4, num_frames=8, context=2, seed=0)
    assert clips.num_frames == 8 and set(clips.clips) == {1, 2}  # the clip of 6 frames is too short
    frames = np.concatenate(list(clips.chunks(SIZE)), axis=1)
    assert frames.shape == (4, 8, *SIZE, 3)
    assert frames[0, :, 0, 0, 1].tolist() == [20, 30, 40, 50, 60, 70, 80, 90]
    assert frames[:, 0, 0, 0, 0].tolist() == [20 * clip for clip in clips.clips]

    condition = clips.condition(SIZE, torch.device("cpu"))
    low = condition(-2, 3)
    assert low.shape == (4, 3, 3, *SIZE) and low.dtype == torch.float32 and low.is_contiguous()
    assert ((low[:, 1, :, 0, 0] + 1) * 127.5).round().tolist() == [[0, 10, 20]] * 4
    low = condition([-2, -1, 0, 9], 1)
    assert ((low[:, 1, 0, 0, 0] + 1) * 127.5).round().tolist() == [0, 10, 20, 110]


def test_previews_are_no_longer_than_the_clips(dataset):
    assert RealClips(dataset, num_videos=1, num_frames=100, context=2, seed=0).num_frames == 8


def test_the_same_clips_are_shown_again(dataset):
    first, again, other = (RealClips(dataset, 16, 2, 0, seed).clips for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first[:3]) == [0, 1, 2]  # none twice before all were shown


def write_run(run_dir, lines, metrics=(), **options):
    """A run directory with these lines of statistics, each name -> mean, and of a metric."""
    run_dir.mkdir(parents=True)
    for line in lines:
        step = line.pop("step")
        entries = {name: {"num": 1, "mean": mean, "std": 0.0} for name, mean in line.items()}
        append_line(run_dir / "stats.jsonl", {"step": step, **entries, "timestamp": 1.79e9})
    for step, value in metrics:
        append_line(run_dir / "metric-fvd.jsonl", {"step": step, "results": {"fvd": value}, "timestamp": 1.79e9})
    if options:
        (run_dir / "options.json").write_text(json.dumps(options))
    return run_dir


def points(chart):
    return {line.label: dict(zip(line.x, line.y, strict=True)) for line in chart.lines}


def test_curves_are_what_was_logged(tmp_path):
    lines = [
        {"step": 0, "timing/sec_per_step": 0.0, "loss/r1_loss": math.nan},
        {"step": 20, "loss/G_loss": 1.5, "loss/D_loss": math.nan, "loss/other": 3.0, "timing/sec_per_step": 2.0},
        {"step": 10, "loss/G_loss": 1.25, "loss/D_loss": 1.0, "timing/sec_per_step": 2.5, "timing/data_wait_sec": 5.0},
        {"step": 20, "loss/G_loss": 1.75, "loss/D_loss": math.nan, "progress/unknown": 1.0},
    ]
    run_dir = write_run(tmp_path / "run", lines, metrics=[(10, 500.0), (20, 300.0)])
    nan = pytest.approx(math.nan, nan_ok=True)
    charts = curves_of(run_dir)
    assert points(charts["Loss"]) == {"G": {0: nan, 10: 1.25, 20: 1.75}, "D": {0: nan, 10: 1.0, 20: nan}}
    assert points(charts["Seconds a step"]) == {
        "all": {0: nan, 10: 2.5, 20: nan},
        "waiting for data": {0: nan, 10: 0.5, 20: nan},
    }
    assert points(charts["metric-fvd"]) == {"fvd": {10: 500.0, 20: 300.0}}
    assert points(charts["Not finite"]) == {"values a tick": {0: 0, 10: 0, 20: 0}}
    assert "R1" not in charts and "Norm of gradients" not in charts


def test_losses_that_nobody_foresaw_are_drawn(tmp_path):
    run_dir = write_run(tmp_path / "run", [{"step": 0, "loss/codebook": 0.5}])
    assert points(curves_of(run_dir)["codebook"]) == {"mean": {0: 0.5}}


def test_values_that_were_left_out_are_counted(tmp_path):
    run_dir = write_run(tmp_path / "run", [{"step": 0}])
    entry = {"num": 3, "mean": 1.0, "std": 0.0, "nonfinite": 2}
    append_line(run_dir / "stats.jsonl", {"step": 1, "loss/G_loss": entry, "loss/D_loss": entry, "timestamp": 1.79e9})
    assert points(curves_of(run_dir)["Not finite"])["values a tick"] == {0: 0, 1: 4}


def test_curves_are_one_picture_in_the_run(tmp_path):
    lines = [{"step": step, "loss/G_loss": 1.0 + step} for step in range(3)]
    run_dir = write_run(tmp_path / "00007-maze-4batch", lines, steps=3, system="longvideogan-lres")
    result = CliRunner().invoke(main, [str(run_dir)])
    assert result.exit_code == 0 and result.output.strip() == str(run_dir / "curves.png")
    first = Image.open(run_dir / "curves.png")
    first.load()
    append_line(run_dir / "stats.jsonl", {"step": 3, "loss/G_loss": {"mean": 9.0}, "timestamp": 1.79e9})
    assert draw_curves(run_dir) == run_dir / "curves.png"
    assert np.asarray(Image.open(run_dir / "curves.png")).tolist() != np.asarray(first).tolist()
    assert sorted(path.name for path in run_dir.iterdir()) == ["curves.png", "options.json", "stats.jsonl"]


def test_runs_are_drawn_over_each_other(tmp_path):
    one = write_run(tmp_path / "lres" / "00000-maze", [{"step": 0, "loss/G_loss": 1.0}], metrics=[(0, 5.0)])
    two = write_run(tmp_path / "lres" / "00001-maze", [{"step": 0, "loss/G_loss": 2.0, "loss/D_loss": 3.0}])
    assert draw_curves([one, two]) == tmp_path / "lres" / "curves.png"
    three = write_run(tmp_path / "sres" / "00000-maze", [{"step": 0, "loss/G_loss": 2.0}])
    assert draw_curves([one, three], tmp_path / "both.png") == tmp_path / "both.png"
    heights = [Image.open(path).height for path in (tmp_path / "lres" / "curves.png", tmp_path / "both.png")]
    assert heights[0] > heights[1]  # G, D, not finite and FVD; G, not finite and FVD


def test_a_folder_without_statistics_is_no_run(tmp_path):
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 1 and "holds no statistics" in result.output and "Traceback" not in result.output

"""Grid videos and contact sheets, read back and compared with the written frames."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from dnnlib.video import iter_video_frames, probe
from training.data.dataset import ClipDataset
from training.preview import RealClips, write_preview
from training.sampling import Needs

SIZE = (16, 32)
NEEDS = Needs(past=2, future=2, size=SIZE, follows=True)


@pytest.fixture
def dataset(tmp_path):
    """Return clips of 6, 12 and 12 frames; each pixel of frame t of clip c is (20 c, 10 t, 0)."""
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
    clips = RealClips(dataset, [SIZE], num_videos=4, num_frames=8, needs=NEEDS, seed=0)
    assert clips.num_frames == 8 and set(clips.clips) == {1, 2}  # the clip of 6 frames is too short
    frames = np.concatenate(list(clips.chunks(SIZE)), axis=1)
    assert frames.shape == (4, 8, *SIZE, 3)
    assert frames[0, :, 0, 0, 1].tolist() == [20, 30, 40, 50, 60, 70, 80, 90]
    assert frames[:, 0, 0, 0, 0].tolist() == [20 * clip for clip in clips.clips]

    prompt = clips.prompt()
    low = prompt.frames(-2, 3, SIZE)
    assert low.shape == (4, 3, 3, *SIZE) and low.dtype == torch.float32
    assert ((low[:, 1, :, 0, 0] + 1) * 127.5).round().tolist() == [[0, 10, 20]] * 4
    low = prompt.frames([-2, -1, 0, 9], 1, SIZE)
    assert ((low[:, 1, 0, 0, 0] + 1) * 127.5).round().tolist() == [0, 10, 20, 110]


def test_previews_are_no_longer_than_the_clips(dataset):
    assert RealClips(dataset, [SIZE], num_videos=1, num_frames=100, needs=NEEDS, seed=0).num_frames == 8


def test_the_same_clips_are_shown_again(dataset):
    first, again, other = (RealClips(dataset, [SIZE], 16, 2, Needs(), seed).clips for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first[:3]) == [0, 1, 2]  # none twice before all were shown

"""A folder of many videos is looked at once, and again where a file has changed."""

import json
import os
import shutil

import pytest

from tests.training.data.clips import drifting, write
from training.data import clip_files
from training.data.clip_files import open_clip_files
from training.data.listing import Remarks
from training.data.video_index import VideoIndex

NUM_VIDEOS = 33


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "videos").mkdir()
    first = write(tmp_path / "videos" / "000.mp4", drifting("index", 5))
    for number in range(1, NUM_VIDEOS):
        shutil.copy(first, tmp_path / "videos" / f"{number:03d}.mp4")
    return tmp_path / "videos"


def look(folder, monkeypatch):
    """Return the clips of a folder, and the names of the videos that were looked at."""
    seen, scan = [], clip_files.scan
    monkeypatch.setattr(clip_files, "scan", lambda path: seen.append(path.name) or scan(path))
    clips = open_clip_files(folder, Remarks())
    monkeypatch.setattr(clip_files, "scan", scan)
    return [(clip.clip.path, clip.clip.num_frames, clip.fps, clip.version) for clip in clips], sorted(seen)


def test_videos_are_looked_at_once(folder, monkeypatch):
    first, seen = look(folder, monkeypatch)
    assert len(seen) == NUM_VIDEOS and all(entry[1] == 5 for entry in first)
    second, seen = look(folder, monkeypatch)
    assert second == first and seen == []
    write(folder / "007.mp4", drifting("index", 8))
    os.remove(folder / "008.mp4")
    third, seen = look(folder, monkeypatch)
    assert seen == ["007.mp4"] and len(third) == NUM_VIDEOS - 1
    assert {name: count for name, count, _, _ in third}["007.mp4"] == 8


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": [9]}', '{"version": [1], "x": ["a"]}'])
def test_a_damaged_index_is_passed_over(folder, monkeypatch, content):
    first, _ = look(folder, monkeypatch)
    index = VideoIndex(folder)
    assert len(json.loads(index.path.read_text())) == NUM_VIDEOS + 1
    index.path.write_text(content)
    again, seen = look(folder, monkeypatch)
    assert again == first and len(seen) == NUM_VIDEOS

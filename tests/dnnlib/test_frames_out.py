"""Frames are read back from every kind of file; unfinished files are not visible."""

import concurrent.futures
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dnnlib import frames_out
from dnnlib.video import iter_video_frames

FRAMES = np.random.RandomState(0).randint(0, 256, (7, 5, 9, 3)).astype(np.uint8)


def write(path, num_frames=None):
    with frames_out.open_writer(path, 5, 9, num_frames=num_frames) as writer:
        writer.write(FRAMES[:3])
        writer.write(FRAMES[3:])
    assert writer.num_frames == 7


@pytest.mark.parametrize("planned", [7, 100, None])
def test_an_array_file_has_its_actual_length(tmp_path, planned):
    write(tmp_path / "a.npz", planned)
    with np.load(tmp_path / "a.npz") as archive:
        assert archive.files == ["frames"]
        assert np.array_equal(archive["frames"], FRAMES)
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None
    assert os.listdir(tmp_path) == ["a.npz"]


def test_images_are_numbered_from_zero(tmp_path):
    write(tmp_path / "seed=1")
    assert sorted(os.listdir(tmp_path / "seed=1")) == [f"{index:06d}.png" for index in range(7)]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "seed=1" / "000004.png")), FRAMES[4])


def test_suffixes_choose_the_writer(tmp_path):
    for name, suffix in frames_out.SUFFIXES.items():
        write(tmp_path / f"{name}{suffix}")
    assert sorted(os.listdir(tmp_path)) == ["gif.gif", "mp4.mp4", "npz.npz", "png", "webm.webm"]
    assert sum(1 for _ in iter_video_frames(tmp_path / "mp4.mp4")) == 7
    with pytest.raises(ValueError, match=r"use one of .mp4"):
        frames_out.open_writer(tmp_path / "a.mov", 5, 9)


def test_an_interrupted_array_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), frames_out.open_writer(path, 5, 9) as writer:
        writer.write(FRAMES)
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.npz"]


def test_only_what_is_published_stays(tmp_path):
    folder = tmp_path / "out"
    for num_pictures in (3, 2):  # the second time in place of the first
        with frames_out.staging(folder) as stage:
            assert stage.name.startswith(".unfinished-") and stage.parent == folder
            write(stage / "a.npz")
            with frames_out.open_writer(stage / "a", 5, 9) as writer:
                writer.write(FRAMES[:num_pictures])
            frames_out.publish(stage / "a.npz", folder / "b.npz")
            frames_out.publish(stage / "a", folder / "b")
    assert sorted(os.listdir(folder)) == ["b", "b.npz"]
    assert len(os.listdir(folder / "b")) == 2
    with pytest.raises(KeyboardInterrupt), frames_out.staging(folder) as stage:
        write(stage / "c.npz")
        raise KeyboardInterrupt
    assert sorted(os.listdir(folder)) == ["b", "b.npz"]


HOLD = """
import sys, time
from pathlib import Path
from dnnlib import frames_out
with frames_out.staging(Path(sys.argv[1])) as stage:
    (stage / "a.mp4").write_text("half")
    print(stage, flush=True)
    time.sleep(100)
"""


def test_what_killed_processes_left_is_removed_and_what_others_work_on_stays(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        stages = [Path(process.stdout.readline().strip()) for process in processes if process.stdout]
        assert len({*stages}) == 2 and all((stage / "a.mp4").exists() for stage in stages)
        processes[0].kill()
        processes[0].wait()
        with frames_out.staging(tmp_path) as mine:
            assert not stages[0].exists()
            assert (stages[1] / "a.mp4").exists() and mine.exists()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert os.listdir(tmp_path) == [stages[1].name]


def test_stages_made_at_once_do_not_remove_each_other(tmp_path):
    def work(index):
        for _ in range(20):
            with frames_out.staging(tmp_path) as stage:
                (stage / "a").write_text(str(index))
                assert (stage / "a").read_text() == str(index)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert os.listdir(tmp_path) == []

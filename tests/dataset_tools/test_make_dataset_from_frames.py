"""Images of any kind become RGB frames, in the order of their numbers, at the requested rate."""

import io
import json
import subprocess
import sys
import time

import numpy as np
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset_tools import make_dataset_from_frames as maker
from dataset_tools.making import Recipe
from training.data.dataset import ClipDataset

SIZE = (8, 16)
RED = (200, 30, 10)


def run(*arguments):
    return CliRunner().invoke(maker.main, [str(argument) for argument in arguments])


def save(path, content=RED, height=16, width=32, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = content if isinstance(content, Image.Image) else Image.new("RGB", (width, height), content)
    image.save(path, **options)


def content(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def walk(folder, count=4, names="{:04d}.png"):
    for index in range(count):
        save(folder / names.format(index), (index * 20,) * 3)


def gradient(mode="RGB"):
    ramp = np.linspace(0, 255, 32).astype(np.uint8)[None, :].repeat(16, 0)
    return Image.merge("RGB", [Image.fromarray(part) for part in (ramp, ramp[:, ::-1], ramp // 2)]).convert(mode)


def levels(dataset, index):
    clip = dataset.read(index, SIZE, range(dataset.clips[index].num_frames))
    return [round(float(frame.mean())) for frame in clip]


def test_each_folder_with_images_becomes_a_clip(tmp_path):
    walk(tmp_path / "in" / "b" / "deep", 12, "{}.png")
    walk(tmp_path / "in" / "b", 2, "frame {:03d}.JPG")
    save(tmp_path / "in" / "root.bmp", (90,) * 3)
    save(tmp_path / "in" / "._root.bmp")
    (tmp_path / "in" / "notes").mkdir()
    (tmp_path / "in" / "notes" / "a.txt").write_text("not an image")
    result = run(tmp_path / "in", tmp_path / "out", "--height", 8, "--width", 16, "--source-fps", 25)
    assert result.exit_code == 0, result.output
    dataset = ClipDataset(tmp_path / "out", [SIZE])
    assert [clip.path for clip in dataset.clips] == ["in", "b", "b/deep"] and dataset.fps == 25
    assert levels(dataset, 0) == [90] and levels(dataset, 1) == [0, 20]
    assert levels(dataset, 2) == list(range(0, 240, 20))  # 2.png comes before 10.png
    description = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert description["source_fps"] == 25 and description["source"] == "in"


def test_broken_images_break_their_clip_only_and_moving_ones_are_named(tmp_path):
    walk(tmp_path / "in" / "good")
    walk(tmp_path / "in" / "torn")
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8))
    data = io.BytesIO()
    noise.save(data, "PNG")
    (tmp_path / "in" / "torn" / "0002.png").write_bytes(data.getvalue()[:5000])
    save(tmp_path / "in" / "moving" / "a.gif", noise, save_all=True, append_images=[gradient()])
    result = run(tmp_path / "in", tmp_path / "out", "--sizes", "8x16")
    assert result.exit_code == 1 and "1 of 2 sources are broken" in result.output
    assert "torn/0002.png cannot be a frame: " in result.output
    assert "make_dataset_from_videos takes videos (1): moving/a.gif" in result.output
    assert [clip.path for clip in ClipDataset(tmp_path / "out", [SIZE]).clips] == ["good"]
    result = run(tmp_path / "in", tmp_path / "out", "--sizes", "8x16", "--dry-run")
    assert "good  4 images, the first 16x32, make 4 frames" in result.output


def test_frames_that_differ_in_size_are_each_cropped(tmp_path):
    ramp = np.linspace(0, 255, 256).astype(np.uint8)[None, :, None].repeat(3, 2)
    for index, (height, width) in enumerate([(128, 256), (64, 256), (128, 512)]):
        image = Image.fromarray(ramp.repeat(8, 0)).resize((width, height))
        save(tmp_path / "in" / "a" / f"{index}.png", image)
    assert run(tmp_path / "in", tmp_path / "out", "--sizes", "8x16").exit_code == 0
    clip = ClipDataset(tmp_path / "out", [SIZE]).read(0, SIZE, range(3))[:, 4, :, 0].astype(float)
    assert np.abs(clip[0] - (np.arange(16) * 16 + 7.5)).max() < 4
    for cropped in clip[1:]:
        assert np.abs(cropped - (np.arange(16) * 8 + 67.5)).max() < 4


@given(
    num_frames=st.integers(1, 60),
    source=st.sampled_from([10.0, 12.5, 25.0, 29.97, 30.0]),
    wanted=st.sampled_from([None, 5.0, 10.0, 24.0, 29.97, 60.0]),
    trims=st.tuples(*[st.sampled_from([0.0, 0.1, 0.5])] * 2),
)
def test_resampling_takes_the_frame_shown_at_each_time(num_frames, source, wanted, trims):
    chosen = maker.choose_frames(num_frames, source, Recipe(fps=wanted, trim_start=trims[0], trim_end=trims[1]))
    # In whole thousandths of a frame and a second.
    rate = round((wanted or source) * 1000)
    period = round(source * 1000)
    first = next(i for i in range(10**6) if i * 10**6 >= round(trims[0] * 1000) * period)
    stop = [i for i in range(num_frames + 1) if (num_frames - i) * 10**6 >= round(trims[1] * 1000) * period]
    expected, index = [], 0
    while stop and (frame := first + index * period // rate) < stop[-1]:
        expected.append(frame)
        index += 1
    assert chosen == expected


def test_a_rate_is_resampled_and_recorded(tmp_path):
    walk(tmp_path / "in" / "a", 10)
    result = run(tmp_path / "in", tmp_path / "out", "--sizes", "8x16", "--fps", 15, "--trim-start", 0.1)
    assert result.exit_code == 0, result.output
    dataset = ClipDataset(tmp_path / "out", [SIZE])
    assert dataset.fps == 15 and levels(dataset, 0) == [60, 100, 140, 180]
    result = run(tmp_path / "in", tmp_path / "none", "--sizes", "8x16", "--trim-start", 1)
    assert "nothing is left of" in result.output and "after trimming: it holds 10 frames" in result.output


def test_missing_numbers_divide_a_clip_unless_gaps_are_kept(tmp_path):
    walk(tmp_path / "in" / "a", 10)
    (tmp_path / "in" / "a" / "0004.png").unlink()
    (tmp_path / "in" / "a" / "0010.heic").write_bytes(b"")
    result = run(tmp_path / "in", tmp_path / "out", "--sizes", "8x16")
    assert "begin anew (1): a between 0003.png and 0005.png" in result.output
    assert "no kind of file that is read (1): a/0010.heic" in result.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())["clips"]
    found = {name: (clip["frames"], clip["group"]) for name, clip in manifest.items()}
    assert found == {"a/0000": (4, "a"), "a/0005": (5, "a")}  # both parts train, or both validate
    result = run(tmp_path / "in", tmp_path / "whole", "--sizes", "8x16", "--keep-gaps")
    assert result.exit_code == 0 and "between" not in result.output
    dataset = ClipDataset(tmp_path / "whole", [SIZE])
    assert [clip.path for clip in dataset.clips] == ["a"]
    assert levels(dataset, 0) == [0, 20, 40, 60, 100, 120, 140, 160, 180]


def test_doubles_break_their_clip_and_twelve_bits_are_named(tmp_path):
    walk(tmp_path / "in" / "double")
    save(tmp_path / "in" / "double" / "0002.jpg")
    for number in range(3):
        save(tmp_path / "in" / "deep" / f"{number}.png", Image.fromarray(np.full((16, 32), 4000, np.uint16)))
    result = run(tmp_path / "in", tmp_path / "out", "--sizes", "8x16")
    assert result.exit_code == 1 and "0002.jpg and 0002.png have the same number" in result.output
    assert "Read as 12 bits, since no 16-bit value exceeds 4095 (1): deep" in result.output
    dataset = ClipDataset(tmp_path / "out", [SIZE])
    assert [clip.path for clip in dataset.clips] == ["deep"] and levels(dataset, 0) == [250] * 3


def test_partitions_that_wait_for_one_listing_make_what_one_run_makes(tmp_path, repo):
    for name in "abcde":
        walk(tmp_path / "in" / name)
    options = ["--sizes", "8x16", "--num-partitions", "3"]
    command = [sys.executable, "-m", "dataset_tools.make_dataset_from_frames", tmp_path / "in", tmp_path / "out"]
    waiting = [
        subprocess.Popen([*command, *options, "--partition", index, "--wait-for-list-file"], cwd=repo)
        for index in ("0", "2")
    ]
    time.sleep(1)
    assert [process.poll() for process in waiting] == [None, None]
    before = content(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out", *options, "--partition", 1).exit_code == 0
    assert [process.wait(60) for process in waiting] == [0, 0]
    assert run(tmp_path / "in", tmp_path / "one", *options).exit_code == 0
    (tmp_path / "out" / maker.LISTING).unlink()
    assert content(tmp_path / "out") == content(tmp_path / "one")
    assert content(tmp_path / "in") == before


def test_a_listing_of_another_folder_is_refused(tmp_path):
    for name in ("one", "two"):
        walk(tmp_path / name / "a")
    assert run(tmp_path / "one", tmp_path / "out", "--partition", 0).exit_code == 0
    result = run(tmp_path / "two", tmp_path / "out", "--partition", 1, "--wait-for-list-file")
    assert result.exit_code == 1 and "delete it to list anew" in result.output


def test_folders_without_images_are_refused_and_two_of_one_name_get_two(tmp_path):
    (tmp_path / "in").mkdir()
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 1 and "holds no images that Pillow reads" in result.output
    walk(tmp_path / "in")
    walk(tmp_path / "in" / "in", 5)
    assert run(tmp_path / "in", tmp_path / "out", "--sizes", "8x16").exit_code == 0
    assert {c.path: c.num_frames for c in ClipDataset(tmp_path / "out", [SIZE]).clips} == {"in": 5, "in_2": 4}

"""generate.py from the command line: files, lengths, images, interruptions and error messages."""

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import generate
from dnnlib.video import VideoWriter, iter_video_frames, scan
from tests.training.longvideogan.tiny import make_sampler
from torch_utils.precision import cpu_has_bf16
from training import network_file
from training.checkpoint import save_network
from training.data.footage import open_videos
from training.longvideogan.lres.discriminator import LowResDiscriminator
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sres.generator import SuperResGenerator
from training.sampling import Request
from training.video_files import Sheet, format_seeds, tile


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Return a pair of tiny networks and where they are saved."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    lres = LowResGenerator(18, 32, 16, 4, 10, 60, 8, 8, temporal_channels=(8, 8, 6, 6), spatial_channels=(4, 4, 4, 4))
    sres = SuperResGenerator(36, 64, 18, 32, 2, 8, 8, num_layers=8, channel_base=256, channel_max=4)
    save_network(lres, folder / "lres.pkl")
    save_network(sres, folder / "sres.pkl")
    return lres.requires_grad_(False), sres.requires_grad_(False), folder


@pytest.fixture
def run(networks, tmp_path):
    """Run the command on the CPU into tmp_path, with the named networks: run("lres sres", "--seed=0")."""

    def run(names, *arguments, exit_code=0):
        given = [f"--{name}={networks[2] / name}.pkl" for name in names.split()]
        command = [f"--outdir={tmp_path}", "--device=cpu", *given, *map(str, arguments)]
        result = CliRunner().invoke(generate.main, command)
        assert result.exit_code == exit_code, result.output
        return result.output

    return run


def read(path):
    return np.stack(list(iter_video_frames(path)))


def frames_of(path):
    with np.load(path) as archive:
        return archive["frames"]


def close(a, b):
    """Equal but for the rounding of frames that were computed in other pieces."""
    difference = np.abs(a.astype(int) - b)
    return difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_without_networks_the_included_ones_are_used(networks, run, tmp_path, monkeypatch):
    models = tmp_path / "models"
    models.mkdir()
    monkeypatch.setattr(network_file, "MODELS", models)
    assert "--model is missing" in run("", "--seed=1", "--len=5", exit_code=2)
    for role in ("lres", "sres"):
        (models / f"{network_file.DEFAULT_MODEL}-{role}.pkl").write_bytes((networks[2] / f"{role}.pkl").read_bytes())
    run("", "--seed=1", "--len=5", "--format=npz")
    (found,) = tmp_path.glob("*.npz")
    frames = frames_of(found)
    found.unlink()
    run("lres sres", "--seed=1", "--len=5", "--format=npz")
    np.testing.assert_array_equal(frames, frames_of(found))


def test_pair_writes_exactly_what_was_asked(networks, run, tmp_path):
    lres, sres, _ = networks
    output = run("lres sres", "--seed=7", "--len=21", "--save-lres=True", "-i", 0, "-i", 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "seed=7_len=21_frame=0000.png",
        "seed=7_len=21_frame=0020.png",
        "seed=7_len=21_lres.mp4",
        "seed=7_len=21_sheet.png",
        "seed=7_len=21_sres.mp4",
    ]
    assert "21 frames in" in output and output.splitlines()[-1].startswith("Next: python calc_metrics.py")
    assert read(tmp_path / "seed=7_len=21_sres.mp4").shape == (21, 36 * 4, 64 * 4, 3)
    assert read(tmp_path / "seed=7_len=21_lres.mp4").shape == (21, 18 * 8, 32 * 8, 3)
    frames = torch.cat(list(make_sampler(lres, sres).video(Request([7], 0, 21))), dim=1)[0].numpy()
    for index in (0, 20):
        picture = np.asarray(Image.open(tmp_path / f"seed=7_len=21_frame={index:04d}.png"))
        assert np.array_equal(picture, frames[index])
    sheet = np.asarray(Image.open(tmp_path / "seed=7_len=21_sheet.png"))
    assert sheet.shape == (4 * 36, 6 * 64, 3)
    assert np.array_equal(sheet[:36, 64:128], frames[1])


@pytest.mark.parametrize("file_format", ["png", "npz", "mp4", "webm", "gif"])
def test_the_folder_is_measured_as_the_frames_that_were_generated(run, tmp_path, file_format):
    """Whatever else is in it: contact sheets, single frames, the output of the first stage, side files."""
    run("lres sres", "--seeds=0-1", "--len=9", f"--format={file_format}", "--save-lres=True", "-i", 3)
    (tmp_path / "log.txt").write_text("generated")
    (tmp_path / "options.json").write_text("{}")
    made = tmp_path.parent / f"{tmp_path.name}-npz"
    run("lres sres", "--seeds=0-1", "--len=9", "--format=npz", f"--outdir={made}")
    if file_format == "webm":  # the same video again
        run("lres sres", "--seeds=0-1", "--len=9", "--format=mp4")
    side = open_videos(tmp_path)
    assert side.size == (36, 64) and [clip.num_frames for clip in side.footage.clips] == [9, 9]
    for number in range(2):
        frames = frames_of(made / f"seed={number}_len=9_sres.npz")
        error = np.abs(side.footage.read(number, side.size, range(9)).astype(int) - frames)
        assert error.mean() < (3 if file_format in ("mp4", "webm", "gif") else 1e-9)
    left_out = " ".join(side.remarks)
    assert "contact sheet or single frame of a generated video (4)" in left_out
    assert (
        f"a further file of a generated video ({4 if file_format == 'webm' else 2})" in left_out
        and "no kind of file that is read (2)" in left_out
    )


def test_every_format_shows_the_same_frames(run, tmp_path):
    for name in ("npz", "png", "mp4", "webm", "gif"):
        run("lres sres", "--seed=1", "--len=9", f"--format={name}", "--fps=25")
    frames = frames_of(tmp_path / "seed=1_len=9_sres.npz")
    assert frames.shape == (9, 36, 64, 3) and frames.std() > 1
    pictures = [Image.open(tmp_path / "seed=1_len=9_sres" / f"{index:06d}.png") for index in range(9)]
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), frames)
    for name in ("mp4", "webm", "gif"):
        pixels = read(tmp_path / f"seed=1_len=9_sres.{name}").reshape(9, 36, 4, 64, 4, 3).mean(axis=(2, 4))
        assert np.abs(pixels - frames).mean() < 3


def test_windows_are_cut_from_one_endless_video(run, tmp_path):
    run("lres sres", "--seed=3", "--len=40", "--format=npz")
    whole = frames_of(tmp_path / "seed=3_len=40_sres.npz")
    run("lres sres", "--seed=3", "--len=9", "--format=npz")
    assert close(frames_of(tmp_path / "seed=3_len=9_sres.npz"), whole[:9])
    run("lres sres", "--seed=3", "--start=13", "--len=20", "--format=npz", "-i", 14)
    assert close(frames_of(tmp_path / "seed=3_start=13_len=20_sres.npz"), whole[13:33])
    assert close(np.asarray(Image.open(tmp_path / "seed=3_start=13_len=20_frame=0014.png")), whole[14])
    run("lres", "--seed=3", "--start=-5", "--len=6", "--format=npz")
    run("lres", "--seed=3", "--len=1", "--format=npz")
    assert close(
        frames_of(tmp_path / "seed=3_start=-5_len=6_lres.npz")[5:], frames_of(tmp_path / "seed=3_len=1_lres.npz")
    )


def test_seeds_made_together_equal_those_made_alone(run, tmp_path):
    run("lres sres", "--seeds=2-4", "--len=5", "--format=npz", "--batch=2", "--save-lres=1")
    videos = {}
    for seed in (2, 3, 4):
        path = tmp_path / f"seed={seed}_len=5_sres.npz"
        videos[seed] = frames_of(path)
        path.unlink()
        run("lres sres", f"--seed={seed}", "--len=5", "--format=npz")
        assert close(frames_of(path), videos[seed])
    assert not close(videos[2], videos[3])
    for batch in (1, 4):
        run("lres sres", "--seeds=3,2,4,7", "--grid=2x2", "--len=5", "--format=npz", f"--batch={batch}", "-i", 2)
        grid = frames_of(tmp_path / "seeds=3,2,4,7_len=5_grid=2x2_sres.npz")
        assert grid.shape == (5, 72, 128, 3)
        for cell, seed in ((grid[:, :36, :64], 3), (grid[:, :36, 64:], 2), (grid[:, 36:, :64], 4)):
            assert close(cell, videos[seed])
        assert np.array_equal(np.asarray(Image.open(tmp_path / "seeds=3,2,4,7_len=5_grid=2x2_frame=0002.png")), grid[2])
    run("lres", "--seeds=0-1", "--grid=1x2", "--len=2")
    assert read(tmp_path / "seeds=0-1_len=2_grid=1x2_lres.mp4").shape == (2, 18 * 8, 2 * 32 * 8, 3)


def test_sampling_options_reach_the_networks(run, tmp_path):
    def video(*options):
        run("lres", "--seed=1", "--len=48", "--format=npz", *options)
        return frames_of(tmp_path / "seed=1_len=48_lres.npz").astype(int)

    plain, calm, other = video(), video("--truncation=0"), video("--rng=legacy")
    assert calm.std(axis=0).mean() < plain.std(axis=0).mean()
    assert not close(other, plain)
    loop = video("--loop=16")
    assert close(loop[:16], loop[16:32]) and close(loop[:16], loop[32:]) and not close(loop[:8], loop[8:16])
    run("lres", "--seed=1", "--loop=16", "--format=npz")
    assert close(frames_of(tmp_path / "seed=1_len=16_lres.npz"), loop[:16])
    slow = video("--temporal-scale=0.5")
    assert np.abs(np.diff(slow, axis=0)).mean() < np.abs(np.diff(plain, axis=0)).mean()
    assert not close(video("--blend=5@20", "--blend=6@40"), plain)


def test_bf16_is_close_to_fp32_or_refused(run, tmp_path):
    if not cpu_has_bf16():
        output = run("lres sres", "--seed=1", "--precision=bf16", exit_code=2)
        assert "bf16 is slower than fp32 on this CPU, which has no instructions for it; use fp32" in " ".join(
            output.replace("\u2502", "").split()
        )
        assert not list(tmp_path.iterdir())
        return
    videos = []
    for precision in ("fp32", "bf16"):
        run("lres sres", "--seed=1", "--len=9", "--format=npz", f"--precision={precision}")
        videos.append(frames_of(tmp_path / "seed=1_len=9_sres.npz").astype(int))
    assert 0 < np.abs(videos[0] - videos[1]).mean() < 2


def test_a_given_video_is_enlarged_like_a_generated_one(run, tmp_path):
    run("lres sres", "--seed=4", "--len=24", "--format=npz", "--save-lres=1")
    small, large = tmp_path / "seed=4_len=24_lres.npz", frames_of(tmp_path / "seed=4_len=24_sres.npz")
    output = run("sres", "--seed=4", f"--lres-video={small}", "--format=npz", "--save-lres=1", "--len=99")
    assert "The context ended: only 24 frames were made." in output
    stem = "seed=4_len=24_lres_seed=4"
    assert np.array_equal(frames_of(tmp_path / f"{stem}_len=24_lres.npz"), frames_of(small))
    # Frames were rounded in the file, so the result is close but not equal, and its ends are padded otherwise.
    assert np.abs(frames_of(tmp_path / f"{stem}_len=24_sres.npz")[2:-2].astype(int) - large[2:-2]).mean() < 1
    with VideoWriter(tmp_path / "clip.mp4", 90, 120, fps=12) as writer:
        writer.write(np.random.RandomState(0).randint(0, 256, (6, 90, 120, 3)).astype(np.uint8))
    run("sres", "--seed=0", f"--lres-video={tmp_path / 'clip.mp4'}", "--start=2")
    assert read(tmp_path / "clip_seed=0_start=2_len=4_sres.mp4").shape == (4, 144, 256, 3)
    assert scan(tmp_path / "clip_seed=0_start=2_len=4_sres.mp4").fps == 12


def test_a_video_that_is_read_in_part_leaves_no_trace(networks, tmp_path):
    with VideoWriter(tmp_path / "clip.mp4", 18, 32, fps=12) as writer:
        writer.write(np.zeros((400, 18, 32, 3), np.uint8))
    command = [sys.executable, generate.__file__, f"--outdir={tmp_path / 'out'}", "--device=cpu", "--seed=0", "--len=2"]
    command += [f"--sres={networks[2] / 'sres.pkl'}", f"--context={tmp_path / 'clip.mp4'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Fatal" not in done.stderr, done.stderr


def start(networks, tmp_path, *arguments, **options):
    command = [sys.executable, generate.__file__, f"--outdir={tmp_path}", "--device=cpu", "--seed=0", *arguments]
    command += [f"--lres={networks[2] / 'lres.pkl'}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for_frames(tmp_path):
    """Until the encoder has been given frames for a while."""
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".unfinished-*/.*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)


def test_an_endless_video_is_finished_by_ctrl_c_and_thrown_away_by_a_kill(networks, run, tmp_path):
    stopped = start(networks, tmp_path / "a", "--len=inf", "-i", "3", "-i", "100000000")
    killed = start(networks, tmp_path / "b", "--len=inf")
    for folder in ("a", "b"):
        wait_for_frames(tmp_path / folder)
    killed.kill()
    stopped.send_signal(signal.SIGINT)
    output, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 0, errors
    assert "Stopping: what there is will be finished" in errors
    (path,) = (tmp_path / "a").glob("*_lres.mp4")
    num_frames = len(read(path))
    assert num_frames > 0 and path.name == f"seed=0_len={num_frames}_lres.mp4"
    assert f"Stopped after {num_frames} frames." in output and "Not reached: frame 100000000" in output
    names = [f"seed=0_len={num_frames}_{name}" for name in ("frame=0003.png", "lres.mp4", "sheet.png")]
    assert sorted(os.listdir(tmp_path / "a")) == names
    killed.communicate(timeout=60)
    assert all(name.startswith(".unfinished-") for name in os.listdir(tmp_path / "b"))
    run("lres", "--seed=0", "--len=3", f"--outdir={tmp_path / 'b'}")
    assert sorted(os.listdir(tmp_path / "b")) == ["seed=0_len=3_lres.mp4", "seed=0_len=3_sheet.png"]


def test_sigterm_finishes_the_video_under_its_true_length(run, tmp_path):
    def stop():
        wait_for_frames(tmp_path)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop)
    thread.start()
    output = run("lres", "--seeds=0-4", "--len=1000000", "--batch=2", "--format=npz", exit_code=128 + signal.SIGTERM)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    lengths = [int(re.findall(r"len=(\d+)", path.name)[0]) for path in tmp_path.glob("*.npz")]
    assert len(lengths) == 2 and lengths[0] == lengths[1] < 1000000
    assert len(frames_of(next(tmp_path.glob("seed=1_*.npz")))) == lengths[0]
    assert f"Stopped after {lengths[0]} frames; 3 seeds were not begun." in output
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("name", ["mp4", "npz"])
def test_a_full_disk_leaves_one_sentence_and_no_file(networks, tmp_path, name):
    def fill():  # no file may grow beyond this, as on a disk without space
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(networks, tmp_path, "--len=3000", f"--format={name}", preexec_fn=fill)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("Error: cannot ") and "Traceback" not in errors
    assert os.listdir(tmp_path) == []


MISTAKES = {
    "neither seed": ("lres", [], 2, "Give --seed=0, or several as --seeds=0-15"),
    "both seeds": ("lres", ["--seed=0", "--seeds=1-2"], 2, "one of the two"),
    "seeds": ("lres", ["--seeds=5-2"], 2, "'5-2' names no seeds: they look like 0-15 or 0,3,7"),
    "seed twice": ("lres", ["--seeds=0-3,2"], 2, "names a seed twice"),
    "few seeds": ("lres", ["--seeds=3-5", "--grid=2x2"], 2, "2x2 has 4 cells, but there are 3 seeds; use --seeds=3-6"),
    "many seeds": ("lres", ["--seeds=0-5", "--grid=2x2"], 2, "2x2 has 4 cells, but there are 6 seeds"),
    "grid": ("lres", ["--seed=0", "--grid=4"], 2, "'4' is not a grid: it looks like 4x4"),
    "negative": ("lres", ["--seed=0", "--len=-3"], 2, "'-3' is not a length"),
    "zero": ("lres", ["--seed=0", "--len=0"], 2, "use a whole number of frames from 1 on, or inf"),
    "picture": (
        "lres",
        ["--seed=0", "--len=9", "-i", "9"],
        2,
        "frame 9 was asked for, but the video has frames 0 to 8",
    ),
    "early picture": ("lres", ["--seed=0", "--len=inf", "--start=9", "-i", "8"], 2, "the video has frames from 9 on"),
    "crf": ("lres", ["--seed=0", "--format=gif", "--crf=3"], 2, "--format=gif has no such quality"),
    "half": ("sres", ["--seed=0"], 1, "needs context frames of 18x32"),
    "two sources": ("lres sres", ["--seed=0", "--lres-video=README.md"], 1, "takes none: leave out --context"),
    "not enlarged": ("", ["--seed=0", "--lres-video=README.md"], 2, "--model is missing"),
    "no video": ("sres", ["--seed=0", "--lres-video=README.md"], 1, "README.md has no video that ffmpeg can read"),
    "no effect": ("sres", ["--seed=0", "--lres-video=README.md", "--loop=8"], 1, "temporal scale, blend, loop and rng"),
    "fp16": ("lres sres", ["--seed=0", "--precision=fp16"], 2, "fp16 is for CUDA, and this is cpu; use fp32"),
    "tf32": ("lres", ["--seed=0", "--precision=tf32"], 2, "tf32 is for CUDA, and this is cpu; use fp32"),
    "blend": ("lres", ["--seed=0", "--blend=3"], 1, "'3' is not a blend: it looks like 7@300"),
    "blends": ("lres", ["--seed=0", "--blend=3@20", "--blend=4@10"], 1, "ascending frames"),
    "loop": ("lres", ["--seed=0", "--loop=13"], 1, "loop"),
    "legacy window": ("lres", ["--seed=0", "--rng=legacy", "--start=5"], 1, "begin at frame 0"),
    "endless legacy": ("lres", ["--seed=0", "--rng=legacy", "--len=inf"], 1, "without end"),
    "swapped": (
        "",
        ["--seed=0", "--lres={folder}/sres.pkl"],
        1,
        "is a super-resolution generator, expected a low-resolution generator; did you swap --lres and --sres?",
    ),
    "twice lres": (
        "lres",
        ["--seed=0", "--sres={folder}/lres.pkl"],
        1,
        "is a low-resolution generator, expected a super-resolution generator; did you swap",
    ),
    "absent": ("", ["--seed=0", "--lres={folder}/nothing.pkl"], 1, "nothing.pkl"),
    "discriminator": ("", ["--seed=0", "--lres={folder}/D.pkl"], 1, "D.pkl"),
    "other sizes": ("lres", ["--seed=0", "--sres={folder}/other.pkl"], 1, "makes frames of 18x32"),
    "page": ("", ["--seed=0", "--lres={folder}/page.pkl"], 1, "page.pkl"),
    "cut": ("", ["--seed=0", "--lres={folder}/cut.pkl"], 1, "cut.pkl"),
    "payload": ("", ["--seed=0", "--lres={folder}/payload.pkl"], 1, "payload.pkl"),
    "state": ("", ["--seed=0", "--lres={folder}/ckpt-00000001-train.pt"], 1, "ckpt-00000001-train.pt"),
}


@pytest.fixture(scope="module")
def other_files(networks):
    """Return files beside the networks that are no generators."""
    folder = networks[2]
    save_network(LowResDiscriminator(16, 18, 32, (4, 4, 4, 4, 4), 8), folder / "D.pkl")
    other = SuperResGenerator(64, 64, 32, 32, 2, 8, 8, num_layers=8, channel_base=256, channel_max=4)
    save_network(other, folder / "other.pkl")
    (folder / "page.pkl").write_text("<!DOCTYPE html><html>Sign in</html>")
    whole = (folder / "lres.pkl").read_bytes()
    (folder / "cut.pkl").write_bytes(whole[: len(whole) // 2])
    (folder / "payload.pkl").write_bytes(f"cos\nsystem\n(S'touch {folder}/pwned'\ntR.".encode())
    torch.save({"step": 1, "modules": {}}, folder / "ckpt-00000001-train.pt")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_in_a_sentence(run, other_files, tmp_path, mistake):
    names, arguments, exit_code, message = MISTAKES[mistake]
    arguments = [argument.format(folder=other_files) for argument in arguments]
    output = run(names, *arguments, f"--outdir={tmp_path / 'out'}", exit_code=exit_code)
    said = " ".join(output.partition("Error: ")[2].split())
    assert message in said and "Traceback" not in output
    assert not (other_files / "pwned").exists()
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_a_place_that_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in run("lres", "--seed=0", f"--outdir={tmp_path / 'file' / 'out'}", exit_code=1)


def test_seeds_are_read_as_they_are_written():
    for text, seeds in {"0-3": [0, 1, 2, 3], "0,3,7": [0, 3, 7], "5": [5], "9,2": [9, 2]}.items():
        assert generate.parse_seeds(text) == seeds and format_seeds(seeds) == text
    assert generate.parse_seeds(" 1-2, 8") == [1, 2, 8]


def test_a_sheet_spans_the_video_whether_or_not_its_end_was_known():
    frames = np.arange(300, dtype=np.uint16).view(np.uint8).reshape(300, 1, 2, 1).repeat(3, axis=3)
    for planned in (300, None):
        sheet = Sheet(planned)
        for frame in frames:
            sheet.add(frame)
        picture = sheet.draw()
        assert picture.shape == (4, 12, 3)
        shown = picture[..., 0].copy().view(np.uint16).ravel()
        assert shown[0] == 0 and shown[-1] >= 280 and (np.diff(shown) > 0).all() and np.diff(shown).max() <= 24


def test_tiles_run_row_by_row():
    videos = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1, 1).repeat(2, axis=1).repeat(3, axis=4)
    assert tile(videos, (2, 3))[1, :, :, 0].tolist() == [[0, 1, 2], [3, 4, 5]]

"""The demo: the whole of it with minimal training, and what its page shows."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dnnlib.video import VideoWriter, iter_video_frames
from runs import demo, demo_page, strip


def continuation(path, name, value, num_frames=30):
    """A video of one grey value, and real frames of another."""
    height, width = demo.SIZE
    with VideoWriter(path, height, width, demo_page.FPS, enlarge=True) as writer:
        writer.write(np.full((num_frames, height, width, 3), value, np.uint8))
    return demo_page.Continuation(name, path, np.full((num_frames, height, width, 3), value // 2, np.uint8))


def test_its_page_shows_real_frames_above_generated_ones(tmp_path):
    """With a column for each model, measures, previews in order, and the way to play."""
    run_dir = tmp_path / "world" / "00000-x"
    (run_dir / "samples").mkdir(parents=True)
    for step in (0, 50, 100):
        Image.new("RGB", (8, 8)).save(run_dir / "samples" / f"fake-{step:08d}.png")
    videos = [continuation(tmp_path / "a.mp4", "first & best", 200), continuation(tmp_path / "b.mp4", "second", 100)]
    rows = [demo_page.Row("first & best", 812.34, 1.5), demo_page.Row("noise", 3000.0)]
    strips = {"first & best": tmp_path / "strip.webp"}
    play = "python view.py --model=world.pkl"
    demo_page.write_page(tmp_path, videos, strips, rows, {"world model": run_dir}, play)

    page = (tmp_path / "index.html").read_text()
    for text in ("first &amp; best", "812.3", "+1.50 dB", "3000.0", play, demo_page.PLAY_URL, "strip.webp"):
        assert text in page
    assert "first & best" not in page
    assert page.index("step 0<") < page.index("step 50<") < page.index("step 100<")
    height, width = (edge * demo_page.ENLARGE for edge in demo.SIZE)
    frames = list(iter_video_frames(tmp_path / "comparison.mp4"))
    assert len(frames) == 30 and frames[0].shape == (2 * height + strip.LINE, 2 * width + strip.GAP, 3)
    middles = [frames[-1][y, x] for y in (height // 2, height * 3 // 2) for x in (width // 2, width * 3 // 2)]
    np.testing.assert_allclose(np.mean(middles, axis=1), [100, 50, 200, 100], atol=3)
    assert np.asarray(Image.open(tmp_path / "overview.png")).std() > 10


def test_it_fails_if_generated_video_is_not_nearer_to_real_video_than_noise():
    def rows(distance):
        return [demo_page.Row(demo.TRAINED, distance, 0.5), demo_page.Row(demo.NOISE, 3000.0)]

    assert demo.failures(rows(2999.0), {"world model": 20.0}) == []
    (why,) = demo.failures(rows(3000.0), {"world model": 20.0})
    assert "not nearer" in why
    (why,) = demo.failures(rows(900.0), {"world model": 1.0})
    assert "world model hardly changed" in why


def test_the_table_has_a_line_for_each_row():
    head, first, second = demo_page.table(
        [demo_page.Row("a", 1.25, -0.5), demo_page.Row("b", 30.0)], num_clips=8, clip_frames=16
    ).splitlines()
    assert "fvd8_16f" in head and first.split() == ["a", "1.2", "-0.50", "dB"] and second.split() == ["b", "30.0"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_demo_runs_every_step_and_checks_its_result(repo, tmp_path):
    outdir = tmp_path / "demo"
    command = [sys.executable, "-m", "runs.demo", f"--outdir={outdir}"]
    small = ["--tokenizer-steps=4", "--world-steps=4", "--clips=3", "--eval-clips=4"]
    result = subprocess.run([*command, *small], cwd=repo, capture_output=True, text=True)
    assert "== Done in" in result.stdout and "Traceback" not in result.stderr, result.stdout + result.stderr
    verdicts = ("hardly changed" in result.stderr) or ("not nearer" in result.stderr)
    assert result.returncode == int(verdicts)
    assert "goes on at step 2 of 4" in result.stdout
    page = (outdir / "index.html").read_text()
    for name in ("strip-trained.webp", "comparison.mp4", "overview.png", demo.AUTOENCODER, demo.NOISE, demo.OTHER):
        assert name in page
    assert (outdir / "strip-trained.webp").stat().st_size < 1_500_000
    assert len(list(iter_video_frames(outdir / "comparison.mp4"))) == demo.NUM_FRAMES

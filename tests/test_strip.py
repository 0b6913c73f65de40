"""Strips show real frames above those that a model generates from the same context under the same actions."""

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageSequence

from runs import strip
from tests.explorer import steered
from training.data.dataset import ClipDataset
from training.sampling import Sampler, open_sampler

HEIGHT, WIDTH = steered.SIZE


@pytest.fixture
def ring(tmp_path):
    """A model that turns its last frame of context by the actions, and clips in which a player turns to the left."""
    with steered.registered(tmp_path) as paths:
        yield paths["ring"], steered.write_dataset(tmp_path / "data", num_frames=9)


def frames_of(path):
    """The frames of an animation, uint8 (T, H, W, 3), and how long each is shown, in milliseconds."""
    with Image.open(path) as image:
        pairs = [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(image)]
    return np.stack([frame for frame, _ in pairs]), [duration for _, duration in pairs]


def run(*options):
    return CliRunner().invoke(strip.main, list(options))


def test_real_frames_lie_above_generated_ones_that_are_enlarged_by_repeating():
    rng = np.random.RandomState(0)
    real, generated = (rng.randint(0, 256, (2, 3, 4, 5, 3)).astype(np.uint8) for _ in range(2))
    made = strip.arrange(real, generated, 2)
    assert made.shape == (3, 2 * 8 + strip.LINE, 2 * 10 + strip.GAP, 3)
    np.testing.assert_array_equal(made[:, :8:2, :10:2], real[0])
    np.testing.assert_array_equal(made[:, 1:8:2, 1:10:2], real[0])
    np.testing.assert_array_equal(made[:, 8 + strip.LINE :: 2, 10 + strip.GAP :: 2], generated[1])
    assert (made[:, 8 : 8 + strip.LINE] == 255).all() and (made[:, :, 10 : 10 + strip.GAP] == 255).all()


@pytest.mark.parametrize("suffix", strip.SUFFIXES)
def test_the_model_continues_each_clip_under_its_own_actions(ring, tmp_path, suffix):
    model, root = ring
    path = tmp_path / f"strip{suffix}"
    options = ["--clips=1", "--frames=6", "--stride=2", "--enlarge=3"]
    result = run(f"--dataset={root}", f"--model={model}", f"--out={path}", *options)
    assert result.exit_code == 0, result.output
    frames, durations = frames_of(path)
    assert frames.shape == (3, 2 * 3 * HEIGHT + strip.LINE, 3 * WIDTH, 3) and sum(durations) == pytest.approx(
        200, abs=10
    )
    above, below = frames[:, : 3 * HEIGHT].astype(int), frames[:, 3 * HEIGHT + strip.LINE :].astype(int)
    assert np.abs(above - below).mean() < 12  # the first seed turns as the player of the clip does
    assert np.abs(above[0] - above[1]).mean() > 30
    for row in (above, below):
        assert [steered.shift_between(a, b) for a, b in zip(row, row[1:], strict=False)] == [2 * 3 * steered.TURN] * 2


def test_continuations_begin_after_the_context(ring):
    model, root = ring
    sampler, dataset = open_sampler([model]), ClipDataset(root, [steered.SIZE])
    clips = strip.choose_clips(dataset, steered.PAST + 4, 2, seed=0)
    real, generated = strip.continue_clips(sampler, dataset, clips, 4)
    for clip, video in zip(clips, real, strict=True):
        np.testing.assert_array_equal(video, dataset.read(clip, steered.SIZE, range(steered.PAST, steered.PAST + 4)))
    assert np.abs(generated[0].astype(int) - real[0]).mean() < 8
    assert [steered.shift_between(a, b) for a, b in zip(real[1], generated[1], strict=True)] == [1] * 4  # its seed


def test_a_webp_is_as_good_as_fits(tmp_path):
    frames = np.random.RandomState(0).randint(0, 256, (3, 48, 64, 3)).astype(np.uint8)
    large, small = tmp_path / "large.webp", tmp_path / "small.webp"
    size = strip.write_animation(large, frames, 10, 1_000_000)
    limit = size * 2 // 3
    assert strip.write_animation(small, frames, 10, limit) == small.stat().st_size <= limit < large.stat().st_size
    with pytest.raises(ValueError, match="more than 0.00: use fewer frames"):
        strip.write_animation(tmp_path / "none.webp", frames, 10, 100)
    assert not (tmp_path / "none.webp").exists()


def test_what_cannot_be_shown_is_refused(ring, tmp_path):
    model, root = ring
    given = [f"--dataset={root}", f"--out={tmp_path / 'strip.webp'}", "--frames=2"]
    assert "has 3 clips of 5 frames or more, 7 were asked for" in run(*given, f"--model={model}", "--clips=7").output
    assert "has no clip of 903 frames" in run(*given, f"--model={model}", "--frames=900").output
    assert "--model is missing" in run(*given).output
    result = run(f"--dataset={root}", f"--model={model}", f"--out={tmp_path / 'strip.png'}", "--clips=1", "--frames=2")
    assert result.exit_code == 1 and "name that ends with .webp or .gif" in result.output
    with pytest.raises(ValueError, match="does not continue videos"):
        strip.continue_clips(Sampler(), ClipDataset(root, [steered.SIZE]), [0], 2)

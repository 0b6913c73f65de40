"""Spectrograms: what their rows and columns are, equal in pieces, and files that have none."""

import pickle

import numpy as np
import pytest

from tests.training.data.sounds import write_tone
from training.data.spectrograms import (
    BINS,
    COLUMNS,
    NUM_VALUES,
    RATE,
    WINDOW,
    prepare,
    read_published,
    read_sound,
    spectrograms,
)


def tone(seconds, hertz, level=1.0):
    return (level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def test_rows_are_frequencies_and_values_decibels():
    for row in (3, 20, 50):
        images = spectrograms(tone(1, (row + 1) * RATE / WINDOW), 25, 1, 10)
        assert images.shape == (10, BINS, COLUMNS) and (images.argmax(1) == row).all()
        np.testing.assert_allclose(images[:, row], 1, atol=1e-3)
        quiet = spectrograms(tone(1, (row + 1) * RATE / WINDOW, 0.01), 25, 1, 10)
        np.testing.assert_allclose(quiet[:, row], 0, atol=1e-3)  # 40 of 80 dB below
    assert (spectrograms(np.zeros(RATE, np.float32), 25, 0, 5) == -1).all()


@pytest.mark.parametrize("fps", [10, 30, 29.97])
def test_columns_are_times(fps):
    samples = np.zeros(RATE, np.float32)
    time = 0.4321
    samples[int(time * RATE)] = 1
    loud = np.flatnonzero(spectrograms(samples, fps, 0, int(fps)).max(1).ravel() > -0.9)
    middle = (loud.mean() + 0.5) / COLUMNS / fps
    assert abs(middle - time) < 1 / COLUMNS / fps + 1 / RATE
    assert np.ptp(loud) + 1 <= np.ceil(WINDOW / RATE * fps * COLUMNS) + 1


def test_pieces_equal_the_whole():
    samples = np.random.RandomState(0).uniform(-1, 1, 3 * RATE).astype(np.float32)
    whole = spectrograms(samples, 24, 0, 80)
    for first, count in ((0, 1), (7, 30), (60, 20)):
        found = spectrograms(samples, 24, first, count)
        np.testing.assert_allclose(found, whole[first : first + count], rtol=0, atol=1e-5)
    assert (whole[73:] == -1).all(), "silence after the end"


def test_tracks_are_read_in_step_with_the_frames(tmp_path):
    path = write_tone(tmp_path / "a.mkv", 2)
    whole = read_sound(path, 10)
    assert whole.shape == (20, NUM_VALUES) and whole.dtype == np.float16
    assert (whole.reshape(20, BINS, COLUMNS)[1:-1].argmax(1) == 1000 * WINDOW // RATE - 1).all()
    later = read_sound(path, 10, 5, start_sec=0.5)
    np.testing.assert_allclose(later[1:-1], whole[6:9], atol=2e-3)


def test_a_track_may_end_a_little_early_and_no_more(tmp_path):
    path = write_tone(tmp_path / "a.mkv", 2, sound_seconds=1.8)
    assert (read_sound(path, 10, 20)[19:] == -1).all()
    with pytest.raises(ValueError, match=r"the audio of .*a.mkv lasts 1.8 s from 0 s on, but its 30 frames last 3 s"):
        read_sound(path, 10, 30)
    with pytest.raises(ValueError, match="less than a frame"):
        read_sound(write_tone(tmp_path / "b.mkv", 1, sound_seconds=0.3), 1)


def test_arrays_of_the_release_are_read_without_running_them(tmp_path):
    stft = np.random.RandomState(0).uniform(0, 1, (90, 20, 10)).astype(np.float32)
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(stft))
    np.save(tmp_path / "a.npy", stft)
    wanted = prepare(stft)[:16].reshape(16, NUM_VALUES)
    for name in ("a.pickle", "a.npy"):
        np.testing.assert_allclose(read_published(tmp_path / name, 16), wanted, atol=5e-4)


class Hostile:
    """What a harmful pickle may hold."""

    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.zeros((3, 4)), r"float64 of shape \[3, 4\], expected spectrograms"),
        (np.full((30, 4, 4), 2.0), "values from 2 to 2, expected spectrograms in"),
        (np.full((30, 4, 4), np.nan), "values from nan to nan"),
        (np.zeros((3, 4, 4)), "has 3 spectrograms, but the video has 16 frames"),
        (["a"], "expected spectrograms"),
        (Hostile(), "cannot be read as spectrograms"),
        (None, "cannot be read as spectrograms .*No such file"),
    ],
)
def test_other_arrays_are_refused(content, words, tmp_path, capsys):
    if content is not None:
        (tmp_path / "a.pickle").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=words):
        read_published(tmp_path / "a.pickle", 16)
    assert "ran" not in capsys.readouterr().out

"""Changes of colours are those of RIVER, one for each clip."""

import colorsys
import re

import numpy as np
import pytest
import torch

from tests import golden_files
from training.augment.colour import change_clips, change_colours, draw_changes


@golden_files.entries("river", "colour_augmentation*")
def test_colours_are_those_of_river(entry, golden):
    (clip,) = golden_files.draws(entry["input"], golden["about"]["seed"])
    changes = [float(value) for value in re.findall(r"\b[bcsh]=(-?[\d.]+)", entry["input"])]
    found = change_colours(torch.from_numpy(clip.astype(np.uint8)), *changes)
    golden_files.check(found, entry["out"], 0)


def test_nothing_changes_without_changes():
    """But for the way through hue, which rounds."""
    frames = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 8, 8), np.uint8))
    found = change_colours(frames, 0, 0, 0, 0)
    assert found.dtype == torch.uint8 and (found.int() - frames.int()).abs().max() <= 1


def test_hue_turns_as_in_the_standard_library():
    frames = torch.from_numpy(np.random.RandomState(1).randint(0, 256, (1, 3, 4, 4), np.uint8))
    found = change_colours(frames, 0, 0, 0, 0.2)[0]
    for y in range(4):
        for x in range(4):
            h, s, v = colorsys.rgb_to_hsv(*(frames[0, :, y, x].numpy() / 255))
            wanted = np.array(colorsys.hsv_to_rgb((h + 0.2) % 1, s, v)) * 255
            assert np.abs(found[:, y, x].numpy() - wanted).max() <= 1.01


def test_clips_change_as_a_whole_and_each_in_its_own_way():
    rng = np.random.RandomState(2)
    frame = torch.from_numpy(rng.randint(0, 256, (2, 3, 1, 6, 5), np.uint8)).float().div(127.5).sub(1)
    video = frame.repeat(1, 1, 3, 1, 1)
    changes = np.stack([draw_changes(rng), draw_changes(rng)])
    found = change_clips(video, changes)
    assert found.shape == video.shape and found.dtype == torch.float32
    assert found.min() >= -1 and found.max() <= 1
    whole = change_clips(video[:1], changes[:1])
    torch.testing.assert_close(found[:1], whole)
    # The contrast of a frame is about its own mean; frames that are equal stay equal.
    assert torch.equal(found[:, :, 0], found[:, :, 2])
    assert not torch.equal(change_clips(video[:1], changes[1:]), whole)


def test_draws_are_within_the_published_ranges():
    draws = np.stack([draw_changes(np.random.RandomState(seed)) for seed in range(300)])
    assert draws.shape == (300, 4)
    for values, spread in zip(draws.T, (0.1, 0.1, 0.1, 0.25), strict=True):
        assert np.abs(values).max() <= spread and values.min() < -0.9 * spread and values.max() > 0.9 * spread


@pytest.mark.parametrize("values", [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 0, 255), (7, 7, 9)])
def test_extreme_colours_stay_in_range(values):
    frames = torch.tensor(values, dtype=torch.uint8).view(1, 3, 1, 1)
    for changes in ((0.1, 0.1, 0.1, 0.25), (-0.1, -0.1, -0.1, -0.25)):
        assert change_colours(frames, *changes).shape == (1, 3, 1, 1)

"""Revisits found by hand, and what a model with memory, one without and a frozen one are worth."""

import dataclasses

import numpy as np
import pytest

from metrics import inputs, metric_main
from metrics.revisits import find_pairs, pose_distance
from tests.metrics.walks import NAMES, SIZE, Values, Walks, sides


def glances(count: int, num_walks: int) -> list[np.ndarray]:
    """Return walks that turn left `count` times, pause, turn back, and then turn right by as much."""
    left, right = NAMES.index("left"), NAMES.index("right")
    row = np.array([0] + [left] * count + [0] * 2 + [right] * count + [right] * count)
    return [row] * num_walks


def test_distances_of_poses():
    poses = np.array([[0, 0, 350], [3, 4, 10], [0, 16, -370.0]])
    units, degrees = pose_distance(poses)
    assert units[0, 1] == 5 and units[0, 2] == 16 and units[1, 2] == pytest.approx(np.hypot(3, 12))
    assert degrees[0].tolist() == [0, 20, 0] and degrees[1, 2] == 20


def test_revisits_and_novel_pairs_of_a_glance():
    """Every 6 degrees a frame to 60, back to 0, and on to -60: near is one turn, away are seven."""
    angles = 6.0 * np.concatenate([np.arange(11), np.arange(9, -11, -1)])
    poses = np.stack([0 * angles, 0 * angles, angles], axis=1)
    revisits, novel = find_pairs(poses, 0)
    # Frame j comes back to i: |angle difference| <= 10, and a frame between is 40 or more from frame j.
    expected = set()
    for j in range(len(angles)):
        for i in range(j):
            is_left = any(abs(angles[k] - angles[j]) >= 40 for k in range(i, j))
            if abs(angles[i] - angles[j]) <= 10 and is_left:
                expected.add((i, j))
    assert expected and {tuple(pair) for pair in revisits.tolist()} <= expected
    assert len(novel) == len(revisits) and (np.diff(novel) == np.diff(revisits)).all()
    for i, j in novel:
        left = max(k for k in range(j) if abs(angles[k] - angles[j]) >= 40)
        assert abs(angles[i] - angles[j]) >= 40 and min(abs(angles[k] - angles[j]) for k in range(left + 1)) >= 40
    assert find_pairs(poses, 0)[0].tolist() == revisits.tolist() and len(revisits) <= 32


def test_standing_still_is_no_revisit():
    poses = np.zeros((50, 3))
    poses[:, 2] = np.repeat([0, 6, 0, 6, 0], 10)
    assert len(find_pairs(poses, 0)[0]) == 0


def measure(way: str, rules: str = "lvg"):
    footage = Walks(glances(14, 4))
    real, fake, _ = sides(way, footage)
    (result,) = metric_main.calc_metrics(["revisit"], real, fake, num_videos=4, num_frames=len(glances(14, 1)[0]) - 2)
    return result


def test_a_model_that_remembers_equals_the_recorded_walk():
    result = measure("obey")
    for name, value in result["results"].items():
        assert value == pytest.approx(result["floors"][name]), name
    # Within one turn of one another: some pairs are equal, some are one turn apart.
    assert result["results"]["revisit_psnr_difference"] > 10 and result["results"]["revisit_ssim_difference"] > 0.2
    assert result["facts"]["revisit_pairs"] > 8 and result["facts"]["revisit_videos"] == 4
    assert "16 map units and 10 degrees" in result["protocol"]["revisit"]


def test_neither_a_frozen_video_nor_one_that_forgets_gains():
    frozen, drifting = measure("still"), measure("drift")
    assert frozen["results"]["revisit_psnr"] == 100 and frozen["results"]["revisit_psnr_difference"] == 0
    assert abs(drifting["results"]["revisit_psnr_difference"]) < 2, "pairs as far apart in time are alike"
    assert frozen["errors"]["revisit_psnr_difference"] == 0 and drifting["errors"]["revisit_psnr"] >= 0


def test_recorded_footage_is_measured_by_itself():
    real = inputs.Videos(Walks(glances(14, 4)), SIZE, "array")
    (result,) = metric_main.calc_metrics(["revisit"], real, real, num_videos=3, num_frames=45)
    for name, value in result["results"].items():  # of other walks and pairs
        assert value == pytest.approx(result["floors"][name], rel=0.1), name


def test_what_cannot_be_measured_is_refused():
    footage = Walks([np.zeros(40, np.int64)] * 3)
    real, fake, _ = sides("obey", footage)
    with pytest.raises(ValueError, match=r"0 of 3 real videos come back to a place, and revisit needs two"):
        metric_main.calc_metrics(["revisit"], real, fake, num_videos=3, num_frames=20)
    footage.streams["poses"] = Values([np.zeros((40, 2), np.float32)] * 3)
    with pytest.raises(ValueError, match="poses of 2 values were found, but a pose is x, y and an angle"):
        metric_main.calc_metrics(["revisit"], real, fake, num_videos=3, num_frames=20)
    del footage.streams["poses"]
    with pytest.raises(ValueError, match="walks has no poses, which are needed"):
        metric_main.calc_metrics(["revisit"], real, fake, num_videos=3, num_frames=20)
    footage.streams["poses"] = Values([np.zeros((40, 3), np.float32)] * 3)
    sampler = fake.sampler
    sampler.needs = dataclasses.replace(sampler.needs, streams=())
    with pytest.raises(ValueError, match="revisit is of models that follow actions, and this one takes none"):
        metric_main.calc_metrics(["revisit"], real, fake, num_videos=3, num_frames=20)

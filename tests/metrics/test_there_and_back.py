"""There-and-back consistency: inverse actions; models that obey, do not obey, and stand still."""

import numpy as np
import pytest

from metrics import inputs, metric_main
from metrics.there_and_back import and_back, inverse_actions, turning_returns
from tests.metrics.walks import NAMES, SIZE, Walks, headings, random_walks, sides


def numbers(*names: str) -> np.ndarray:
    return np.array([NAMES.index(name) for name in names])


def test_each_action_of_a_person_has_its_inverse():
    pairs = {"none": "none", "forward": "back", "left": "right", "forward_left": "back_right"}
    pairs |= {"forward_right": "back_left"}
    both = {**pairs, **{value: key for key, value in pairs.items()}}
    assert [NAMES[number] for number in inverse_actions(NAMES)] == [both[name] for name in NAMES]
    with pytest.raises(ValueError, match="'jump' has no opposite among none, left, right, jump"):
        inverse_actions(["none", "left", "right", "jump"])
    with pytest.raises(ValueError, match="'forward' has no opposite among none, forward, left, right"):
        inverse_actions(["none", "forward", "left", "right"])
    with pytest.raises(ValueError, match="'none' has no opposite among left, right"):
        inverse_actions(["left", "right"])


def test_the_way_back_shows_the_way_there():
    there = np.stack(random_walks(3, 9))
    actions = and_back(there, inverse_actions(NAMES), NAMES.index("none"))
    assert actions.shape == (3, 18)
    for row in actions:
        turns = headings(row)
        assert turns[:9].tolist() == turns[:8:-1].tolist()


def test_returns_of_recorded_turns_are_found_by_their_actions():
    actions = numbers("none", "left", "left", "none", "right", "right", "forward", "right", "left", "left")
    #        headings:  0       1       2       2       1        0        0          -1       0       1
    assert turning_returns(actions, NAMES).tolist() == [[1, 4], [0, 5], [6, 8]]
    for first, second in turning_returns(random_walks(1, 300)[0], NAMES):
        between = random_walks(1, 300)[0][first + 1 : second + 1]
        assert headings(between)[-1] == 0 and {NAMES[a] for a in between} <= {"none", "left", "right"}


def measure(way: str, *names: str, **options):
    real, fake, sampler = sides(way, Walks(random_walks(4, 40)))
    return metric_main.calc_metrics(names, real, fake, num_videos=4, num_frames=20, **options), sampler


def test_a_model_that_obeys_is_perfect_and_moves():
    (result, walk), sampler = measure("obey", "there_and_back", "there_and_back_walk")
    for found in (result, walk):
        name = found["metric"]
        assert found["results"][f"{name}_psnr"] == 100 and found["results"][f"{name}_ssim"] == pytest.approx(1)
        assert found["baselines"]["real, turned away and back"][f"{name}_psnr"] == 100
        assert found["floors"][f"{name}_psnr"] < 60
    turned = [row.tolist() for row in sampler.given[:4]]
    left, right = ([number] * 10 for number in numbers("left", "right"))
    assert turned == [[*left, 0, *right[:9]], [*right, 0, *left[:9]]] * 2
    assert result["results"]["there_and_back_motion"] > 5
    recorded = np.stack(random_walks(4, 40))
    for row in sampler.given[4:]:
        assert any((recorded[:, t : t + 10] == row[:10]).all(axis=1).any() for t in range(31)), "recorded actions"
        assert row[11:].tolist() == inverse_actions(NAMES)[row[9:0:-1]].tolist() and row[10] == 0
    assert result["protocol"]["num_frames"] == 20 and result["curves"][0]["lines"][0]["x"] == list(range(1, 20, 2))


def test_values_are_those_of_the_frames():
    (result,), sampler = measure("drift", "there_and_back")
    videos = np.stack(sampler.made).astype(float)  # turning left all the time
    there, back = videos[:, :10][:, ::-1] / 255, videos[:, 10:] / 255
    psnr = -10 * np.log10(np.square(there - back).mean(axis=(2, 3, 4)))  # (4, 10)
    curve = result["curves"][0]["lines"][0]
    assert curve["y"] == pytest.approx(psnr.mean(axis=0), rel=1e-5)
    assert result["results"]["there_and_back_psnr"] == pytest.approx(psnr.mean(), rel=1e-5)
    left_out = [np.delete(psnr, number, axis=0).mean() for number in range(4)]  # four videos are four groups
    assert result["errors"]["there_and_back_psnr"] == pytest.approx(np.sqrt(3 * np.var(left_out)), rel=1e-4)
    motion = np.abs(np.diff(videos, axis=1)).mean()
    assert result["results"]["there_and_back_motion"] == pytest.approx(motion)


def test_a_video_that_stands_still_is_told_by_its_motion():
    (result,), _ = measure("still", "there_and_back")
    assert result["results"]["there_and_back_psnr"] == 100 and result["results"]["there_and_back_motion"] == 0
    assert result["floors"]["there_and_back_motion"] > 1 and result["errors"]["there_and_back_motion"] == 0


def test_what_cannot_be_steered_is_refused():
    footage = Walks(random_walks(3, 40))
    real = inputs.Videos(footage, SIZE, "array")
    with pytest.raises(ValueError, match="there_and_back steers a model, and walks is existing video"):
        metric_main.calc_metrics(["there_and_back"], real, real, num_videos=2, num_frames=10)
    names = ["none", "jump", "duck", "roll", "spin", "wave", "sing", "hide", "seek"]
    real, fake, _ = sides("obey", Walks(random_walks(3, 40), names))
    with pytest.raises(ValueError, match=r"actions are none, jump.* and turning away and back needs 'left'"):
        metric_main.calc_metrics(["there_and_back"], real, fake, num_videos=2, num_frames=10)
    real, fake, _ = sides("obey", Walks(random_walks(3, 40)))
    with pytest.raises(ValueError, match="takes at least 4 frames, and there are 3"):
        metric_main.calc_metrics(["there_and_back"], real, fake, num_videos=2, num_frames=3)

"""Shifts that are known, and what models that turn rightly, wrongly and not at all are worth."""

import numpy as np
import pytest
from scipy.ndimage import uniform_filter1d

from metrics import metric_main
from metrics.turning import LEAST_DEG, WINDOW, in_windows, is_right, shifts
from tests.metrics.walks import COLUMNS, NAMES, TURN_DEG, Values, Walks, random_walks, sides


def measure(way: str):
    real, fake, _ = sides(way, Walks(random_walks(4, 60)))
    (result,) = metric_main.calc_metrics(["turning"], real, fake, num_videos=4, num_frames=40)
    return result


def test_shifts_of_known_pictures():
    wide = uniform_filter1d(np.random.RandomState(0).rand(1, 12, 80).astype(np.float32), 9, axis=2)
    for moved in (-7, -1, 0, 3, 8):
        pair = np.stack([wide[0, :, 20:52], wide[0, :, 20 - moved : 52 - moved]])  # content moves to the right
        assert shifts(pair[None]).item() == pytest.approx(moved, abs=0.3)
    half = (wide[0, :, 20:52] + wide[0, :, 19:51]) / 2
    assert shifts(np.stack([wide[0, :, 20:52], half])[None]).item() == pytest.approx(0.5, abs=0.2)
    assert shifts(np.full((1, 2, 12, 32), 0.5, np.float32)).item() == 0, "one colour has not moved"
    with pytest.raises(ValueError, match="frames 7 pixels wide: 8 are the least"):
        shifts(np.zeros((1, 2, 4, 7), np.float32))


def test_windows_that_hardly_turn_have_no_sign():
    turns = np.repeat([LEAST_DEG / WINDOW, 0.5 * LEAST_DEG / WINDOW, -2.0], WINDOW)
    windows = in_windows(np.stack([np.repeat([1.0, -1.0, 1.0], WINDOW), turns])[None])
    np.testing.assert_array_equal(is_right(windows), [[1, np.nan, 0]])


def test_a_model_that_obeys_equals_the_recorded_walk():
    result = measure("obey")
    for name, value in result["results"].items():
        assert value == pytest.approx(result["floors"][name], abs=0.1), name
    assert result["results"]["turn_sign"] > 0.9 and result["results"]["turn_correlation"] > 0.9
    assert result["errors"]["turn_sign"] >= 0 and result["protocol"]["num_frames"] == 40
    assert COLUMNS > 0 and TURN_DEG > 0, "a turn to the left moves this world to the right"


def test_models_that_do_not():
    mirror, still, drift = measure("mirror"), measure("still"), measure("drift")
    assert mirror["results"]["turn_sign"] < 0.1 and mirror["results"]["turn_correlation"] < -0.9
    assert still["results"] == {"turn_sign": 0.0, "turn_correlation": 0.0}
    assert 0.2 < drift["results"]["turn_sign"] < 0.8 and abs(drift["results"]["turn_correlation"]) < 0.5


def test_what_cannot_be_measured_is_refused():
    footage = Walks([np.full(40, NAMES.index("forward"))] * 3)
    real, fake, _ = sides("obey", footage)
    with pytest.raises(ValueError, match="no window of 8 frames turns by 10 degrees: measure walks that turn"):
        metric_main.calc_metrics(["turning"], real, fake, num_videos=3, num_frames=20)
    with pytest.raises(ValueError, match="turning needs videos of at least 9 frames"):
        metric_main.calc_metrics(["turning"], real, fake, num_videos=3, num_frames=8)
    footage.streams["poses"] = Values([np.zeros((40, 2), np.float32)] * 3)
    with pytest.raises(ValueError, match="poses of 2 values were found"):
        metric_main.calc_metrics(["turning"], real, fake, num_videos=3, num_frames=20)

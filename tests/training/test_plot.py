"""Axes with round numbers, and lines that lie where they should on the picture."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.plot import (
    CHART_SIZE,
    COLOURS,
    EDGE,
    HEADER_HEIGHT,
    MARGIN,
    Chart,
    Line,
    draw_charts,
    log_ticks,
    make_axis,
    round_ticks,
    short_number,
    smooth,
    tick_labels,
    time_axis,
    value_axis,
)


@given(st.floats(-1e9, 1e9), st.floats(-6, 9), st.integers(2, 8))
def test_ticks_are_round_and_inside(low, exponent, most):
    high = low + max(10**exponent, 1e-6 * abs(low))
    ticks = round_ticks(low, high, most)
    margin = 1e-6 * (high - low)
    assert len(ticks) <= most and all(low - margin <= tick <= high + margin for tick in ticks)
    steps = np.diff(ticks)
    if len(steps):
        digits = 10 ** (math.log10(steps[0]) % 1)
        assert min(abs(digits - digit) for digit in (1, 2, 5, 10)) < 1e-3
        assert np.allclose(steps, steps[0], rtol=1e-3)
        assert (len(ticks) + 1) * steps[0] * 2.5 > (high - low) * most / (most + 1) / 2.5  # not needlessly few


def test_ticks_by_example():
    assert round_ticks(0, 100_000, 5) == [0, 50_000, 100_000]
    assert round_ticks(0, 280, 5) == [0, 100, 200]
    assert round_ticks(0.82, 1.54, 5) == [1.0, 1.2, 1.4]
    assert round_ticks(-0.1, 0.31, 5) == [-0.1, 0.0, 0.1, 0.2, 0.3]
    assert log_ticks(0.0004, 0.2, 5) == [0.001, 0.003, 0.01, 0.03, 0.1]
    assert log_ticks(0.0004, 0.2, 4) == [0.001, 0.01, 0.1]
    assert log_ticks(3, 70, 5) == [5, 10, 20, 50]
    assert log_ticks(1e-9, 1e9, 5) == [1e-8, 1e-4, 1, 1e4, 1e8]


def test_labels_are_short():
    assert tick_labels([0.0, 0.2, 0.4]) == ["0", "0.2", "0.4"]
    assert tick_labels([0, 500, 1000, 1500]) == ["0", "500", "1000", "1500"]
    assert tick_labels([0, 50_000, 100_000]) == ["0", "50k", "100k"]
    assert tick_labels([0, 1_000_000, 2_500_000]) == ["0", "1M", "2.5M"]
    assert tick_labels([]) == []
    assert [short_number(value) for value in (0.01234, 1.386, -2.5, 2076.4, 20_760, 3e6, math.nan)] == [
        *("0.0123", "1.39", "-2.5", "2076", "20.8k", "3M", "none")
    ]


def test_axes_place_their_ends():
    assert make_axis(2, 6, 5).place([2, 4, 6]).tolist() == [0, 0.5, 1]
    log = make_axis(0.01, 100, 5, log=True)
    assert np.allclose(log.place([0.01, 1, 100]), [0, 0.5, 1]) and np.isnan(log.place([0.0, -1])).all()


def chart(*values, **arguments):
    return Chart("", (Line("", list(range(len(values))), list(values)),), **arguments)


def test_the_vertical_axis_holds_the_values():
    axis = value_axis(chart(2.0, math.nan, 3.0))
    assert 1.8 < axis.low < 2 and 3 < axis.high < 3.2 and not axis.log
    assert value_axis(chart(0.0, 0.0)).low == 0 and value_axis(chart(0.0, 0.0)).high >= 1
    assert value_axis(chart(7.0)).low < 7 < value_axis(chart(7.0)).high
    assert value_axis(chart(0.5, 0.9, guide=1.4)).high > 1.4
    assert (value_axis(chart(5.0, limits=(-1, 1))).low, value_axis(chart(5.0, limits=(-1, 1))).high) == (-1, 1)


def test_an_axis_is_logarithmic_where_it_helps():
    assert value_axis(chart(0.01, 5.0, log=True)).log
    assert not value_axis(chart(1.0, 5.0, log=True)).log
    assert not value_axis(chart(0.0, 0.01, 5.0, log=True)).log  # zero has no place there


def test_a_spike_does_not_flatten_the_rest():
    values = [1 + 0.01 * (i % 7) for i in range(100)]
    values[40] = 1000.0
    assert value_axis(chart(*values)).high < 1.3
    assert value_axis(chart(*values, exact=True)).high > 1000


def test_smoothing_is_a_windowed_mean_that_keeps_gaps():
    values = np.random.RandomState(0).randn(200)
    values[50:60] = math.nan
    window = [math.exp(-0.5 * (d / 2.5) ** 2) for d in range(-8, 9)]
    expected = []
    for i, value in enumerate(values):
        near = [(w, values[i + d]) for d, w in zip(range(-8, 9), window, strict=True) if 0 <= i + d < 200]
        near = [(w, v) for w, v in near if math.isfinite(v)]
        mean = sum(w * v for w, v in near) / sum(w for w, _ in near) if math.isfinite(value) else math.nan
        expected.append(mean)
    assert np.allclose(smooth(values), expected, equal_nan=True)
    assert smooth(np.full(31, 3.0)) == pytest.approx(np.full(31, 3.0))


def test_lines_lie_where_their_values_are():
    values = [5.0] * 11
    values[4] = math.nan
    picture = draw_charts([chart(*values, limits=(0, 10))], scale=2)
    assert picture.size == (2 * (CHART_SIZE[0] + 2 * EDGE), 2 * (HEADER_HEIGHT + CHART_SIZE[1] + EDGE))
    colour = np.array([int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)])
    left, top = 2 * (EDGE + MARGIN[0]), 2 * (HEADER_HEIGHT + MARGIN[1])
    width, height = 2 * (CHART_SIZE[0] - MARGIN[0] - MARGIN[2]), 2 * (CHART_SIZE[1] - MARGIN[1] - MARGIN[3])
    area = np.asarray(picture)[top : top + height, left : left + width].astype(int)
    drawn = (np.abs(area - colour).sum(axis=2) < 60).nonzero()
    assert abs(drawn[0].mean() - height / 2) < 2 and drawn[0].max() - drawn[0].min() <= 4
    columns = np.unique(drawn[1])
    assert columns.min() <= 2 and columns.max() >= width - 3
    gap = columns[(columns > 0.31 * width) & (columns < 0.49 * width)]
    assert len(gap) == 0 and np.isin(np.arange(2, int(0.29 * width)), columns).all()


def test_a_lonely_point_is_a_dot():
    alone = np.asarray(draw_charts([chart(math.nan, 5.0, math.nan, limits=(0, 10))], scale=1)).astype(int)
    nothing = np.asarray(draw_charts([chart(math.nan, 50.0, math.nan, limits=(0, 10))], scale=1)).astype(int)
    top, left = HEADER_HEIGHT + MARGIN[1], EDGE + MARGIN[0]
    differing = (alone != nothing).any(axis=2)[top : top + CHART_SIZE[1] - MARGIN[1] - MARGIN[3]].nonzero()
    assert 4 <= len(differing[0]) <= 80
    assert abs(differing[1].mean() - (left + (CHART_SIZE[0] - MARGIN[0] - MARGIN[2]) / 2)) < 2


def test_a_chart_may_have_a_horizontal_axis_of_its_own():
    charts = [
        Chart("", (Line("", [1, 1000], [0, 1]),), x_name="lag", log_x=True, legend=False),
        Chart("", (Line("", [0, 7], [0, 1]),)),
    ]
    axis = time_axis(charts[:1])
    assert axis is not None and axis.log and (axis.low, axis.high) == (1, 1000)
    together = np.asarray(draw_charts(charts, scale=1))
    alone = np.asarray(draw_charts(charts[1:], scale=1))
    left = EDGE + CHART_SIZE[0]
    assert (together[HEADER_HEIGHT:, left : left + CHART_SIZE[0]] == alone[HEADER_HEIGHT:, EDGE:-EDGE]).all()


def test_a_band_reaches_as_far_as_it_says():
    line = Line("", [0, 1], [5.0, 5.0], [2.0, 2.0], "#000000")
    picture = np.asarray(draw_charts([Chart("", (line,), limits=(0, 10))], scale=2)).astype(int)
    left, top = 2 * (EDGE + MARGIN[0]), 2 * (HEADER_HEIGHT + MARGIN[1])
    height = 2 * (CHART_SIZE[1] - MARGIN[1] - MARGIN[3])
    column = picture[top : top + height - 4, left + 100, 0]
    shaded = np.flatnonzero(column < 225)
    assert shaded.min() == pytest.approx(0.3 * height, abs=3) and shaded.max() == pytest.approx(0.7 * height, abs=3)
    assert value_axis(Chart("", (line,))).low < 3 and value_axis(Chart("", (line,))).high > 7

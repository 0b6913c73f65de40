"""Axes that contain the values, and the positions of lines, bands and legends in the figure."""

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.charts import (
    COLOURS,
    Chart,
    Line,
    MissingMatplotlib,
    draw_charts,
    legend_shape,
    make_figure,
    short_number,
    smooth,
    tick_label,
    value_range,
)


def chart(*values, **arguments):
    return Chart("", (Line("", list(range(len(values))), list(values)),), **arguments)


def axes_of(*charts) -> list[Any]:
    return make_figure(charts).axes


def test_numbers_are_short():
    ticks = (0, 0.25, 0.1 + 0.2, 1500, 20_000, 1_500_000, 1e-5)
    assert [tick_label(tick) for tick in ticks] == ["0", "0.25", "0.3", "1500", "20k", "1.5M", "1e-05"]
    values = (0.01234, 1.386, -2.5, 123.4, 2076.4, 20_760, 3e6, 5e9, math.nan)
    assert [short_number(value) for value in values] == [
        *("0.0123", "1.39", "-2.5", "123", "2076", "20.8k", "3M", "5G", "none")
    ]


def test_the_vertical_axis_holds_the_values():
    low, high, log = value_range(chart(2.0, math.nan, 3.0))
    assert 1.8 < low < 2 and 3 < high < 3.2 and not log
    assert value_range(chart(0.0, 0.0))[0] == 0 and value_range(chart(0.0, 0.0))[1] >= 1
    for value in (7.0, -7.0):
        low, high, _ = value_range(chart(value))
        assert low < value < high
    assert value_range(chart(0.5, 0.9, guide=1.4))[1] > 1.4
    assert value_range(chart(5.0, limits=(-1, 1))) == (-1, 1, False)
    banded = Chart("", (Line("", [0, 1], [5.0, 5.0], [2.0, 2.0]),))
    assert value_range(banded)[0] < 3 and value_range(banded)[1] > 7


def test_an_axis_is_logarithmic_where_it_helps():
    assert value_range(chart(0.01, 5.0, log=True))[2]
    assert not value_range(chart(1.0, 5.0, log=True))[2]
    assert not value_range(chart(0.0, 0.01, 5.0, log=True))[2]  # zero has no place there
    (logarithmic, linear) = axes_of(chart(0.01, 5.0, log=True), chart(0.01, 5.0))
    assert (logarithmic.get_yscale(), linear.get_yscale()) == ("log", "linear")
    assert [text.get_text() for text in logarithmic.texts] == ["log scale"] and not linear.texts


def test_a_spike_does_not_flatten_the_rest():
    values = [1 + 0.01 * (i % 7) for i in range(100)]
    values[40] = 1000.0
    (axes, exact) = axes_of(chart(*values), chart(*values, exact=True))
    assert axes.get_ylim()[1] < 1.3 and exact.get_ylim()[1] > 1000
    smoothed = np.asarray(axes.lines[-1].get_ydata(), float)
    assert smoothed.max() < 1.2  # and does not lift its neighbours


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


def test_few_points_are_drawn_as_they_are_and_many_are_smoothed_above_pale_ones():
    few, many, exact = axes_of(chart(1.0, 5.0), chart(*range(1, 101)), chart(*range(100), exact=True))
    assert [list(line.get_ydata()) for line in few.lines] == [[1.0, 5.0]]
    assert few.lines[0].get_markevery() == [True, True]
    pale, strong = many.lines
    assert list(pale.get_ydata()) == list(range(1, 101)) and pale.get_alpha() < 1
    assert np.allclose(strong.get_ydata(), smooth(np.arange(1.0, 101.0))) and not any(strong.get_markevery())
    assert [list(line.get_ydata()) for line in exact.lines] == [list(range(100))]


def test_smoothing_on_a_logarithmic_axis_is_of_logarithms():
    values = np.exp(np.random.RandomState(0).randn(100))
    (axes,) = axes_of(chart(*values, log=True))
    assert axes.get_yscale() == "log"
    assert np.allclose(axes.lines[-1].get_ydata(), np.exp(smooth(np.log(values))))


def test_a_point_between_gaps_is_marked():
    values = [1.0] * 40
    values[3] = values[5] = math.nan
    (axes,) = axes_of(chart(*values))
    assert np.flatnonzero(axes.lines[-1].get_markevery()).tolist() == [4]
    assert np.flatnonzero(np.isnan(axes.lines[-1].get_ydata())).tolist() == [3, 5]


def test_lines_have_colours_bands_and_a_legend_with_their_last_values():
    lines = (
        Line("_$a$", [0, 1, 2], [1.0, 2.0, math.nan]),
        Line("b", [0, 1], [5.0, 6.0], [1.0, 2.0], "#123456"),
        Line("c", [0, 1], [0.0, 1.0]),
    )
    (axes,) = axes_of(Chart("Title", lines, guide=3.0))
    assert axes.get_title(loc="left") == "Title" and axes.get_xlabel() == "step"
    guide, *drawn = axes.lines
    assert list(guide.get_ydata()) == [3.0, 3.0]
    assert [line.get_color() for line in drawn] == [COLOURS[0], "#123456", COLOURS[2]]
    (band,) = axes.collections
    box = band.get_datalim(axes.transData)
    assert (box.y0, box.y1) == (4.0, 8.0)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["_$a$  2", "b  6", "c  1"]
    assert not legend.get_texts()[0].get_parse_math()


def test_charts_over_steps_share_their_axis():
    charts = [
        Chart("", (Line("", [0, 1000], [0, 1]),)),
        Chart("", (Line("", [1, 1000], [0, 1]),), x_name="lag", log_x=True),
        Chart("", (Line("", [500, 3000], [0, 1]),)),
    ]
    first, lag, last = axes_of(*charts)
    assert first.get_xlim() == last.get_xlim() == (-60, 3060)
    assert lag.get_xscale() == "log" and lag.get_xlabel() == "lag" and lag.get_xlim()[1] < 1500
    assert [label.get_text() for label in first.get_xticklabels()] == ["-1000", "0", "1000", "2000", "3000", "4000"]


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.82, 1.54), (-3e5, 4e5), (1e-6, 5e-6)])
def test_axes_have_a_few_round_numbers(values):
    (axes,) = axes_of(chart(*values))
    low, high = axes.get_ylim()
    inside = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert 3 <= len(inside) <= 6
    assert all(abs(tick - float(f"{tick:.2g}")) < 1e-9 * high for tick in inside)


@pytest.mark.parametrize("values", [(0.03, 0.5), (0.0004, 0.2), (1e-9, 1e9)])
def test_logarithmic_axes_too(values):
    (axes,) = axes_of(chart(*values, log=True))
    low, high = axes.get_ylim()
    ticks = [float(tick_label(tick)) for tick in axes.get_yticks() if low <= tick <= high and tick < 10_000]
    assert 3 <= len(ticks) <= 8 and all(f"{tick:.0e}"[0] in "1235" for tick in ticks)


def test_legends_and_titles_cover_nothing():
    names = ["a", "a rather long name", "another long name", "b", "and one more that is longer than all of these"]
    lines = tuple(Line(name, [0, 1], [0.0, 1.0]) for name in names)
    assert legend_shape(Chart("", lines[:1])) == (1, 1) and legend_shape(Chart("", lines))[0] > 1
    figure = make_figure([Chart("Title", lines), *[chart(1.0, 2.0)] * 6], "Run", "one\ntwo")
    figure.draw_without_rendering()
    assert len(figure.axes) == 7
    boxes = []
    for axes in figure.axes:
        inside, legend = axes.get_window_extent(), axes.get_legend()
        assert legend is not None
        assert legend.get_window_extent().y0 >= inside.y1
        assert legend.get_window_extent().x1 <= figure.bbox.x1
        boxes.append(axes.get_tightbbox())
    texts = [text.get_window_extent() for text in figure.texts]
    assert min(text.y0 for text in texts) >= max(box.y1 for box in boxes)
    assert boxes[0].y0 > boxes[3].y1 and boxes[3].y0 > boxes[6].y1 and boxes[6].y0 >= 0


def test_charts_are_written_as_one_image(tmp_path):
    draw_charts([chart(1.0, 2.0)] * 4, tmp_path / "a.png", "Title")
    picture = Image.open(tmp_path / "a.png").convert("RGB")
    assert picture.width > picture.height > 500 and len(picture.getcolors(100_000) or []) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_without_matplotlib_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingMatplotlib) as caught:
        draw_charts([chart(1.0)], tmp_path / "a.png")
    assert str(caught.value) == "charts need matplotlib: pip install 'longtake[plots]'"
    assert isinstance(caught.value, ValueError) and not list(tmp_path.iterdir())


def test_describing_charts_imports_neither_matplotlib_nor_torch(repo):
    script = "import sys, training.charts; assert not {'matplotlib', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=repo, check=True)

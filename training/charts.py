"""Draw line charts in a grid into one image. matplotlib is an optional dependency, imported on first use."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dnnlib.util import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stay apart for the colour-blind (Okabe and Ito 2008), in the order in which they are taken.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b4fa2", "#8c8c2c")
PAPER, INK, FAINT_INK, GRID, AXIS = "#ffffff", "#1f2430", "#5b6370", "#e8eaee", "#a3a9b4"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "text.color": INK,
    "text.parse_math": False,  # labels are file and folder names
    "text.usetex": False,
    "axes.edgecolor": AXIS,
    "axes.labelcolor": FAINT_INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

# Sizes in inches.
COLUMNS = 3
CELL_WIDTH, CELL_HEIGHT = 4.0, 2.3  # size of a chart without its legend
MARGINS = (0.62, 0.2, 0.5, 0.34)  # left, right, bottom, top of the plot area
LEGEND_ROW = 0.17
EDGE = 0.15  # around the whole image
HEADER, HEADER_LINE = 0.5, 0.16  # height of the title, and of each line of the subtitle
DPI = 160
LEGEND_LETTERS = 48  # letters that fit in a row above a chart; the stroke of a line counts as 5

LOG_FACTOR = 10.0  # the axis becomes logarithmic if the values span more than this factor
FEW_POINTS = 30  # up to this many points are drawn with markers, unsmoothed, and all inside the axis
SMOOTHING = 1 / 80  # standard deviation of the smoothing window, as a fraction of the number of points


class MissingMatplotlib(ValueError):
    """matplotlib, which charts require, is not installed."""


@dataclasses.dataclass(frozen=True)
class ChartSpec:
    """A chart of logged statistics: `lines` maps the name of a statistic to its label. The rest is as in `Chart`."""

    title: str
    values: Mapping[str, str]
    log: bool = False
    guide: float | None = None
    limits: tuple[float, float] | None = None
    exact: bool = False


@dataclasses.dataclass(frozen=True)
class Line:
    """A named sequence of points in ascending `x`.

    A non-finite `y` leaves a gap. `band` is the half-width of the shaded band around the line at each point, such as a
    standard error. Without `colour` the next colour of `COLOURS` is used.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[float] | None = None
    colour: str | None = None


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines that share their axes.

    `log` requests a logarithmic axis if all values are positive and span more than one decade. `guide` is a reference
    value, drawn as a dashed line. `limits` fixes the vertical axis. `exact` lines, such as counts of rare events, are
    neither smoothed nor clipped. Charts over steps share their horizontal axis.
    """

    title: str
    lines: tuple[Line, ...]
    log: bool = False
    guide: float | None = None
    limits: tuple[float, float] | None = None
    exact: bool = False
    x_name: str = "step"
    log_x: bool = False


def draw_charts(charts: Sequence[Chart], out: Path, title: str = "", subtitle: str = "") -> None:
    """Write all charts as one PNG. Raise `MissingMatplotlib` without matplotlib."""
    figure = make_figure(charts, title, subtitle)
    with atomic_path(out) as path:
        figure.savefig(path, dpi=DPI, format="png")


def make_figure(charts: Sequence[Chart], title: str = "", subtitle: str = "", below: float = 0.0) -> "Figure":
    """Return a figure of all charts in rows of at most three, under a title; the lowest `below` inches stay empty.

    Raises `MissingMatplotlib` without matplotlib.
    """
    matplotlib = _import_matplotlib()
    columns = min(COLUMNS, max(len(charts), COLUMNS if below else 2 if title else 1))
    legend = LEGEND_ROW * max((legend_shape(chart)[0] for chart in charts), default=0)
    header = HEADER + HEADER_LINE * len(subtitle.splitlines()) if title else EDGE
    cell_height = CELL_HEIGHT + legend
    width = columns * CELL_WIDTH + 2 * EDGE
    height = header + -(-len(charts) // columns) * cell_height + below
    left, right, bottom, top = MARGINS
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(width, height), facecolor=PAPER)
        figure.text(2 * EDGE / width, 1 - 0.2 / height, title, fontsize=14, va="top")
        figure.text(2 * EDGE / width, 1 - HEADER / height, subtitle, color=FAINT_INK, va="top", linespacing=1.4)
        for index, chart in enumerate(charts):
            row, column = divmod(index, columns)
            corner = (EDGE + column * CELL_WIDTH + left, height - header - (row + 1) * cell_height + bottom)
            size = (CELL_WIDTH - left - right, CELL_HEIGHT - bottom - top)
            place = (corner[0] / width, corner[1] / height, size[0] / width, size[1] / height)
            shared = next((axes for axes in figure.axes if chart.x_name == axes.get_xlabel() == "step"), None)
            _draw_chart(figure.add_axes(place, sharex=shared), chart, matplotlib.ticker)
    return figure


def _import_matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError:
        raise MissingMatplotlib("charts need matplotlib: pip install 'longtake[plots]'") from None
    return matplotlib


# ----------------------------------------------------------------------------
# One chart.


def _draw_chart(axes: "Axes", chart: Chart, ticker: Any) -> None:
    low, high, log = value_range(chart)
    axes.set(xscale="log" if chart.log_x else "linear", xlabel=chart.x_name)
    axes.set(yscale="log" if log else "linear", ylim=(low, high))
    axes.margins(x=0.02)
    axes.tick_params(color=AXIS, labelcolor=FAINT_INK, length=3)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    if chart.guide is not None:
        axes.axhline(chart.guide, color=AXIS, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    handles = [_draw_line(axes, chart, line, log, colour_of(line, i)) for i, line in enumerate(chart.lines)]
    for axis, is_log in ((axes.xaxis, chart.log_x), (axes.yaxis, log)):
        axis.set_major_locator(_locator(ticker, *axis.get_view_interval(), is_log))
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_major_formatter(lambda value, _: tick_label(value))
    rows, columns = legend_shape(chart)
    axes.set_title(chart.title, loc="left", fontsize=10, pad=6 + 72 * LEGEND_ROW * rows)
    if log:
        axes.text(1, -0.17, "log scale", color=FAINT_INK, ha="right", va="top", transform=axes.transAxes)
    axes.legend(
        handles=handles,
        ncols=columns,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        frameon=False,
        borderpad=0,
        borderaxespad=0.3,
        handlelength=1.4,
        columnspacing=1.2,
        labelspacing=0.3,
        labelcolor=FAINT_INK,
    )


def _draw_line(axes: "Axes", chart: Chart, line: Line, log: bool, colour: str) -> Any:
    """Draw a line with its band and return the artist for the legend; a point between two gaps becomes a dot."""
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    finite = np.isfinite(y)
    if line.band is not None:
        band = np.asarray(line.band, float)
        axes.fill_between(x, y - band, y + band, color=colour, alpha=0.16, linewidth=0)
    marked = finite
    if len(y) > FEW_POINTS:
        marked = finite & ~np.append(False, finite[:-1]) & ~np.append(finite[1:], False)
        if not chart.exact:
            axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.7)
            # Clipping before smoothing keeps one spike from lifting its whole neighbourhood.
            low, high = axes.get_ylim() if not log else np.log(axes.get_ylim())
            places = ((np.log(y) if log else y) - low) / (high - low)
            y = low + (high - low) * smooth(np.clip(places, -0.1, 1.1))
            y = np.exp(y) if log else y
    (artist,) = axes.plot(x, y, color=colour, linewidth=1.6, marker="o", markersize=3, markevery=marked.tolist())
    artist.set_label(entry_of(line))
    return artist


def _locator(ticker: Any, low: float, high: float, log: bool) -> Any:
    """Return a tick locator that places about five round numbers on an axis."""
    if not log:
        return ticker.MaxNLocator(5, steps=[1, 2, 5, 10])
    decades = math.log10(high / low)
    return ticker.LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,), numticks=6)


def entry_of(line: Line) -> str:
    """Return the legend entry of a line: its label and its last value."""
    finite = [value for value in line.y if math.isfinite(value)]
    return f"{line.label}  {short_number(finite[-1]) if finite else 'none'}"


def legend_shape(chart: Chart) -> tuple[int, int]:
    """Return the number of rows and columns that the legend of a chart needs."""
    letters = np.array([5 + len(entry_of(line)) for line in chart.lines])
    fitting = [
        columns
        for columns in range(1, len(letters) + 1)
        if sum(part.max() for part in np.array_split(letters, columns)) <= LEGEND_LETTERS
    ]
    columns = max(fitting, default=1)
    return -(-len(letters) // columns), columns


def colour_of(line: Line, index: int) -> str:
    """Return the colour of line number `index` of a chart."""
    return line.colour or COLOURS[index % len(COLOURS)]


# ----------------------------------------------------------------------------
# Values.


def value_range(chart: Chart) -> tuple[float, float, bool]:
    """Return the limits of the vertical axis, which exclude rare outliers, and whether it is logarithmic."""
    if chart.limits is not None:
        return *chart.limits, False
    parts = [np.asarray(line.y, float) for line in chart.lines]
    for line in chart.lines:
        if line.band is not None:
            parts += [np.asarray(line.y, float) + side * np.asarray(line.band, float) for side in (-1, 1)]
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if chart.log and low > 0 and high > LOG_FACTOR * low:
        return low / 1.2, high * 1.2, True
    if len(values) > FEW_POINTS and not chart.exact:
        # The spike of a single step must not flatten the rest of the curve: it is clipped instead.
        first, last = np.quantile(values, 0.01, method="higher"), np.quantile(values, 0.99, method="lower")
        room = last - first
        low, high = max(low, float(first - room)), min(high, float(last + room))
    if chart.guide is not None:
        low, high = min(low, chart.guide), max(high, chart.guide)
    if low >= 0 and (low < 0.4 * high or high == 0):
        low, high = 0.0, high or 1.0  # include zero if it is near
    margin = 0.06 * (high - low) or 0.5 * abs(high)  # a single value gets a margin as well
    return low - (margin if low else 0), high + margin, False


def smooth(values: np.ndarray) -> np.ndarray:
    """Smooth values with a Gaussian window over finite neighbours, (n,) -> (n,); gaps stay gaps."""
    deviation = max(1.0, SMOOTHING * len(values))
    reach = np.arange(-math.ceil(3 * deviation), math.ceil(3 * deviation) + 1)
    window = np.exp(-0.5 * (reach / deviation) ** 2)
    finite = np.isfinite(values)
    # mode="same" returns the length of the longer argument, and the window may be longer than the values.
    inside = slice(len(reach) // 2, len(reach) // 2 + len(values))
    total = np.convolve(np.where(finite, values, 0.0), window)[inside]
    weight = np.convolve(finite.astype(float), window)[inside]
    return np.where(finite, total / np.maximum(weight, 1e-12), np.nan)


def short_number(value: float) -> str:
    """Format a value with three digits: 0.0123, 1.39, 2076, 20.8k."""
    if not math.isfinite(value):
        return "none"
    return tick_label(value, 3) if abs(value) >= 10_000 else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def tick_label(value: float, digits: int = 6) -> str:
    """Format a number for an axis as briefly as possible: 0.25, 1500, 20k, 1.5M, 1e-05."""
    for least, unit, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"

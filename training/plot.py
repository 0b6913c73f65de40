"""Line charts as small multiples on one picture, drawn with Pillow alone."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Colours that stay apart for the colour-blind (Okabe and Ito 2008), in the order in which they are taken.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b4fa2", "#8c8c2c")
PAPER, INK, FAINT_INK, GRID, AXIS = "#ffffff", "#1f2430", "#6b7280", "#e8eaee", "#b4b9c2"

# Sizes in units of which `scale` make a pixel.
CHART_SIZE = (396, 226)  # width, height
MARGIN = (50, 54, 16, 26)  # left, top, right, bottom of a chart's lines
LEGEND_HEIGHT = 18
NAME_HEIGHT = 16  # of the name of a chart's own horizontal axis
EDGE = 16  # around the whole picture
FONT_SIZE = 11
TITLE_SIZE = 13
HEADLINE_SIZE = 18
HEADER_HEIGHT = 62

OVERSAMPLING = 2  # lines have no anti-aliasing in Pillow, so charts are drawn larger and reduced
LOG_FACTOR = 10.0  # a logarithmic axis is taken if the values span more than this
FEW_POINTS = 30  # so many are shown as they are: not smoothed, and none outside the axis
SMOOTHING = 1 / 80  # standard deviation of the smoothing window, as a share of the points


@dataclasses.dataclass(frozen=True)
class Line:
    """A named sequence of points in ascending `x`; a `y` that is not finite leaves a gap. `band` is how far the shade
    around the line reaches up and down, such as an error, at each point. Without a `colour` the next one is taken."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[float] | None = None
    colour: str | None = None


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines that share their axes.

    `log` asks for a logarithmic axis where all values are positive and more than one decade apart. `limits` fixes the
    vertical axis. `guide` is a value marked by a dashed line, for comparison. `exact` lines, such as counts of rare
    events, are neither smoothed nor cut off. With `x_name` a chart has a horizontal axis of its own, which `log_x`
    makes logarithmic. Without `legend` the lines are named elsewhere.
    """

    title: str
    lines: tuple[Line, ...]
    log: bool = False
    limits: tuple[float, float] | None = None
    guide: float | None = None
    exact: bool = False
    x_name: str | None = None
    log_x: bool = False
    legend: bool = True


@dataclasses.dataclass(frozen=True)
class Axis:
    """A range of values, linear or logarithmic, and the round numbers in it that are written beside it."""

    low: float
    high: float
    ticks: list[float]
    labels: list[str]
    log: bool = False

    def place(self, values: Any) -> np.ndarray:
        """Values as fractions of the axis, 0 at its beginning and 1 at its end; what cannot be placed is NaN."""
        values = np.asarray(values, float)
        if self.log:
            values = np.log(np.where(values > 0, values, np.nan))
            return (values - math.log(self.low)) / math.log(self.high / self.low)
        return (values - self.low) / (self.high - self.low)


def draw_charts(
    charts: Sequence[Chart], title: str = "", subtitle: str = "", columns: int = 3, scale: int = 2, x_name: str = "step"
) -> Image.Image:
    """All charts in rows of `columns` over one and the same horizontal axis, but for those that name their own, under
    a headline.

    `scale` is how many pixels a unit of the layout takes; type is 11 units high.
    """
    assert charts
    shared = time_axis([chart for chart in charts if chart.x_name is None])
    columns = min(columns, len(charts))
    rows = -(-len(charts) // columns)
    width = columns * CHART_SIZE[0] + 2 * EDGE
    image = Image.new("RGB", (width * scale, (HEADER_HEIGHT + rows * CHART_SIZE[1] + EDGE) * scale), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((2 * EDGE * scale, 16 * scale), title, INK, _font(HEADLINE_SIZE * scale))
    pen.text((2 * EDGE * scale, 40 * scale), subtitle, FAINT_INK, _font(FONT_SIZE * scale))
    for index, chart in enumerate(charts):
        row, column = divmod(index, columns)
        corner = (EDGE + column * CHART_SIZE[0], HEADER_HEIGHT + row * CHART_SIZE[1])
        x_axis = shared if chart.x_name is None else time_axis([chart])
        assert x_axis is not None
        picture = _draw_chart(chart, x_axis, x_name, scale * OVERSAMPLING).reduce(OVERSAMPLING)
        image.paste(picture, (corner[0] * scale, corner[1] * scale))
    return image


# ----------------------------------------------------------------------------
# Axes.


def make_axis(low: float, high: float, most: int, log: bool = False) -> Axis:
    """An axis from `low` to `high`, with at most `most` round numbers on it."""
    if low == high:  # a single value: give it some room
        low, high = (low / 2, high * 2) if log else (low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1))
    ticks = log_ticks(low, high, most) if log else round_ticks(low, high, most)
    return Axis(low, high, ticks, tick_labels(ticks), log)


def time_axis(charts: Sequence[Chart]) -> Axis | None:
    """The horizontal axis that holds all points of the charts; None without charts."""
    if not charts:
        return None
    points = np.concatenate([np.asarray(line.x, float) for chart in charts for line in chart.lines])
    return make_axis(points.min(), points.max(), most=5, log=charts[0].log_x)


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten in [low, high]: as many as possible, but at most `most`."""
    power = math.floor(math.log10((high - low) / most)) - 1
    for exponent in range(power, power + 4):
        for digit in (1, 2, 5):
            # Powers of ten below one are divided by, not multiplied with: 3 / 10 is 0.3, but 3 * 0.1 is not.
            step, divisor = (digit * 10**exponent, 1) if exponent >= 0 else (digit, 10**-exponent)
            first, last = math.ceil(low * divisor / step - 1e-9), math.floor(high * divisor / step + 1e-9)
            if last - first + 1 <= most:
                return [number * step / divisor for number in range(first, last + 1)]
    raise AssertionError(f"no round numbers between {low} and {high}")


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten in [low, high], every n-th if there are many; with their 2- and 5-fold if there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits, stride in [((1, 2, 5), 1), ((1, 3), 1), *(((1,), stride) for stride in range(1, 100))]:
        ticks = [float(f"{digit}e{exponent}") for exponent in exponents if exponent % stride == 0 for digit in digits]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= most:
            return ticks
    raise AssertionError(f"no powers of ten between {low} and {high}")


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Numbers as short as they may be on an axis: 0.25, 1500, 20k, 1.5M, 1e-05."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if 10_000 <= largest and unit <= largest:
            return [f"{tick / unit:.6g}{suffix}" if tick else "0" for tick in ticks]
    return [f"{tick:.6g}" for tick in ticks]


def short_number(value: float) -> str:
    """A value in three digits: 0.0123, 1.39, 2076, 20.8k."""
    if not math.isfinite(value):
        return "none"
    for least, unit, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def value_axis(chart: Chart) -> Axis:
    """The vertical axis of a chart: all its values, but for rare outliers, with a little room around them."""
    values = [np.asarray(line.y, float) for line in chart.lines]
    for line in chart.lines:
        if line.band is not None:
            values += [np.asarray(line.y, float) + side * np.asarray(line.band, float) for side in (-1, 1)]
    values = np.concatenate(values)
    values = values[np.isfinite(values)]
    if chart.limits is not None:
        return make_axis(*chart.limits, most=5)
    low, high = values.min(), values.max()
    log = chart.log and low > 0 and high > LOG_FACTOR * low
    if log:
        return make_axis(low / 1.2, high * 1.2, most=5, log=True)
    if len(values) > FEW_POINTS and not chart.exact:
        # A spike of one step must not press everything else flat: it leaves the picture instead.
        first, last = np.quantile(values, 0.01, method="higher"), np.quantile(values, 0.99, method="lower")
        room = last - first
        low, high = max(low, first - room), min(high, last + room)
    if chart.guide is not None:
        low, high = min(low, chart.guide), max(high, chart.guide)
    if low >= 0 and (low < 0.4 * high or high == 0):
        low, high = 0.0, high or 1.0  # zero is near enough to be shown
    margin = 0.06 * (high - low)
    return make_axis(low - (margin if low else 0), high + margin, most=5)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean of the finite neighbours of each point under a Gaussian window, (n,) -> (n,); gaps stay gaps."""
    deviation = max(1.0, SMOOTHING * len(values))
    reach = np.arange(-math.ceil(3 * deviation), math.ceil(3 * deviation) + 1)
    window = np.exp(-0.5 * (reach / deviation) ** 2)
    finite = np.isfinite(values)
    # "same" would give the longer of the two, and a window may be longer than the points.
    inside = slice(len(reach) // 2, len(reach) // 2 + len(values))
    total = np.convolve(np.where(finite, values, 0.0), window)[inside]
    weight = np.convolve(finite.astype(float), window)[inside]
    return np.where(finite, total / np.maximum(weight, 1e-12), np.nan)


# ----------------------------------------------------------------------------
# Drawing.


def _draw_chart(chart: Chart, x_axis: Axis, x_name: str, scale: int) -> Image.Image:
    y_axis = value_axis(chart)
    left, top, right, bottom = (side * scale for side in MARGIN)
    top -= 0 if chart.legend else LEGEND_HEIGHT * scale
    bottom += NAME_HEIGHT * scale if chart.x_name else 0
    width, height = CHART_SIZE[0] * scale, CHART_SIZE[1] * scale
    inner_width, inner_height = width - left - right, height - top - bottom
    picture = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(picture)
    font = _font(FONT_SIZE * scale)

    # The lines have a picture of their own, whose edges cut off what lies outside the axes.
    inside = Image.new("RGB", (inner_width, inner_height), PAPER)
    for tick in y_axis.place(y_axis.ticks):
        y = round((1 - tick) * (inner_height - 1))
        ImageDraw.Draw(inside).line([(0, y), (inner_width, y)], GRID, scale)
    if chart.guide is not None:
        y = round((1 - float(y_axis.place(chart.guide))) * (inner_height - 1))
        for x in range(0, inner_width, 8 * scale):
            ImageDraw.Draw(inside).line([(x, y), (x + 4 * scale, y)], AXIS, scale)
    strokes = []
    for index, line in enumerate(chart.lines):
        if line.band is not None:
            x = x_axis.place(line.x) * (inner_width - 1)
            low, high = (y_axis.place(np.asarray(line.y) + side * np.asarray(line.band)) for side in (-1, 1))
            _draw_band(inside, x, low, high, colour_of(line, index))
    for index, line in enumerate(chart.lines):
        colour = colour_of(line, index)
        x = x_axis.place(line.x) * (inner_width - 1)
        y = np.clip(y_axis.place(line.y), -0.1, 1.1)  # or one spike would lift its whole neighbourhood when smoothed
        if chart.exact or len(y) <= FEW_POINTS:
            strokes.append((x, y, colour, 1.75 * scale))
        else:
            _draw_line(inside, x, y, _blend(colour, 0.3), scale)
            strokes.append((x, smooth(y), colour, 1.75 * scale))
    for stroke in strokes:  # above all that is pale
        _draw_line(inside, *stroke)
    picture.paste(inside, (left, top))

    base = height - bottom
    pen.line([(left, base), (width - right, base)], AXIS, scale)
    for place, label in zip(y_axis.place(y_axis.ticks), y_axis.labels, strict=True):
        pen.text((left - 6 * scale, top + (1 - place) * inner_height), label, FAINT_INK, font, anchor="rm")
    x_labels = list(x_axis.labels)
    if chart.x_name:
        middle = left + inner_width / 2
        pen.text((middle, height - 6 * scale), chart.x_name, FAINT_INK, font, anchor="mb")
    elif x_labels:
        x_labels[0] = f"{x_name} {x_labels[0]}"
    for place, label in zip(x_axis.place(x_axis.ticks), x_labels, strict=True):
        x = left + place * inner_width
        pen.line([(x, base), (x, base + 3 * scale)], AXIS, scale)
        pen.text((x, base + 6 * scale), label, FAINT_INK, font, anchor="mt")
    pen.text((left, 12 * scale), chart.title, INK, _font(TITLE_SIZE * scale), anchor="lt")
    if y_axis.log:
        pen.text((width - right, 13 * scale), "log scale", FAINT_INK, font, anchor="rt")
    if chart.legend:
        _draw_legend(pen, chart, left, width - right, scale)
    return picture


def _draw_line(image: Image.Image, x: np.ndarray, y: np.ndarray, colour: str, width: float) -> None:
    """Points in order, `y` as fractions of the height; a point between two gaps becomes a dot."""
    pen = ImageDraw.Draw(image)
    finite = np.isfinite(y)
    rows = (1 - np.where(finite, y, 0.0)) * (image.height - 1)
    breaks = np.flatnonzero(np.diff(finite.astype(int))) + 1
    for piece in np.split(np.arange(len(y)), breaks):
        if not len(piece) or not finite[piece[0]]:
            continue
        points = [(float(x[i]), float(rows[i])) for i in piece]
        if len(points) == 1:
            pen.circle(points[0], 1.5 * width, fill=colour)
        else:
            pen.line(points, colour, max(1, round(width)), joint="curve")


def _draw_band(image: Image.Image, x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> None:
    """A shade between two lines, given as fractions of the height, through which what is below can be seen."""
    seen = np.isfinite(low) & np.isfinite(high)
    if seen.sum() < 2:
        return
    x, y = np.concatenate([x[seen], x[seen][::-1]]), np.concatenate([low[seen], high[seen][::-1]])
    rows = (1 - np.clip(y, -0.1, 1.1)) * (image.height - 1)
    shade = Image.new("L", image.size)
    ImageDraw.Draw(shade).polygon([(float(a), float(b)) for a, b in zip(x, rows, strict=True)], fill=45)
    image.paste(colour, mask=shade)


def _draw_legend(pen: ImageDraw.ImageDraw, chart: Chart, left: int, right: int, scale: int) -> None:
    """A stroke, the name and the last value of each line, as far as they fit into one row."""
    font = _font(FONT_SIZE * scale)
    x, y = left, 38 * scale
    for index, line in enumerate(chart.lines):
        finite = [value for value in line.y if math.isfinite(value)]
        value = short_number(finite[-1]) if finite else "none"
        name_width, value_width = pen.textlength(line.label + " ", font), pen.textlength(value, font)
        if x + 18 * scale + name_width + value_width > right:
            pen.text((x, y), "...", FAINT_INK, font, anchor="lm")
            return
        pen.line([(x, y), (x + 12 * scale, y)], colour_of(line, index), 3 * scale)
        pen.text((x + 18 * scale, y), line.label, FAINT_INK, font, anchor="lm")
        pen.text((x + 18 * scale + name_width, y), value, INK, font, anchor="lm")
        x += int(32 * scale + name_width + value_width)


def colour_of(line: Line, index: int) -> str:
    """The colour of line number `index` of a chart."""
    return line.colour or COLOURS[index % len(COLOURS)]


def _font(size: float) -> Any:
    return ImageFont.load_default(size)


def _blend(colour: str, strength: float) -> str:
    """`colour` on white paper, thinned to `strength`."""
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 + (channel - 255) * strength):02x}" for channel in channels)

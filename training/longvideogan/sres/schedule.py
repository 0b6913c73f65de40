"""The rate, cutoff and canvas of each layer of the super-resolution generator (StyleGAN3, section 3.2).

Pure functions of a few numbers. The published constants at 144x256 scale with the longer edge R: the cutoffs range
from 2 to R / 2.
"""

import math
from dataclasses import dataclass

from training.longvideogan.layers import check_square_padding

FIRST_CUTOFF = 2.0
FIRST_STOPBAND = 2**2.1
LAST_STOPBAND_REL = 2**0.3
NUM_CRITICAL = 2  # layers at the end that are critically sampled
MARGIN = 10  # extra pixels around each canvas but the last two
FILTER_SIZE = 6  # taps of a resampling filter, per sample of the lower rate
KERNEL = 3
MAX_LAYERS = 64  # published are 14


@dataclass(frozen=True)
class Layer:
    """One synthesis layer; sizes are (width, height), rates in samples across the longer edge."""

    index: int
    in_channels: int
    out_channels: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    in_rate: int
    out_rate: int
    in_cutoff: float
    out_cutoff: float
    in_half_width: float
    out_half_width: float
    is_rgb: bool

    @property
    def name(self) -> str:
        """Return the attribute name of the layer, such as L13_256_144_128."""
        return f"L{self.index}_{self.out_size[0]}_{self.out_size[1]}_{self.out_channels}"

    @property
    def kernel(self) -> int:
        """Return the edge of the convolution kernel."""
        return 1 if self.is_rgb else KERNEL

    @property
    def filter_rate(self) -> int:
        """Return the rate of the non-linearity."""
        return max(self.in_rate, self.out_rate) * (1 if self.is_rgb else 2)

    @property
    def up(self) -> int:
        """Return the factor from the input's rate to the non-linearity's."""
        return self.filter_rate // self.in_rate

    @property
    def down(self) -> int:
        """Return the factor from the non-linearity's rate to the output's."""
        return self.filter_rate // self.out_rate

    @property
    def up_taps(self) -> int:
        """Return the taps of the filter after zero insertion; 1 means no filter."""
        return 1 if self.is_rgb or self.up == 1 else FILTER_SIZE * self.up

    @property
    def down_taps(self) -> int:
        """Return the taps of the filter before downsampling; 1 means no filter."""
        return 1 if self.is_rgb or self.down == 1 else FILTER_SIZE * self.down

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """Return the padding (negative: cropping) after zero insertion: x_lo, x_hi, y_lo, y_hi."""
        pads = []
        for size_in, size_out in zip(self.in_size, self.out_size, strict=True):
            total = (size_out - 1) * self.down + 1
            total -= (size_in + self.kernel - 1) * self.up
            total += self.up_taps + self.down_taps - 2
            low = (total + self.up) // 2
            pads += [low, total - low]
        return pads[0], pads[1], pads[2], pads[3]


def check_size(height: int, width: int) -> None:
    """Raise ValueError, naming a valid size, for an output size that the networks do not support."""
    long, short = max(height, width), min(height, width)
    if long < 64 or long & (long - 1) or short * 4 < long:
        nearest = max(64, 1 << round(math.log2(max(long, 1))))
        raise ValueError(
            f"super-resolution frames of {height}x{width}: the longer edge must be a power of two from 64; "
            f"the nearest is {nearest}, such as {nearest * 9 // 16}x{nearest}, and the shorter at least a quarter of it"
        )
    check_square_padding("super-resolution frames", height, width)


def check_pair(height: int, width: int, lres_height: int, lres_width: int) -> None:
    """Raise ValueError for a low-resolution size that no low-resolution network supports for this output size.

    It is the output size halved an integer number of times, with a longer edge from 16 and edges of even difference.
    """
    check_size(height, width)
    halved = [(height >> j, width >> j) for j in range(1, max(height, width).bit_length() - 4)]
    possible = [
        (low_height, low_width)
        for j, (low_height, low_width) in enumerate(halved, 1)
        if (low_height << j, low_width << j) == (height, width) and (low_height - low_width) % 2 == 0
    ]
    if not possible:
        nearest = (f"{max(edge // 4 * 4, 4)}" for edge in (height, width))
        raise ValueError(
            f"super-resolution frames of {height}x{width}: their edges cannot be halved to a low-resolution size; "
            f"use {'x'.join(nearest)}"
        )
    if (lres_height, lres_width) not in possible:
        raise ValueError(
            f"low-resolution frames of {lres_height}x{lres_width} for {height}x{width}: both edges must be those of "
            "the output divided by the same power of two from 2, differ by an even number, and the longer be at least "
            f"16; possible are {', '.join(f'{low_height}x{low_width}' for low_height, low_width in possible)}"
        )


def sampling_rates(edge: int, num_layers: int) -> tuple[list[float], list[float], list[int]]:
    """Return cutoff, transition half-width and sampling rate of layers 0 .. num_layers for a longer edge of `edge`."""
    last_cutoff = edge / 2
    cutoffs, half_widths, rates = [], [], []
    for index in range(num_layers + 1):
        exponent = min(index / (num_layers - NUM_CRITICAL), 1)
        cutoff = FIRST_CUTOFF * (last_cutoff / FIRST_CUTOFF) ** exponent
        stopband = FIRST_STOPBAND * (last_cutoff * LAST_STOPBAND_REL / FIRST_STOPBAND) ** exponent
        rate = int(2 ** math.ceil(math.log2(min(2 * stopband, edge))))
        cutoffs.append(cutoff)
        rates.append(rate)
        half_widths.append(max(stopband, rate / 2) - cutoff)
    return cutoffs, half_widths, rates


def quadruples(edge: int, num_layers: int) -> bool:
    """Return whether some step of the schedule multiplies the sampling rate by more than two."""
    _, _, rates = sampling_rates(edge, num_layers)
    return any(after > 2 * before for before, after in zip(rates[:-1], rates[1:], strict=True))


def layer_schedule(
    height: int,
    width: int,
    num_layers: int,
    channel_base: int,
    channel_max: int,
    cond_channels: int,
    input_channels: int,
) -> list[Layer]:
    """Return layers 0 .. num_layers. `cond_channels` join every layer's input, `input_channels` the first one's.

    Raises ValueError, naming the smallest valid number of layers, if the rate would have to quadruple in one layer.
    """
    edge = max(height, width)
    if num_layers > MAX_LAYERS:
        raise ValueError(f"{num_layers} super-resolution layers: use num_layers={MAX_LAYERS} or less")
    if num_layers <= NUM_CRITICAL or quadruples(edge, num_layers):
        enough = next(n for n in range(NUM_CRITICAL + 1, MAX_LAYERS) if not quadruples(edge, n))
        raise ValueError(
            f"{num_layers} super-resolution layers cannot reach {height}x{width}: a layer would have to raise the "
            f"sampling rate more than twofold; use num_layers={enough} or more"
        )
    cutoffs, half_widths, rates = sampling_rates(edge, num_layers)
    sizes, channels = [], []
    for index, (rate, cutoff) in enumerate(zip(rates, cutoffs, strict=True)):
        canvas = (
            math.ceil(rate * min(1, width / height)) + 2 * MARGIN,
            math.ceil(rate * min(1, height / width)) + 2 * MARGIN,
        )
        sizes.append((width, height) if index > num_layers - NUM_CRITICAL else canvas)
        channels.append(round(min(channel_base / 2 / cutoff, channel_max)))
    channels[-1] = 3
    layers = []
    for index in range(num_layers + 1):
        before = max(index - 1, 0)
        layers.append(
            Layer(
                index=index,
                in_channels=cond_channels + (channels[before] if index else input_channels),
                out_channels=channels[index],
                in_size=sizes[before],
                out_size=sizes[index],
                in_rate=rates[before],
                out_rate=rates[index],
                in_cutoff=cutoffs[before],
                out_cutoff=cutoffs[index],
                in_half_width=half_widths[before],
                out_half_width=half_widths[index],
                is_rgb=index == num_layers,
            )
        )
    return layers

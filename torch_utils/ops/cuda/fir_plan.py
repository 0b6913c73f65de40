"""Choose the tile and the compile-time constants of the FIR kernel in fir.cuh, in integer arithmetic without a GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

MAX_THREADS = 256
MAX_REGISTERS = 200  # by the estimate below; the hardware has 255 per thread
MAX_TAPS_2D = 64
STEP_ROWS = 8  # rows of the grid between the filters per step; unrolled, so more take longer to compile
REGISTERS_PER_SM = 65536
SECTOR_COST = 110  # of 32 bytes through the second-level cache, in instructions of a thread
ENOUGH_WARPS = 12  # of an SM, to hide latencies with four independent sums a thread


@dataclass(frozen=True)
class AxisFilters:
    """One axis of a stream of two successive FIRs; see fir.cuh for the coordinates.

    `step` decimates after the first filter if there is no second. `plain`: the first filter is the identity. `second`:
    there is a second filter. `offset` is the padding in front of the up-sampled input, and `grid_pad` the part of it
    that pads the grid between the filters.
    """

    size: int
    out_size: int
    up: int = 1
    taps: int = 1
    offset: int = 0
    step: int = 1
    down: int = 1
    taps2: int = 1
    plain: bool = False
    second: bool = False
    grid_size: int = 0
    grid_pad: int = 0


@dataclass(frozen=True)
class Problem:
    """The properties that a tile depends on. `marks` is 1 if signs are written, 2 if they are read."""

    x: AxisFilters
    y: AxisFilters
    batch: int
    channels: int
    channels_last: bool
    item_size: int
    filter_2d: bool = False
    shared_taps: bool = False
    shared_taps2: bool = False
    marks: int = 0
    any_width: bool = False  # few different sizes occur, so that each width can have its own kernel


@dataclass(frozen=True)
class Gpu:
    """The properties of a GPU that a plan depends on."""

    num_sms: int
    shared_bytes: int  # maximum per block


@dataclass(frozen=True)
class Plan:
    """A tile: constants of the kernel, its block, its grid, and the integer fields of its parameters.

    `kernels` is a cache of the caller for kernels of this plan.
    """

    constants: dict[str, int]
    threads: int
    shared_bytes: int
    num_blocks: int
    fields: dict[str, int]
    kernels: dict[Any, Any] = field(default_factory=dict)


@functools.lru_cache(maxsize=4096)
def make_plan(problem: Problem, gpu: Gpu) -> Plan | None:
    """Return the plan of the cheapest tile, or None if the filters are too large for the kernel's registers."""
    tile = choose_tile(coarsened(problem), gpu.shared_bytes)
    return None if tile is None else finish(problem, gpu, replace(tile, problem=problem))


@functools.lru_cache(maxsize=4096)
def choose_tile(problem: Problem, shared_bytes: int) -> Tile | None:
    """Return the tile of the lowest cost, or None if there is none."""
    return min(make_tiles(problem, shared_bytes), key=lambda tile: tile.cost(shared_bytes), default=None)


def coarsened(problem: Problem) -> Problem:
    """Return a problem with the same tiles that is equal for similar sizes, as a key of the cache.

    Augmentation resamples images of a different size in every call, and comparing all tiles takes milliseconds.
    """

    def coarse(axis: AxisFilters, keep_size: bool) -> AxisFilters:
        size = axis.out_size if keep_size or axis.out_size <= 32 else round_up(axis.out_size, 32)
        return replace(axis, size=0, out_size=size, offset=axis.offset % axis.up, grid_size=min(axis.grid_size, 1))

    return replace(problem, x=coarse(problem.x, problem.any_width), y=coarse(problem.y, False))


@dataclass(frozen=True)
class Tile:
    """A candidate for the tile; the properties have the meaning of the macros of the same name in fir.cuh."""

    problem: Problem
    cols: int
    rows: int
    width: int
    planes: int

    @functools.cached_property
    def phase_x(self) -> int:
        return -self.problem.x.offset % self.problem.x.up

    @functools.cached_property
    def out_cols(self) -> int:
        return out_cols(self.problem.x.down)

    @functools.cached_property
    def groups(self) -> int:
        x = self.problem.x
        columns = (self.width - 1) * x.down + x.taps2 if x.second else self.width
        return ceil_div(columns, self.cols)

    @functools.cached_property
    def span(self) -> int:
        x = self.problem.x
        return ceil_div(x.taps, x.up) + (self.phase_x + (self.cols - 1) * x.step + x.up - 1) // x.up

    @functools.cached_property
    def threads(self) -> int:
        return max(round_up(self.groups * self.planes, 32), 64)

    @functools.cached_property
    def load_columns(self) -> int:
        x = self.problem.x
        return self.planes * ((self.groups - 1) * (self.cols * x.step // x.up) + self.span)

    @functools.cached_property
    def out_rows(self) -> int:
        return self.rows * self.problem.y.up // self.problem.y.down

    @functools.cached_property
    def shared_bytes(self) -> int:
        x = self.problem.x
        group_step = self.cols * x.step // x.up
        in_pitch = round_up((self.groups - 1) * group_step + round_up(self.span, 4), 4)
        floats = self._plane_pitch(self.rows * in_pitch)
        if x.second:
            step = self.out_cols * x.down
            reads = (self.width // self.out_cols - 1) * step + round_up(step - x.down + x.taps2, 4)
            mid_pitch = round_up(max(self.groups * self.cols, reads), 4)
            floats += self._plane_pitch(self.out_rows * mid_pitch)
        return 4 * 2 * self.planes * floats

    def _plane_pitch(self, size: int) -> int:
        return round_up(size - 4, 32) + 4 if self.problem.channels_last else size

    @functools.cached_property
    def registers(self) -> int:
        """Return a rough estimate of registers per thread, too high for small filters."""
        p, x, y = self.problem, self.problem.x, self.problem.y
        window = ceil_div(y.taps, y.up) * (self.span if p.filter_2d else self.cols)
        taps = x.taps * y.taps if p.filter_2d else x.taps + (0 if p.shared_taps else y.taps)
        taps += y.taps2 * y.second + x.taps2 * (x.second and not p.shared_taps2)
        sums = ceil_div(y.taps2, y.down) * self.cols * y.second
        return 40 + window + taps + sums + self.span + self.loads()

    def loads(self) -> int:
        """Return the number of elements that a thread fetches per step."""
        per_thread, groups = spread(self.load_columns, self.threads)
        return per_thread * ceil_div(self.rows, groups)

    def cost(self, shared_bytes_per_sm: int) -> float:
        """Return the estimated time in instructions: of all threads, idle time with few warps, memory traffic."""
        p, x = self.problem, self.problem.x
        steps = ceil_div(needed_rows(p.y), self.rows) + (1 if x.second else 0)
        images = p.batch * p.channels
        plane_blocks = p.batch * ceil_div(p.channels, self.planes) if p.channels_last else ceil_div(images, self.planes)
        fitting = min(REGISTERS_PER_SM // (self.registers * self.threads), shared_bytes_per_sm // self.shared_bytes, 16)
        idle = max(ENOUGH_WARPS / (max(fitting, 1) * self.threads / 32), 1) ** 0.5
        work = self.instructions() * self.threads * idle + SECTOR_COST * self.sectors()
        return work * steps * plane_blocks * ceil_div(x.out_size, self.width)

    def instructions(self) -> float:
        """Return the number of instructions of a thread per step."""
        p, x, y = self.problem, self.problem.x, self.problem.y
        taps_x, taps_y = ceil_div(x.taps, x.up), ceil_div(y.taps, y.up)
        per_row = self.span / 2 + (0 if p.filter_2d else self.cols * taps_x)
        per_mid = self.cols * (taps_y * (taps_x if p.filter_2d else 1) + (6 if x.grid_size else 0))
        per_mid += self.cols * ceil_div(y.taps2, y.down) * y.second
        total = self.rows * (per_row + y.up * per_mid) + 14 * self.loads() + 40
        if x.second:
            per_thread, groups = spread(self.planes * (self.width // self.out_cols), self.threads)
            per_vector = x.taps2 * self.out_cols + (self.out_cols * x.down + x.taps2) / 4 + 10
            total += per_thread * ceil_div(self.out_rows, groups) * per_vector
        return total

    def sectors(self) -> float:
        """Return the number of 32-byte sectors that a block moves per step; runs of pixels begin and end within one."""
        size = self.problem.item_size
        if self.problem.channels_last:
            per_pixel = max(self.planes * size / 32, 1)
            return per_pixel * (self.rows * self.load_columns / self.planes + self.out_rows * self.width)
        runs = self.rows * (self.load_columns / self.planes * size / 32 + 1)
        return self.planes * (runs + self.out_rows * (self.width * size / 32 + 1))


def make_tiles(problem: Problem, shared_bytes: int) -> Iterator[Tile]:
    """Yield the tiles that the kernel supports."""
    x, y = problem.x, problem.y
    if problem.filter_2d and x.taps * y.taps > MAX_TAPS_2D:
        return
    unit_rows = y.down // math.gcd(y.up, y.down)
    rows = unit_rows * max(round(STEP_ROWS / (y.up * unit_rows)), 1)
    rows = min(rows, round_up(needed_rows(y), unit_rows))
    if problem.marks == 1 and (x.taps2 < x.down or y.taps2 < y.down):
        return  # some elements of the grid are in no strip
    for cols in columns_of_a_thread(problem):
        unit = math.lcm(out_cols(x.down) if x.second else cols, x.up // math.gcd(x.up, x.down * x.step))
        if problem.marks:
            unit = math.lcm(unit, 4 // math.gcd(4, x.down))
        found = False
        for width in widths(problem, unit):
            for planes in plane_counts(problem):
                tile = Tile(problem, cols, rows, width, planes)
                fits = tile.registers <= MAX_REGISTERS and tile.shared_bytes <= shared_bytes
                if fits and tile.groups * planes <= MAX_THREADS:
                    found = True
                    yield tile
        if found:
            return


def columns_of_a_thread(problem: Problem) -> list[int]:
    """Return possible numbers of columns per thread, best first: those that use one 16-byte read of the input."""
    x = problem.x
    if problem.marks:
        return [4] if 4 % x.up == 0 else []
    unit = x.up // math.gcd(x.up, x.step)
    best = min(unit * max(4 // (unit * x.step), 1), round_up(x.out_size, unit))
    return sorted({best, *(n for n in range(unit, best, unit) if best % n == 0)}, reverse=True)


def widths(problem: Problem, unit: int) -> list[int]:
    """Return widths of strips in columns; few if sizes vary between calls, since each width needs its own kernel."""
    largest = round_up(problem.x.out_size, unit)
    counts = range(1, 65) if problem.any_width else [n * 2**k for k in range(7) for n in (1, 3)]
    return sorted({unit * n for n in counts if unit * n <= min(largest, 256)} | {unit})


def plane_counts(problem: Problem) -> list[int]:
    """Return possible numbers of planes per block."""
    if problem.channels_last:
        return [n for n in (4, 8, 16, 32) if n < 2 * problem.channels] or [problem.channels]
    return [n for n in (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64) if n <= problem.batch * problem.channels]


def finish(problem: Problem, gpu: Gpu, tile: Tile) -> Plan:
    """Return the plan of a tile: the grid of blocks, and constants and parameters of the kernel."""
    x, y = problem.x, problem.y
    first_row, phase_y = stream_start(y)
    planes = problem.batch if problem.channels_last else problem.batch * problem.channels
    channel_blocks = ceil_div(problem.channels, tile.planes) if problem.channels_last else 1
    plane_blocks = planes * channel_blocks if problem.channels_last else ceil_div(planes, tile.planes)
    strips = ceil_div(x.out_size, tile.width)
    segment_rows = rows_of_a_segment(y, strips * plane_blocks, gpu.num_sms)
    segments = ceil_div(y.out_size, segment_rows)
    count = tile.out_cols if x.second else tile.cols
    vector = not problem.channels_last and count in (2, 4) and x.out_size % count == 0
    constants = {
        "CHANNELS_LAST": int(problem.channels_last), "FILTER_2D": int(problem.filter_2d),
        "UP_X": x.up, "STEP_X": x.step, "TAPS_X": x.taps, "PHASE_X": tile.phase_x,
        "UP_Y": y.up, "TAPS_Y": y.taps, "PLAIN_X": int(x.plain), "PLAIN_Y": int(y.plain),
        "DOWN_Y": y.down, "TAPS2_Y": y.taps2, "PHASE_Y": phase_y, "DOWN_X": x.down, "TAPS2_X": x.taps2,
        "SECOND_X": int(x.second), "SECOND_Y": int(y.second),
        "SHARED_TAPS": int(problem.shared_taps), "SHARED_TAPS2": int(problem.shared_taps2),
        "TILE_W": tile.width, "PLANES": tile.planes, "THREADS": tile.threads, "GROUPS": tile.groups,
        "ROWS": tile.rows, "COLS": tile.cols, "OUT_COLS": tile.out_cols, "VECTOR_STORE": int(vector),
    }  # fmt: skip
    fields = {
        "in_h": y.size, "in_w": x.size, "out_h": y.out_size, "out_w": x.out_size,
        "planes": planes, "channels": problem.channels,
        "strips": strips, "segments": segments, "segment_rows": segment_rows, "channel_blocks": channel_blocks,
        "first_col": -x.offset // x.up, "first_row": first_row, "row_offset": y.offset - y.taps + 1,
        "grid_h": y.grid_size, "grid_w": x.grid_size, "sign_row": -y.grid_pad, "sign_byte": -x.grid_pad // 4,
    }  # fmt: skip
    return Plan(constants, tile.threads, tile.shared_bytes, strips * segments * plane_blocks, fields)


def stream_start(y: AxisFilters) -> tuple[int, int]:
    """Return the input row where the first segment begins, and the position of its first grid row (PHASE_Y).

    The window is full when the first needed row is completed, and the position is the smallest possible, so that
    paddings that differ by whole periods share a kernel.
    """
    row_offset = y.offset - y.taps + 1
    row = -row_offset // y.up - (ceil_div(y.taps, y.up) - 1)
    phase = row_offset % math.gcd(y.up, y.down)
    while (row * y.up + row_offset) % y.down != phase:
        row -= 1
    return row, phase


def needed_rows(y: AxisFilters) -> int:
    """Return the number of input rows, including zeros outside the image, for all rows of the output."""
    last = (y.out_size - 1) * y.down + y.taps2 - 1
    return (last - (y.offset - y.taps + 1)) // y.up - stream_start(y)[0] + 1


def rows_of_a_segment(y: AxisFilters, blocks: int, num_sms: int) -> int:
    """Return the output rows of a block: all, unless there are too few blocks for the GPU.

    Every segment filters some rows above it again; its length is at least four times their number.
    """
    unit = y.up // math.gcd(y.up, y.down)
    again = ceil_div(y.taps, y.up) * y.up // y.down + ceil_div(y.taps2, y.down)
    wanted = ceil_div(8 * num_sms, blocks)
    most = max(y.out_size // (4 * again), 1)
    return round_up(ceil_div(y.out_size, min(wanted, most)), unit)


def spread(columns: int, threads: int) -> tuple[int, int]:
    """Return PER_THREAD and ROW_GROUPS of fir.cuh."""
    return ceil_div(columns, threads), threads // columns if columns * 2 <= threads else 1


def out_cols(down: int) -> int:
    """Return the outputs of a thread in the second filter along x: those of one 16-byte step of its input."""
    return {1: 4, 2: 2}.get(down, 1)


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """Return the smallest multiple of b that is not less than a."""
    return ceil_div(a, b) * b

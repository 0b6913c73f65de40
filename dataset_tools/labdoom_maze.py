"""Build textured mazes and write them as a WAD for the Doom engine: grids, splits, textures and UDMF maps."""

import functools
import hashlib
import importlib.util
import io
import itertools
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TILE = 128  # map units along the edge of a tile, the width of a corridor; the player is 32 wide
SPLITS = ("train", "val", "test")
_SPLIT_OF_TENTH = ("train",) * 8 + ("val", "test")


@dataclass(frozen=True)
class Difficulty:
    """The difficulty of predicting a walk: the ranges from which mazes, their looks and smooth walks are drawn.

    All ranges include both ends. Lengths are in map units, angles in degrees, times in frames.
    """

    cells: tuple[int, int]  # along each edge of the maze
    loops: tuple[float, float]  # fraction of the inner walls that is opened
    rooms: tuple[int, int]  # minimum number of rooms, and the number of cells per additional room
    room_edge: tuple[int, int]  # cells
    regions: tuple[int, int]  # number of regions with different looks
    accents: float  # fraction of wall panels with a texture other than their region's
    speeds: tuple[float, float]  # slow and fast
    max_turn: float
    turn_change: float  # per frame, at most


DIFFICULTIES = {
    "easy": Difficulty((5, 7), (0.4, 0.7), (2, 8), (2, 4), (1, 2), 0.0, (5.0, 7.0), 4.0, 0.6),
    "normal": Difficulty((3, 7), (0.15, 0.2), (1, 12), (2, 3), (3, 5), 0.15, (6.5, 10.0), 5.0, 0.8),
    "hard": Difficulty((7, 10), (0.02, 0.05), (0, 50), (2, 2), (6, 9), 0.3, (8.0, 12.0), 8.0, 1.5),
}

_TEXTURE_EDGE = 128  # pixels, one per map unit
_NUM_CHOICES = 14  # number of candidate textures of each kind in one maze
_DISTINCT = 70.0  # minimum RGB distance of the mean colours of adjacent surfaces
TEXTURES = {"full": None, "soft": 4, "flat": 1}  # mean colours that are left along each edge of a texture; None: all
_SHADES = (1.0, 0.85, 0.7, 0.55)  # brightnesses of the textures that the palette is fitted to
# Without the dark colours of a pattern the palette needs more shades: with four, some walls turned olive and violet.
_REDUCED_SHADES = tuple(1 - level / 16 for level in range(10))
_SKY = "F_SKY1"  # the engine's name for a ceiling that is open to the sky

# Sides of a tile with its inside on the right, as the engine requires: corner to corner, and the neighbour (dy, dx).
_SIDES = (
    ((0, 1), (1, 1), (1, 0)),
    ((1, 1), (1, 0), (0, 1)),
    ((1, 0), (0, 0), (-1, 0)),
    ((0, 0), (0, 1), (0, -1)),
)


@dataclass(frozen=True)
class Maze:
    """A maze on a grid of tiles: the open ones, the region of each, and the start of the walk.

    `open_tiles` is bool and `regions` int, both (rows, columns), row 0 at y = 0; every open tile is reachable.
    """

    open_tiles: np.ndarray
    regions: np.ndarray
    start: tuple[int, int]

    def wall_distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the distance in map units from points to the nearest closed tile, 0 inside one; of the shape of x and
        y.
        """
        rows, columns = np.nonzero(~self.open_tiles)
        dx = np.abs(np.asarray(x)[..., None] - (columns + 0.5) * TILE) - TILE / 2
        dy = np.abs(np.asarray(y)[..., None] - (rows + 0.5) * TILE) - TILE / 2
        return np.hypot(dx.clip(min=0), dy.clip(min=0)).min(axis=-1)

    def facts(self) -> dict[str, Any]:
        """Return the entries of the manifest; "maze" is the same for its rotations and mirror images."""
        rows, columns = ((edge - 1) // 2 for edge in self.open_tiles.shape)
        passages = (self.open_tiles[1:] & self.open_tiles[:-1]).sum()
        passages += (self.open_tiles[:, 1:] & self.open_tiles[:, :-1]).sum()
        return {
            "cells": f"{rows}x{columns}",
            "loops": int(passages - self.open_tiles.sum() + 1),
            "regions": int(self.regions.max() + 1),
            "maze": _digest(self.open_tiles).hex(),
        }


def split_of(open_tiles: np.ndarray) -> str:
    """Return the split of a maze of this shape, the same for its rotations and mirror images.

    It depends on the shape alone, so two splits never share a maze for any seeds.
    """
    return _SPLIT_OF_TENTH[_digest(open_tiles)[0] % len(_SPLIT_OF_TENTH)]


def _digest(open_tiles: np.ndarray) -> bytes:
    """Return a SHA-256 of the shape of a maze, the same for its rotations and mirror images."""
    turned = [np.rot90(grid, k) for grid in (open_tiles, open_tiles.T) for k in range(4)]
    return hashlib.sha256(min(bytes(grid.shape) + grid.astype(np.uint8).tobytes() for grid in turned)).digest()


def build_maze(random: np.random.RandomState, split: str, difficulty: Difficulty = DIFFICULTIES["normal"]) -> Maze:
    """Draw mazes until one belongs to `split`, then divide it into regions with different looks."""
    while True:
        open_tiles = _draw_tiles(random, difficulty)
        if split_of(open_tiles) == split:
            break
    rows, columns = np.nonzero(open_tiles)
    seeds = random.choice(len(rows), size=_draw_int(random, difficulty.regions), replace=False)
    distance = (rows[:, None] - rows[seeds]) ** 2 + (columns[:, None] - columns[seeds]) ** 2
    regions = np.full(open_tiles.shape, -1)
    regions[rows, columns] = distance.argmin(axis=1)
    start = random.randint(len(rows))
    return Maze(open_tiles, regions, (int(rows[start]), int(columns[start])))


def _draw_int(random: np.random.RandomState, bounds: tuple[int, int]) -> int:
    return random.randint(bounds[0], bounds[1] + 1)


def _draw_tiles(random: np.random.RandomState, difficulty: Difficulty) -> np.ndarray:
    """Draw a maze by depth-first search over the cells of a grid, then add loops and rooms: bool (2 n + 1, 2 m + 1)."""
    rows, columns = (_draw_int(random, difficulty.cells) for _ in range(2))
    tiles = np.zeros((2 * rows + 1, 2 * columns + 1), bool)
    stack = [(random.randint(rows), random.randint(columns))]
    tiles[2 * stack[0][0] + 1, 2 * stack[0][1] + 1] = True
    while stack:
        row, column = stack[-1]
        steps = [
            (dr, dc)
            for dr, dc in ((0, 1), (1, 0), (0, -1), (-1, 0))
            if 0 <= row + dr < rows and 0 <= column + dc < columns
            and not tiles[2 * (row + dr) + 1, 2 * (column + dc) + 1]
        ]  # fmt: skip
        if not steps:
            stack.pop()
            continue
        dr, dc = steps[random.randint(len(steps))]
        tiles[2 * row + 1 + dr, 2 * column + 1 + dc] = True
        tiles[2 * (row + dr) + 1, 2 * (column + dc) + 1] = True
        stack.append((row + dr, column + dc))
    inner = [
        (r, c)
        for r, c in itertools.product(range(1, 2 * rows), range(1, 2 * columns))
        if (r + c) % 2 and not tiles[r, c]
    ]
    loops = random.choice(len(inner), size=round(random.uniform(*difficulty.loops) * len(inner)), replace=False)
    for index in loops:
        tiles[inner[index]] = True
    fewest, cells_per_room = difficulty.rooms
    for _ in range(_draw_int(random, (fewest, fewest + rows * columns // cells_per_room))):
        height, width = (_draw_int(random, difficulty.room_edge) for _ in range(2))
        top, left = random.randint(rows - height + 1), random.randint(columns - width + 1)
        tiles[2 * top + 1 : 2 * (top + height), 2 * left + 1 : 2 * (left + width)] = True
    return tiles


# ----------------------------------------------------------------------------
# Textures.


@dataclass(frozen=True)
class Texture:
    """A texture: its name in the WAD and its pixels, uint8 (H, W, 3)."""

    name: str
    pixels: np.ndarray

    @functools.cached_property
    def color(self) -> np.ndarray:
        """Return the mean colour, float (3,)."""
        return self.pixels.mean(axis=(0, 1))

    def reduced(self, count: int) -> "Texture":
        """Return this texture, of the same height and width, with each cell of a count x count grid in its mean colour.

        The cells stay sharp: the 256 colours of the engine would turn a smooth change between them into stripes.
        """
        height, width, _ = self.pixels.shape
        cells = self.pixels.reshape(count, height // count, count, width // count, 3).mean(axis=(1, 3))
        pixels = cells.round().astype(np.uint8).repeat(height // count, axis=0).repeat(width // count, axis=1)
        return Texture(self.name, pixels)


@functools.cache
def load_patterns(kind: str) -> tuple[np.ndarray, ...]:
    """Load the labmaze textures of a kind, "wall" or "floor", in order of their names: uint8 (128, 128, 3) each."""
    return tuple(_load(path, _TEXTURE_EDGE) for path in sorted(_assets().glob(f"style_*/{kind}_*_d.png")))


@functools.cache
def _load_skies() -> tuple[np.ndarray, ...]:
    """Load the front sides of labmaze's sky boxes, each mirrored to be periodic: uint8 (128, 256, 3)."""
    halves = [_load(path, 128) for path in sorted(_assets().glob("sky_*/ft.png"))]
    return tuple(np.concatenate([half, half[:, ::-1]], axis=1) for half in halves)


def _assets() -> Path:
    # Located without importing labmaze: only its images are used, not its compiled maze generator.
    spec = importlib.util.find_spec("labmaze")
    assert spec is not None and spec.submodule_search_locations, "labmaze is installed"
    return Path(spec.submodule_search_locations[0]) / "assets"


def _load(path: Path, edge: int) -> np.ndarray:
    with Image.open(path) as image:
        rgb = image.convert("RGBA").convert("RGB")
    return np.asarray(rgb.resize((edge, edge), Image.Resampling.LANCZOS))


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _draw_sky(random: np.random.RandomState) -> Texture:
    skies = _load_skies()
    return Texture("SKYVIEW", np.roll(skies[random.randint(len(skies))], random.randint(256), axis=1))


def _recolor(random: np.random.RandomState, patterns: Sequence[np.ndarray], name: str) -> Texture:
    """Draw a pattern, rotate its hue, limit its saturation, and set a suitable mean brightness."""
    pattern = patterns[random.randint(len(patterns))]
    turn, saturation, brightness = random.uniform(0, 2 * np.pi), random.uniform(0.15, 0.55), random.uniform(105, 185)
    # The rotation of the hue rotates the chroma about the grey axis.
    grey = pattern.mean(axis=2, keepdims=True)
    chroma = pattern - grey
    turned = np.cos(turn) * chroma + np.sin(turn) * np.cross(np.full(3, 3**-0.5), chroma)
    mean_grey, mean_chroma = grey.mean(), turned.mean(axis=(0, 1))
    # Scaled by s, the mean colour has saturation 1 - min / max = s (max - min) / (grey + s max) of its chroma.
    high, low = mean_chroma.max(), mean_chroma.min()
    scale = saturation * mean_grey / max(high - low - saturation * high, 1e-3)
    pixels = grey + min(scale, 1.0) * turned
    for _ in range(3):  # clipping reduces the brightness slightly
        pixels = (pixels * brightness / pixels.mean()).clip(8, 250)
    return Texture(name, pixels.round().astype(np.uint8))


def _pick(random: np.random.RandomState, textures: Sequence[Texture], unlike: Sequence[Texture]) -> Texture:
    """Draw a texture whose mean colour is far from those of `unlike`, or the farthest of 30 draws."""
    best, best_distance = textures[0], -1.0
    for _ in range(30):
        texture = textures[random.randint(len(textures))]
        distance = min((float(np.linalg.norm(texture.color - other.color)) for other in unlike), default=np.inf)
        if distance >= _DISTINCT:
            return texture
        if distance > best_distance:
            best, best_distance = texture, distance
    return best


# ----------------------------------------------------------------------------
# Maps.


def build_wad(
    random: np.random.RandomState,
    maze: Maze,
    strength: int,
    difficulty: Difficulty = DIFFICULTIES["normal"],
    textures: str = "full",
) -> bytes:
    """Return a WAD with one map, MAP01: the maze, textures drawn for it, and a palette fitted to these textures.

    The player accelerates `strength` times as fast as usual. `textures`, a key of TEXTURES, does not change what is
    drawn, only how many colours of it are left. The engine renders with 256 colours; its own palette is fitted to
    dungeons and would dither other colours.
    """
    walls = [_recolor(random, load_patterns("wall"), f"WALL{i:02d}") for i in range(_NUM_CHOICES)]
    flats = [_recolor(random, load_patterns("floor"), f"FLAT{i:02d}") for i in range(_NUM_CHOICES)]
    sky = _draw_sky(random)
    looks = _draw_looks(random, maze.regions.max() + 1, walls, flats)
    used = {texture.name: texture for look in looks for texture in look.textures}
    open_air = any(look.ceiling is None for look in looks)
    images = [*used.values(), *([sky] if open_air else [])]
    count = TEXTURES[textures]
    if count is not None:
        images = [image.reduced(count) for image in images]
    palette = _palette(images, _SHADES if count is None else _REDUCED_SHADES)
    player = f"actor Walker : DoomPlayer {{ Player.ForwardMove {strength} Player.SideMove {strength} }}"
    lumps = [
        ("PLAYPAL", palette.tobytes() * 14),
        ("COLORMAP", _shades(palette).tobytes()),
        ("MAPINFO", b'map MAP01 "maze" { sky1 = "SKYVIEW", 0.0 } gameinfo { playerclasses = "Walker" }'),
        ("DECORATE", player.encode()),
        ("MAP01", b""),
        ("TEXTMAP", _map_text(random, maze, looks, difficulty.accents).encode()),
        ("ENDMAP", b""),
        ("TX_START", b""),
        *((image.name, _png(image.pixels)) for image in images),
        ("TX_END", b""),
    ]
    return _pack(lumps)


def _palette(textures: Sequence[Texture], shades: Sequence[float]) -> np.ndarray:
    """Return 256 colours that fit the textures in these shades, as distant surfaces are darker: uint8 (256, 3)."""
    near = np.concatenate([texture.pixels[::4, ::4].reshape(-1, 3) for texture in textures])
    pixels = np.concatenate([near * shade for shade in shades]).astype(np.uint8)
    image = Image.fromarray(pixels[None]).quantize(253, Image.Quantize.MEDIANCUT, kmeans=2)
    colors = np.array(image.getpalette(), np.uint8).reshape(-1, 3)[:253]
    palette = np.zeros((256, 3), np.uint8)
    palette[1 : 1 + len(colors)] = colors
    palette[254:] = 255
    return palette


def _shades(palette: np.ndarray) -> np.ndarray:
    """Return the engine's table of darker colours: for 34 levels of darkness, the palette index of each shade."""
    scale = np.append(np.linspace(1, 1 / 32, 32), [1, 0])[:, None, None]
    wanted = (palette * scale).reshape(-1, 3)
    squares = (palette.astype(float) ** 2).sum(axis=1)
    return (squares - 2 * wanted @ palette.T.astype(float)).argmin(axis=1).astype(np.uint8).reshape(34, 256)


def _pack(lumps: Sequence[tuple[str, bytes]]) -> bytes:
    """Return the PWAD container: header, contents, then a directory of (offset, length, name of 8 bytes)."""
    offsets = np.cumsum([12, *(len(data) for _, data in lumps)])
    head = struct.pack("<4sii", b"PWAD", len(lumps), offsets[-1])
    directory = (
        struct.pack("<ii8s", offset, len(data), name.encode())
        for offset, (name, data) in zip(offsets, lumps, strict=False)
    )
    return b"".join([head, *(data for _, data in lumps), *directory])


@dataclass(frozen=True)
class _Look:
    """The look of a region: its surfaces, its light and the height of its ceiling."""

    wall: Texture
    accent: Texture
    floor: Texture
    ceiling: Texture | None  # None: open to the sky
    light: int
    height: int

    @property
    def textures(self) -> list[Texture]:
        surfaces = (self.wall, self.accent, self.floor, self.ceiling)
        return [texture for texture in surfaces if texture is not None]


def _draw_looks(random: np.random.RandomState, count: int, walls: list[Texture], flats: list[Texture]) -> list[_Look]:
    looks: list[_Look] = []
    for _ in range(count):
        wall = _pick(random, walls, [look.wall for look in looks])
        accent = _pick(random, walls, [wall])
        floor = _pick(random, flats, [wall, *(look.floor for look in looks[-1:])])
        ceiling = _pick(random, flats, [wall, floor]) if random.uniform() < 0.7 else None
        light, height = random.randint(176, 232), 16 * random.randint(7, 11)
        looks.append(_Look(wall, accent, floor, ceiling, light, height))
    return looks


def _map_text(random: np.random.RandomState, maze: Maze, looks: Sequence[_Look], accents: float) -> str:
    """Return a maze in the Universal Doom Map Format: a sector per region, lines where tiles close or regions meet."""
    vertices: dict[tuple[int, int], int] = {}
    lines, sides = [], []

    def side(region: int, **textures: str) -> int:
        sides.append(_block("sidedef", sector=region, **textures))
        return len(sides) - 1

    for row, column in np.argwhere(maze.open_tiles).tolist():
        region = int(maze.regions[row, column])
        for corner, next_corner, (dy, dx) in _SIDES:
            neighbour = int(maze.regions[row + dy, column + dx])
            ends = [
                vertices.setdefault(((column + x) * TILE, (row + y) * TILE), len(vertices))
                for x, y in (corner, next_corner)
            ]
            look = looks[region]
            if neighbour < 0:
                wall = (look.accent if random.uniform() < accents else look.wall).name
                lines.append(
                    _block("linedef", v1=ends[0], v2=ends[1], sidefront=side(region, texturemiddle=wall), blocking=True)
                )
            elif region < neighbour:
                # Where ceilings differ in height, the step between them shows the wall of the higher region.
                front, back = (side(r, texturetop=looks[r].wall.name) for r in (region, neighbour))
                lines.append(_block("linedef", v1=ends[0], v2=ends[1], sidefront=front, sideback=back, twosided=True))
    row, column = maze.start
    centre = {"x": (column + 0.5) * TILE, "y": (row + 0.5) * TILE}
    player = _block("thing", **centre, angle=0, type=1, **{f"skill{i}": True for i in range(1, 6)}, single=True)
    points = [_block("vertex", x=float(x), y=float(y)) for x, y in vertices]
    sectors = [
        _block(
            "sector",
            heightfloor=0,
            heightceiling=look.height,
            texturefloor=look.floor.name,
            textureceiling=look.ceiling.name if look.ceiling else _SKY,
            lightlevel=look.light,
        )
        for look in looks
    ]
    return "\n".join(['namespace = "zdoom";', player, *points, *lines, *sides, *sectors])


def _block(kind: str, **fields: str | float | bool) -> str:
    """Return one object of the map; its strings, numbers and booleans are formatted as in JSON."""
    return f"{kind} {{ {' '.join(f'{key} = {json.dumps(value)};' for key, value in fields.items())} }}"

"""Mazes are connected, belong to one split, and vary; maps match the mazes."""

import hashlib
import re
import struct

import numpy as np
import pytest
from scipy import ndimage

from dataset_tools import labdoom_maze
from dataset_tools.labdoom_maze import DIFFICULTIES, TILE

SEEDS = range(60)


@pytest.fixture(scope="module")
def mazes():
    return [labdoom_maze.build_maze(np.random.RandomState(seed), "train") for seed in SEEDS]


def test_mazes_are_closed_connected_and_have_loops(mazes):
    shapes = set()
    num_loops = []
    for maze in mazes:
        tiles = maze.open_tiles
        shapes.add(tiles.shape)
        assert not (tiles[0].any() or tiles[-1].any() or tiles[:, 0].any() or tiles[:, -1].any())
        labels = ndimage.label(tiles)
        assert isinstance(labels, tuple) and labels[1] == 1
        assert tiles[1::2, 1::2].all() and tiles[maze.start]
        edges = (tiles[1:] & tiles[:-1]).sum() + (tiles[:, 1:] & tiles[:, :-1]).sum()
        num_loops.append(edges - tiles.sum() + 1)
        assert np.array_equal(maze.regions >= 0, tiles) and 3 <= maze.regions.max() + 1 <= 5
    assert min(num_loops) >= 1 and len(shapes) > 15
    assert {edge for shape in shapes for edge in shape} == {7, 9, 11, 13, 15}


def test_normal_mazes_never_change(mazes):
    content = b"".join(maze.open_tiles.tobytes() + maze.regions.astype("<i4").tobytes() for maze in mazes)
    assert hashlib.sha256(content + repr([maze.start for maze in mazes]).encode()).hexdigest() == (
        "813304983a0633542130237944af280e44432d99d600d7ca56f60f97b60aa66b"
    )


def test_difficulties_differ_in_what_they_promise():
    drawn = {}
    for name, difficulty in DIFFICULTIES.items():
        levels = [labdoom_maze.build_maze(np.random.RandomState(seed), "train", difficulty) for seed in range(40)]
        facts = [maze.facts() for maze in levels]
        assert len({entry["maze"] for entry in facts}) == 40
        for maze, entry in zip(levels, facts, strict=True):
            rows, columns = map(int, str(entry["cells"]).split("x"))
            assert maze.open_tiles.shape == (2 * rows + 1, 2 * columns + 1)
            assert all(difficulty.cells[0] <= edge <= difficulty.cells[1] for edge in (rows, columns))
            assert difficulty.regions[0] <= entry["regions"] <= difficulty.regions[1]
            # Euler: what an open area encloses, plus 1, are the pieces of wall; a 2 x 2 of open tiles is a loop, too.
            labels = ndimage.label(~maze.open_tiles, np.ones((3, 3)))
            assert isinstance(labels, tuple)
            tiles = maze.open_tiles
            squares = (tiles[1:, 1:] & tiles[1:, :-1] & tiles[:-1, 1:] & tiles[:-1, :-1]).sum()
            assert entry["loops"] == labels[1] - 1 + squares
        drawn[name] = [
            np.mean([maze.open_tiles.mean() for maze in levels]),
            -np.mean([entry["loops"] for entry in facts]),
            np.mean([entry["regions"] for entry in facts]),
        ]
    easy, normal, hard = (drawn[name] for name in ("easy", "normal", "hard"))
    assert (
        easy[0] > normal[0] + 0.05 > hard[0] + 0.05 and easy[1] < normal[1] < hard[1] and easy[2] < normal[2] < hard[2]
    )


def test_the_digest_of_a_maze_is_that_of_its_mirror_images_and_of_no_other(mazes):
    digests = {maze.facts()["maze"] for maze in mazes}
    assert len(digests) == len({maze.open_tiles.tobytes() for maze in mazes})
    for maze in mazes[:10]:
        turned = labdoom_maze.Maze(np.rot90(maze.open_tiles).T, np.rot90(maze.regions).T, maze.start)
        assert turned.facts()["maze"] == maze.facts()["maze"]


def test_splits_share_no_maze_in_any_orientation():
    splits = {}
    for split in ("train", "val", "test"):
        for seed in range(40):
            tiles = labdoom_maze.build_maze(np.random.RandomState(seed), split).open_tiles
            for grid in (tiles, tiles.T, np.flipud(tiles), np.fliplr(tiles), np.rot90(tiles), tiles[::-1, ::-1]):
                assert labdoom_maze.split_of(grid) == split
                assert splits.setdefault((grid.shape, grid.tobytes()), split) == split


def test_wall_distance_is_that_to_the_nearest_point_of_a_wall(mazes):
    maze = mazes[0]
    random = np.random.RandomState(0)
    rows, columns = np.nonzero(~maze.open_tiles)
    steps = np.linspace(0, TILE, 33)
    wall_x = (columns[:, None, None] * TILE + steps[:, None]).repeat(33, axis=2).ravel()
    wall_y = (rows[:, None, None] * TILE + steps).repeat(33, axis=1).ravel()
    for row, column in np.argwhere(maze.open_tiles)[::7]:
        x, y = (column + random.uniform()) * TILE, (row + random.uniform()) * TILE
        expected = np.hypot(wall_x - x, wall_y - y).min()
        assert maze.wall_distance(np.array([x]), np.array([y]))[0] == pytest.approx(expected, abs=1.5)


def lumps_of(wad):
    """Return an independent reader of the container: name -> content."""
    kind, count, directory = struct.unpack_from("<4sii", wad)
    assert kind == b"PWAD"
    entries = [struct.unpack_from("<ii8s", wad, directory + 16 * i) for i in range(count)]
    assert directory + 16 * count == len(wad)
    return {name.rstrip(b"\0").decode(): wad[offset : offset + size] for offset, size, name in entries}


def test_the_map_has_a_wall_wherever_the_maze_has_one(mazes):
    maze = mazes[1]
    lumps = lumps_of(labdoom_maze.build_wad(np.random.RandomState(0), maze, 1))
    text = lumps["TEXTMAP"].decode()
    vertices = [(float(x), float(y)) for x, y in re.findall(r"vertex \{ x = ([\d.]+); y = ([\d.]+); \}", text)]
    sectors = re.findall(r'sector \{ .*texturefloor = "(\w+)"; textureceiling = "(\w+)"; lightlevel = (\d+)', text)
    sides = [int(sector) for sector in re.findall(r"sidedef \{ sector = (\d+)", text)]
    assert len(sectors) == maze.regions.max() + 1

    solid, doors = set(), set()
    for line in re.findall(r"linedef \{ (.*?) \}", text):
        v1, v2, front = (int(number) for number in re.findall(r"(?:v1|v2|sidefront) = (\d+)", line))
        (x1, y1), (x2, y2) = vertices[v1], vertices[v2]
        # The front of a line is on its right.
        middle_x, middle_y = (x1 + x2) / 2, (y1 + y2) / 2
        front_tile = int(middle_y - (x2 - x1) / 2) // TILE, int(middle_x + (y2 - y1) / 2) // TILE
        back_tile = int(middle_y + (x2 - x1) / 2) // TILE, int(middle_x - (y2 - y1) / 2) // TILE
        assert maze.regions[front_tile] == sides[front]
        if "blocking = true" in line:
            solid.add((front_tile, back_tile))
        else:
            back = int(re.findall(r"sideback = (\d+)", line)[0])
            assert maze.regions[back_tile] == sides[back]
            doors.add(frozenset((front_tile, back_tile)))
    expected_solid, expected_doors = set(), set()
    for row, column in np.argwhere(maze.open_tiles).tolist():
        for tile in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if not maze.open_tiles[tile]:
                expected_solid.add(((row, column), tile))
            elif maze.regions[tile] != maze.regions[row, column]:
                expected_doors.add(frozenset(((row, column), tile)))
    assert solid == expected_solid and doors == expected_doors
    for floor, ceiling, _ in sectors:
        assert lumps[floor][:4] == b"\x89PNG" and (ceiling == "F_SKY1" or ceiling in lumps)
    assert len(lumps["PLAYPAL"]) == 14 * 768 and len(lumps["COLORMAP"]) == 34 * 256


def test_a_texture_is_bright_and_unlike_its_neighbours():
    random = np.random.RandomState(0)
    textures = [
        labdoom_maze._recolor(random, labdoom_maze.load_patterns("wall"), f"WALL{index:02d}") for index in range(40)
    ]
    for texture in textures:
        assert 95 < texture.pixels.mean() < 190
        assert texture.pixels.astype(float).std(axis=(0, 1)).max() > 8  # has a pattern
    distances = []
    for _ in range(50):
        first = textures[random.randint(40)]
        second = labdoom_maze._pick(random, textures, unlike=[first])
        distances.append(np.linalg.norm(first.color - second.color))
    assert min(distances) > 60
    hues = np.array([texture.color - texture.color.mean() for texture in textures])
    assert (hues.max(axis=0) > 15).all() and (hues.min(axis=0) < -15).all()


@pytest.mark.parametrize("count", [4, 1])
def test_a_reduced_texture_keeps_the_mean_colours_of_its_cells(count):
    for pattern in labdoom_maze.load_patterns("floor")[:5]:
        texture = labdoom_maze.Texture("FLAT00", np.concatenate([pattern, pattern[:, ::-1]], axis=1))
        reduced = texture.reduced(count)
        assert reduced.name == "FLAT00" and reduced.pixels.shape == (128, 256, 3) and reduced.pixels.dtype == np.uint8
        rows, columns = np.array_split(np.arange(128), count), np.array_split(np.arange(256), count)
        for cell in (np.ix_(row, column) for row in rows for column in columns):
            assert np.ptp(reduced.pixels[cell], axis=(0, 1)).max() == 0
            assert np.abs(reduced.pixels[cell][0, 0] - texture.pixels[cell].mean(axis=(0, 1))).max() <= 0.5
        assert np.array_equal(reduced.reduced(count).pixels, reduced.pixels)


def test_reduced_textures_change_the_pictures_in_a_wad_and_nothing_else(mazes):
    full, *others = (
        lumps_of(labdoom_maze.build_wad(np.random.RandomState(0), mazes[0], 1, textures=textures))
        for textures in labdoom_maze.TEXTURES
    )
    for lumps in others:
        assert lumps.keys() == full.keys()
        changed = {name for name in full if full[name] != lumps[name]}
        assert changed == {"PLAYPAL", "COLORMAP"} | {name for name in full if full[name][:4] == b"\x89PNG"}


def test_shades_of_a_palette_get_darker_to_black():
    palette = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    shades = labdoom_maze._shades(palette)
    assert shades.shape == (34, 256) and np.array_equal(shades[0], np.arange(256))
    assert (np.diff(shades[:32].astype(int), axis=0) <= 0).all()
    assert abs(int(shades[16, 200]) - 100) < 8 and not shades[33].any()

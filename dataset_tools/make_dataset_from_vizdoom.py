"""Make LabDoom, a dataset of first-person walks through random textured mazes, rendered without a display.

Example, a minute on a laptop:
  python -m dataset_tools.make_dataset_from_vizdoom data/labdoom --clips 64 --frames 300 --sizes 36x64,144x256
"""

import collections
import concurrent.futures
import contextlib
import importlib.util
import multiprocessing
import multiprocessing.managers
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from dataset_tools import archive
from dataset_tools.frames import Size, SizesType, encode_stream
from dataset_tools.labdoom_maze import DIFFICULTIES, SPLITS, TEXTURES, build_maze, build_wad
from dataset_tools.labdoom_person import PERSON_ACTIONS, plan_person_walk
from dataset_tools.labdoom_walker import DISCRETE_ACTIONS, plan_walk
from dataset_tools.names import train_command
from training.random import random_state

CLIPS_PER_SHARD = 32
MIXED = "mixed"
NOMINAL_FPS = 30  # one frame per tick of the engine, played at video rate
_FROZEN_TICKS = 10  # ticks for which the engine freezes a new player
_WARMUP_FRAMES = 30  # walked before a clip begins, so that no clip starts from standstill
_THRUST = 32  # button value for a change of velocity of one map unit per tick; the engine rounds it to an integer
_SUPERSAMPLING = 1.5  # rendered pixels per stored pixel, along each edge
# Acceleration of the player, relative to the default: enough to start and stop within a frame, at the cost of
# precision.
_STRENGTH = {"smooth": 1, "discrete": 6, "person": 6}
_ACTIONS = {"discrete": DISCRETE_ACTIONS, "person": PERSON_ACTIONS}  # in the order of their numbers

# The resolutions, width x height, that the engine supports: wide images have a larger field of view.
_WIDE = ((256, 144), (320, 180), (400, 225), (512, 288), (640, 360), (800, 450), (1024, 576), (1280, 720), (1920, 1080))
_HIGH = ((160, 120), (320, 240), (400, 300), (512, 384), (640, 480), (800, 600), (1024, 768), (1280, 960), (1600, 1200))


@dataclass(frozen=True)
class Plan:
    """The options that determine the contents of a dataset."""

    sizes: tuple[Size, ...]
    num_clips: int
    num_frames: int
    split: str
    seed: int
    walker: str
    difficulty: str
    looks: int | None = None
    textures: str = "full"

    def facts(self) -> dict[str, Any]:
        """Return the entries of dataset.json; those that are None it lacks."""
        return {
            "looks": self.looks,
            "textures": None if self.textures == "full" else self.textures,
            **({"actions": list(_ACTIONS[self.walker])} if self.walker in _ACTIONS else {}),
            "source": "LabDoom",
            "split": self.split,
            "seed": self.seed,
            "requested_clips": self.num_clips,
            "frames_per_clip": self.num_frames,
            "walker": self.walker,
            "difficulty": self.difficulty,
            "rendered": "{1}x{0}".format(*_resolution(self.sizes)),
        }


@contextlib.contextmanager
def _engine(wad: bytes, resolution: tuple[int, int]) -> Iterator[Any]:
    """Yield a running engine with the WAD's map loaded and the player ready to move, in its own folder."""
    import vizdoom

    with tempfile.TemporaryDirectory() as folder:
        wad_path = Path(folder, "maze.wad")
        wad_path.write_bytes(wad)
        game = vizdoom.DoomGame()
        game.set_doom_game_path(str(Path(vizdoom.__file__).with_name("freedoom2.wad")))
        game.set_doom_scenario_path(str(wad_path))
        game.set_doom_config_path(str(Path(folder, "vizdoom.ini")))
        game.set_doom_map("MAP01")
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_screen_resolution(getattr(vizdoom.ScreenResolution, f"RES_{resolution[0]}X{resolution[1]}"))
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        overlays = (
            "hud",
            "weapon",
            "crosshair",
            "messages",
            "decals",
            "particles",
            "effects_sprites",
            "screen_flashes",
        )
        for overlay in overlays:
            getattr(game, f"set_render_{overlay}")(False)
        game.set_available_buttons(
            [
                vizdoom.Button.MOVE_FORWARD_BACKWARD_DELTA,
                vizdoom.Button.MOVE_LEFT_RIGHT_DELTA,
                vizdoom.Button.TURN_LEFT_RIGHT_DELTA,
            ]
        )
        variables = ("POSITION_X", "POSITION_Y", "ANGLE", "VELOCITY_X", "VELOCITY_Y")
        game.set_available_game_variables([getattr(vizdoom.GameVariable, name) for name in variables])
        game.set_episode_start_time(_FROZEN_TICKS)
        game.set_episode_timeout(0)
        game.set_mode(vizdoom.Mode.PLAYER)
        game.set_seed(0)  # nothing random is left in the map, but the engine would use the time as seed
        game.add_game_args("+movebob 0")
        game.init()
        try:
            yield game
        finally:
            game.close()


def _follow(game: Any, start: np.ndarray, target: np.ndarray, strength: int) -> np.ndarray:
    """Push the player from its pose to the next one and return the pose that it reached: x, y, degrees."""
    x, y, angle, velocity_x, velocity_y = start
    push = (target[0] - x - velocity_x, target[1] - y - velocity_y)
    cos, sin = np.cos(np.radians(target[2])), np.sin(np.radians(target[2]))
    forward, right = push[0] * cos + push[1] * sin, push[0] * sin - push[1] * cos
    left_turn = (target[2] - angle + 180) % 360 - 180
    thrust = _THRUST / strength
    game.make_action([round(thrust * forward), round(thrust * right), -left_turn])
    return game.get_state().game_variables


def _frames(
    game: Any, warmup: np.ndarray, planned: np.ndarray, strength: int, poses: list[list[float]]
) -> Iterator[np.ndarray]:
    """Walk the planned poses; yield the view from each, uint8 (H, W, 3), and append its actual pose to `poses`."""
    state = game.get_state().game_variables
    for target in warmup[1:]:
        state = _follow(game, state, target, strength)
    for target in planned:
        state = _follow(game, state, target, strength)
        poses.append([round(float(value), 3) for value in state[:3]])
        yield game.get_state().screen_buffer.copy()


def draw_look(plan: Plan, index: int) -> tuple[int, np.random.RandomState]:
    """Return the look of clip number `index`, one of those shared by all splits, and the generator of its textures."""
    assert plan.looks is not None
    look = random_state(f"labdoom-{plan.split}-look", plan.seed, index).randint(plan.looks)
    return look, random_state("labdoom-look", plan.seed, look)


def make_clip(writer: archive.ShardWriter, plan: Plan, index: int) -> None:
    """Render clip number `index`, which depends on the plan except for the number of clips."""
    name = plan.difficulty
    if name == MIXED:
        names = list(DIFFICULTIES)
        name = names[random_state(f"labdoom-{plan.split}-difficulty", plan.seed, index).randint(len(names))]
    difficulty = DIFFICULTIES[name]
    random = random_state(f"labdoom-{plan.split}", plan.seed, index)
    maze = build_maze(random, plan.split, difficulty)
    lengths = plan.num_frames, _WARMUP_FRAMES
    if plan.walker == "person":
        warmup, walk = plan_person_walk(maze, random, *lengths)
    else:
        warmup, walk = plan_walk(maze, random, *lengths, plan.walker == "discrete", difficulty)
    strength = _STRENGTH[plan.walker]
    facts = {"difficulty": name, **maze.facts()}
    if plan.looks is not None:
        facts["look"], random = draw_look(plan, index)
    wad = build_wad(random, maze, strength, difficulty, plan.textures)
    poses: list[list[float]] = []
    with _engine(wad, _resolution(plan.sizes)) as game:
        with writer.clip(f"{plan.split}/{index:06d}", facts=facts, actions=walk.actions, poses=poses) as add:
            for files in encode_stream(_frames(game, warmup, walk.poses, strength, poses), plan.sizes, num_threads=1):
                add(files)


def make_shard(root: Path, plan: Plan, shard: int, progress: Any) -> archive.ShardReport:
    """Render the clips of one shard, calling `progress.put(1)` after each; return its report."""
    first = shard * CLIPS_PER_SHARD
    with archive.ShardWriter(root, plan.sizes, shard) as writer:
        for index in range(first, min(first + CLIPS_PER_SHARD, plan.num_clips)):
            make_clip(writer, plan, index)
            progress.put(1)
    return writer.report(collections.Counter({NOMINAL_FPS: len(writer.frame_paths)}))


def _resolution(sizes: tuple[Size, ...]) -> tuple[int, int]:
    """Return the smallest resolution, width and height, with enough pixels for crops of all sizes; else the largest."""
    choices = _WIDE if all(width > 1.5 * height for height, width in sizes) else _HIGH
    for width, height in choices:
        if all(min(width / w, height / h) >= _SUPERSAMPLING for h, w in sizes):
            return width, height
    return choices[-1]


def _require_extras() -> None:
    missing = [name for name in ("vizdoom", "labmaze") if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(
            f"{' and '.join(missing)} not installed; LabDoom needs the demo extra: pip install -e '.[demo]'"
        )


def _die_with_parent() -> None:
    # Without this, a worker process would wait forever after its parent was killed.
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _start_worker(scratch: str) -> None:
    _die_with_parent()
    # The engine creates a folder in the working directory, and fails where another instance does so at the same moment.
    os.chdir(tempfile.mkdtemp(dir=scratch))


@click.command(
    epilog="Example, a minute on a laptop: python -m dataset_tools.make_dataset_from_vizdoom data/labdoom --clips 64"
)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
# fmt: off
@click.option(
    "--clips",
    "num_clips",
    help="Number of clips, each in a maze of its own",
    type=click.IntRange(min=1),
    default=2000,
    show_default=True,
)
@click.option(
    "--frames", "num_frames", help="Frames in each clip", type=click.IntRange(min=2), default=300, show_default=True
)
@click.option(
    "--sizes",
    help="Frame sizes to store, height x width",
    type=SizesType(),
    metavar="HxW,...",
    default="36x64,144x256",
    show_default=True,
)
@click.option(
    "--split",
    help="Which of three sets to make; no maze is in two of them",
    type=click.Choice(SPLITS),
    default="train",
    show_default=True,
)
@click.option(
    "--seed", help="Decides mazes, textures and walks", type=click.IntRange(min=0), default=0, show_default=True
)
@click.option(
    "--walker",
    help="Smooth turns; the three actions forward, left and right; or a person with a keyboard, who also stands, backs "
    "off, runs into walls and comes back to places",
    type=click.Choice(["smooth", "discrete", "person"]),
    default="smooth",
    show_default=True,
)
@click.option(
    "--difficulty",
    help="From slow walks in wide halls to fast ones on narrow, winding, colourful ways; mixed draws one for each clip",
    type=click.Choice([*DIFFICULTIES, MIXED]),
    default="normal",
    show_default=True,
)
@click.option(
    "--looks",
    help="Draw textures and colours of mazes from so many sets, the same in all splits  [default: each maze its own]",
    type=click.IntRange(min=1),
)
@click.option(
    "--textures",
    help="What is left of each texture: its mean colour, the mean colours of a 4x4 grid, or all of it",
    type=click.Choice(list(reversed(TEXTURES))),
    default="full",
    show_default=True,
)
@click.option(
    "--workers", help="Processes to render with  [default: one for each core]", type=click.IntRange(min=1), default=None
)
# fmt: on
def main(
    out: Path,
    num_clips: int,
    num_frames: int,
    sizes: tuple[Size, ...],
    split: str,
    seed: int,
    walker: str,
    difficulty: str,
    looks: int | None,
    textures: str,
    workers: int | None,
) -> None:
    """Render first-person walks through random textured mazes into the dataset folder OUT.

    The walks are smooth, like a rider's, unless --walker says otherwise. Besides the frames each zip holds actions.json
    and poses.json: for each clip the action that led into each frame ("none" for the first), and x, y (map units) and
    angle (degrees) of each frame.
    """
    _require_extras()
    plan = Plan(sizes, num_clips, num_frames, split, seed, walker, difficulty, looks, textures)
    num_shards = -(-num_clips // CLIPS_PER_SHARD)
    packages = ("vizdoom", "labmaze", "pillow", "numpy")
    facts = plan.facts()  # None is compared, too: a set made without an option does not mix with one made with it
    try:
        archive.refuse_mixture(out, sizes, range(num_shards), num_shards, **facts)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if archive.read_description(out) is not None:
        # Remove outdated or replaced shards from the description before new ones are written.
        archive.describe_dataset(out, [], num_shards, packages, **facts)
    facts = {name: fact for name, fact in facts.items() if fact is not None}
    workers = min(workers or os.cpu_count() or 1, num_shards)
    for report in _make_shards(out.resolve(), plan, num_shards, workers):
        archive.describe_dataset(out, [report], num_shards, packages, **facts)
    click.echo(f"{num_clips} clips of {num_frames} frames are in {out}. Next: {train_command(out, sizes)}")


def _make_shards(root: Path, plan: Plan, num_shards: int, workers: int) -> Iterator[archive.ShardReport]:
    """Render all shards in worker processes under a progress bar; yield reports as they are finished."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        manager = multiprocessing.managers.SyncManager(ctx=context)
        manager.start(_die_with_parent)
        stack.callback(manager.shutdown)
        progress = manager.Queue()
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (scratch,))
        stack.callback(pool.shutdown, cancel_futures=True)
        bar = stack.enter_context(click.progressbar(length=plan.num_clips, label="Rendering clips"))
        pending = {pool.submit(make_shard, root, plan, shard, progress) for shard in range(num_shards)}
        while pending:
            done, pending = concurrent.futures.wait(pending, 0.2, concurrent.futures.FIRST_COMPLETED)
            while not progress.empty():
                bar.update(progress.get())
            for future in done:
                yield future.result()


if __name__ == "__main__":
    main()

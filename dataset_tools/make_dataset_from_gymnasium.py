"""Make a dataset of clips with actions by playing an environment of gymnasium.

Example:
  python -m dataset_tools.make_dataset_from_gymnasium CartPole-v1 data/cartpole --clips 64 --sizes 64x96
  python -m dataset_tools.make_dataset_from_gymnasium minigrid:MiniGrid-FourRooms-v0 data/rooms --policy my_bot:make
"""

import contextlib
import dataclasses
import enum
import functools
import importlib
import json
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import click
import numpy as np

from dataset_tools import making
from dnnlib.text import one_line, shown
from training.data.stream_values import NONE
from training.random import random_state

RANDOM = "random"
_lock = threading.Lock()  # some environments share state when they are made, such as that of a window system


@dataclass(frozen=True)
class Play:
    """How an environment is played."""

    env: str
    arguments: Mapping[str, Any]
    policy: str
    hold: int
    frame_skip: int
    num_frames: int
    split: str
    seed: int


@dataclass
class Episode:
    """The streams of one clip, which grow as it is played."""

    actions: list[Any] = field(default_factory=lambda: [NONE])
    rewards: list[float] = field(default_factory=lambda: [0.0])


# ----------------------------------------------------------------------------
# Environments.


def load_gymnasium() -> Any:
    """Return the module gymnasium; raise `ValueError` if it is not installed."""
    try:
        import gymnasium
    except ImportError as error:
        raise ValueError(
            "playing environments needs the package gymnasium; install it with: pip install 'longtake[gym]' (in a "
            "checkout: pip install -e '.[gym]')"
        ) from error
    return gymnasium


@contextlib.contextmanager
def open_env(play: Play) -> Iterator[Any]:
    """Yield an environment that renders to arrays; raise `ValueError` if it cannot be made."""
    gymnasium = load_gymnasium()
    try:
        with _lock:
            env = gymnasium.make(play.env, render_mode="rgb_array", disable_env_checker=True, **play.arguments)
    except Exception as error:  # of whatever kind: environments are programs of others
        raise ValueError(
            f"the environment {play.env} cannot be made ({one_line(error)}); see its documentation"
        ) from error
    try:
        yield env
    finally:
        with _lock:
            env.close()


def action_names(env: Any) -> list[str] | None:
    """Return the names of the actions of an environment whose actions are whole numbers, None for any other.

    Names are those that the environment gives (an enumeration `actions`, or `get_action_meanings`), else numbers.
    """
    space = env.action_space
    if not isinstance(space, load_gymnasium().spaces.Discrete):
        return None
    names = [str(number) for number in range(int(space.start), int(space.start) + int(space.n))]
    given = getattr(env.unwrapped, "actions", None)
    meanings = getattr(env.unwrapped, "get_action_meanings", None)
    found: Sequence[Any] = []
    if isinstance(given, type) and issubclass(given, enum.IntEnum):
        found = [action.name for action in sorted(given)]
    elif callable(meanings):
        found = list(meanings())  # type: ignore[call-overload]
    found = [str(name).lower() for name in found]
    if len(found) < len(names) or len(set(found)) < len(found) or NONE in found:
        return names
    return found[: len(names)]


def describe_action(env: Any, action: Any, names: Sequence[str] | None) -> Any:
    """Return an action as JSON has it: its name, or the numbers of its vector."""
    if names is not None:
        return names[int(action) - int(env.action_space.start)]
    vector = load_gymnasium().spaces.utils.flatten(env.action_space, action)
    return np.asarray(vector, np.float32).ravel().tolist()


def check_env(env: Any, play: Play) -> None:
    """Raise `ValueError` unless actions are vectors or whole numbers."""
    if not env.action_space.is_np_flattenable:
        raise ValueError(
            f"actions of {play.env} are {one_line(env.action_space)}, which have no fixed number of values"
        )


# ----------------------------------------------------------------------------
# Policies.


def random_policy(env: Any, random: np.random.RandomState, hold: int) -> Callable[[Any, Any], Any]:
    """Return a policy that draws an action, and keeps it for 1 to 2 * hold - 1 steps: `hold` on average."""
    env.action_space.seed(int(random.randint(1 << 31)))
    left, action = 0, None

    def act(observation: Any, info: Any) -> Any:
        nonlocal left, action
        if left == 0:
            left, action = int(random.randint(1, 2 * hold)), env.action_space.sample()
        left -= 1
        return action

    return act


def make_policy(play: Play, env: Any, random: np.random.RandomState) -> Callable[[Any, Any], Any]:
    """Return the policy of one clip: a function (observation, info) -> action."""
    if play.policy == RANDOM:
        return random_policy(env, random, play.hold)
    return load_policy(play.policy)(env, random)


def load_policy(text: str) -> Callable[[Any, np.random.RandomState], Callable[[Any, Any], Any]]:
    """Return the function that MODULE:FUNCTION names; raise `ValueError` if there is none."""
    module, _, name = text.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--policy is {text}, which cannot be imported ({one_line(error)}); give MODULE:FUNCTION"
        ) from error
    if not callable(found):
        raise ValueError(f"--policy is {text}, which is no function; give MODULE:FUNCTION")
    return cast(Any, found)


# ----------------------------------------------------------------------------
# Clips.


def play_clip(play: Play, index: int, episode: Episode) -> Generator[np.ndarray, None, None]:
    """Yield the frames of clip number `index`, uint8 (H, W, 3), and append its actions and rewards to `episode`.

    The clip ends with the episode of the environment. Raises `ValueError` naming the clip if anything fails.
    """
    random = random_state(f"gymnasium-{play.split}", play.seed, index)
    with open_env(play) as env:
        check_env(env, play)
        names = action_names(env)
        act = make_policy(play, env, random)
        try:
            observation, info = env.reset(seed=int(random.randint(1 << 31)))
            yield _render(env, play)
            for _ in range(play.num_frames - 1):
                action, reward, is_over = act(observation, info), 0.0, False
                for _ in range(play.frame_skip):
                    observation, gained, terminated, truncated, info = env.step(action)
                    reward, is_over = reward + float(gained), bool(terminated or truncated)
                    if is_over:
                        break
                episode.actions.append(describe_action(env, action, names))
                episode.rewards.append(reward)
                yield _render(env, play)
                if is_over:
                    return
        except Exception as error:  # as above
            raise ValueError(
                f"clip {index} of {play.env} failed ({type(error).__name__}: {one_line(error)})"
            ) from error


def _render(env: Any, play: Play) -> np.ndarray:
    frame = env.render()
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        found = f"{frame.dtype} of shape {list(frame.shape)}" if isinstance(frame, np.ndarray) else shown(frame)
        raise ValueError(
            f"{play.env} renders {found}, expected uint8 of shape [height, width, 3]: render_mode rgb_array"
        )
    return frame


def _open(play: Play, index: int, fps: float, recipe: making.Recipe) -> making.Footage:
    episode = Episode()

    def streams(num_frames: int) -> dict[str, list[Any]]:
        return {"actions": episode.actions[:num_frames], "rewards": episode.rewards[:num_frames]}

    return making.Footage(fps, play_clip(play, index, episode), streams)


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Parse NAME=VALUE, where the value is JSON or else text."""
    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise ValueError(f"--env-arg is {text!r}; give NAME=VALUE, such as size=8")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


# ----------------------------------------------------------------------------
# The command.


@click.command(
    epilog="Example: python -m dataset_tools.make_dataset_from_gymnasium CartPole-v1 data/cartpole --clips 64"
)
@click.argument("env")
@click.argument("output_dir", type=click.Path(file_okay=False, path_type=Path))
# fmt: off
@click.option(
    "--clips",
    "num_clips",
    help="Number of clips, an episode each",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
)
@click.option(
    "--frames",
    "num_frames",
    help="Frames in a clip, at most",
    type=click.IntRange(min=2),
    default=300,
    show_default=True,
)
@click.option("--seed", help="Decides episodes and actions", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--policy",
    help="What plays: random actions, or MODULE:FUNCTION, which gets the environment and a numpy.random.RandomState "
    "and returns a function (observation, info) -> action",
    default=RANDOM,
    show_default=True,
)
@click.option(
    "--hold",
    help="Steps for which a random action is kept, on average",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
)
@click.option(
    "--frame-skip",
    help="Steps of the environment from one stored frame to the next, with one action",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
)
@click.option(
    "--env-arg", "env_args", help="NAME=VALUE, an argument of the environment; may be repeated", multiple=True
)
@click.option(
    "--source-fps",
    help="Frames per second at which the clips are shown  [default: as the environment says, else 30]",
    type=click.FloatRange(0, min_open=True),
)
# fmt: on
@making.maker_options(None)
def main(
    env: str,
    output_dir: Path,
    num_clips: int,
    num_frames: int,
    seed: int,
    policy: str,
    hold: int,
    frame_skip: int,
    env_args: tuple[str, ...],
    source_fps: float | None,
    recipe: making.Recipe,
    job: dict[str, Any],
) -> None:
    """Play the environment ENV, as gymnasium.make names it, and store the episodes as a dataset in OUTPUT_DIR.

    MODULE:NAME imports the module first, which registers the environment. Frames keep the size in which they are
    rendered unless --sizes is given. Beside the frames each zip holds the action that led into each frame ("none" for
    the first) and the rewards. Actions that are whole numbers are stored by name, any others as vectors. A clip is
    shorter where its episode ends; --min-frames leaves out clips that are too short.
    """
    if recipe.fps is not None or recipe.trim_start or recipe.trim_end:
        raise ValueError("--fps and --trim-* are for footage; give --frame-skip to store fewer frames")
    play = Play(env, parse_arguments(env_args), policy, hold, frame_skip, num_frames, job["split"], seed)
    if policy != RANDOM:
        load_policy(policy)
    with open_env(play) as opened:
        check_env(opened, play)
        names, rate = action_names(opened), opened.metadata.get("render_fps")
        opened.reset(seed=0)
        height, width, _ = _render(opened, play).shape
    fps = source_fps or (float(rate) / frame_skip if rate else 30.0)
    recipe = dataclasses.replace(recipe, sizes=recipe.sizes or ((height, width),))
    sources = [
        making.Source(f"{index:06d}", f"{index:06d}", functools.partial(_open, play, index, fps))
        for index in range(num_clips)
    ]
    facts: dict[str, Any] = {
        "seed": seed,
        "policy": policy,
        "hold": hold if policy == RANDOM else None,
        "frame_skip": frame_skip,
        "frames": num_frames,
        "env_args": dict(play.arguments),
        "source_fps": fps,
    }
    if names is not None:
        facts["actions"] = [NONE, *names]
    packages = ("gymnasium", "pillow", "numpy")
    making.make(output_dir, sources, recipe, **job, origin=env, packages=packages, facts=facts)


if __name__ == "__main__":
    main()

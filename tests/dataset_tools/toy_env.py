"""A small environment of gymnasium whose frames tell which action led into them, and policies for it."""

import enum

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.spaces.utils import flatten

LEVELS = 25  # of grey, between the frames of two actions


class Actions(enum.IntEnum):
    """Names of the actions."""

    LEFT = 0
    RIGHT = 1
    FORWARD = 2


class ToyEnv(gymnasium.Env):
    """Frames are grey: 10 before any action, then 40 + 25 times the sum of the last action's values."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, kind="names", length=1000, fails_at=None, renders=None, render_mode=None):
        self.render_mode, self.length, self.fails_at, self.renders = render_mode, length, fails_at, renders
        self.observation_space = spaces.Box(0, 1, (1,))
        if kind == "names":
            self.actions, self.action_space = Actions, spaces.Discrete(3)
        elif kind == "numbers":
            self.action_space = spaces.Discrete(4, start=2)
        elif kind == "vectors":
            self.action_space = spaces.Box(-1, 1, (2,))
        elif kind == "dict":
            self.action_space = spaces.Dict({"move": spaces.Discrete(2), "turn": spaces.Box(0, 1, (1,))})
        else:
            self.action_space = spaces.Sequence(spaces.Discrete(2))
        self.level, self.num_steps = 10, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.level, self.num_steps = 10, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.num_steps += 1
        if self.num_steps == self.fails_at:
            raise RuntimeError("the engine is gone")
        values = np.array(flatten(self.action_space, action), np.float32)
        number = int(action) if isinstance(self.action_space, spaces.Discrete) else np.clip(values, 0, 1).sum()
        self.level = round(40 + LEVELS * float(number))
        return np.zeros(1, np.float32), 0.5, self.num_steps >= self.length, False, {}

    def render(self):
        return np.full((12, 16, 3), self.level, np.uint8) if self.renders is None else self.renders


def turn_always(env, random):
    """Return a policy that turns left and right in turns."""
    turns = iter(range(10**6))
    return lambda observation, info: next(turns) % 2


gymnasium.register("Toy-v0", "tests.dataset_tools.toy_env:ToyEnv")

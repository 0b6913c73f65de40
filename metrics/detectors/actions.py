"""The inverse-dynamics network, which tells from two successive frames which action led from one to the other.

`metrics.action_network` is the command that trains it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metrics.action_following import confusion, factors_of, scores
from metrics.detectors import registry
from metrics.families import ACTION_NETWORK
from torch_utils import safe_pickle
from training import network_format
from training.contract import Size
from training.random import random_state

if TYPE_CHECKING:
    from training.data.dataset import ClipDataset

RUN_FRAMES = 9  # successive frames that are read together, which make eight pairs
HELD_OUT_RUNS = 256
STATUS_STEPS = 100
MIRROR = {"left": "right", "right": "left"}


class ActionNetwork(nn.Module):
    """Classify what happened between two frames: strided convolutions, a grid of 3x4 means, a linear layer a factor.

    `names` are those of the actions, `height` and `width` the size of the frames.
    """

    def __init__(self, names: Sequence[str], height: int, width: int, channels: int = 32) -> None:
        super().__init__()
        self.options = {"names": list(names), "height": height, "width": width, "channels": channels}
        self.names, self.size = list(names), (height, width)
        self.factors = factors_of(names)
        widths = [6, channels, 2 * channels, 2 * channels]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 5 if before == 6 else 3, stride=2, padding=2 if before == 6 else 1)
            for before, after in zip(widths, widths[1:], strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.hidden = nn.Linear(widths[-1] * 12, 4 * channels)
        self.heads = nn.ModuleList(nn.Linear(4 * channels, len(factor.classes)) for factor in self.factors)

    def forward(self, before: Tensor, after: Tensor) -> list[Tensor]:
        """Return the logits of each factor: uint8 (M, 3, H, W), twice -> float32 (M, classes) each."""
        before, after = before.float() / 127.5 - 1, after.float() / 127.5 - 1
        x = torch.cat([(before + after) / 2, after - before], dim=1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        x = F.relu(self.hidden(F.adaptive_avg_pool2d(x, (3, 4)).flatten(1)))
        return [head(x) for head in self.heads]


@dataclass
class ActionDetector:
    """A trained network, as metrics use it."""

    network: ActionNetwork
    identity: dict[str, Any]

    def predict(self, before: Tensor, after: Tensor) -> np.ndarray:
        """Return the class of each factor: uint8 (M, 3, H, W), twice -> int64 (M, factors)."""
        device = self.network.hidden.weight.device
        with torch.no_grad():
            logits = self.network(before.to(device), after.to(device))
        return torch.stack([part.argmax(dim=1) for part in logits], dim=1).cpu().numpy()


def load(device: torch.device | str = "cpu", file: Path | str | None = None) -> ActionDetector:
    """Load a network that `train` wrote; no code of the file is run.

    Raises `ValueError` if there is no file, or it holds another network.
    """
    path = registry.locate(ACTION_NETWORK, file)
    network_format.check_seal(str(path))
    record = safe_pickle.load(path)
    entry = record.children.get("actions")
    if record.class_name != safe_pickle.BUNDLE or entry is None or entry.class_name != ActionNetwork.__name__:
        raise ValueError(
            f"{path} is not an inverse-dynamics network: make one with  python -m metrics.action_network train"
        )
    network = network_format.build_network(ActionNetwork, entry.attributes["options"], entry.tensors, str(path))
    assert isinstance(network, ActionNetwork)
    trained = dict(record.attributes.get("options") or {})
    identity = {**registry.identity(ACTION_NETWORK, path, verified=False), "trained": trained}
    return ActionDetector(network.to(device).eval().requires_grad_(False), identity)


# ----------------------------------------------------------------------------
# Training.


class Pairs:
    """Runs of successive frames of a dataset with named actions."""

    def __init__(self, dataset: ClipDataset, size: Size, clips: Sequence[int]) -> None:
        self.dataset, self.size = dataset, size
        self.clips = [clip for clip in clips if dataset.lengths[clip] >= RUN_FRAMES]
        if not self.clips:
            raise ValueError(
                f"{dataset.path} has no clip of {RUN_FRAMES} frames to train or to test on: add longer ones"
            )

    def read(self, random: np.random.RandomState, num_runs: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return frames before and after, uint8 (M, 3, H, W), and actions int64 (M,), of random runs."""
        befores, afters, actions = [], [], []
        for _ in range(num_runs):
            clip = self.clips[random.randint(len(self.clips))]
            start = int(random.randint(self.dataset.lengths[clip] - RUN_FRAMES + 1))
            run = torch.from_numpy(self.dataset.read(clip, self.size, range(start, start + RUN_FRAMES)))
            run = run.permute(0, 3, 1, 2)
            befores.append(run[:-1])
            afters.append(run[1:])
            actions.append(self.dataset.read_stream(clip, "actions", start + 1, RUN_FRAMES - 1))
        return torch.cat(befores), torch.cat(afters), torch.from_numpy(np.concatenate(actions))


def mirrored_actions(names: Sequence[str]) -> np.ndarray | None:
    """Return for each action that of the mirrored video, int64 (actions,); None if one of them has none."""
    mirrored = ["_".join(MIRROR.get(word, word) for word in name.split("_")) for name in names]
    if mirrored == list(names) or not set(mirrored) <= set(names):
        return None
    return np.array([list(names).index(name) for name in mirrored])


def fit(
    network: ActionNetwork, pairs: Pairs, steps: int, batch: int, lr: float, seed: int, device: torch.device
) -> None:
    """Train by AdamW, with a learning rate that falls to 0 along a cosine, on `batch` runs of eight pairs a step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    mirror = mirrored_actions(network.names)
    tables = [torch.from_numpy(factor.table) for factor in network.factors]
    begin, total = time.monotonic(), 0.0
    for step in range(steps):
        random = random_state("action-network", seed, step)
        before, after, actions = pairs.read(random, batch)
        if mirror is not None:  # half of the runs
            flips = torch.from_numpy(np.repeat(random.randint(2, size=batch) == 1, RUN_FRAMES - 1))
            before, after = (torch.where(flips[:, None, None, None], x.flip(3), x) for x in (before, after))
            actions = torch.where(flips, torch.from_numpy(mirror)[actions], actions)
        logits = network(before.to(device), after.to(device))
        loss = sum(
            (F.cross_entropy(part, table[actions].to(device)) for part, table in zip(logits, tables, strict=True)),
            torch.zeros((), device=device),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += float(loss.detach())
        if (step + 1) % STATUS_STEPS == 0 or step + 1 == steps:
            count = (step % STATUS_STEPS) + 1
            click.echo(f"step {step + 1} of {steps}, loss {total / count:.3f}, {time.monotonic() - begin:.0f} s")
            total = 0.0


def test(network: ActionNetwork, pairs: Pairs, device: torch.device) -> dict[str, float]:
    """Return the scores of the network on runs of held-out clips."""
    detector, total = ActionDetector(network, {}), None
    for part in range(HELD_OUT_RUNS // 16):
        before, after, actions = pairs.read(random_state("action-network-test", 0, part), 16)
        found = confusion(detector.predict(before.to(device), after), actions.numpy(), network.factors)
        total = found if total is None else total + found
    assert total is not None
    return scores(total, network.factors)

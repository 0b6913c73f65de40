"""The loss of TECO on some frames of each clip, and the random numbers that it takes.

Yan et al., ICML 2023, section 3.4 (DropLoss) and eq. 3; masks as in MaskGit (Chang et al., CVPR 2022, section 3.2).
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.modules.quantizers import Quantized
from training.teco.networks import NULL_ACTION, SCHEDULES, TECO

SMOOTHING = 0.01  # of the decoder's labels


def masked_share(schedule: str, ratio: np.ndarray, total: int) -> np.ndarray:
    """Return the share of `total` cells that is hidden at a ratio in [0, 1]: float32, at least 1e-6.

    Raises `ValueError` for an unknown schedule.
    """
    ratio = np.asarray(ratio, np.float32)
    bits = np.float32(math.log2(total))
    if schedule == "uniform":
        share = 1 - ratio
    elif match := re.fullmatch(r"pow(\d+(?:\.\d+)?)", schedule):
        share = 1 - ratio ** np.float32(match[1])
    elif schedule == "cosine":
        share = np.cos(np.float32(math.pi / 2) * ratio)
    elif schedule == "log":
        share = -np.log2(np.maximum(ratio, np.float32(1e-30))) / bits
    elif schedule == "exp":
        share = 1 - np.exp2(-bits * (1 - ratio))
    else:
        raise ValueError(f"the mask schedule {schedule!r} is unknown: use one of {SCHEDULES}")
    return np.clip(share, np.float32(1e-6), np.float32(1)).astype(np.float32)


def num_masked(schedule: str, ratio: np.ndarray, total: int) -> np.ndarray:
    """Return the number of hidden cells, at least one: int64 of the shape of `ratio`."""
    return np.maximum(1, np.floor(total * masked_share(schedule, ratio, total))).astype(np.int64)


def num_kept(drop_loss_rate: float, num_frames: int) -> int:
    """Return the number of frames whose loss is computed."""
    return max(1, int((1 - drop_loss_rate) * num_frames)) if drop_loss_rate else num_frames


class Draws(NamedTuple):
    """The random numbers of a training step for some clips."""

    unknown: Tensor  # bool (N,): clips whose actions are replaced by the unknown one
    frames: Tensor  # int64 (F,): kept frames, counted from the first that is predicted
    detached: Tensor | None  # bool (F,): those that give no gradient to h and z; None: none
    hidden: Tensor  # bool (N, F, cells)
    num_hidden: Tensor  # (): cells hidden in a clip, averaged over the batch of all ranks


class Losses(NamedTuple):
    """The terms of the loss of some clips."""

    recon_loss: Tensor  # (N,), nats a frame
    trans_loss: Tensor  # (N,), nats a frame; its mean over the batch is that over all hidden cells
    quantized: Quantized

    @property
    def total(self) -> Tensor:
        """Return the loss: ()."""
        return self.recon_loss.mean() + self.trans_loss.mean() + self.quantized.loss


def losses(network: TECO, x: Tensor, codes: Tensor, actions: Tensor, draws: Draws) -> Losses:
    """Return the loss of clips: embedded frames (N, T, D, H, W), their codes (N, T, H, W), actions (N, T).

    The terms' means over equal parts of a batch average to those of the whole batch.
    """
    actions = torch.where(draws.unknown.unsqueeze(1), NULL_ACTION, actions)
    cond, z, quantized = network.posterior(x)
    h = network.predict(cond, z, actions)
    h, z = (kept(part, draws).flatten(0, 1) for part in (h, z))  # (N F, E, h, w)
    codes = codes[:, network.n_cond :][:, draws.frames].flatten(0, 1)
    logits = network.decode(h, z).float()
    recon = F.cross_entropy(logits, codes, label_smoothing=SMOOTHING, reduction="none")  # (N F, H, W)
    labels = quantized.codes[:, network.n_cond :][:, draws.frames].flatten(2).flatten(0, 1)  # (N F, cells)
    hidden = draws.hidden.flatten(0, 1)
    logits = network.prior(torch.where(hidden, network.prior.num_codes, labels), h).float()
    entropy = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none") * hidden  # (N F, cells)
    shape = len(x), -1
    recon_loss = recon.flatten(1).sum(1).view(shape).mean(1)
    trans_loss = labels.shape[1] * entropy.sum(1).view(shape).sum(1) / draws.num_hidden
    return Losses(recon_loss, trans_loss, quantized)


def kept(x: Tensor, draws: Draws) -> Tensor:
    """Return the kept frames of (N, T, ...)."""
    found = x[:, draws.frames]
    if draws.detached is None:
        return found
    return torch.where(draws.detached.view(1, -1, *[1] * (x.ndim - 2)), found.detach(), found)

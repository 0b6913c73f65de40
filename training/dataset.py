"""Alias of `training.data.dataset`, its previous import path."""

from training.data.dataset import *  # noqa: F403
from training.data.dataset import ClipDataset as ClipDataset

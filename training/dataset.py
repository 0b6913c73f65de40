"""The former place of `training.data.dataset`, which others import from here."""

from training.data.dataset import *  # noqa: F403
from training.data.dataset import ClipDataset as ClipDataset

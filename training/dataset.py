"""Former names of `training.data.dataset`, for those who import them from here."""

from training.contract import FrameClip as ClipPart
from training.data.dataset import BatchSpec, BatchStream, ClipDataset

__all__ = ["BatchSpec", "BatchStream", "ClipDataset", "ClipPart"]

"""Videos to measure: see `training.data.footage`, which reads them, whatever form they have."""

from training.data.arrays import load_array as load_array
from training.data.footage import Arrays as Arrays
from training.data.footage import Files as Files
from training.data.footage import Videos as Videos
from training.data.footage import is_dataset as is_dataset
from training.data.footage import open_videos as open_videos

"""Utilities that do not import torch: caches and downloads, attribute dictionaries, video pipes."""

from dnnlib.util import EasyDict, make_cache_dir_path

__all__ = ["EasyDict", "make_cache_dir_path"]

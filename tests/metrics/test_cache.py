"""Cached features belong to the dataset's content and to the protocol, not to a path."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np

from metrics import cache


def test_id_is_that_of_the_content(dataset_path: Path, tmp_path: Path):
    size = (16, 24)
    original = cache.dataset_id(dataset_path, size)
    copy = tmp_path / "elsewhere"
    shutil.copytree(dataset_path, copy)
    assert cache.dataset_id(copy, size) == original
    assert cache.dataset_id(copy, (8, 12)) != original
    shard = copy / "0016x0024" / "partition_0000.zip"
    with zipfile.ZipFile(shard) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in members if name.endswith(".jpg"))
    members[name] = members[name][:-3] + bytes([members[name][-3] ^ 1]) + members[name][-2:]
    with zipfile.ZipFile(shard, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    assert cache.dataset_id(copy, size) != original, "one bit of one frame"


def test_features_come_back_bit_for_bit_and_only_for_the_same_description(own_cache: Path):
    features = np.random.RandomState(0).standard_normal((5, 400)).astype(np.float32)
    description = {"dataset": "0123", "num_clips": 5, "seed": 0}
    assert cache.load(description) is None
    file = cache.save(description, features)
    assert own_cache in file.parents
    assert json.loads(file.with_suffix(".json").read_text()) == {"schema": cache.SCHEMA, **description}
    found = cache.load(dict(reversed(description.items())))
    assert found is not None and found.dtype == np.float32
    np.testing.assert_array_equal(found, features)
    assert cache.load({**description, "seed": 1}) is None

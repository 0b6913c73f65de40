"""Cached features are keyed by the contents of the dataset and the protocol, not by a path."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from metrics import cache

ROOT = Path(__file__).parents[2]


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


def test_arrays_come_back_bit_for_bit_and_only_for_the_same_description(own_cache: Path):
    arrays = {"values": np.random.RandomState(0).standard_normal((5, 400)).astype(np.float32), "colours": np.eye(4)}
    description = {"content": "0123", "seed": 0}
    assert cache.load(description) is None
    file = cache.save(description, arrays)
    assert own_cache in file.parents
    assert json.loads(file.with_suffix(".json").read_text()) == {"schema": cache.SCHEMA, **description}
    found = cache.load(dict(reversed(description.items())))
    assert found is not None and found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert cache.load({**description, "seed": 1}) is None


@pytest.mark.parametrize("how", ["empty", "cut", "NUL", "one bit", "a pickle", "other arrays", "a folder"])
def test_a_damaged_file_is_computed_again(how: str, own_cache: Path, capsys: pytest.CaptureFixture[str]):
    description, arrays = {"seed": 0}, {"values": np.zeros((50, 40)), "colours": np.eye(4)}
    file = cache.save(description, arrays)
    data = file.read_bytes()
    file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how == "a pickle":
        np.savez(file, values=np.array([{}], object))
    elif how == "other arrays":
        np.savez(file, other=np.zeros(3))
    else:
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 1
        file.write_bytes({"empty": b"", "cut": data[:-100], "NUL": bytes(len(data)), "one bit": flipped}[how])
    used = []
    assert not cache.restore(description, lambda found: used.append(found["values"]))
    assert not used and f"{file} is damaged" in capsys.readouterr().err
    cache.save(description, arrays)
    assert cache.restore(description, lambda found: used.append(found["values"])) == (how != "a folder")


def test_a_cache_that_cannot_be_written_costs_no_numbers(own_cache: Path, capsys: pytest.CaptureFixture[str]):
    (own_cache / "metrics").write_text("a file where a folder should be")
    with cache.locked({"seed": 0}):
        assert cache.load({"seed": 0}) is None
        cache.save({"seed": 0}, {"values": np.zeros(3)})
    assert "was not stored" in capsys.readouterr().err


def test_only_one_process_holds_the_lock_of_a_description(own_cache: Path):
    """The second waits until the first has stored its arrays, and finds them."""
    script = """
import sys, time, numpy as np
from dnnlib import util
from metrics import cache
util.set_cache_dir(sys.argv[1])
with cache.locked({"seed": 0}):
    found = cache.load({"seed": 0})
    print("found" if found else "computed", flush=True)
    if not found:
        time.sleep(0.5)
        cache.save({"seed": 0}, {"values": np.zeros(3)})
"""
    command = [sys.executable, "-c", script, str(own_cache)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    assert sorted(process.communicate(timeout=60)[0].strip() for process in both) == ["computed", "found"]

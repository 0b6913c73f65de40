"""Checkpoints of flax are read as values."""

import base64
import re

import numpy as np
import pytest

from tests import golden_files
from torch_utils import flax_file
from torch_utils.safe_archive import load_pickle


@golden_files.entries("teco", "checkpoint_files*")
def test_a_file_of_flax(entry, golden, tmp_path):
    tree = flax_file.loads(base64.b64decode(entry["checkpoint_base64"]))
    text = entry["contents"]
    step = re.match(r"step (\d+)", text)
    assert step is not None and tree["step"] == int(step[1])
    assert tree["params"].keys() == {"z_unproj", "sos"} and tree["opt_state"].keys() == {"0", "1", "2"}
    kernel, table = golden_files.draws(text)
    np.testing.assert_array_equal(tree["params"]["z_unproj"]["kernel"], kernel.astype(np.float32))
    np.testing.assert_array_equal(tree["model_state"]["stats"]["quantize"]["embeddings"], table.astype(np.float32))
    np.testing.assert_array_equal(tree["params"]["sos"], np.arange(4).reshape(2, 2))
    assert tree["params"]["sos"].dtype == np.float32 and tree["opt_state"]["2"]["count"] == int(step[1])
    chunked = flax_file.loads(base64.b64decode(entry["chunked_base64"]))
    np.testing.assert_array_equal(chunked["params"]["w"], np.arange(10, dtype=np.float32).reshape(2, 5))
    path = tmp_path / "args"
    path.write_bytes(base64.b64decode(entry["args_pickle_base64"]))
    assert load_pickle(path).attributes() == entry["args_contents"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x01\x02",
        b"\xdd\xff\xff\xff\xff",
        b"\xa5abc",
        b"\x91" * 200,
        b"\x81\x90\x01",
        b"\xd4\x05\x00",
        b"\xc7\x09\x01\x93\x91\x09\xa1\x4f\xc4\x01\x00",
        b"\xa1\xff",
    ],
)
def test_damaged_files_are_refused(data, tmp_path):
    path = tmp_path / "checkpoint_1"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checkpoint_1 is damaged"):
        flax_file.load(path)

"""Weights are taken as data: hashes are checked, foreign pickles refused, and what is missing is said."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from dnnlib import util
from metrics.detectors import registry


def crc32c_bit_by_bit(data: bytes) -> int:
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = (remainder >> 1) ^ (0x82F63B78 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF


def test_crc32c_gives_the_values_of_rfc_3720():
    assert registry.crc32c(b"123456789") == 0xE3069283
    assert registry.crc32c(bytes(32)) == 0x8A9136AA
    assert registry.crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize("num_bytes", [0, 1, 2, 63, 64, 129, 1000, 4097])
def test_crc32c_of_any_length_equals_the_definition(num_bytes: int):
    data = np.random.RandomState(num_bytes).bytes(num_bytes)
    assert registry.crc32c(data) == crc32c_bit_by_bit(data)


def test_arrays_are_read_and_any_other_global_is_refused(tmp_path: Path):
    tree = {"a": {"b": np.arange(6.0).reshape(2, 3)}}
    good, bad = tmp_path / "good.ckpt", tmp_path / "bad.ckpt"
    good.write_bytes(pickle.dumps(tree))
    np.testing.assert_array_equal(registry.load_arrays(good)["a"]["b"], tree["a"]["b"])
    marker = tmp_path / "executed"
    bad.write_bytes(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    with pytest.raises(ValueError, match=r"os\.system, which is refused"):
        registry.load_arrays(bad)
    assert not marker.exists()


def test_missing_or_damaged_weights_name_the_command_that_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(util, "_cache_dir", str(tmp_path))
    remedy = "python -m metrics.detectors.registry fetch i3d-kinetics-400"
    with pytest.raises(ValueError, match=remedy):
        registry.path("i3d-kinetics-400")
    (tmp_path / "detectors").mkdir()
    (tmp_path / "detectors" / "i3d-kinetics-400.ckpt").write_bytes(b"other bytes")
    with pytest.raises(ValueError, match=f"expected af5c50f0.*{remedy}"):
        registry.path("i3d-kinetics-400")


def test_unknown_detector_is_refused():
    with pytest.raises(ValueError, match="Unknown detector 'i3d'; known are i3d-kinetics-400"):
        registry.fetch("i3d")

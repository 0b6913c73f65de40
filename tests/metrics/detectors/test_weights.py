"""Weights are read as data: other pickles and code are rejected, and tensors that do not fit are named."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from metrics.detectors import weights


def crc32c_bit_by_bit(data: bytes) -> int:
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = (remainder >> 1) ^ (0x82F63B78 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF


class Command:
    """Pickles as a call that leaves a trace."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_crc32c_gives_the_values_of_rfc_3720():
    assert weights.crc32c(b"123456789") == 0xE3069283
    assert weights.crc32c(bytes(32)) == 0x8A9136AA
    assert weights.crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize("num_bytes", [0, 1, 2, 63, 64, 129, 1000, 4097])
def test_crc32c_of_any_length_equals_the_definition(num_bytes: int):
    data = np.random.RandomState(num_bytes).bytes(num_bytes)
    assert weights.crc32c(data) == crc32c_bit_by_bit(data)


def test_arrays_are_read_and_any_other_global_is_refused(tmp_path: Path):
    tree = {"a": {"b": np.arange(6.0).reshape(2, 3)}}
    good, bad = tmp_path / "good.ckpt", tmp_path / "bad.ckpt"
    good.write_bytes(pickle.dumps(tree))
    np.testing.assert_array_equal(weights.load_arrays(good)["a/b"], tree["a"]["b"])
    marker = tmp_path / "executed"
    bad.write_bytes(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    with pytest.raises(ValueError, match=r"os\.system, which is refused"):
        weights.load_arrays(bad)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x01\x85R.", "asks for builtins.bytearray"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "holds other things than numpy arrays"),
        (b"\x80\x02]q\x00h\x00a.", "RecursionError"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of git-lfs"),
        (b"<html>", "is a web page"),
        (b"", "it is empty"),
    ],
)
def test_other_files_are_one_sentence(data: bytes, message: str, tmp_path: Path):
    (tmp_path / "w.ckpt").write_bytes(data)
    with pytest.raises(ValueError, match=rf"w.ckpt .*{message}"):
        weights.load_arrays(tmp_path / "w.ckpt")


def test_arrays_without_values_take_no_memory(tmp_path: Path):
    make = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\x00\x00\x00\x60\x85U\x02f8\x87R"
    (tmp_path / "w.ckpt").write_bytes(b"\x80\x02}U\x01a" + make + b"s.")
    assert weights.load_arrays(tmp_path / "w.ckpt")["a"].size == 0


@pytest.mark.parametrize("is_zip", [True, False])
def test_state_dicts_are_read_as_tensors_alone(tmp_path: Path, is_zip: bool):
    good, bad, marker = tmp_path / "good.pth", tmp_path / "bad.pth", tmp_path / "executed"
    state = {"bn.weight": torch.arange(3.0), "bn.num_batches_tracked": torch.tensor(7)}
    torch.save(state, good, _use_new_zipfile_serialization=is_zip)
    torch.save({"a": Command(marker)}, bad, _use_new_zipfile_serialization=is_zip)
    assert weights.container(good) == "state_dict"
    read = weights.load_state_dict(good)
    assert list(read) == ["bn.weight"] and torch.equal(read["bn.weight"], state["bn.weight"])
    with pytest.raises(ValueError, match=r"bad.pth cannot be read as tensors alone"):
        weights.load_state_dict(bad)
    assert not marker.exists()
    torch.save({"epoch": 3}, good)
    with pytest.raises(ValueError, match="save the state dict of the network alone"):
        weights.load_state_dict(good)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_code_is_opened_only_if_its_hash_is_known(tmp_path: Path):
    file = tmp_path / "network.pt"
    torch.jit.script(nn.ReLU()).save(str(file))
    assert weights.container(file) == "torchscript"
    found = weights.file_sha256(file)
    opened = weights.load_script(file, ["0" * 64, found], "")
    assert opened(torch.tensor([-1.0, 2.0])).tolist() == [0, 2]
    with pytest.raises(ValueError, match=f"is code, and has sha256 {found}, expected 000000.*; do this"):
        weights.load_script(file, ["0" * 64], "do this")
    with pytest.raises(ValueError, match="is not a PyTorch state dict"):
        weights.load_state_dict(file)


def test_tensors_that_do_not_fit_are_named():
    net, good = nn.Linear(2, 3), {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    weights.fill(net, good, Path("w.pth"))
    assert torch.equal(net.weight, good["weight"])
    for wrong, message in (
        ({"weight": good["weight"]}, r"no such tensor for bias, but Linear has \(3,\)"),
        (good | {"more": torch.ones(1)}, r"\(1,\) for more, but Linear has no such tensor"),
        (good | {"weight": torch.ones(3, 3)}, r"w.pth has \(3, 3\) for weight, but Linear has \(3, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.fill(net, wrong, Path("w.pth"))

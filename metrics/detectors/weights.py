"""Read the weights of detectors as data: numpy pickles, PyTorch state dicts, and TorchScript behind a known hash.

Nothing here executes what a file contains, with one exception: TorchScript is code, so it is opened only if its
sha256 is one that the caller accepts.
"""

import functools
import pickle
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct as numpy_reconstruct
from torch import Tensor, nn

from dnnlib.download import file_sha256

LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # the first object of a PyTorch file before 1.6


def container(file: Path) -> str:
    """What a file of weights is: "torchscript", "state_dict" (any file of `torch.save`) or "arrays" (other pickles)."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as members:
            return "torchscript" if any("/code/" in name for name in members.namelist()) else "state_dict"
    with open(file, "rb") as stream:
        return "state_dict" if LEGACY_MAGIC in stream.read(32) else "arrays"


def load_arrays(file: Path) -> dict[str, np.ndarray]:
    """Read a pickle of nested dicts of numpy arrays, the levels joined by slashes.

    Any other content raises `ValueError` and is never executed.
    """
    with open(file, "rb") as stream:
        try:
            return dict(_flatten(_ArrayUnpickler(stream).load()))
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{file} is not a plain pickle of numpy arrays: {error}") from error


def load_state_dict(file: Path) -> dict[str, Tensor]:
    """Read a file of `torch.save` that holds named tensors; any other content raises `ValueError` and is not executed.

    The counters of batches that batch normalisation keeps for training are left out.
    """
    if container(file) != "state_dict":
        raise ValueError(f"{file} is not a PyTorch state dict; give the file that `torch.save` wrote")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} cannot be read as tensors alone, which is all that is accepted: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds other things than named tensors; save the state dict of the network alone")
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def load_script(file: Path, accepted: Collection[str], remedy: str) -> torch.jit.ScriptModule:
    """Open a TorchScript whose sha256 is in `accepted`; any other raises `ValueError`, ending in the `remedy`."""
    found = file_sha256(file)
    if found not in accepted:
        expected = f", expected {' or '.join(accepted)}" if accepted else ""
        raise ValueError(f"{file} is TorchScript, which is code, and has sha256 {found}{expected}; {remedy}")
    return torch.jit.load(file, map_location="cpu").eval()


def fill(net: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Load `state` into `net`; `ValueError` naming a tensor that is missing, superfluous, or of another shape."""
    expected = {name: tensor.shape for name, tensor in net.state_dict().items() if "num_batches_tracked" not in name}
    for name in sorted(expected.keys() | state.keys()):
        wanted, found = expected.get(name), state[name].shape if name in state else None
        if wanted != found:
            said = [tuple(shape) if shape is not None else "no such tensor" for shape in (found, wanted)]
            raise ValueError(
                f"{file} has {said[0]} for {name}, but {type(net).__name__} has {said[1]}: give the weights of this "
                "very network"
            )
    net.load_state_dict(state, strict=False)


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli, RFC 3720 appendix B.4) of `data`, fast enough for tens of megabytes.

    A CRC is linear over GF(2), so the data is cut into equal lanes that numpy advances together, two bytes a step,
    and the lanes' remainders are then folded pairwise. Zeros in front of the data leave a zero remainder as it is,
    which makes any length fit.
    """
    num_bytes = len(data)
    num_lanes = 1 << max(0, min(14, (num_bytes // 64).bit_length()))
    lane_bytes = 2 * -(-num_bytes // (2 * num_lanes))
    padded = np.zeros(num_lanes * lane_bytes, np.uint8)
    padded[padded.size - num_bytes :] = np.frombuffer(data, np.uint8)
    words = np.ascontiguousarray(padded.view("<u2").reshape(num_lanes, -1).T)
    table = _crc_table()
    remainders = np.zeros(num_lanes, np.uint32)
    for word in words:
        remainders = table[(remainders ^ word) & 0xFFFF] ^ (remainders >> np.uint32(16))
    shift = _append_zeros(lane_bytes)
    while remainders.size > 1:
        remainders = _apply(shift, remainders[0::2]) ^ remainders[1::2]
        shift = _apply(shift, shift)
    start = _apply(_append_zeros(num_bytes), np.array([0xFFFFFFFF], np.uint32))
    return int(remainders[0] ^ start[0]) ^ 0xFFFFFFFF


class _ArrayUnpickler(pickle.Unpickler):
    """Admits the three names a pickled numpy array is made of, and nothing else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): numpy_reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): numpy_reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module_name, global_name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which is refused")
        return allowed[module_name, global_name]


def _flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


# ----------------------------------------------------------------------------------------------------------------------
# CRC arithmetic. An operator on remainders is a 32x32 matrix over GF(2), kept as its 32 columns, uint32 each.


@functools.cache
def _crc_table() -> np.ndarray:
    """The remainder after 16 bits, for every value of them: uint32 (65536,)."""
    table = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(16):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1).astype(np.uint32)
    return table


def _apply(columns: np.ndarray, remainders: np.ndarray) -> np.ndarray:
    result = np.zeros_like(remainders)
    for bit in range(32):
        result ^= np.where((remainders >> np.uint32(bit)) & 1, columns[bit], np.uint32(0))
    return result


@functools.cache
def _append_zeros(num_bytes: int) -> np.ndarray:
    """The operator that appends `num_bytes` zero bytes, by repeated squaring of the one that appends one bit."""
    square = np.concatenate([[0x82F63B78], 1 << np.arange(31)]).astype(np.uint32)
    result = (1 << np.arange(32)).astype(np.uint32)
    num_bits = 8 * num_bytes
    while num_bits:
        if num_bits & 1:
            result = _apply(square, result)
        square = _apply(square, square)
        num_bits >>= 1
    return result

"""Read the weights of detectors as data: NumPy pickles, PyTorch state dicts, and TorchScript with a known hash.

Nothing here executes the contents of a file, with one exception: TorchScript is code, so it is loaded only if its
SHA-256 is one that the caller accepts.
"""

import functools
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dnnlib.download import file_sha256
from dnnlib.file_kinds import explain_kind
from torch_utils import safe_pickle, torch_file

LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # the first object of a PyTorch file before 1.6


def container(file: Path) -> str:
    """Return the format of a file of weights: "torchscript", "state_dict" (any file of `torch.save`) or "arrays"
    (pickles).
    """
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
            arrays = dict(_flatten(safe_pickle.load_arrays(stream)))
        except (ValueError, AttributeError) as error:
            other = explain_kind(file, "weights")
            reason = f"it {other}" if other else error
            raise ValueError(f"{file} is not a plain pickle of numpy arrays: {reason}") from error
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise ValueError(f"{file} holds other things than numpy arrays; give the weights as they were published")
    return arrays


def load_state_dict(file: Path) -> dict[str, Tensor]:
    """Read a file of `torch.save` that holds named tensors; raise `ValueError` for other contents, without executing
    them.

    The batch counters of batch normalisation are skipped.
    """
    if container(file) != "state_dict":
        raise ValueError(f"{file} is not a PyTorch state dict; give the file that `torch.save` wrote")
    try:
        state = torch_file.load(file)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as tensors alone, which is all that is accepted: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds other things than named tensors; save the state dict of the network alone")
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def load_script(file: Path, accepted: Collection[str], remedy: str) -> torch.jit.ScriptModule:
    """Load a TorchScript whose SHA-256 is in `accepted`; raise `ValueError`, ending in the `remedy`, for any other."""
    found = file_sha256(file)
    if found not in accepted:
        expected = f", expected {' or '.join(accepted)}" if accepted else ""
        raise ValueError(f"{file} is TorchScript, which is code, and has sha256 {found}{expected}; {remedy}")
    return torch.jit.load(file, map_location="cpu").eval()


def fill(net: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Load `state` into `net`; raise `ValueError` naming a tensor that is missing, unexpected, or of another shape."""
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
    """Return the CRC-32C (Castagnoli, RFC 3720 appendix B.4) of `data`, fast enough for tens of megabytes.

    A CRC is linear over GF(2), so the data is split into equal lanes that NumPy advances together, two bytes per step,
    and the lanes' remainders are then combined pairwise. Leading zeros leave a zero remainder unchanged, which allows
    any length.
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


def _flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


# ----------------------------------------------------------------------------------------------------------------------
# CRC arithmetic. An operator on remainders is a 32x32 matrix over GF(2), stored as its 32 columns, uint32 each.


@functools.cache
def _crc_table() -> np.ndarray:
    """Return the remainder after 16 bits, for every value of them: uint32 (65536,)."""
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
    """Return the operator that appends `num_bytes` zero bytes, by repeated squaring of the one that appends one bit."""
    square = np.concatenate([[0x82F63B78], 1 << np.arange(31)]).astype(np.uint32)
    result = (1 << np.arange(32)).astype(np.uint32)
    num_bits = 8 * num_bytes
    while num_bits:
        if num_bits & 1:
            result = _apply(square, result)
        square = _apply(square, square)
        num_bits >>= 1
    return result

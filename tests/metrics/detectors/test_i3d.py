"""I3D is the published network: its tensors, its values, and the inputs that it rejects."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metrics.detectors import i3d, registry
from metrics.frechet import frechet_distance


@pytest.fixture(scope="module")
def net() -> i3d.I3D:
    return i3d.load()


def test_tensors_have_the_published_names_shapes_and_count():
    published = i3d.published_tensors()
    state = i3d.I3D().state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == 12_704_544
    assert {i3d.name_in_tensorflow(name) for name in state} == set(published)
    for name, tensor in state.items():
        shape = published[i3d.name_in_tensorflow(name)]["shape"]
        if tensor.ndim == 5:
            assert [*tensor.shape[2:], tensor.shape[1], tensor.shape[0]] == shape, name
        else:
            assert tensor.numel() == np.prod(shape) and shape[-1] == len(tensor), name


def test_loaded_weights_are_the_original_ones_and_a_single_changed_bit_is_seen(net: i3d.I3D):
    assert i3d.fingerprint(net) == "verified"
    changed = i3d.I3D()
    changed.load_state_dict(net.state_dict())
    changed.get_parameter("Conv3d_1a_7x7.beta").view(torch.int32)[3] ^= 1
    assert i3d.fingerprint(changed) == "unverified"


# T = 30 is the value of the published TensorFlow graph, 151.39244; its other lengths come from an independent native
# port. A batch-norm epsilon of 1e-5 instead of 1e-3 would give 151.759. Clips of one colour are all alike, so one clip
# has the mean and the (zero) covariance of any number of them.
@pytest.mark.parametrize(("num_frames", "expected", "tolerance"), [(10, 569.771, 2e-3), (30, 151.39244, 1e-3)])
def test_distance_of_black_from_white_is_the_published_one(net, num_frames: int, expected: float, tolerance: float):
    black = net.features(torch.zeros(1, 3, num_frames, 64, 64, dtype=torch.uint8))
    white = net.features(torch.full((1, 3, num_frames, 64, 64), 255, dtype=torch.uint8))
    still = torch.zeros(400, 400)
    assert frechet_distance(black[0], still, white[0], still) == pytest.approx(expected, abs=tolerance)


@pytest.mark.slow
def test_distance_of_noise_from_noise_is_the_published_one(net: i3d.I3D):
    """128 + 128 clips of 16 frames of noise in [0, 1], fed as they are; TensorFlow gives 10.13809."""
    moments = []
    for seed in (1, 2):
        rng = np.random.RandomState(seed)
        rows = [
            net.features(torch.from_numpy(rng.random_sample((1, 16, 224, 224, 3))).float().permute(0, 4, 1, 2, 3))
            for _ in range(128)
        ]
        features = torch.cat(rows).double().numpy()
        moments += [features.mean(0), np.cov(features.T)]
    assert frechet_distance(*moments) == pytest.approx(10.13809, abs=2e-4)


def test_frames_are_stretched_with_half_pixel_centres_and_bytes_are_scaled(net: i3d.I3D):
    """The edges of a two-pixel image hold its values, the middle runs between them in a straight line."""
    image = torch.tensor([[0, 255], [0, 255]], dtype=torch.uint8).expand(1, 3, 9, 2, 2)
    ramp = ((torch.arange(224) + 0.5) / 112 - 0.5).clamp(0, 1) * 2 - 1
    expected = net(ramp.expand(1, 3, 9, 224, 224))
    torch.testing.assert_close(net.features(image), expected, rtol=0, atol=1e-4)


def test_pooling_never_sees_its_padding():
    x = -torch.rand(1, 2, 5, 6, 7) - 1
    found = i3d._max_pool(x, (3, 3, 3), (2, 2, 2))
    # SAME: 5 and 7 are odd, one before and one after; 6 is even, one after only.
    padded = F.pad(x, (1, 1, 0, 1, 1, 1), value=-1e9)
    torch.testing.assert_close(found, F.max_pool3d(padded, 3, 2), rtol=0, atol=0)


def test_too_few_frames_are_refused(net: i3d.I3D):
    with pytest.raises(ValueError, match="at least 9 frames and got 8"):
        net.features(torch.zeros(1, 3, 8, 16, 16, dtype=torch.uint8))


# ----------------------------------------------------------------------------------------------------------------------
# The same network from other files.

SHORT = {"Conv3d_0a_1x1": "a", "Conv3d_0b_3x3": "b", "Conv3d_0b_1x1": "b"}
LEAVES = {
    "beta": "bn.bias",
    "moving_mean": "bn.running_mean",
    "moving_variance": "bn.running_var",
    "bias": "conv3d.bias",
    "weight": "conv3d.weight",
}


def as_videogpt(net: i3d.I3D) -> dict[str, torch.Tensor]:
    """Return the tensors with the names of `i3d_pretrained_400.pt`, and the scales of one that it carries."""
    state = {}
    for name, tensor in net.state_dict().items():
        *stem, leaf = name.split(".")
        if stem[0] == "Logits":
            stem = ["logits"]
        elif len(stem) == 3:
            branch = stem[1].removeprefix("Branch_")
            stem = [stem[0], f"b{branch}{SHORT[stem[2]] if branch != '0' else ''}"]
        state[".".join([*stem, LEAVES[leaf]])] = tensor
        if leaf == "beta":
            state[".".join([*stem, "bn.weight"])] = torch.ones_like(tensor)
            state[".".join([*stem, "bn.num_batches_tracked"])] = torch.tensor(0)
    return state


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return torch.randint(256, (1, 3, 9, 20, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_state_dict_of_videogpt_gives_the_same_logits(net: i3d.I3D, clips: torch.Tensor, tmp_path: Path):
    state = as_videogpt(net)
    assert {"Mixed_5b.b2b.conv3d.weight", "Mixed_3c.b3b.bn.running_var", "Mixed_4f.b0.bn.weight"} <= set(state)
    torch.save(state, tmp_path / "i3d_pretrained_400.pt")
    other = i3d.load("cpu", tmp_path / "i3d_pretrained_400.pt")
    assert other.identity["verified"]
    assert registry.describe(other.identity).startswith("i3d-kinetics-400 (verified, sha256 ")
    assert torch.equal(other.features(clips), net.features(clips))


def test_another_network_of_the_same_shape_is_reported_unverified(net: i3d.I3D, tmp_path: Path):
    file = tmp_path / "rgb_imagenet.pt"
    state = as_videogpt(net)
    state["Mixed_4c.b1b.conv3d.weight"] = state["Mixed_4c.b1b.conv3d.weight"] * 1.001
    torch.save(state, file)
    other = i3d.load("cpu", file)
    assert not other.identity["verified"] and "UNVERIFIED" in registry.describe(other.identity)
    torch.save(state | {"Conv3d_1a_7x7.bn.weight": torch.full((64,), 0.5)}, file)
    with pytest.raises(ValueError, match="scales in Conv3d_1a_7x7.bn.weight, which the I3D of FVD does not"):
        i3d.load("cpu", file)
    torch.save({name: tensor for name, tensor in state.items() if "Mixed_5c" not in name}, file)
    with pytest.raises(ValueError, match="has no such tensor for Mixed_5c"):
        i3d.load("cpu", file)


class Published(nn.Module):
    """The call of the TorchScript that other projects fetch; it would scale and resize where it is told to."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net: Any = torch.jit.trace(net, torch.zeros(1, 3, 9, 224, 224), check_trace=False)

    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False):
        assert return_features and not rescale and not resize
        return self.net(x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_torchscript_gives_the_same_logits_and_other_code_is_refused(
    net: i3d.I3D, clips: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(Published(net)).save(str(file))
    with pytest.raises(ValueError, match="is code, and has sha256 .*, expected bec6519f.*registry fetch"):
        i3d.load_any("cpu", file)
    monkeypatch.setattr(i3d, "SCRIPT_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    opened = i3d.load_any("cpu", file)
    assert isinstance(opened, i3d.ScriptedI3D) and opened.identity["verified"]
    torch.testing.assert_close(opened.features(clips), net.features(clips), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="at least 9 frames"):
        opened.features(clips[:, :, :8])

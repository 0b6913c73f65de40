"""I3D is the published network: its tensors, its numbers, and what it refuses."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from metrics.detectors import i3d
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

"""What only a GPU can tell: `pytest -m gpu` on a machine that has one."""

import pytest
import torch

from metrics.detectors import i3d
from training import registry
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.presets import STAGES
from training.longvideogan.sampling import make_source
from training.longvideogan.sres.generator import SuperResGenerator

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def full_precision():
    """TF32 off, as in training and metrics."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def toy(stage):
    return STAGES[stage]["toy"]["model"]["generator"]


def test_low_resolution_frames_are_those_of_the_cpu():
    torch.manual_seed(0)
    network = LowResGenerator(18, 32, **toy("longvideogan-lres")).requires_grad_(False)
    expected = torch.cat(list(make_source(network).frames([1, 2], 3, 70)), dim=2)
    found = torch.cat(list(make_source(network.cuda()).frames([1, 2], 3, 70)), dim=2).cpu()
    assert (found - expected).abs().max() <= 1e-4


def test_super_resolution_frames_are_those_of_the_cpu_and_nearly_so_in_half_precision(seeded_pair):
    network, lres, z = seeded_pair
    expected = network(lres, z)
    network.cuda()
    full = network(lres.cuda(), z.cuda(), force_fp32=True).cpu()
    half = network(lres.cuda(), z.cuda()).cpu()
    assert (full - expected).abs().max() <= 1e-4
    assert 0 < (half - expected).abs().max() <= 0.02


@pytest.fixture
def seeded_pair():
    torch.manual_seed(0)
    network = SuperResGenerator(72, 128, 18, 32, **toy("longvideogan-sres")).requires_grad_(False)
    return network, torch.randn(2, 3, 12, 18, 32) * 0.5, torch.randn(2, network.z_channels)


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_step_trains_on_a_gpu_as_on_a_cpu(stage):
    row = STAGES[stage]["toy"]
    model = {**row["model"], "batch": 2, "grad_accum": 1}
    losses = []
    for device in ("cpu", "cuda"):
        system = registry.resolve(registry.SYSTEMS[stage])(model, device)
        rng = torch.Generator().manual_seed(0)
        batches = (
            {
                part.name: torch.rand(2, 3, part.num_frames, part.height, part.width, generator=rng).to(device) * 2 - 1
                for part in spec.parts
            }
            for spec in system.batch_spec(0)
        )
        losses.append({name: value.float().mean().item() for name, value in system.step(batches, 0).items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-2, abs=1e-2)


def test_detector_is_the_same_on_a_gpu():
    video = torch.randint(0, 256, (2, 3, 16, 72, 128), dtype=torch.uint8)
    expected = i3d.load("cpu").features(video)
    found = i3d.load("cuda").features(video.cuda()).cpu()
    assert torch.allclose(found, expected, atol=1e-3)

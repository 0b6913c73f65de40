"""Tests that need a GPU: `pytest -m gpu`."""

import pytest
import torch

from metrics.detectors import i3d
from tests.training.longvideogan.tiny import make_sampler, video
from torch_utils import precision, training_stats
from training import registry
from training.contract import Run
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.presets import STAGES
from training.longvideogan.sres.generator import SuperResGenerator
from training.status import Clock

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def full_precision():
    """TF32 off, as in training and metrics."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def toy(stage):
    return STAGES[stage]["toy"]["model"]["generator"]


def test_low_resolution_frames_are_those_of_the_cpu():
    torch.manual_seed(0)
    network = LowResGenerator(18, 32, **toy("longvideogan-lres")).requires_grad_(False)
    expected = video(make_sampler(network), [1, 2], 3, 70)
    found = video(make_sampler(network.cuda()), [1, 2], 3, 70).cpu()
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


@pytest.mark.parametrize(("name", "limit"), [("tf32", 0.01), ("bf16", 0.04)])
def test_frames_in_other_precisions_are_close(seeded_pair, name, limit):
    if precision.why_not(name, "cuda"):
        pytest.skip("this GPU has no such precision")
    sres, lres_video, z = seeded_pair
    lres = LowResGenerator(18, 32, **toy("longvideogan-lres")).requires_grad_(False).cuda()
    noise = torch.randn(1, lres.noise_channels, lres.num_noise_frames(32)).cuda()
    sres, inputs = sres.cuda(), (lres_video.cuda(), z.cuda())
    precision.set_precision([lres, sres], "fp32")
    expected = [lres.synthesize(noise, 32), sres(*inputs)]
    precision.set_precision([lres, sres], name)
    with precision.tf32(name == "tf32"):
        found = [lres.synthesize(noise, 32), sres(*inputs)]
    for ours, full in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and 0 < (ours - full).norm() / full.norm() < limit


def make_system(stage, device, batch, grad_accum=1, **changes):
    """Return a stage at the size of its preset toy."""
    cls = registry.resolve(registry.spec(stage).system)
    run = Run(torch.device(device), batch, grad_accum)
    return cls(cls.Options(**{**STAGES[stage]["toy"]["model"], **changes}), run)


@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize("name", ["tf32", "fp16", "bf16"])
def test_a_step_in_another_precision_goes_the_same_way(stage, name):
    if precision.why_not(name, "cuda") or (stage, name) == ("longvideogan-lres", "fp16"):
        pytest.skip("there is no such precision here")
    losses = []
    for chosen in ("fp32", name):
        system = make_system(stage, "cuda", batch=2)
        system.set_precision(chosen)
        rng = torch.Generator().manual_seed(0)
        batches = (
            {
                part.name: (torch.rand(2, 3, part.count, part.height, part.width, generator=rng) * 2 - 1).cuda()
                for part in spec.parts
            }
            for spec in system.batch_spec(0)
        )
        losses.append({key: value.float().mean().item() for key, value in system.step(batches, 0).items()})
    for key in ("loss/G_loss", "loss/D_loss", "loss/r1_penalty"):
        assert losses[1][key] == pytest.approx(losses[0][key], rel=0.1, abs=1e-3)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_step_trains_on_a_gpu_as_on_a_cpu(stage, compiles):
    losses = []
    for device in ("cpu", "cuda"):
        system = make_system(stage, device, batch=2)
        system.set_compile(compiles and device == "cuda")
        rng = torch.Generator().manual_seed(0)
        batches = (
            {
                part.name: torch.rand(2, 3, part.count, part.height, part.width, generator=rng).to(device) * 2 - 1
                for part in spec.parts
            }
            for spec in system.batch_spec(0)
        )
        losses.append({name: value.float().mean().item() for name, value in system.step(batches, 0).items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_step_never_waits_for_the_gpu(stage):
    """All but the adaptation of the augmentation, which is not due here; the first step may build kernels."""
    changes = {"r1_interval": 1}
    if stage == "longvideogan-sres":
        changes["ada_interval"] = 99
    system = make_system(stage, "cuda", batch=2, grad_accum=2, **changes)
    batches = [
        {part.name: torch.zeros(2, 3, part.count, part.height, part.width, device="cuda") for part in spec.parts}
        for spec in system.batch_spec(0)
    ]
    system.step(iter(batches), 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, value in system.step(iter(batches), 1).items():
            training_stats.report(f"gpu/{name}", value)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_for_the_gpu_counts_as_training():
    clock = Clock(past_sec=0.0, clean_step=0)
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        x = x @ x * 1e-3
    assert not torch.cuda.current_stream().query()
    clock.settle(x.device)
    assert torch.cuda.current_stream().query() and clock.train_sec > 0


def test_detector_is_the_same_on_a_gpu():
    video = torch.randint(0, 256, (2, 3, 16, 72, 128), dtype=torch.uint8)
    expected = i3d.load("cpu").features(video)
    found = i3d.load("cuda").features(video.cuda()).cpu()
    assert torch.allclose(found, expected, atol=1e-3)

"""Half precision is used only where requested, and its effect is bounded.

A CPU without bfloat16 emulates it exactly but slowly, so that all of this runs on any machine.
"""

import pytest
import torch

from metrics.detectors import i3d
from metrics.frechet import frechet_distance_from_features
from tests.training.longvideogan import tiny
from torch_utils import precision
from training.checkpoint import load_network, save_network
from training.longvideogan.layers import MixedPrecision
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.presets import LRES
from training.longvideogan.sres.generator import SuperResGenerator
from training.network_file import ModelPath
from training.sampling import Request, open_sampler, quantize


def halves(network):
    """Return the half precision of each layer that has one."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, MixedPrecision)}
    return {name.removeprefix("SG3.synthesis."): layer.half for name, layer in layers.items() if layer.half}


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def test_what_a_cpu_lacks_is_refused_in_one_sentence():
    assert precision.why_not("fp32", "cpu") is None
    for name in ("fp16", "tf32"):
        assert precision.why_not(name, "cpu") == "is for CUDA, and this is cpu; use fp32"
    reason = "is slower than fp32 on this CPU, which has no instructions for it; use fp32"
    assert precision.why_not("bf16", "cpu") == (None if precision.cpu_has_bf16() else reason)
    assert "for CUDA and for CPUs" in str(precision.why_not("bf16", "mps"))


def test_published_layers_are_halved_and_no_others():
    generator = SuperResGenerator(channel_max=8)
    published = dict.fromkeys(generator.SG3.synthesis.layer_names[3:], "fp16")
    assert halves(generator) == published
    precision.set_precision([generator], "bf16")
    assert halves(generator) == dict.fromkeys(list(published)[:-1], "bf16")  # not the colours
    precision.set_precision([generator], "fp32")
    assert halves(generator) == {}
    precision.set_precision([generator], "fp16")
    assert halves(generator) == published

    system = tiny.make("longvideogan-sres")
    assert set(halves(system.D).values()) == {"fp16"} and "b4" not in halves(system.D)
    lres = tiny.make("longvideogan-lres")
    assert halves(lres.G) == halves(lres.D) == {}
    precision.set_precision([lres.G, lres.D], "bf16")
    assert len(halves(lres.G)) == len(lres.G.temporal_layers) + len(lres.G.spatial_layers)
    assert list(halves(lres.D)) == [f"blocks.{index}" for index in range(4)]
    with pytest.raises(ValueError, match="precision fp16 suits none of these networks; use bf16 or fp32"):
        precision.set_precision([lres.G], "fp16")
    precision.set_precision([lres.G, generator], "fp16")  # one of them will do
    assert halves(lres.G) == {} and halves(generator) == published


def test_half_precision_of_cuda_never_lands_on_a_cpu(seeded):
    system = tiny.make("longvideogan-sres", dtype=torch.float32)
    assert halves(system.D) and halves(system.G)
    dtypes = set()
    for module in [*system.D.modules(), *system.G.modules()]:
        module.register_forward_hook(lambda _module, _args, output: dtypes.add(output.dtype))
    clips = {"video": seeded(0, 2, 3, 2, 36, 64), "lres": seeded(1, 2, 3, 4, 18, 32)}
    logits = system.logits(clips, system.run.rngs("G", 0)[:2])
    system.fakes(clips, system.run.rngs("G", 0)[:2])
    assert logits.dtype == torch.float32 and dtypes == {torch.float32}


@pytest.mark.parametrize("format", ["pkl", "safetensors"])
def test_precision_is_no_part_of_a_file(tiny_sres, seeded, tmp_path, format):
    precision.set_precision([tiny_sres], "bf16")
    save_network(tiny_sres, tmp_path / f"sres.{format}")
    network = load_network(str(tmp_path / f"sres.{format}"), "cpu")
    assert isinstance(network, SuperResGenerator) and set(halves(network).values()) <= {"fp16"}
    precision.set_precision([tiny_sres], "fp32")
    inputs = seeded(0, 1, 3, 9, 18, 32), seeded(1, 1, 16)
    assert torch.equal(network(*inputs), tiny_sres(*inputs))


@pytest.fixture
def lres():
    """Return the toy network, whose values are of the size of a trained one's."""
    torch.manual_seed(0)
    network = LowResGenerator(18, 32, **LRES["toy"]["model"]["generator"]).eval().requires_grad_(False)
    noise = torch.randn(1, network.noise_channels, network.num_noise_frames(16))
    network.synthesize(noise, 16, magnitude_ema_beta=0.0)
    return network


def test_low_resolution_frames_in_bf16_are_close(lres):
    frames = []
    for name in ("fp32", "bf16"):
        precision.set_precision([lres], name)
        frames.append(tiny.video(tiny.make_sampler(lres), [1], 0, 20))
    noise = torch.randn(1, lres.noise_channels, lres.num_noise_frames(16), generator=torch.Generator().manual_seed(0))
    halved = lres.synthesize(noise, 16)
    precision.set_precision([lres], "fp32")
    assert 1e-4 < relative(halved, lres.synthesize(noise, 16)) < 0.04
    assert frames[1].dtype == torch.float32 and 1e-4 < relative(frames[1], frames[0]) < 0.04
    levels = (quantize(frames[0]).int() - quantize(frames[1]).int()).abs()
    assert levels.float().mean() < 1 and levels.max() <= 12


def test_super_resolution_frames_in_bf16_are_close(tiny_sres, seeded):
    inputs = seeded(0, 2, 3, 10, 18, 32) * 0.5, seeded(1, 2, 16)
    expected = tiny_sres(*inputs)
    precision.set_precision([tiny_sres], "bf16")
    found = tiny_sres(*inputs)
    assert found.dtype == torch.float32 and 1e-4 < relative(found, expected) < 0.02


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_a_step_in_bf16_goes_the_same_way(stage):
    """Losses, R1 with its second derivative included, and every update's gradient; what is kept stays in fp32."""
    runs = []
    for name in ("fp32", "bf16"):
        system = tiny.make(stage, dtype=torch.float32, batch=2)
        precision.set_precision([system.G, system.D], name)
        updates = tiny.record_gradients(system)
        (values,) = tiny.train(system, [0])
        assert {tensor.dtype for tensor in tiny.weights(system).values()} == {torch.float32}
        runs.append((values, updates))
    (full, full_updates), (half, half_updates) = runs
    for name in ("loss/G_loss", "loss/D_loss", "loss/r1_penalty"):
        assert half[name].mean().item() == pytest.approx(full[name].mean().item(), rel=0.05, abs=1e-3), name
    assert len(full_updates) == len(half_updates) == 3
    for found, expected in zip(half_updates, full_updates, strict=True):
        assert 1e-5 < tiny.distance(found, expected) < 0.3  # gradients of few channels, which partly cancel
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_tf32_is_allowed_within_a_step_only(stage):
    system = tiny.make(stage, dtype=torch.float32, batch=2)
    with pytest.raises(ValueError, match="precision tf32 is for CUDA, and this is cpu; use fp32"):
        system.set_precision("tf32")
    seen = set()
    system.D.register_forward_pre_hook(
        lambda *_: seen.add((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
    )
    for name, allowed in (("tf32", True), (None, False)):
        system.precision = name
        seen.clear()
        with precision.tf32(False):
            tiny.train(system, [0])
            assert seen == {(allowed, allowed)}
            assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    with precision.tf32(False), pytest.raises(ZeroDivisionError):
        with precision.tf32(True):
            raise ZeroDivisionError
    with precision.tf32(False):
        assert not torch.backends.cuda.matmul.allow_tf32


def test_what_is_shown_and_measured_of_a_run_is_in_full_precision():
    system = tiny.make("longvideogan-sres", dtype=torch.float32)
    system.set_precision("fp32")
    assert halves(system.G) == halves(system.D) == halves(system.G_ema) == {}
    if precision.cpu_has_bf16():
        system.set_precision("bf16")
        assert halves(system.G) and halves(system.D) and not halves(system.G_ema)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_bf16_does_not_move_fvd(lres):
    """It moves FVD between two sets of clips by less than leaving out a clip does."""
    num_clips = 12
    features = {}
    net = i3d.load()
    for name, seeds in (("fp32", range(num_clips)), ("bf16", range(num_clips)), ("others", range(100, 112))):
        precision.set_precision([lres], "bf16" if name == "bf16" else "fp32")
        clips = torch.cat(list(tiny.make_sampler(lres).video(Request(list(seeds), 0, 16))), dim=1)
        features[name] = net.features(clips.permute(0, 4, 1, 2, 3))
    distance = {name: frechet_distance_from_features(features["others"], features[name]) for name in ("fp32", "bf16")}
    rest = [
        frechet_distance_from_features(features["others"], features["fp32"][torch.arange(num_clips) != left_out])
        for left_out in range(num_clips)
    ]
    error = torch.tensor(rest).std().item()
    assert abs(distance["bf16"] - distance["fp32"]) < error
    assert frechet_distance_from_features(features["fp32"], features["bf16"]) < 0.1 * distance["fp32"]


def test_auto_is_what_a_probe_finds_faster(monkeypatch, tiny_sres):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    for gain, expected in ((1.0, "fp32"), (2.0, "bf16")):
        monkeypatch.setattr(precision, "_gain", lambda shape, gain=gain: gain)
        assert precision.set_precision([tiny_sres], "auto") == expected
        assert bool(halves(tiny_sres)) == (expected == "bf16")
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    assert precision.set_precision([tiny_sres], "auto") == "fp32" and not halves(tiny_sres)
    assert precision.set_precision([torch.nn.Linear(2, 2)], "auto") == "fp32"  # no layer has a half precision


def test_the_probe_measures(monkeypatch):
    """Whatever it finds, it is the ratio of two times."""
    if not precision.cpu_has_bf16():
        pytest.skip("bfloat16 is emulated, tens of times slower")
    for shape in ((32, 32, 3, 3), (32, 32, 1, 3, 3)):
        assert 0.01 < precision._gain(shape) < 100


@pytest.mark.skipif(not precision.cpu_has_bf16(), reason="bfloat16 is emulated, tens of times slower")
def test_bf16_changes_frames_of_the_included_model_little():
    """Mean and largest difference in grey levels of a trained pair; where edges move, single pixels differ more."""
    sampler = open_sampler([ModelPath("labdoom-tiny")], {}, "cpu")
    videos = {}
    for name in ("fp32", "bf16"):
        precision.set_precision(sampler.networks, name)
        chunks = list(sampler.frames(Request([0], 0, 16)))
        for output in ("lres", "video"):
            videos[name, output] = quantize(torch.cat([chunk[output] for chunk in chunks], dim=2)).int()
    for output in ("lres", "video"):
        difference = (videos["fp32", output] - videos["bf16", output]).abs()
        assert 0 < difference.float().mean() < 1 and difference.max() <= 32

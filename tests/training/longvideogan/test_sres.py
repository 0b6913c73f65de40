"""The super-resolution networks compared with stored values of the published ones."""

import numpy as np
import pytest
import torch

from training.longvideogan.sres.discriminator import BilinearUpsample, SuperResDiscriminator
from training.longvideogan.sres.generator import Resample, SuperResGenerator
from training.longvideogan.sres.schedule import layer_schedule, quadruples

# index: (input channels, output width x height, filter rate, cutoff out, up, down, pad low, pad high)
PUBLISHED_LAYERS = {
    0: (27, (36, 29), 32, 2.0, 2, 2, 9, 8),
    1: (539, (36, 29), 32, 2.828427, 2, 2, 9, 8),
    3: (539, (52, 38), 64, 5.656854, 4, 2, -6, -9),
    8: (539, (148, 92), 256, 32.0, 2, 2, 9, 8),
    10: (389, (276, 164), 512, 64.0, 4, 2, -6, -9),
    12: (208, (276, 164), 512, 128.0, 2, 2, 9, 8),
    13: (155, (256, 144), 512, 128.0, 2, 2, -11, -12),
    14: (155, (256, 144), 256, 128.0, 1, 1, 0, 0),
}


def assert_samples_match(tensor: torch.Tensor, expected: dict, tolerance: float = 1e-4) -> None:
    assert list(tensor.shape) == expected["shape"]
    flat = tensor.detach().double().flatten()
    limit = tolerance * expected["std"]
    assert flat.mean().item() == pytest.approx(expected["mean"], abs=limit)
    assert flat.std(correction=0).item() == pytest.approx(expected["std"], abs=limit)
    assert np.allclose(flat[expected["idx"]], expected["val"], rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("network", "listing"), [(SuperResGenerator, "sres_generator"), (SuperResDiscriminator, "sres_discriminator")]
)
def test_state_is_the_published_one(network, listing, golden):
    module = network()
    parameters = dict(module.named_parameters())
    found = {
        name: {"kind": "parameter" if name in parameters else "buffer", "shape": list(tensor.shape)}
        for name, tensor in module.state_dict().items()
    }
    expected = golden("longvideogan_state")[listing]
    assert found == expected
    assert list(found) == list(expected)


def test_layer_schedule_is_the_published_one():
    layers = layer_schedule(144, 256, 14, 32768, 512, 27, 0)
    assert [layer.out_channels for layer in layers] == [512] * 9 + [362, 256, 181, 128, 128, 3]
    for index, (in_channels, size, rate, cutoff, up, down, low, high) in PUBLISHED_LAYERS.items():
        layer = layers[index]
        assert (layer.in_channels, layer.out_size, layer.filter_rate) == (in_channels, size, rate)
        assert layer.out_cutoff == pytest.approx(cutoff, abs=1e-5)
        assert (layer.up, layer.down, layer.padding) == (up, down, (low, high, low, high))


def test_filters_are_the_published_ones():
    generator = SuperResGenerator()
    first = generator.SG3.synthesis.get_submodule("L13_256_144_128").get_buffer("up_filter")[:6]
    assert first.tolist() == pytest.approx(
        [0.0233742, 0.0344493, -0.0508807, -0.0786152, 0.1396104, 0.4320619], abs=1e-6
    )
    half = [-1.4422802e-06, -1.8817191e-04, 2.6558994e-03, 3.9198037e-02, 1.5848844e-01, 2.9984725e-01]
    assert Resample(2, up=True).filter.tolist() == pytest.approx(half + half[::-1], abs=1e-8)
    assert Resample(4, up=False).filter.max().item() == pytest.approx(0.1568583, abs=1e-6)


def test_borders_are_attenuated_as_published():
    flat = torch.ones(1, 1, 32, 32)
    assert Resample(4, up=False)(flat)[0, 0, 4, 0].item() == pytest.approx(0.9962, abs=1e-4)
    assert Resample(4, up=True)(flat)[0, 0, 64, 0].item() == pytest.approx(0.9858, abs=1e-4)
    enlarged = BilinearUpsample(4)(flat.unsqueeze(2))[0, 0, 0]
    assert enlarged[64, :2].tolist() == pytest.approx([0.625, 0.875])
    assert enlarged[0, 0].item() == pytest.approx(0.390625)


@pytest.fixture(scope="module")
def golden_run(fill, seeded, golden):
    """Conditions, features and video of the published-size generator with made-up weights."""
    generator = fill(SuperResGenerator(), base=0).requires_grad_(False)
    lres = seeded(11, 1, 3, 10, 36, 64) * 0.5
    features = {}
    for name in generator.SG3.synthesis.layer_names:
        generator.SG3.synthesis.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: features.setdefault(name, output)
        )
    video = generator(lres, seeded(12, 1, 512))
    return generator, lres, features, video


def test_conditions_features_and_video_match_the_published_network(golden_run, golden, seeded):
    generator, lres, features, video = golden_run
    expected = golden("longvideogan_sres")
    w = generator.SG3.mapping(seeded(12, 1, 512))
    assert_samples_match(w.unsqueeze(1).expand(-1, 15, -1), expected["w"])  # published once for each of 15 layers
    for index, condition in enumerate(generator.SG3.conditions(lres, 4)):
        assert_samples_match(condition, expected[f"cond{index}"])
    for name, feature in features.items():
        assert_samples_match(feature, expected[name])
    assert_samples_match(video, expected["video"])


def test_discriminator_matches_the_published_network(fill, seeded, golden):
    expected = golden("longvideogan_sres")["D"]
    discriminator = fill(SuperResDiscriminator(), base=1000).requires_grad_(False)
    lres = seeded(13, 2, 3, 4, 36, 64) * 0.5
    video = (seeded(14, 2, 3, 4, 144, 256) * 0.5).requires_grad_(True)
    logits = discriminator(lres, video)
    assert logits.flatten().tolist() == pytest.approx(expected["logits"], rel=1e-4)
    gradient = torch.autograd.grad(logits.sum(), video)[0]
    assert gradient.square().sum(dim=[1, 2, 3, 4]).tolist() == pytest.approx(expected["gradsq"], rel=1e-3)


def test_any_chunking_and_batch_gives_the_same_frames(tiny_sres, seeded):
    lres, z = seeded(0, 2, 3, 14, 18, 32), seeded(1, 2, 16)
    whole = tiny_sres(lres, z)
    assert whole.shape == (2, 3, 6, 36, 64)
    for start, count in [(0, 1), (1, 3), (4, 2)]:
        chunk = tiny_sres(lres[:, :, start : start + count + 8], z)
        assert torch.allclose(chunk, whole[:, :, start : start + count], atol=1e-5)
    assert torch.allclose(tiny_sres(lres[1:], z[1:]), whole[1:], atol=1e-5)


def test_emas_move_only_when_asked(tiny_sres, seeded):
    before = {name: buffer.clone() for name, buffer in tiny_sres.named_buffers()}
    tiny_sres(seeded(0, 1, 3, 9, 18, 32), seeded(1, 1, 16))
    assert all(torch.equal(before[name], buffer) for name, buffer in tiny_sres.named_buffers())
    tiny_sres(seeded(0, 1, 3, 9, 18, 32), seeded(1, 1, 16), update_emas=True)
    moved = {name for name, buffer in tiny_sres.named_buffers() if not torch.equal(before[name], buffer)}
    assert moved == {name for name in before if name.endswith(("magnitude_ema", "w_avg"))}
    first = tiny_sres.SG3.synthesis.layer_names[0]
    condition = tiny_sres.SG3.conditions(seeded(0, 1, 3, 9, 18, 32), 4)[0]
    expected = 0.999 + 0.001 * condition.square().mean().item()
    assert tiny_sres.SG3.synthesis.get_submodule(first).get_buffer("magnitude_ema").item() == pytest.approx(expected)


def test_truncation_pulls_w_towards_its_average(tiny_sres, seeded):
    tiny_sres.SG3.mapping.w_avg.copy_(seeded(2, 16))
    mapping, z = tiny_sres.SG3.mapping, seeded(3, 4, 16)
    half = mapping(z, truncation=0.5)
    assert torch.allclose(half, (mapping(z) + mapping.w_avg) / 2, atol=1e-6)


def test_fourier_input_reads_the_published_variant():
    generator = SuperResGenerator(fourier_channels=512)
    state = generator.state_dict()
    assert list(state["SG3.synthesis.input.weight"].shape) == [512, 512]
    assert list(state["SG3.synthesis.input.features"].shape) == [1, 512, 29, 36]
    assert list(state["SG3.synthesis.L0_36_29_512.weight"].shape) == [512, 539, 3, 3]
    assert sum(parameter.numel() for parameter in generator.parameters()) == 30_054_036


@pytest.mark.parametrize(("height", "width", "lres"), [(72, 128, 32), (128, 128, 32), (256, 256, 64), (288, 512, 64)])
def test_other_sizes_put_out_what_was_asked(height, width, lres, seeded):
    factor = width // lres
    num_layers = next(n for n in range(6, 30) if not quadruples(width, n))
    options = {"lres_height": height // factor, "lres_width": lres, "channel_max": 4}
    generator = SuperResGenerator(height, width, **options, num_layers=num_layers, z_channels=8, w_channels=8)
    video = generator(seeded(0, 1, 3, 9, height // factor, lres), seeded(1, 1, 8))
    assert video.shape == (1, 3, 1, height, width)
    discriminator = SuperResDiscriminator(1, height, width, **options)
    assert discriminator(seeded(2, 1, 3, 1, height // factor, lres), video).shape == (1, 1)


def test_impossible_sizes_are_refused_with_possible_ones():
    with pytest.raises(ValueError, match="power of two from 64; the nearest is 128, such as 72x128"):
        SuperResGenerator(72, 120, 18, 30)
    with pytest.raises(ValueError, match="super-resolution frames of 71x128.*even number of pixels"):
        SuperResGenerator(71, 128, 18, 32)
    with pytest.raises(ValueError, match="possible are 72x128, 36x64, 18x32"):
        SuperResGenerator(144, 256, 30, 50)
    with pytest.raises(ValueError, match=r"more than twofold; use num_layers=\d+ or more"):
        SuperResGenerator(144, 256, num_layers=5)

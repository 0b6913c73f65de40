"""The low-resolution networks compared with stored values of the published ones."""

import math

import numpy as np
import pytest
import torch

from training.longvideogan.lres.discriminator import DiscriminatorBlock, LowResDiscriminator
from training.longvideogan.lres.generator import (
    LowResGenerator,
    TemporalEmbedding,
    fast_fft_size,
    kernel_norms,
    modulated_conv3d,
)

# Taps of the 128 filters, as published.
TAP_COUNTS = """
125 129 133 137 141 145 149 154 158 163 168 173 178 183 188 194 199 205 211 218 224 231 237 244 251 259 267 274 282 291
299 308 317 326 336 346 356 367 377 389 400 412 424 436 449 462 476 490 504 519 535 550 567 583 600 618 636 655 674 694
715 736 757 780 803 826 851 876 901 928 955 983 1012 1042 1073 1105 1137 1171 1205 1241 1277 1315 1354 1393 1434 1477
1520 1565 1611 1659 1707 1758 1810 1863 1918 1974 2032 2092 2154 2217 2283 2350 2419 2491 2564 2640 2717 2797 2880 2965
3052 3142 3235 3330 3428 3529 3633 3740 3850 3964 4081 4201 4325 4452 4583 4718 4857 5000
"""


@pytest.fixture(scope="module")
def generator(fill):
    return fill(LowResGenerator(), base=0).requires_grad_(False)


@pytest.fixture(scope="module")
def discriminator(fill):
    return fill(LowResDiscriminator(), base=1000).requires_grad_(False)


def assert_matches(tensor: torch.Tensor, expected: dict, tolerance: float = 1e-4) -> None:
    """Assert that statistics and three elements equal the published ones, relative to the size of the signal."""
    assert list(tensor.shape) == expected["shape"]
    flat = tensor.detach().double().flatten()
    scale = expected["std"]
    found = [flat.mean(), flat.std(), flat[0], flat[flat.numel() // 2], flat[-1]]
    wanted = [expected[key] for key in ("mean", "std", "first", "mid", "last")]
    assert np.allclose(found, wanted, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("network", "listing"), [(LowResGenerator, "lres_generator"), (LowResDiscriminator, "lres_discriminator")]
)
def test_state_is_the_published_one(network, listing, golden):
    with torch.device("meta"):
        module = network() if network is LowResDiscriminator else None
    module = module or network()
    parameters = dict(module.named_parameters())
    found = {
        name: {"kind": "parameter" if name in parameters else "buffer", "shape": list(tensor.shape)}
        for name, tensor in module.state_dict().items()
    }
    expected = golden("longvideogan_state")[listing]
    assert found == expected
    assert list(found) == list(expected)  # the order matters to optimisers of published checkpoints


def test_filter_bank_is_the_published_one():
    bank = TemporalEmbedding(128, 125, 5000)
    taps = bank.blur_filters.squeeze(1)
    assert taps.count_nonzero(dim=1).tolist() == [int(count) for count in TAP_COUNTS.split()]
    assert torch.allclose(taps.sum(dim=1), torch.ones(128), atol=1e-6)
    energy = taps.square().sum(dim=1)
    assert torch.allclose(energy[[0, 63, 127]], torch.tensor([0.016625749, 0.002659639, 0.000414460]), rtol=1e-5)
    scales = bank.output_scale[0, [0, 63, 127], 0]
    assert torch.allclose(scales, torch.tensor([7.755492, 19.390486, 49.120056]), rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_embedding_is_the_direct_correlation(seeded, dtype, tolerance):
    bank = TemporalEmbedding(8, 5, 60).to(dtype)
    noise = seeded(0, 2, 3, 100 + 59).to(dtype).requires_grad_(True)
    direct = torch.nn.functional.conv1d(noise.flatten(0, 1).unsqueeze(1), bank.blur_filters)  # N*c filters E
    direct = (direct * bank.output_scale).unflatten(0, (2, 3)).flatten(1, 2)
    embedding = bank(noise)
    assert embedding.dtype == dtype and torch.allclose(embedding, direct, rtol=0, atol=tolerance)
    weights = seeded(1, *direct.shape).to(dtype)
    gradients = [torch.autograd.grad((value * weights).sum(), noise)[0] for value in (embedding, direct)]
    assert torch.allclose(*gradients, rtol=0, atol=10 * tolerance)


def test_convolution_is_modulated_as_published(seeded):
    """Kernel and style divided by their largest values before the epsilon is added, and every factor by itself."""
    x, weight, style, skip = (
        seeded(seed, *shape).double().requires_grad_(True)
        for seed, shape in enumerate([(2, 5, 6, 4, 3), (7, 5, 3, 3, 3), (2, 5, 6), (2, 7, 6, 4, 3)])
    )
    gain = torch.tensor(1.3, dtype=torch.float64)
    peaks = style.abs().amax(dim=1, keepdim=True)  # as published but for the maximum over all frames
    normalized = weight / weight.abs().amax(dim=[1, 2, 3, 4], keepdim=True) / weight[0].numel() ** 0.5
    energy = torch.einsum("oityx,nis->nos", normalized.square(), (style / peaks).square())
    y = torch.nn.functional.conv3d(x * gain * (style / peaks.amax())[..., None, None], normalized, padding=1)
    y = y * ((energy + 1e-8).rsqrt() * peaks.amax() / peaks)[..., None, None]
    expected = (y + skip) * 0.5**0.5
    found = modulated_conv3d(x, weight, style, gain, skip * 0.5**0.5, scale=0.5**0.5)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    slopes = seeded(9, *found.shape).double()
    for ours, theirs in zip(
        *(torch.autograd.grad((value * slopes).sum(), [x, weight, style, skip]) for value in (found, expected)),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)
    inner = modulated_conv3d(x, weight, style, gain, skip[:, :, 1:-1], norms=kernel_norms(weight), pad_time=False)
    assert torch.allclose(inner, (y + skip)[:, :, 1:-1], rtol=0, atol=1e-12)


def test_discriminator_block_is_the_published_one(seeded):
    """The skip path convolved before it is decimated, the sum of both paths scaled after it."""
    block = DiscriminatorBlock(3, 6, 5, time_down=True, space_down=True, from_rgb=False).double()
    with torch.no_grad():
        for seed, parameter in enumerate(block.parameters()):
            parameter.copy_(seeded(seed, *parameter.shape))
    x = (100 * seeded(20, 2, 3, 8, 6, 6).double()).requires_grad_(True)  # some of it beyond the clamp
    down, bias = block.conv_skip.downsample, block.conv_1._bias
    assert down is not None and bias is not None
    skip = down(torch.nn.functional.conv3d(x, block.conv_skip.weight / 3**0.5)).clamp(-256, 256)
    h = block.conv_0(x)
    assert h.max() == 256
    h = down(torch.nn.functional.conv3d(h, block.conv_1.weight / (3 * 45) ** 0.5, padding=(2, 1, 1)))
    h = torch.nn.functional.leaky_relu(h + bias[:, None, None, None], 0.2) * 2**0.5
    expected = (h.clamp(-256, 256) + skip) * 0.5**0.5
    found = block(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-11)
    gradients = [
        torch.autograd.grad(value.square().sum(), [x, *block.parameters()], retain_graph=True)
        for value in (found, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-9)


def test_fast_fft_size():
    smooth = sorted(2**a * 3**b * 5**c for a in range(14) for b in range(6) for c in range(4))
    for length in (1, 2, 17, 385, 5543, 6001):
        assert fast_fft_size(length) == next(size for size in smooth if size >= length)


def test_lengths_of_every_level(tiny_lres):
    with torch.device("meta"):
        published = LowResGenerator.__new__(LowResGenerator)
    published.num_temporal_doublings, published.temporal_scale = 5, 32
    assert LowResGenerator.level_lengths(published, 160)[1:] == [26, 36, 56, 96, 176, 160]
    assert LowResGenerator.level_lengths(published, 312)[1:] == [36, 55, 94, 172, 328, 312]
    assert tiny_lres.num_noise_frames(32) == 32 + 2 * 8 * 8 + 60 - 1


@pytest.mark.parametrize("num_frames", [48, pytest.param(128, marks=pytest.mark.slow)])
def test_features_and_video_match_the_published_network(generator, discriminator, seeded, golden, num_frames):
    expected = golden("longvideogan_lres")[f"G_L{num_frames}"]
    features = {}
    hooks = [
        module.register_forward_hook(lambda _module, _args, output, name=name: features.setdefault(name, output))
        for name, module in [
            ("emb", generator.temporal_emb),
            ("w", generator.latent_mapping),
            ("temp_input", generator.w_to_temp_input),
            *((f"layer{i}", block) for i, block in enumerate([*generator.temporal_layers, *generator.spatial_layers])),
            ("layer10", generator.to_rgb),
        ]
    ]
    noise = seeded(999, 1, 8, generator.num_noise_frames(num_frames))
    video = generator.synthesize(noise, num_frames, legacy_alignment=True)
    for hook in hooks:
        hook.remove()
    for name, feature in features.items():
        scale = generator.output_scale if name == "layer10" else 1.0
        assert_matches(feature * scale, expected[name])
    *tracks, shared = generator.style_tracks(features["w"], num_frames)
    for index in range(11):
        assert_matches(tracks[index] if index < len(tracks) else shared, expected[f"ws{index}"])
    assert_matches(video, expected["layer10"])
    if num_frames == 128:
        logit = discriminator(video)
        assert logit.item() == pytest.approx(golden("longvideogan_lres")["D_of_G128"][0], rel=1e-4)


def test_magnitude_trackers_and_gradients_match_the_published_network(fill, seeded, golden):
    expected = golden("longvideogan_lres")
    generator = fill(LowResGenerator(), base=0)
    with torch.no_grad():
        generator.synthesize(
            seeded(999, 1, 8, generator.num_noise_frames(48)), 48, legacy_alignment=True, magnitude_ema_beta=0.999
        )
    trackers = {name: buffer.item() for name, buffer in generator.named_buffers() if "magnitude_ema" in name}
    assert trackers == pytest.approx(expected["mag_after"], rel=1e-5)

    fill(generator, base=0)
    video = generator.synthesize(seeded(999, 1, 8, generator.num_noise_frames(32)), 32)
    loss = (video * seeded(5, *video.shape)).mean()
    loss.backward()
    gradients = dict(expected["G_grad_L32"])
    assert loss.item() == pytest.approx(gradients.pop("loss"), rel=1e-4)
    parameters = dict(generator.named_parameters())
    for name, norm in gradients.items():
        gradient = parameters[name].grad
        assert gradient is not None
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3), name


def test_discriminator_matches_the_published_network(discriminator, seeded, golden):
    expected = golden("longvideogan_lres")["D"]
    for index in range(2):  # one clip at a time: half the memory, and the clips do not see each other
        video = (0.5 * seeded(7, 2, 3, 128, 36, 64))[index : index + 1].requires_grad_(True)
        logit = discriminator(video)
        assert logit.item() == pytest.approx(expected["logits"][index], rel=1e-4)
        gradient = torch.autograd.grad(logit.sum(), video)[0]  # what R1 penalises
        assert gradient.square().sum().item() == pytest.approx(expected["gradsq"][index], rel=1e-3)


def test_windows_of_one_noise_agree_in_every_chunking(tiny_lres, seeded):
    scale = tiny_lres.temporal_scale
    noise = seeded(3, 1, tiny_lres.noise_channels, tiny_lres.num_noise_frames(64))
    whole = tiny_lres.synthesize(noise, 64)
    for start, count in [(0, 64), (scale, 24), (40, 3), (24, 37)]:
        window = noise[:, :, start : start + tiny_lres.num_noise_frames(count)]
        assert torch.allclose(tiny_lres.synthesize(window, count), whole[:, :, start : start + count], atol=1e-5)
    # The published alignment shifts styles when the length is not a multiple of the scale, and so differs.
    window = noise[:, :, : tiny_lres.num_noise_frames(37)]
    legacy = tiny_lres.synthesize(window, 37, legacy_alignment=True)
    assert (legacy - whole[:, :, :37]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("height", "width", "base"),
    [(36, 64, (3, 4)), (16, 16, (4, 4)), (18, 32, (3, 4)), (72, 128, (3, 4)), (64, 36, (4, 3))],
)
def test_other_sizes_put_out_what_was_asked(height, width, base):
    options = {"embedding_channels": 16, "num_filters": 4, "min_filter_taps": 5, "max_filter_taps": 20, "w_channels": 8}
    network = LowResGenerator(
        height, width, **options, input_channels=8, temporal_channels=(8, 8, 6, 6), spatial_channels=(4, 4, 4, 4)
    )
    assert tuple(network.spatial_input.shape[3:]) == base
    video = network(1, 16, np.random.RandomState(0))
    assert video.shape == (1, 3, 16, height, width)
    logit = LowResDiscriminator(16, height, width, channels=(4, 4, 6, 6, 8), epilogue_channels=8)(video)
    assert logit.shape == (1, 1) and math.isfinite(logit.item())


def test_impossible_sizes_are_refused_with_possible_ones():
    with pytest.raises(ValueError, match="power of two from 16.*use a longer edge of 64, such as 36x64"):
        LowResGenerator(36, 60)
    with pytest.raises(ValueError, match="at least a quarter"):
        LowResDiscriminator(height=8, width=64)
    with pytest.raises(ValueError, match="even number of pixels"):
        LowResDiscriminator(height=35, width=64)
    with pytest.raises(ValueError, match="multiple of 8 from 16; use 24"):
        LowResDiscriminator(num_frames=23)

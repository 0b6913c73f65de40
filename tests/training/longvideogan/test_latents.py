"""Operations on the embedding preserve its distribution, and depend on the frame number alone."""

import numpy as np
import pytest
import torch

from training.longvideogan.latents import Latents, average_w, legacy_draws, noise_blocks, periodic_gains

LEAD = 8 * 8  # noise samples before frame 0 of the tiny network


def embedding(network, seed: int, start: int, stop: int, **options) -> torch.Tensor:
    """(embedding channels, stop - start)."""
    return Latents(network, [seed], [0], **options).embedding(start, stop)[0]


def test_the_plain_embedding_is_the_bank_on_the_numbered_noise(tiny_lres):
    noise = noise_blocks(3, 4, -100 + LEAD, 300 + 59).astype(np.float64)
    taps = tiny_lres.temporal_emb.blur_filters.squeeze(1).double().numpy()
    taps /= np.linalg.norm(taps, axis=1, keepdims=True)
    expected = [np.correlate(channel, row, "valid") for channel in noise for row in taps]
    found = embedding(tiny_lres, 3, -100, 200)
    assert np.abs(found.numpy() - np.stack(expected)).max() < 1e-5


def test_temporal_scale_one_is_the_plain_path_and_two_every_second_sample(tiny_lres):
    plain = embedding(tiny_lres, 1, -40, 60)
    assert torch.equal(embedding(tiny_lres, 1, -40, 60, temporal_scale=1.0), plain)
    assert torch.allclose(embedding(tiny_lres, 1, -20, 30, temporal_scale=2.0), plain[:, ::2], atol=1e-5)
    assert torch.allclose(embedding(tiny_lres, 1, -80, 120, temporal_scale=0.5)[:, ::2], plain, atol=1e-5)


def test_slow_motion_interpolates_the_band_limited_embedding(tiny_lres):
    """Against sinc interpolation of a wide range, on the filters whose pitch is as low as that of published ones."""
    channels = [channel * 8 + 7 for channel in range(4)]
    wide = embedding(tiny_lres, 2, -2000, 2000)[channels].double().numpy()
    times = np.arange(-90, 90) * 0.37
    sinc = np.sinc(times[:, None] - np.arange(-2000, 2000))
    found = embedding(tiny_lres, 2, -90, 90, temporal_scale=0.37)[channels].numpy()
    assert np.abs(found - wide @ sinc.T).max() < 2e-3
    assert wide.std() > 0.5


@pytest.mark.parametrize("options", [{"temporal_scale": 0.37}, {"temporal_scale": 2.5}, {"keys": ((8, 20), (9, 50))}])
def test_any_start_and_division_gives_the_same_embedding(tiny_lres, options):
    whole = embedding(tiny_lres, 4, -30, 90, **options)
    for start, stop in [(-30, -29), (-7, 41), (19, 21), (50, 90)]:
        part = embedding(tiny_lres, 4, start, stop, **options)
        assert torch.allclose(part, whole[:, start + 30 : stop + 30], atol=1e-5)
    two = Latents(tiny_lres, [5, 4], [80, -24], **options).embedding(0, 30)
    assert torch.allclose(two[1], whole[:, 6:36], atol=1e-5)
    assert torch.allclose(two[0], embedding(tiny_lres, 5, 80, 110, **options), atol=1e-5)


def test_a_blend_goes_from_seed_to_seed_on_a_circle(tiny_lres):
    keys = ((11, 32), (12, 64))
    blended = embedding(tiny_lres, 10, -10, 100, keys=keys)
    seeds = [embedding(tiny_lres, seed, -10, 100) for seed in (10, 11, 12)]
    for at, seed in [(slice(0, 11), 0), (slice(42, 43), 1), (slice(74, 110), 2)]:
        assert torch.allclose(blended[:, at], seeds[seed][:, at], atol=1e-6)
    halfway = (seeds[0][:, 26] + seeds[1][:, 26]) * 0.5**0.5
    assert torch.allclose(blended[:, 26], halfway, atol=1e-5)
    weights = Latents(tiny_lres, [10], [0], keys=keys).weights(np.arange(-10, 100)[None])
    assert np.allclose((weights**2).sum(axis=0), 1)


def test_a_blend_that_stays_with_its_seed_is_that_seed(tiny_lres):
    plain = embedding(tiny_lres, 10, 0, 64)
    blended = embedding(tiny_lres, 10, 0, 64, keys=((10, 24), (10, 40), (11, 56)))
    assert torch.allclose(blended[:, :41], plain[:, :41], atol=1e-6)
    assert torch.allclose(blended[:, 56:], embedding(tiny_lres, 11, 56, 64), atol=1e-6)


@pytest.mark.parametrize("loop, temporal_scale", [(8, 1.0), (16, 1.0), (128, 1.0), (32, 0.5), (8, 2.5)])
def test_a_loop_repeats_with_the_variance_that_was_trained(tiny_lres, loop, temporal_scale):
    """Without the gains the slowest channel of a loop of 8 would be 2.4 times too loud."""
    latents = Latents(tiny_lres, range(800), [0] * 800, temporal_scale=temporal_scale, loop=loop)
    values = latents.embedding(-3, loop + 5)
    assert torch.allclose(values[:, :, :8], values[:, :, loop:], atol=1e-5)
    deviation = values[:, :, 3 : 3 + loop].square().mean(dim=0).sqrt()  # over seeds
    floor = 0.75 if temporal_scale != 1 else 0.9  # interpolation dampens the fastest of these filters, of 10 taps
    assert floor < deviation.min() and deviation.max() < 1.15
    part = Latents(tiny_lres, [5], [1000 * loop], temporal_scale=temporal_scale, loop=loop).embedding(2, 7)
    assert torch.allclose(part[0], values[5, :, 5:10], atol=1e-5)


def test_gains_undo_what_folding_does_to_a_box():
    boxes = torch.stack([torch.full((12,), 1.0), torch.cat([torch.zeros(9), torch.ones(3)])])
    assert torch.allclose(periodic_gains(boxes, 4), torch.tensor([3**-0.5, 1.0]))
    assert torch.allclose(periodic_gains(boxes, 12), torch.ones(2))


def test_the_average_is_the_mean_of_w_over_many_seeds(tiny_lres):
    average = average_w(tiny_lres)
    w = torch.cat([Latents(tiny_lres, range(at, at + 500), [0] * 500)(0, 1)[:, :, 0] for at in range(0, 4000, 500)])
    assert average.shape == (24, 1)
    assert ((average[:, 0] - w.mean(dim=0)).abs() < 5 * w.std(dim=0) / 800**0.5).all()
    assert (average.abs() > 0.1).any()
    assert torch.equal(average, average_w(tiny_lres))


def test_published_draws_come_from_one_stream_per_video(tiny_lres):
    noise, z = legacy_draws(tiny_lres, [3, 4], 48, 16)
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(noise[1:], torch.randn((1, 4, tiny_lres.num_noise_frames(48)), generator=generator))
    assert torch.equal(z[1:], torch.randn((1, 16), generator=generator))

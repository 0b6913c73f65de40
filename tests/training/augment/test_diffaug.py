"""DiffAugment, temporal stretch and temporal crop compared with slicing and numpy.interp."""

import numpy as np
import pytest
import scipy.stats
import torch

from training.augment import diffaug


def _rngs(*seeds):
    return [np.random.RandomState(seed) for seed in seeds]


def _video(*shape, dtype=torch.float64):
    return torch.from_numpy(np.random.RandomState(0).standard_normal(shape)).to(dtype)


@pytest.mark.parametrize("seed", range(4))
def test_color_formula(seed):
    video = _video(1, 3, 4, 5, 6)
    brightness, saturation, contrast = np.random.RandomState(seed).random_sample(7)[:3]
    expected = video[0].numpy() + brightness - 0.5
    grey = expected.mean(axis=0)
    expected = grey + 2 * saturation * (expected - grey)
    expected = expected.mean() + (contrast + 0.5) * (expected - expected.mean())
    actual = diffaug.diff_augment(video, _rngs(seed), policy="color")[0]
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-13)


def _seen_shift(shifted, original):
    """Return the only (dy, dx) for which the shifted clip, built by slicing into zeros, equals `shifted`."""
    height, width = original.shape[-2:]
    found = []
    for dy in range(-height, height + 1):
        for dx in range(-width, width + 1):
            expected = np.zeros_like(original)
            target = (slice(max(dy, 0), height + min(dy, 0)), slice(max(dx, 0), width + min(dx, 0)))
            source = (slice(max(-dy, 0), height + min(-dy, 0)), slice(max(-dx, 0), width + min(-dx, 0)))
            expected[(..., *target)] = original[(..., *source)]
            if np.array_equal(expected, shifted):
                found.append((dy, dx))
    assert len(found) == 1
    return found[0]


def test_translation_shifts_both_axes_by_a_quarter_of_the_long_edge():
    # 4 x 8: reach 2 on both axes, 25 shifts, all about equally likely (bounds: 5 standard deviations).
    video = _video(600, 3, 2, 4, 8)
    shifted = diffaug.diff_augment(video, _rngs(*range(600)), policy="translation").numpy()
    counts = {}
    for before, after in zip(video.numpy(), shifted, strict=True):
        shift = _seen_shift(after, before)
        counts[shift] = counts.get(shift, 0) + 1
    assert set(counts) == {(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)}
    assert max(abs(count - 24) for count in counts.values()) < 24


def test_color_laws():
    # Brightness moves the mean by U - 0.5; saturation and contrast multiply the spread by 2 U and by U + 0.5.
    num = 500
    video = _video(1, 3, 2, 6, 6).expand(num, -1, -1, -1, -1)
    result = diffaug.diff_augment(video, _rngs(*range(num)), policy="color")
    brightness = (result.mean(dim=(1, 2, 3, 4)) - video.mean(dim=(1, 2, 3, 4))).numpy()
    grey, old_grey = (x.mean(dim=1).flatten(1) for x in (result, video))
    contrast = (grey.std(dim=1) / old_grey.std(dim=1)).numpy()
    color = (result - result.mean(dim=1, keepdim=True)).flatten(1).norm(dim=1)
    old_color = (video - video.mean(dim=1, keepdim=True)).flatten(1).norm(dim=1)
    saturation = (color / old_color).numpy() / contrast
    for values, low, high in ((brightness, -0.5, 0.5), (contrast, 0.5, 1.5), (saturation, 0, 2)):
        assert scipy.stats.kstest((values - low) / (high - low), "uniform").pvalue > 1e-3


def test_translation_by_the_whole_height_leaves_nothing():
    video = _video(40, 1, 1, 2, 8) + 10  # reach 2 = height
    shifted = diffaug.diff_augment(video, _rngs(*range(40)), policy="translation")
    empty = (shifted == 0).all(dim=(1, 2, 3, 4))
    assert 0 < empty.sum() < 40


@pytest.mark.parametrize("height, width, hole", [(18, 32, (9, 16)), (7, 10, (4, 5)), (5, 6, (3, 3))])
def test_cutout_is_one_rectangle_clipped_at_borders(height, width, hole):
    video = torch.ones(300, 3, 2, height, width)
    holes = (diffaug.diff_augment(video, _rngs(*range(300)), policy="cutout") == 0).numpy()
    assert (holes == holes[:, :1, :1]).all()
    for axis, edge in enumerate((height, width)):
        # The centre moves over 0 ... edge (even hole) or 0 ... edge - 1 (odd); half of the hole lies before it.
        starts = [centre - hole[axis] // 2 for centre in range(edge + 1 - hole[axis] % 2)]
        spans = [tuple(i for i in range(s, s + hole[axis]) if 0 <= i < edge) for s in starts]
        seen = {tuple(np.flatnonzero(mask.any(axis=1 - axis)).tolist()) for mask in holes[:, 0, 0]}
        assert seen == set(spans)
    assert all(mask.sum() == mask.any(axis=1).sum() * mask.any(axis=0).sum() for mask in holes[:, 0, 0])


def test_visible_part_of_published_cutout():
    holes = diffaug.diff_augment(torch.ones(400, 1, 1, 36, 64), _rngs(*range(400)), policy="cutout")[:, 0, 0] == 0
    rows, columns = holes.any(dim=2).sum(dim=1), holes.any(dim=1).sum(dim=1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (9, 18, 16, 32)


def test_policy_selects_without_moving_draws():
    video = _video(2, 3, 2, 8, 8)
    step = diffaug.diff_augment(video, _rngs(1, 2), policy="color")
    step = diffaug.diff_augment(step, _rngs(1, 2), policy="translation")
    step = diffaug.diff_augment(step, _rngs(1, 2), policy="cutout")
    assert torch.equal(step, diffaug.diff_augment(video, _rngs(1, 2)))
    for nothing in ("", "none"):
        assert torch.equal(video, diffaug.diff_augment(video, _rngs(1, 2), policy=nothing))
    with pytest.raises(ValueError, match="'colour'.*color, translation, cutout"):
        diffaug.diff_augment(video, _rngs(1, 2), policy="colour,cutout")


def _stretch_oracle(clip, factor, draw):
    """Return one clip (C, T, H, W): numpy.interp for each pixel, then zeros around it or a window of it."""
    num_frames = clip.shape[1]
    length = int(num_frames * factor)
    positions = (np.arange(length) + 0.5) / factor - 0.5
    resized = np.apply_along_axis(lambda track: np.interp(positions, np.arange(num_frames), track), 1, clip)
    if length >= num_frames:
        start = int(draw * (length - num_frames + 1))
        return resized[:, start : start + num_frames]
    result = np.zeros_like(clip)
    start = int(draw * (num_frames - length + 1))
    result[:, start : start + length] = resized
    return result


@pytest.mark.parametrize("num_frames, strength", [(16, 1.0), (7, 1.0), (16, 0.3), (1, 1.0)])
def test_stretch_equals_numpy_interp(num_frames, strength):
    video = _video(12, 2, num_frames, 2, 3)
    stretched = diffaug.temporal_stretch(video, _rngs(*range(12)), strength).numpy()
    factors = []
    for seed in range(12):
        first, second = np.random.RandomState(seed).random_sample(2)
        factors.append(2 ** ((2 * first - 1) * strength))
        expected = _stretch_oracle(video[seed].numpy(), factors[-1], second)
        np.testing.assert_allclose(stretched[seed], expected, atol=1e-12)
    assert min(factors) < 1 < max(factors)


def test_stretch_without_strength_is_the_identity():
    video = _video(3, 3, 8, 2, 2)
    assert torch.equal(video, diffaug.temporal_stretch(video, _rngs(0, 1, 2), 0.0))


def test_stretch_law():
    # A constant clip shows how many frames are left: floor(16 f), f = 2^u; the first frame present is uniform.
    left = (diffaug.temporal_stretch(torch.ones(2000, 1, 16, 1, 1), _rngs(*range(2000)))[:, 0, :, 0, 0] != 0).numpy()
    lengths = left.sum(axis=1)
    assert lengths.min() == 8 and lengths.max() == 16
    assert abs((lengths == 16).mean() - 0.5) < 0.04
    # P(length = 8) = log2(9 / 8) / 2 and then the 9 places are equally likely.
    eight = left[lengths == 8]
    assert abs(len(eight) / 2000 - np.log2(9 / 8) / 2) < 0.03
    assert set(eight.argmax(axis=1)) == set(range(9))


def test_crop_offsets_cover_each_phase_once():
    video = torch.arange(40.0).reshape(1, 1, 40, 1, 1).expand(500, 3, 40, 2, 2)
    cropped = diffaug.temporal_crop(video, 32, _rngs(*range(500)))
    first = cropped[:, 0, 0, 0, 0]
    assert torch.equal(cropped - first[:, None, None, None, None], video[:, :, :32])
    counts = np.bincount(first.numpy().astype(int), minlength=9)
    assert counts[8:].sum() == 0 and abs(counts[:8] - 62.5).max() < 37
    assert torch.equal(video[:2], diffaug.temporal_crop(video[:2], 40, _rngs(0, 1)))


FUNCTIONS = {
    "augment": diffaug.diff_augment,
    "stretch": diffaug.temporal_stretch,
    "crop": lambda video, rngs: diffaug.temporal_crop(video, 2, rngs),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_clip_does_not_depend_on_its_batch(name):
    function = FUNCTIONS[name]
    video = _video(3, 3, 6, 8, 8)
    whole = function(video, _rngs(5, 6, 7))
    parts = torch.cat([function(video[i : i + 1], _rngs(5 + i)) for i in range(3)])
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12)
    assert function(video.float(), _rngs(5, 6, 7)).dtype == torch.float32 and whole.dtype == torch.float64


@pytest.mark.parametrize("name", FUNCTIONS)
def test_draws_taken_are_fixed(name):
    states = []
    for seed, scale in ((3, 1.0), (3, 0.0)):
        rng = np.random.RandomState(seed)
        FUNCTIONS[name](_video(1, 3, 4, 4, 4) * scale, [rng])
        states.append(rng.random_sample())
    counted = np.random.RandomState(3)
    counted.random_sample({"augment": 7, "stretch": 2, "crop": 1}[name])
    assert states == [counted.random_sample()] * 2


@pytest.mark.parametrize("name", FUNCTIONS)
def test_differentiable_twice(name):
    video = _video(2, 3, 3, 4, 4).requires_grad_()
    apply = lambda x: FUNCTIONS[name](x, _rngs(8, 9))  # noqa: E731
    assert torch.autograd.gradcheck(apply, video)
    # All three are linear, so the curvature that a double backward pass carries has to come from outside.
    assert torch.autograd.gradgradcheck(lambda x: apply(x.sin()), video)

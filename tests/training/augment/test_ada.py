"""The ADA pipeline: filters, geometry, colour, corruptions, probabilities, batch independence, and the controller."""

import io
import math
import pickle

import numpy as np
import pytest
import scipy.ndimage
import scipy.spatial.transform
import scipy.stats
import torch

from training.augment import ada

GEOMETRY = ("xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac")
COLOR = ("brightness", "contrast", "lumaflip", "hue", "saturation")
EVERYTHING = dict.fromkeys((*GEOMETRY, *COLOR, "imgfilter", "noise", "cutout"), 1.0)


def _rngs(*seeds):
    return [np.random.RandomState(seed) for seed in seeds]


def _video(*shape):
    return torch.from_numpy(np.random.RandomState(0).standard_normal(shape))


def _smooth(*shape, cutoff=2.0):
    """Return a clip (C, T, H, W) whose detail is about `cutoff` pixels wide, with unit standard deviation."""
    clip = np.random.RandomState(1).standard_normal(shape)
    clip = scipy.ndimage.gaussian_filter(clip, (0, 0, cutoff, cutoff), mode="mirror")
    return clip / clip.std()


def _warp(clip, inverse):
    return ada.warp(torch.from_numpy(clip), np.asarray(inverse, dtype=float), ada.AugmentPipe().Hz_geom).numpy()


# ------------------------------------------------------------------------------------------------------------------
# Which transforms, and how strong


def test_sets_of_transforms_are_the_published_ones():
    blit, geometry = {"xflip", "rotate90", "xint"}, {"scale", "rotate", "aniso", "xfrac"}
    color = {"brightness", "contrast", "lumaflip", "hue", "saturation"}
    expected = [set(), blit, blit | geometry, blit | geometry | color]
    expected += [expected[-1] | {"imgfilter"}, expected[-1] | {"imgfilter", "noise"}, set(EVERYTHING)]
    assert [set(multipliers) for multipliers in ada.AUGMENTATIONS.values()] == expected
    assert all(set(multipliers.values()) <= {1.0} for multipliers in ada.AUGMENTATIONS.values())
    assert list(ada.AUGMENTATIONS) == ["none", "b", "bg", "bgc", "bgcf", "bgcfn", "bgcfnc"]
    assert ada.BGC == ada.AUGMENTATIONS["bgc"]
    pipe = ada.AugmentPipe(**ada.BGC)
    strengths = (pipe.xint_max, pipe.scale_std, pipe.rotate_max, pipe.aniso_std, pipe.xfrac_std)
    assert strengths == (0.125, 0.2, 1, 0.2, 0.125)
    assert (pipe.brightness_std, pipe.contrast_std, pipe.hue_max, pipe.saturation_std) == (0.2, 0.5, 1, 1)


def test_laws_of_the_condition_pipe():
    pipe = ada.AugmentPipe(**ada.CONDITION)
    draws = [pipe.draw(np.random.RandomState(seed), 0.5, 36, 64) for seed in range(1500)]
    assert all(np.array_equal(draw.color, np.eye(3, 4)) and draw.cutout is None for draw in draws)
    assert all(np.array_equal(draw.band_gains, np.ones(4)) for draw in draws)
    # Scale, stretch and shift each happen half of the time; the determinant has the scale alone.
    scales = np.array([np.linalg.det(draw.inverse[:2, :2]) ** 0.5 for draw in draws])
    scaled = scales[np.abs(scales - 1) > 1e-12]
    assert scipy.stats.binomtest(len(scaled), 1500, 0.5).pvalue > 1e-3 and _p_normal(np.log2(scaled), 0.08) > 1e-3
    ratios = np.array([np.linalg.svd(draw.inverse[:2, :2], compute_uv=False) for draw in draws])
    stretches = np.log2(ratios[:, 0] / ratios[:, 1]) / 2
    stretched = stretches[stretches > 1e-9]
    assert scipy.stats.binomtest(len(stretched), 1500, 0.5).pvalue > 1e-3
    assert scipy.stats.kstest(stretched / 0.08, "halfnorm").pvalue > 1e-3
    # Shifts come last, so they are scaled and turned like everything else: undone, they are in image edges.
    shifts = np.array([np.linalg.solve(draw.inverse[:2, :2], draw.inverse[:2, 2]) for draw in draws]) / (64, 36)
    shifted = shifts[np.abs(shifts).max(axis=1) > 0]
    assert scipy.stats.binomtest(len(shifted), 1500, 0.5).pvalue > 1e-3
    assert _p_normal(shifted[:, 0], 0.016) > 1e-3 and _p_normal(shifted[:, 1], 0.016) > 1e-3
    levels = np.array([draw.noise_sigma for draw in draws if draw.noise_sigma > 0])
    assert scipy.stats.binomtest(len(levels), 1500, 0.5).pvalue > 1e-3
    assert scipy.stats.kstest(levels / 0.08, "halfnorm").pvalue > 1e-3
    # A turn by either rotation happens half of the time, and none is beyond twice the largest.
    angles = np.array([np.arctan2(turn[1, 0], turn[0, 0]) for turn in (_nearest_rotation(d.inverse) for d in draws)])
    assert scipy.stats.binomtest(int((np.abs(angles) > 1e-9).sum()), 1500, 0.5).pvalue > 1e-3
    assert np.abs(angles).max() < 2 * 0.016 * np.pi + 1e-9


def _nearest_rotation(inverse):
    """Return the orthogonal factor of a map's linear part, which a stretch between two turns leaves nearly alone."""
    u, _, v = np.linalg.svd(inverse[:2, :2])
    return u @ v


# ------------------------------------------------------------------------------------------------------------------
# Filters


def test_state_has_published_names_and_shapes():
    pipe = ada.AugmentPipe(**ada.BGC)
    assert {name: tuple(value.shape) for name, value in pipe.state_dict().items()} == {
        "p": (),
        "Hz_geom": (12,),
        "Hz_fbank": (4, 43),
    }
    assert float(pipe.p) == 1 and not list(pipe.parameters())


def test_low_pass_is_an_orthogonal_wavelet_filter_with_six_vanishing_moments():
    taps = ada.AugmentPipe().Hz_geom.double().numpy()
    assert abs(taps.sum() - 1) < 1e-6
    for shift in range(6):
        assert abs((taps[2 * shift :] * taps[: 12 - 2 * shift]).sum() - 0.5 * (shift == 0)) < 1e-6
    x = np.linspace(-1, 1, 12)
    for order in range(6):
        assert abs((taps * x**order * (-1) ** np.arange(12)).sum()) < 1e-6
    # Of that family, symlets have the least asymmetry: the peak is in the middle.
    assert taps.argmax() == 5 and np.allclose(taps[:3] * 2**0.5, [0.0154041, 0.0034907, -0.1179901], atol=1e-6)


def test_bands_divide_the_spectrum():
    bands = ada.AugmentPipe().Hz_fbank.double().numpy()
    impulse = np.zeros(43)
    impulse[21] = 1
    np.testing.assert_allclose(bands.sum(axis=0), impulse, atol=1e-6)
    np.testing.assert_allclose(bands, bands[:, ::-1], atol=1e-6)
    omega = np.linspace(0, np.pi, 100)
    response = (bands[:, None] * np.cos(np.arange(-21, 22) * omega[:, None])).sum(axis=2)

    def low(w):  # closed form for the wavelet filter with two vanishing moments
        return np.cos(w / 2) ** 4 * (1 + 2 * np.sin(w / 2) ** 2)

    expected = [
        low(omega) * low(2 * omega) * low(4 * omega),
        low(omega) * low(2 * omega) * (1 - low(4 * omega)),
        low(omega) * (1 - low(2 * omega)),
        1 - low(omega),
    ]
    np.testing.assert_allclose(response, expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------
# Geometry


@pytest.mark.parametrize("dx, dy", [(3, 0), (0, -4), (-2, 3)])
def test_integer_translation_shifts_the_reflected_image(dx, dy):
    clip = np.random.RandomState(0).uniform(-1, 1, (3, 2, 16, 20))
    padded = np.pad(clip, ((0, 0), (0, 0), (5, 5), (5, 5)), mode="reflect")
    expected = padded[..., 5 - dy : 21 - dy, 5 - dx : 25 - dx]
    np.testing.assert_allclose(_warp(clip, [[1, 0, -dx], [0, 1, -dy], [0, 0, 1]]), expected, atol=1e-5)


def test_flip_and_quarter_turns():
    # The delay of the filter leaves a tenth of a pixel; test_affine_map_equals_spline_interpolation counts it.
    clip = _smooth(3, 2, 20, 20, cutoff=4.0)
    np.testing.assert_allclose(_warp(clip, np.diag([-1, 1, 1])), clip[..., ::-1], atol=0.08)
    for turns in range(1, 4):
        cos, sin = np.round(np.cos(np.pi / 2 * turns)), np.round(np.sin(np.pi / 2 * turns))
        turned = _warp(clip, [[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        np.testing.assert_allclose(turned, np.rot90(clip, turns, axes=(2, 3)), atol=0.08)


AFFINE = {
    "zoom in": [[0.7, 0, 0], [0, 0.7, 0], [0, 0, 1]],
    "zoom out": [[1.25, 0, 0], [0, 1.25, 0], [0, 0, 1]],
    "rotation": [[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]],
    "stretch": [[1.2, 0, 0], [0, 1 / 1.2, 0], [0, 0, 1]],
    "shift": [[1, 0, 1.37], [0, 1, -2.61], [0, 0, 1]],
    "flip": [[-1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "quarter turn": [[0, -1, 0], [1, 0, 0], [0, 0, 1]],
    "half turn": [[-1, 0, 0], [0, -1, 0], [0, 0, 1]],
    "everything": [[0.9, -0.4, 2.3], [0.3, 1.1, -1.7], [0, 0, 1]],
}


@pytest.mark.parametrize("name", AFFINE)
def test_affine_map_equals_spline_interpolation(name):
    clip = _smooth(1, 2, 30, 36, cutoff=3.0)
    inverse = np.array(AFFINE[name], dtype=float)
    swapped = inverse[[1, 0]][:, [1, 0, 2]]  # rows first, as scipy has it
    taps = np.array(ada.SYM6) / sum(ada.SYM6)
    delay = ((taps * np.arange(12)).sum() - 5) / 2  # in pixels, of up- and downsampling each
    centre = np.array([29, 35]) / 2
    offset = centre - delay + swapped[:, 2] - swapped[:, :2] @ (centre - delay)
    expected = [scipy.ndimage.affine_transform(f, swapped[:, :2], offset, order=5, mode="mirror") for f in clip[0]]
    # The clip's standard deviation is 1; what is left is the curvature that bilinear sampling misses.
    np.testing.assert_allclose(_warp(clip, inverse)[0], expected, atol=0.025)


def test_nearly_identical_map_reproduces_noise():
    # Full-band noise is where a wrong filter, phase or gain shows: a map off the identity by 1e-9 is resampled.
    clip = np.random.RandomState(0).uniform(-1, 1, (3, 3, 12, 14))
    np.testing.assert_allclose(_warp(clip, np.diag([1 + 1e-9, 1, 1])), clip, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------------
# Draws


def _draws(num, p=1.0, size=(36, 64), **multipliers):
    pipe = ada.AugmentPipe(**multipliers)
    return [pipe.draw(np.random.RandomState(seed), p, *size) for seed in range(num)]


def _fired(draw):
    return (
        not np.array_equal(draw.inverse, np.eye(3))
        or not np.array_equal(draw.color, np.eye(3, 4))
        or not np.array_equal(draw.band_gains, np.ones(4))
        or draw.noise_sigma > 0
        or draw.cutout is not None
    )


@pytest.mark.parametrize("name", EVERYTHING)
def test_firing_probability(name):
    visible = {"xflip": 1 / 2, "rotate90": 3 / 4, "lumaflip": 1 / 2}.get(name, 1)
    for multiplier, p in ((1.0, 0.3), (0.5, 1.0)):
        expected = multiplier * p * visible
        if name == "imgfilter":  # each of four bands fires by itself
            expected = 1 - (1 - expected) ** 4
        count = sum(_fired(draw) for draw in _draws(800, p, **{name: multiplier}))
        assert 1e-3 < scipy.stats.binomtest(count, 800, expected).pvalue


def _p_normal(values, std):
    return scipy.stats.kstest(np.asarray(values) / std, "norm").pvalue


def _p_uniform(values, low, high):
    return scipy.stats.kstest((np.asarray(values) - low) / (high - low), "uniform").pvalue


def test_laws_of_geometric_draws():
    num = 500
    scales = [draw.inverse[0, 0] for draw in _draws(num, scale=1)]
    assert _p_normal(-np.log2(scales), 0.2) > 1e-3
    stretches = np.array([np.diag(draw.inverse)[:2] for draw in _draws(num, aniso=1, aniso_std=0.08)])
    np.testing.assert_allclose(stretches.prod(axis=1), 1)
    assert _p_normal(-np.log2(stretches[:, 0]), 0.08) > 1e-3
    shifts = np.array([draw.inverse[:2, 2] for draw in _draws(num, xfrac=1)]) / (64, 36)
    assert _p_normal(shifts[:, 0], 0.125) > 1e-3 and _p_normal(shifts[:, 1], 0.125) > 1e-3
    shifts = np.array([draw.inverse[:2, 2] for draw in _draws(num, xint=1)])
    assert np.array_equal(shifts, np.round(shifts))
    assert set(shifts[:, 0]) == set(range(-8, 9))  # 64 / 8
    assert set(shifts[:, 1]) == set(range(-4, 5))  # 36 / 8 = 4.5, which is never reached
    # With p = 1 both rotations fire; at p = 0.36 each has 1 - sqrt(0.64) = 0.2.
    angles = [
        np.arctan2(draw.inverse[1, 0], draw.inverse[0, 0]) for draw in _draws(2000, p=0.36, rotate=1, rotate_max=0.1)
    ]
    single = [angle for angle in angles if angle != 0]
    assert scipy.stats.binomtest(len(single), 2000, 0.36).pvalue > 1e-3
    # 2 * 0.2 * 0.8 = 0.32 of one rotation and 0.04 of the sum of two, whose variance is twice that of one.
    variance = (0.1 * np.pi) ** 2 / 3 * (0.32 + 2 * 0.04) / 0.36
    assert abs(np.var(single) / variance - 1) < 0.12


def test_transforms_compose_in_the_order_of_the_paper():
    # Draws do not depend on multipliers, so pipes with one transform each show the factors of the whole.
    for seed in range(5):
        draw = lambda **kwargs: ada.AugmentPipe(**kwargs).draw(np.random.RandomState(seed), 1.0, 36, 64)  # noqa: B023, E731
        product = np.eye(3)
        for name in ("xflip", "rotate90", "xint", "scale", "aniso", "xfrac"):
            product = product @ draw(**{name: 1}).inverse
        whole = draw(xflip=1, rotate90=1, xint=1, scale=1, aniso=1, xfrac=1)
        np.testing.assert_allclose(whole.inverse, product, atol=1e-12)
        # Rotations come on both sides of the stretch: the product of two alone is not what the stretch commutes with.
        turned, stretch = draw(rotate=1, aniso=1).inverse, draw(aniso=1).inverse
        expected = sorted(np.diag(stretch)[:2])
        np.testing.assert_allclose(np.linalg.svd(turned[:2, :2], compute_uv=False)[::-1], expected)
        rotations = draw(rotate=1).inverse
        assert np.abs(turned - rotations @ stretch).max() > 1e-3 < np.abs(turned - stretch @ rotations).max()
        product = np.eye(4)
        for name in COLOR:
            product = np.vstack([draw(**{name: 1}).color, [0, 0, 0, 1]]) @ product
        np.testing.assert_allclose(draw(**dict.fromkeys(COLOR, 1)).color, product[:3], atol=1e-12)


def test_draws_do_not_shift_with_p():
    video = _video(1, 3, 2, 24, 24)
    following = []
    for p in (0.0, 0.4, 1.0):
        pipe = ada.AugmentPipe(**EVERYTHING)
        pipe.p.fill_(p)
        (rng,) = _rngs(5)
        pipe(video, [rng])
        following.append(rng.random_sample())
    assert len(set(following)) == 1
    weak, strong = (ada.AugmentPipe(**ada.BGC).draw(_rngs(2)[0], p, 36, 64) for p in (0.999, 1.0))
    assert np.array_equal(weak.inverse, strong.inverse) and np.array_equal(weak.color, strong.color)


# ------------------------------------------------------------------------------------------------------------------
# Colour and corruptions


def _grey_and_color(clip):
    grey = clip.mean(axis=0, keepdims=True)
    return grey, clip - grey


def _augmented(video, seed=0, **kwargs):
    return ada.AugmentPipe(**kwargs)(video, _rngs(*range(seed, seed + len(video))))


def test_color_transforms():
    video = _video(40, 3, 2, 3, 4)
    values = {name: _augmented(video, **{name: 1}) for name in COLOR}
    shifts = (values["brightness"] - video).flatten(1).numpy()
    assert np.ptp(shifts, axis=1).max() < 1e-12 and _p_normal(shifts[:, 0], 0.2) > 1e-3
    factors = (values["contrast"] / video).flatten(1).numpy()
    assert np.ptp(factors, axis=1).max() < 1e-9 and _p_normal(np.log2(factors[:, 0]), 0.5) > 1e-3

    flips, angles, saturations = [], [], []
    for index, clip in enumerate(video.numpy()):
        grey, color = _grey_and_color(clip)
        flipped_grey, flipped_color = _grey_and_color(values["lumaflip"][index].numpy())
        np.testing.assert_allclose(flipped_color, color, atol=1e-12)
        flips.append(float((flipped_grey / grey).mean()))
        turned = values["hue"][index].numpy()
        turned_grey, turned_color = _grey_and_color(turned)
        np.testing.assert_allclose(turned_grey, grey, atol=1e-12)
        cross = np.cross(color, turned_color, axis=0).sum(axis=0)
        angles.append(float(np.arctan2(cross.sum() / 3**0.5, (color * turned_color).sum())))
        rotation = scipy.spatial.transform.Rotation.from_rotvec(np.full(3, angles[-1] / 3**0.5)).as_matrix()
        np.testing.assert_allclose(np.tensordot(rotation, clip, 1), turned, atol=1e-9)
        vivid_grey, vivid_color = _grey_and_color(values["saturation"][index].numpy())
        np.testing.assert_allclose(vivid_grey, grey, atol=1e-12)
        saturations.append(float((vivid_color * color).sum() / (color**2).sum()))
        np.testing.assert_allclose(vivid_color, saturations[-1] * color, atol=1e-12)
    assert set(np.round(flips, 9)) == {-1, 1}
    assert _p_uniform(angles, -np.pi, np.pi) > 1e-3 and _p_normal(np.log2(saturations), 1) > 1e-3


def test_noise_has_a_level_for_each_clip_and_new_values_for_each_pixel():
    video = torch.zeros(60, 3, 4, 20, 20, dtype=torch.float64)
    noise = _augmented(video, noise=1, noise_std=0.08).numpy()
    levels = noise.std(axis=(1, 2, 3, 4))
    assert scipy.stats.kstest(levels / 0.08, "halfnorm").pvalue > 1e-3
    scaled = noise / levels[:, None, None, None, None]
    assert _p_normal(scaled.flatten()[::10], 1) > 1e-3
    assert np.abs(np.corrcoef(scaled.transpose(1, 2, 0, 3, 4).reshape(12, -1)) - np.eye(12)).max() < 0.04


def test_cutout_is_one_rectangle():
    video = torch.ones(200, 3, 2, 16, 24)
    holes = (_augmented(video, cutout=1, cutout_size=0.25) == 0).numpy()
    assert (holes == holes[:, :1, :1]).all()
    holes = holes[:, 0, 0]
    rows, columns = holes.any(axis=2), holes.any(axis=1)
    assert (holes == rows[:, :, None] & columns[:, None, :]).all()
    assert (rows.sum(axis=1).min(), rows.sum(axis=1).max()) == (2, 4)
    assert (columns.sum(axis=1).min(), columns.sum(axis=1).max()) == (3, 6)
    assert (np.diff(rows.astype(int), axis=1) == 1).sum(axis=1).max() == 1
    assert rows.any(axis=0).all() and columns.any(axis=0).all()
    for row, column, draw in zip(rows, columns, _draws(200, size=(16, 24), cutout=1), strict=True):
        assert draw.cutout is not None
        for inside, middle in ((column, draw.cutout[0]), (row, draw.cutout[1])):
            pixels = (np.arange(len(inside)) + 0.5) / len(inside)
            assert np.array_equal(inside, np.abs(pixels - middle) < 0.125)


def test_band_filtering_treats_each_frame_alike():
    video = _video(2, 3, 4, 24, 30)
    filtered = _augmented(video, imgfilter=1)
    pipe = ada.AugmentPipe(imgfilter=1)
    for index in range(2):
        gains = pipe.draw(np.random.RandomState(index), 1.0, 24, 30).band_gains
        kernel = gains @ ada.band_filters()
        expected = scipy.ndimage.convolve1d(video[index].numpy(), kernel, axis=2, mode="mirror")
        expected = scipy.ndimage.convolve1d(expected, kernel, axis=3, mode="mirror")
        np.testing.assert_allclose(filtered[index].numpy(), expected, atol=1e-5)
    # Amplifying one band keeps the power expected of natural images: a gain of its own, and a common divisor.
    gains = np.array([draw.band_gains for draw in _draws(300, p=0.1, imgfilter=1)])
    alone = [row for row in gains if len(set(np.round(row, 12))) == 2]
    assert len(alone) > 50
    np.testing.assert_allclose((np.square(alone) * [10, 1, 1, 1]).sum(axis=1) / 13, 1)


# ------------------------------------------------------------------------------------------------------------------
# The whole pipe


def test_nothing_happens_at_p_zero():
    video = _video(2, 3, 2, 24, 32)
    pipe = ada.AugmentPipe(**EVERYTHING)
    pipe.p.fill_(0)
    assert torch.equal(pipe(video, _rngs(0, 1)), video)


def test_frames_share_one_draw():
    video = _video(3, 3, 1, 24, 32).expand(-1, -1, 5, -1, -1)
    result = ada.AugmentPipe(**{**EVERYTHING, "noise": 0})(video, _rngs(3, 4, 5))
    torch.testing.assert_close(result, result[:, :, :1].expand_as(result), rtol=0, atol=1e-12)
    assert (result - video).abs().mean() > 0.1


def test_clip_does_not_depend_on_its_batch():
    video = _video(3, 3, 2, 24, 32)
    pipe = ada.AugmentPipe(**EVERYTHING)
    whole = pipe(video, _rngs(7, 8, 9))
    parts = torch.cat([pipe(video[i : i + 1], _rngs(7 + i)) for i in range(3)])
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-10)
    single = pipe(video.float(), _rngs(7, 8, 9))
    assert whole.dtype == torch.float64 and single.dtype == torch.float32
    torch.testing.assert_close(single.double(), whole, rtol=0, atol=1e-3)
    torch.testing.assert_close(pipe.double()(video, _rngs(7, 8, 9)), whole, rtol=0, atol=1e-10)


def test_differentiable_twice():
    video = _video(2, 3, 1, 4, 5).requires_grad_()
    pipe = ada.AugmentPipe(**{**EVERYTHING, "imgfilter": 0})
    apply = lambda x: pipe(x, _rngs(1, 2))  # noqa: E731
    assert torch.autograd.gradcheck(apply, video)
    assert torch.autograd.gradgradcheck(lambda x: apply(x.sin()), video)
    video = _video(1, 3, 2, 22, 22).requires_grad_()
    pipe = ada.AugmentPipe(imgfilter=1)
    assert torch.autograd.gradcheck(lambda x: pipe(x, _rngs(1)), video, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: pipe(x.sin(), _rngs(1)), video, fast_mode=True)


def test_condition_pipe_is_gentle():
    clip = _smooth(3, 6, 36, 64, cutoff=3.0)
    video = torch.from_numpy(clip).expand(20, -1, -1, -1, -1) * 0.5
    pipe = ada.AugmentPipe(**ada.CONDITION)
    pipe.p.fill_(0.5)
    change = (pipe(video, _rngs(*range(20))) - video).std(dim=(1, 2, 3, 4))
    assert (change == 0).sum() <= 4 and 0.02 < change.median() < 0.5


def test_survives_pickling():
    pipe = ada.AugmentPipe(**ada.CONDITION)
    pipe.p.fill_(0.25)
    copy = pickle.load(io.BytesIO(pickle.dumps(pipe)))
    video = _video(2, 3, 2, 8, 8)
    assert torch.equal(copy(video, _rngs(1, 2)), pipe(video, _rngs(1, 2)))


# ------------------------------------------------------------------------------------------------------------------
# Controller


def test_controller_moves_every_fourth_step():
    controller = ada.AdaController()
    sums = (8, 4, 6, 7, 5, 5, 5, 9, 10, 10, 10, 10)
    history = [controller.update(torch.tensor([1.0] * n + [0.0] * (10 - n))) for n in sums]
    # Means over four steps: 0.625, 0.6 exactly, 1.
    np.testing.assert_allclose(
        history, [0, 0, 0, 0.0005, 0.0005, 0.0005, 0.0005, 0.0005, 0.0005, 0.0005, 0.0005, 0.001]
    )


def test_controller_stays_in_range_and_resumes():
    controller = ada.AdaController(speed=0.1)
    sure, unsure = torch.ones(3), torch.tensor([1.0, 0.0, -1.0])
    assert [controller.update(-sure) for _ in range(4)][-1] == 0
    assert [controller.update(sure) for _ in range(8)][-1] == 0.5
    for _ in range(2):
        controller.update(unsure)
    controller.update(torch.tensor([math.nan, 1.0, -1.0]))  # a NaN neither sticks nor turns the scale
    resumed = ada.AdaController(speed=0.1)
    state = controller.state_dict()
    assert all(type(value) in (int, float) for value in state.values())
    assert state == {"p": 0.5, "num_steps": 15, "sign_sum": 0.0, "sign_count": 9}
    resumed.load_state_dict(state)
    assert resumed.update(unsure) == controller.update(unsure) == pytest.approx(0.1)

"""Layers of both stages compared with their definitions."""

import numpy as np
import pytest
import scipy.signal
import torch

from training.longvideogan.layers import kaiser_lowpass, log_uniform
from training.longvideogan.sres.schedule import layer_schedule


def filters() -> list[tuple[int, float, float, float]]:
    """Taps, cutoff, width and sampling rate of every filter of the networks."""
    found = [(12, 1.0, 6.0, 8.0), *((6 * scale, 1.0, 6.0, 4.0 * scale) for scale in (2, 3, 4, 8, 16))]
    for num_filters, low, high in ((128, 125, 5000), (32, 32, 1024), (32, 16, 256)):
        found += [(int(np.ceil(taps)), 2.0, 12.0, 2 * taps) for taps in log_uniform(low, high, num_filters)]
    for layer in layer_schedule(144, 256, 14, 32768, 512, 27, 0) + layer_schedule(72, 128, 8, 2048, 32, 27, 0):
        found.append((layer.up_taps, layer.in_cutoff, 2 * layer.in_half_width, layer.filter_rate))
        found.append((layer.down_taps, layer.out_cutoff, 2 * layer.out_half_width, layer.filter_rate))
    return [entry for entry in found if entry[0] > 1]


def test_lowpass_filters_are_those_of_scipy_bit_for_bit():
    assert len(filters()) > 200
    for num_taps, cutoff, width, rate in filters():
        expected = np.asarray(scipy.signal.firwin(num_taps, cutoff, width=width, fs=rate), np.float32)
        assert torch.equal(kaiser_lowpass(num_taps, cutoff, width, rate), torch.from_numpy(expected)), num_taps


@pytest.mark.parametrize(("width", "branch"), [(0.1, 0), (0.8, 1), (6.0, 2)])
def test_the_window_has_the_shape_that_the_transition_asks_for(width, branch):
    """One case for each branch of Kaiser's formula."""
    attenuation = scipy.signal.kaiser_atten(24, width / 4.0)
    assert (attenuation > 21) + (attenuation > 50) == branch
    expected = np.asarray(scipy.signal.firwin(24, 1.0, width=width, fs=8.0), np.float32)
    assert torch.equal(kaiser_lowpass(24, 1.0, width, 8.0), torch.from_numpy(expected))

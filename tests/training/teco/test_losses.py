"""TECO's loss: which frames and codes enter it, normalisation, and the published fault of the last index."""

import numpy as np
import pytest
import torch

from tests.training.teco import tiny
from training.teco.losses import Draws, losses, masked_share, num_kept, num_masked
from training.teco.networks import TECO


def draws_of(network, num_videos, frames=(0, 3, 6), detached=None, seed=0):
    """Random draws for tiny clips."""
    cells = network.cells[0] * network.cells[1]
    hidden = torch.from_numpy(np.random.RandomState(seed).random_sample((num_videos, len(frames), cells)) < 0.5)
    unknown = torch.zeros(num_videos, dtype=torch.bool)
    share = hidden.sum() / num_videos
    flags = None if detached is None else torch.tensor(detached)
    return Draws(unknown, torch.tensor(frames), flags, hidden, share)


def inputs(num_videos=2):
    x = tiny.codes(num_videos, 8)
    return tiny.tokenizer().quantizer.lookup(x).transpose(1, 2), x, tiny.actions(num_videos, 8)


def test_numbers_of_the_paper():
    assert (num_kept(0.9, 299), num_kept(0.9, 99), num_kept(0, 299), num_kept(0.999, 10)) == (29, 9, 299, 1)
    ratios = (np.arange(1 << 18) + 0.5) / (1 << 18)
    assert num_masked("cosine", ratios, 64).mean() == pytest.approx(40.231, abs=0.01)


def test_unknown_schedules_are_refused():
    with pytest.raises(ValueError, match="the mask schedule 'linear' is unknown: use one of cosine"):
        masked_share("linear", np.zeros(1), 64)


def test_parts_of_a_batch_average_to_the_whole():
    network, (x, codes, moves) = tiny.network(), inputs(4)
    draws = draws_of(network, 4)
    whole = losses(network, x, codes, moves, draws)
    parts = []
    for piece in (slice(0, 2), slice(2, 4)):
        cut = draws._replace(unknown=draws.unknown[piece], hidden=draws.hidden[piece])
        parts.append(losses(network, x[piece], codes[piece], moves[piece], cut))
    assert torch.stack([part.total for part in parts]).mean().item() == pytest.approx(whole.total.item(), rel=1e-5)


def test_the_prior_is_weighted_by_position():
    """The loss is the mean over all hidden codes of the batch, times the number of cells."""
    network, (x, codes, moves) = tiny.network(), inputs(2)
    draws = draws_of(network, 2)
    found = losses(network, x, codes, moves, draws)
    cond, z, quantized = network.posterior(x)
    h = network.predict(cond, z, moves)[:, draws.frames].flatten(0, 1)
    labels = quantized.codes[:, 1:][:, draws.frames].flatten(2).flatten(0, 1)
    hidden = draws.hidden.flatten(0, 1)
    logits = network.prior(labels.masked_fill(hidden, 24), h)
    entropy = torch.nn.functional.cross_entropy(logits[hidden], labels[hidden])
    assert found.trans_loss.mean().item() == pytest.approx(32 * entropy.item(), rel=1e-5)


def test_hidden_actions_are_the_unknown_one():
    network, (x, codes, moves) = tiny.network(), inputs(2)
    draws = draws_of(network, 2)
    hidden = losses(network, x, codes, moves, draws._replace(unknown=torch.tensor([False, True])))
    moves[1] = -1
    given = losses(network, x, codes, moves, draws)
    assert torch.equal(hidden.recon_loss, given.recon_loss)


def test_detached_frames_teach_only_prior_and_decoder():
    x, codes, moves = inputs(2)
    gradients = []
    for detached in ([False, False], [False, True], None):
        network = tiny.network().requires_grad_(True)
        frames = (2, 6) if detached else (2,)
        draws = draws_of(network, 2, frames, detached)
        found = losses(network, x, codes, moves, draws)
        found.total.backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    whole, cut, alone = gradients
    name = "temporal.transformer.head.weight"
    assert not torch.allclose(whole[name], cut[name], rtol=1e-3)
    assert torch.allclose(whole["decoder.out.weight"], cut["decoder.out.weight"], rtol=1e-4, atol=1e-5)
    # What passes through h is that of the other frame alone, weighted by the mean over two.
    assert cut[name].norm() < whole[name].norm() + alone[name].norm()


@pytest.mark.slow
def test_some_clips_are_learned_by_heart():
    """The loss of the decoder comes near the least that smoothed labels allow."""
    torch.manual_seed(0)
    network = TECO(tiny.GRID, 32, 6, **tiny.SIZES)
    codes = torch.arange(16).view(2, 8, 1, 1).expand(-1, -1, *tiny.GRID) + torch.arange(16)  # stripes that move
    x, moves = tiny.tokenizer().quantizer.lookup(codes).transpose(1, 2), tiny.actions(2, 8)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, (0.9, 0.95))
    found = 0.0
    for step in range(300):
        draws = draws_of(network, 2, tuple(np.random.RandomState(step).randint(0, 7, 3)), seed=step)
        terms = losses(network, x, codes, moves, draws)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        found = terms.recon_loss.mean().item()
    rest = 0.01 / 32
    floor = 8 * 16 * -((0.99 + rest) * np.log(0.99 + rest) + 31 * rest * np.log(rest))
    assert floor < found < 2 * floor

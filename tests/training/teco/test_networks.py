"""TECO's networks: published sizes, initial values, causality, selected tokens, and what is refused."""

import math

import pytest
import torch

from tests.training.teco import tiny
from training.teco.layers import KeyValueCache, ResBlock
from training.teco.networks import NULL_ACTION, TECO
from training.teco.presets import PRESETS, WIDTHS

SIZES = {"dmlab": 173_088_944, "minecraft": 271_278_832, "habitat": 384_256_368, "kinetics": 1_091.8e6}
OWN = ("seq_len", "embedding_dim", "num_codes", "z_ds", "use_actions")


def published(name):
    model = PRESETS[name]["model"]
    return TECO(**WIDTHS[name], **{key: model[key] for key in OWN if key in model})


@pytest.mark.parametrize("name", SIZES)
def test_networks_of_the_release_have_their_sizes(name):
    with torch.device("meta"):
        total = sum(parameter.numel() for parameter in published(name).parameters())
    assert total == pytest.approx(SIZES[name], rel=0 if name != "kinetics" else 1e-4)


def test_parts_have_the_sizes_of_the_release():
    with torch.device("meta"):
        network = published("dmlab")

    def size(part):
        return sum(parameter.numel() for parameter in part.parameters())

    found = {"encoder": 10_788_160, "codebook": 36_864, "prior": 26_046_464, "decoder": 23_842_560}
    assert {name: size(network.get_submodule(name)) for name in found} == found
    temporal = network.temporal
    assert size(temporal.transformer) == 102_871_040 and size(temporal.project) == 5_242_880
    assert size(temporal.unproject) == 4_194_304 and temporal.sos.numel() == 1024
    assert network.sos_post.numel() == 65_536 and size(network.action_embeds) == 112


def test_initial_values():
    torch.manual_seed(0)
    network = TECO((16, 16), 64, 32, 16, **WIDTHS["toy"], z_ds=4, action_dim=200)
    block = next(module for module in network.modules() if isinstance(module, ResBlock))
    weights = block.conv1.weight
    assert weights.std().item() == pytest.approx((9 * weights.shape[1]) ** -0.5, rel=0.05)
    assert weights.abs().max() <= 2.3 * (9 * weights.shape[1]) ** -0.5
    layer = network.temporal.transformer.layers[0]
    query, wi = layer.get_submodule("attention.query"), layer.get_submodule("wi")
    assert query.get_parameter("weight").std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert query.get_parameter("weight").abs().max() > 2.5 * 128**-0.5  # not truncated
    assert wi.get_parameter("weight").abs().max() < 2.3 * 128**-0.5
    for value in (network.sos_post, network.prior.token_embed, network.codebook.codebook, network.prior.head.weight):
        assert value.std().item() == pytest.approx(0.02, rel=0.15)
    assert network.action_embeds.weight.std().item() == pytest.approx(0.25, rel=0.1)
    biases = [p for name, p in network.named_parameters() if name.endswith("bias") and "norm" not in name]
    assert all(bias.abs().max() == 0 for bias in biases)


def test_predictions_depend_on_the_past_alone():
    network = tiny.network(n_cond=2)
    x = tiny.tokenizer().quantizer.lookup(tiny.codes(1, 8)).transpose(1, 2)
    cond, z, _ = network.posterior(x)
    moves = tiny.actions(1, 8)
    h = network.predict(cond, z, moves)
    assert h.shape[1] == 6
    for frame in range(2, 8):
        changed = z.clone()
        changed[:, frame - 2] += 1
        differs = (network.predict(cond, changed, moves) != h).flatten(2).any(2)[0]
        assert differs.tolist() == [other > frame for other in range(2, 8)]
    for frame in range(8):
        other = moves.clone()
        other[:, frame] = NULL_ACTION
        differs = (network.predict(cond, z, other) - h).abs().flatten(2).amax(2)[0] > 1e-6
        assert differs.tolist() == [frame > 0 and later >= frame for later in range(2, 8)]


def test_unknown_actions_have_the_last_row_and_absent_ones_the_first():
    network = tiny.network()
    assert torch.equal(network.embed_actions(torch.tensor([[NULL_ACTION]]))[0, 0], network.action_embeds.weight[-1])
    without = tiny.network(use_actions=False)
    found = without.embed_actions(torch.tensor([[3, NULL_ACTION]]))
    assert torch.equal(found, without.action_embeds.weight[:1].expand(1, 2, -1))


def test_fewer_frames_than_trained_are_possible():
    network = tiny.network()
    x = tiny.tokenizer().quantizer.lookup(tiny.codes(2, 8)).transpose(1, 2)
    cond, z, _ = network.posterior(x)
    moves = tiny.actions(2, 8)
    some = network.predict(cond, z[:, :4], moves[:, :5])
    assert torch.allclose(some, network.predict(cond, z, moves)[:, :4], atol=1e-5)


def test_a_full_cache_forgets_its_oldest_tokens():
    cache = KeyValueCache(4)
    tokens = torch.arange(10.0).view(1, 1, 10, 1)
    cache.push(tokens[:, :, :3], tokens[:, :, :3])
    for i in range(3, 10):
        keys, values = cache.push(tokens[:, :, i : i + 1], -tokens[:, :, i : i + 1])
        held = list(range(max(0, i - 3), i + 1))
        assert sorted(keys.flatten().tolist()) == held
        assert all(k == v if k < 3 else k == -v for k, v in zip(keys.flatten(), values.flatten(), strict=True))
    assert cache.keys.shape[2] == 4


def test_positions_beyond_the_trained_length_are_refused():
    network = tiny.network()
    with pytest.raises(ValueError, match="slot 8 lies beyond the trained length of 8 frames.*--positions=rotary"):
        network.temporal.position(8, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z_ds": 3}, "grid of 8x16 does not divide by 2 .depths. x 3"),
        ({"decoder": {"depths": [32], "blocks": 1}}, "the encoder has 2 depths, the decoder 1"),
        ({"temporal": {**tiny.TRANSFORMER, "num_heads": 5}}, "5 heads do not divide a width of 32"),
        ({"encoder": {"depths": [32, 40], "blocks": 1}}, "40 channels: use a multiple of 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TECO(tiny.GRID, 32, 6, **{**tiny.SIZES, **changes})


def test_losses_at_the_start_are_those_of_guessing():
    from tests.training.teco.test_losses import draws_of
    from training.teco.losses import losses

    torch.manual_seed(0)
    network = TECO(tiny.GRID, 32, 6, **tiny.SIZES)
    x = tiny.codes(4, 8)
    embedded = tiny.tokenizer().quantizer.lookup(x).transpose(1, 2)
    found = losses(network, embedded, x, tiny.actions(4, 8), draws_of(network, 4))
    assert found.recon_loss.mean().item() == pytest.approx(8 * 16 * math.log(32), rel=0.15)
    assert found.trans_loss.mean().item() == pytest.approx(4 * 8 * math.log(24), rel=0.05)

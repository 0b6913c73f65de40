"""Tests of linear layers by oneDNN, of fused attention and of the cache of keys and values, against plain torch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from training.modules import linear as module
from training.modules.attention import KeyValueCache, attend, attend_cached, explicit_attention
from training.modules.linear import Linear, PackedLinear, linear, pack_linears


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.skipif(not module.has_onednn(), reason="this build of torch has no oneDNN operators for linear layers")
@pytest.mark.parametrize("shape", [(2048, 128), (4, 512, 128)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_equal_the_reference(shape, bias, monkeypatch):
    monkeypatch.setattr(module, "is_amd", lambda: True)
    x, w, b = random(*shape), random(256, 128, seed=1), random(256, seed=2) if bias else None
    assert x.numel() * len(w) >= module.TRAINED_PRODUCTS
    results = []
    for function in (F.linear, linear):
        leaves = [t.clone().requires_grad_() for t in (x, w, b) if t is not None]
        y = function(*leaves)
        y.square().mean().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert type(y.grad_fn).__name__ == "_LinearBackward"
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_small_products_are_those_of_torch():
    x, w = random(3, 8), random(4, 8, seed=1)
    assert torch.equal(linear(x, w), F.linear(x, w))


def test_layer_has_the_parameters_of_torch():
    torch.manual_seed(0)
    plain = nn.Linear(8, 4)
    torch.manual_seed(0)
    ours = Linear(8, 4)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.big, self.small, self.norm = nn.Linear(512, 512), nn.Linear(512, 8), nn.LayerNorm(512)
        self.heads = nn.ModuleList([nn.Linear(512, 1024, bias=False)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.big(x))
        return torch.cat([self.small(x), self.heads[0](x)], dim=-1)


@pytest.mark.parametrize("rows", [1, 3, 64, 200])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_packed_copy_equals_the_network(rows, dtype, tolerance):
    network = Network()
    state = copy.deepcopy(network.state_dict())
    packed = pack_linears(network, dtype)
    kinds = [type(layer) for layer in packed.modules()]
    assert kinds.count(PackedLinear) == (2 if module.has_onednn(dtype) else 0)
    x = random(2, rows, 512)
    with torch.no_grad():
        expected, found = network(x), packed(x.to(dtype)).float()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_packed_copy_shares_what_is_not_packed():
    network = Network()
    packed = pack_linears(network)
    assert packed.get_parameter("small.weight").data_ptr() == network.small.weight.data_ptr()


@pytest.mark.parametrize("masked", ["none", "causal", "some"])
def test_attention_equals_its_formula(masked):
    q, k, v = (random(2, 6, 16, seed=seed) for seed in range(3))
    mask = {"none": torch.ones(6, 6), "causal": torch.ones(6, 6).tril(), "some": torch.eye(6).roll(1, 0) + torch.eye(6)}
    seen = mask[masked].bool()
    heads = [x.view(2, 6, 4, 4).transpose(1, 2) for x in (q, k, v)]
    logits = (heads[0] @ heads[1].mT / 2).masked_fill(~seen, -torch.inf)
    expected = (logits.softmax(-1) @ heads[2]).transpose(1, 2).reshape(2, 6, 16)
    found = attend(q, k, v, 4, mask=seen if masked == "some" else None, causal=masked == "causal")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("masked", ["none", "causal", "some", "added"])
def test_explicit_attention_has_the_values_and_gradients_of_the_kernel(masked, dtype, error):
    q, k, v, out = (random(2, 3, 6, 8, seed=seed).double() for seed in range(4))
    seen = torch.eye(6).roll(1, 0) + torch.eye(6)
    mask = {"some": seen.bool(), "added": seen.double()}.get(masked)

    def result(attention, dtype):
        given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        rows = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
        found = attention(*given, rows, is_causal=True) if masked == "causal" else attention(*given, rows)
        return [x.double() for x in (found, *torch.autograd.grad(found, given, out.to(dtype)))]

    def explicit(q, k, v, mask, is_causal=False):
        return explicit_attention(q, k, v, mask, is_causal)

    expected = result(torch.nn.functional.scaled_dot_product_attention, torch.float64)
    for found, wanted in zip(result(explicit, dtype), expected, strict=True):
        assert (found - wanted).norm() <= error * wanted.norm()


def test_training_in_half_precision_on_a_cpu_avoids_the_slow_kernel():
    x = random(1, 4, 8).bfloat16().requires_grad_()
    assert "Softmax" in _names_of_graph(attend(x, x, x, 2))
    assert "ScaledDotProduct" in _names_of_graph(attend(x.float(), x.float(), x.float(), 2))


def _names_of_graph(tensor):
    """Return the names of the steps of the backward pass, joined."""
    steps, names = [tensor.grad_fn], []
    while steps:
        step = steps.pop()
        names.append(step.name())
        steps += [other for other, _ in step.next_functions if other is not None]
    return " ".join(names)


def test_attention_without_keys_is_zero():
    q, none = random(2, 3, 8), random(2, 0, 8)
    assert torch.equal(attend(q, none, none, 2), torch.zeros(2, 3, 8))


def test_cache_equals_the_whole_sequence():
    q, k, v = (random(2, 9, 8, seed=seed) for seed in range(3))
    whole = attend(q, k, v, 2, causal=True)
    cache, pieces = KeyValueCache(1, 2, 9, 8, 2, q), []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        keys, values = cache.write(0, k[:, start:stop], v[:, start:stop])
        seen = torch.ones(stop - start, stop).tril(start).bool()
        pieces.append(attend_cached(q[:, start:stop], keys, values, mask=seen))
        cache.advance(stop - start)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    cache.truncate(2)
    assert cache.write(0, k[:, :1], v[:, :1])[0].shape == (2, 2, 3, 4)

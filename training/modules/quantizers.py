"""Vector quantizers of tokenizers, with one interface: latents (N, C, ...) to codes (N, ...) and back.

| class | codebook | source |
|---|---|---|
| `EMAQuantizer` | moving averages of the latents, unused codes restarted | TATS, Ge et al. 2022, section 3.1 |
| `VectorQuantizer` | trained by its own loss | van den Oord et al. 2017, eq. 3; Esser et al. 2021 |
| `CosineQuantizer` | trained, on the unit sphere of a projection | TECO, Yan et al. 2023; Yu et al. 2022, section 3.2 |
| `FiniteScalarQuantizer` | none: each channel is rounded | FSQ, Mentzer et al. 2024 |
| `LookupFreeQuantizer` | none: the sign of each channel | LFQ, Yu et al. 2024, section 3.1 |
| `ContinuousLatents` | none, and no codes: noise in training | Ghosh et al. 2020, section 3 |

Codes are found and used by index: nothing of positions x codes is kept for the gradient, and nothing has codes x codes
entries. Computation is in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils import distributed, misc

SEARCH_ENTRIES = 1 << 24  # distances that are computed together
COMMITMENT = 0.25  # weight of the commitment, in every published system


class Quantized(NamedTuple):
    """The result of quantizing latents (N, C, ...). Losses are weighted; statistics are those of this rank."""

    output: Tensor  # (N, C, ...), whose gradient passes straight to the latents
    codes: Tensor  # int64 (N, ...)
    commitment_loss: Tensor  # ()
    codebook_loss: Tensor  # ()
    entropy_loss: Tensor  # ()
    perplexity: Tensor  # (), of the frequencies of codes
    usage: Tensor  # (), share of the codes that occur

    @property
    def loss(self) -> Tensor:
        """Return the sum of the losses: ()."""
        return self.commitment_loss + self.codebook_loss + self.entropy_loss


class Quantizer(nn.Module):
    """The interface of quantizers, for latents with `channels` channels and `num_codes` codes."""

    num_codes: int
    channels: int

    def forward(self, z: Tensor, rng: np.random.RandomState | None = None) -> Quantized:
        """Quantize latents (N, channels, ...); in training mode a codebook may learn, with random numbers of `rng`."""
        raise NotImplementedError

    def encode(self, z: Tensor) -> Tensor:
        """Return the codes of latents: (N, channels, ...) -> int64 (N, ...)."""
        raise NotImplementedError

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the vectors of codes: int64 (N, ...) -> (N, channels, ...)."""
        raise NotImplementedError


# ----------------------------------------------------------------------------
# Shared operations.


def to_rows(z: Tensor) -> Tensor:
    """Return the vectors of latents as rows: (N, C, ...) -> float32 (positions, C)."""
    return z.movedim(1, -1).flatten(0, -2).float()


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Undo `to_rows` for rows with any number of channels: (positions, D) -> (N, D, ...)."""
    return rows.unflatten(0, (like.shape[0], *like.shape[2:])).movedim(-1, 1)


@torch.no_grad()
def nearest(rows: Tensor, table: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return for each row the index of the entry of `table` with the largest product, less `offset`; first of equals.

    With `offset` half of each entry's squared norm, that is the nearest entry: |z - e|^2 = |z|^2 - 2 (z.e - |e|^2 / 2).
    Rows (R, D) and table (K, D) -> int64 (R,). Memory does not grow with R.
    """
    size = max(1, min(SEARCH_ENTRIES // len(table), len(rows)))
    rows, table = rows.detach(), table.detach()
    products = rows.new_empty(size, len(table))
    found = [torch.empty(0, dtype=torch.int64, device=rows.device)]
    for part in rows.split(size):
        some = products[: len(part)]
        if offset is None:
            torch.mm(part, table.T, out=some)
        else:
            torch.addmm(-offset, part, table.T, out=some)
        found.append(some.argmax(1))
    return torch.cat(found)


def half_norms(table: Tensor) -> Tensor:
    """Return half of the squared norm of each entry, the offset of `nearest`: (K, D) -> (K,)."""
    return torch.linalg.vector_norm(table, dim=1).square() / 2


@torch.enable_grad()
def sums_by_code(rows: Tensor, codes: Tensor, num_codes: int) -> Tensor:
    """Return the sum of the rows of each code: (R, D) and int64 (R,) -> (K, D), as the gradient of a lookup.

    That is faster than index_add, and on GPUs adds in a fixed order.
    """
    table = rows.new_zeros(num_codes, rows.shape[1], requires_grad=True)
    (sums,) = torch.autograd.grad(F.embedding(codes, table), table, rows.detach())
    return sums


def statistics(codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Return the perplexity of the frequencies of codes, exp(-sum p log(p + 1e-10)), and the share that occurs."""
    counts = torch.bincount(codes.flatten(), minlength=num_codes)
    p = counts / max(codes.numel(), 1)
    return (-(p * (p + 1e-10).log()).sum()).exp(), counts.count_nonzero() / num_codes


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """Return `quantized`, with the gradient of `z`."""
    return z + (quantized - z).detach()


# ----------------------------------------------------------------------------
# Codebooks.


class EMAQuantizer(Quantizer):
    """A codebook of moving averages (decay 0.99) of the latents that chose each code; unused codes are restarted.

    Initialised by random latents of the first training batch, which the buffer `initialised` records, so that resuming
    keeps the codebook. A code that was chosen by fewer than `restart_below` latents a batch, on average, is replaced by
    a random latent of the batch, and its averages begin anew.

    Ranks agree on all of this: counts and sums are added over ranks, and random latents are drawn from the batch of
    all ranks, for which `rng` must be in the same state everywhere. With `legacy`, as in the release of TATS, latents
    are drawn from rank 0's part of the batch, also when none is needed, and restarted codes keep their averages, so
    that they are drawn again in every batch until chosen often enough.
    """

    DECAY = 0.99
    EPSILON = 1e-7

    embeddings: Tensor
    N: Tensor
    z_avg: Tensor
    initialised: Tensor

    def __init__(
        self, num_codes: int, channels: int, restart: bool = True, restart_below: float = 1.0, legacy: bool = False
    ) -> None:
        super().__init__()
        self.num_codes, self.channels = num_codes, channels
        self.restart, self.restart_below, self.legacy = restart, restart_below, legacy
        table = torch.randn(num_codes, channels)
        self.register_buffer("embeddings", table)  # (K, C)
        self.register_buffer("N", torch.zeros(num_codes))  # average number of latents a batch, as in the release
        self.register_buffer("z_avg", table.clone())  # average of their sum
        self.register_buffer("initialised", torch.zeros((), dtype=torch.int64))
        self._is_initialised: bool | None = None  # of the buffer, which is read once: reading waits for the device
        self.register_load_state_dict_post_hook(lambda module, _: module.forget())

    def forget(self) -> None:
        """Read the buffer `initialised` again before the next batch; to be called when it was changed."""
        self._is_initialised = None

    def encode(self, z: Tensor) -> Tensor:
        """See `Quantizer.encode`."""
        codes = nearest(to_rows(z), self.embeddings, half_norms(self.embeddings))
        return codes.view(z.shape[0], *z.shape[2:])

    def lookup(self, codes: Tensor) -> Tensor:
        """See `Quantizer.lookup`."""
        return F.embedding(codes, self.embeddings).movedim(-1, 1)

    def forward(self, z: Tensor, rng: np.random.RandomState | None = None) -> Quantized:
        """See `Quantizer.forward`: codes and losses are those of the codebook before it learns from this batch."""
        rows = to_rows(z)
        if self.training:
            self._initialise(rows.detach(), rng)
        codes = self.encode(z)
        found = self.lookup(codes)
        commitment = COMMITMENT * (z.float() - found).square().mean()
        if self.training:
            self._learn(rows.detach(), codes.flatten(), rng)
        zero = commitment.new_zeros(())
        output = straight_through(z.float(), found)
        return Quantized(output, codes, commitment, zero, zero, *statistics(codes, self.num_codes))

    @torch.no_grad()
    def _initialise(self, rows: Tensor, rng: np.random.RandomState | None) -> None:
        if self._is_initialised is None:
            self._is_initialised = bool(self.initialised)
        if not self._is_initialised:
            drawn = self._draw(rows, rng)
            self.embeddings.copy_(drawn)
            self.z_avg.copy_(drawn)
            self.N.fill_(1)
            self.initialised.fill_(1)
            self._is_initialised = True

    @torch.no_grad()
    def _learn(self, rows: Tensor, codes: Tensor, rng: np.random.RandomState | None) -> None:
        """Update the averages and the codebook, then restart unused codes."""
        counts = torch.bincount(codes, minlength=self.num_codes).float()
        sums = sums_by_code(rows, codes, self.num_codes)
        self.N.lerp_(distributed.all_reduce_sum(counts), 1 - self.DECAY)
        self.z_avg.lerp_(distributed.all_reduce_sum(sums), 1 - self.DECAY)
        total = self.N.sum()
        smoothed = (self.N + self.EPSILON) / (total + self.num_codes * self.EPSILON) * total
        torch.div(self.z_avg, smoothed.unsqueeze(1), out=self.embeddings)
        if self.restart or self.legacy:
            drawn = self._draw(rows, rng)
            unused = (self.N < self.restart_below).unsqueeze(1)
        if self.restart:
            torch.where(unused, drawn, self.embeddings, out=self.embeddings)
        if self.restart and not self.legacy:
            torch.where(unused, drawn, self.z_avg, out=self.z_avg)
            self.N.masked_fill_(unused.squeeze(1), 1.0)

    def _draw(self, rows: Tensor, rng: np.random.RandomState | None) -> Tensor:
        """Return random latents of the batch, one for each code: (K, C), equal on all ranks.

        Where the batch has fewer, they are repeated with noise of standard deviation 0.01 / sqrt(C).
        """
        assert rng is not None, "training needs random numbers"
        if self.legacy:
            return self._draw_as_published(rows, rng)
        world = distributed.get_world_size()
        num_rows = len(rows) * world
        repeats = -(-self.num_codes // num_rows)
        chosen = rng.permutation(num_rows * repeats)[: self.num_codes] % num_rows
        local = misc.upload(torch.from_numpy(chosen - distributed.get_rank() * len(rows)), rows.device)
        if world == 1:
            drawn = rows[local]
        else:  # each rank gives the rows that it has
            own = ((local >= 0) & (local < len(rows))).unsqueeze(1)
            drawn = distributed.all_reduce_sum(torch.where(own, rows[local.clamp(0, len(rows) - 1)], 0.0))
        if repeats > 1:  # uniform noise, whose numbers are made much faster than normal ones
            noise = np.frombuffer(rng.bytes(drawn.numel()), np.uint8)
            noise = misc.upload(torch.from_numpy(noise.copy()), rows.device).view(drawn.shape)
            drawn.add_(noise.float().sub_(127.5), alpha=0.01 / math.sqrt(self.channels * (256**2 - 1) / 12))
        return drawn

    def _draw_as_published(self, rows: Tensor, rng: np.random.RandomState) -> Tensor:
        """Return rank 0's random latents, with normal noise."""
        repeats = -(-self.num_codes // len(rows))
        num_rows = len(rows) * repeats
        noise = rng.standard_normal((num_rows, self.channels)) if repeats > 1 else None
        chosen = rng.permutation(num_rows)[: self.num_codes]
        drawn = rows[misc.upload(torch.from_numpy(chosen % len(rows)), rows.device)]
        if noise is not None:
            scaled = (noise[chosen] * (0.01 / math.sqrt(self.channels))).astype(np.float32)
            drawn = drawn + misc.upload(scaled, rows.device)
        return distributed.from_main(drawn)


class VectorQuantizer(Quantizer):
    """A codebook trained by gradients: |sg(z) - e|^2 pulls codes, |z - sg(e)|^2 the latents (VQ-VAE, eq. 3).

    The second, the commitment, has weight 0.25. With `legacy`, the first has it instead: so did taming-transformers
    and all that was trained with it, RIVER included.
    """

    def __init__(self, num_codes: int, channels: int, legacy: bool = False) -> None:
        super().__init__()
        self.num_codes, self.channels = num_codes, channels
        self.weights = (1.0, COMMITMENT) if legacy else (COMMITMENT, 1.0)  # of commitment and codebook
        self.embedding = nn.Embedding(num_codes, channels)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)

    def encode(self, z: Tensor) -> Tensor:
        """See `Quantizer.encode`."""
        table = self.embedding.weight.detach().float()
        return nearest(to_rows(z), table, half_norms(table)).view(z.shape[0], *z.shape[2:])

    def lookup(self, codes: Tensor) -> Tensor:
        """See `Quantizer.lookup`."""
        return self.embedding(codes).movedim(-1, 1)

    def forward(self, z: Tensor, rng: np.random.RandomState | None = None) -> Quantized:
        """See `Quantizer.forward`."""
        z, codes = z.float(), self.encode(z)
        found = self.lookup(codes).float()
        commitment = self.weights[0] * (z - found.detach()).square().mean()
        codebook = self.weights[1] * (z.detach() - found).square().mean()
        zero = z.new_zeros(())
        output = straight_through(z, found)
        return Quantized(output, codes, commitment, codebook, zero, *statistics(codes, self.num_codes))


class CosineQuantizer(Quantizer):
    """A codebook on the unit sphere in a projection of the latents to `projected` channels, as TECO has it.

    p = N(W_in z) and code = argmax p.N(e), where N(v) = v / max(|v|, 1e-6); the output is W_out N(e). Losses are half
    of the mean squared difference of p and N(e), the commitment times 0.25.
    """

    def __init__(self, num_codes: int, channels: int, projected: int = 32) -> None:
        super().__init__()
        self.num_codes, self.channels = num_codes, channels
        self.project_in = nn.Linear(channels, projected, bias=False)
        self.project_out = nn.Linear(projected, channels, bias=False)
        self.codebook = nn.Parameter(torch.randn(num_codes, projected) * 0.02)
        for layer in (self.project_in, self.project_out):
            std = layer.in_features**-0.5 / TRUNCATED_STD
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)

    def _project(self, z: Tensor) -> Tensor:
        return unit(F.linear(to_rows(z), self.project_in.weight.float()))  # (positions, projected)

    def encode(self, z: Tensor) -> Tensor:
        """See `Quantizer.encode`."""
        return nearest(self._project(z), unit(self.codebook.float())).view(z.shape[0], *z.shape[2:])

    def lookup(self, codes: Tensor) -> Tensor:
        """See `Quantizer.lookup`."""
        found = F.embedding(codes, unit(self.codebook.float()))
        return F.linear(found, self.project_out.weight.float()).movedim(-1, 1)

    def forward(self, z: Tensor, rng: np.random.RandomState | None = None) -> Quantized:
        """See `Quantizer.forward`."""
        p, table = self._project(z), unit(self.codebook.float())
        codes = nearest(p, table)
        q = F.embedding(codes, table)
        commitment = COMMITMENT * (p - q.detach()).square().mean() / 2
        codebook = (p.detach() - q).square().mean() / 2
        output = from_rows(F.linear(straight_through(p, q), self.project_out.weight.float()), z)
        codes, zero = codes.view(z.shape[0], *z.shape[2:]), p.new_zeros(())
        return Quantized(output, codes, commitment, codebook, zero, *statistics(codes, self.num_codes))


TRUNCATED_STD = 0.87962566103423978  # standard deviation of a standard normal cut at -2 and 2


def unit(v: Tensor) -> Tensor:
    """Return vectors scaled to norm 1, unless shorter than 1e-6: (..., C) -> (..., C)."""
    return F.normalize(v, dim=-1, eps=1e-6)


# ----------------------------------------------------------------------------
# Without a codebook.


class FiniteScalarQuantizer(Quantizer):
    """FSQ: each of a few channels is squashed by tanh and rounded to one of `levels[i]` values in [-1, 1].

    Latents are projected to len(levels) channels and back where they have another number. There are no losses.
    """

    bases: Tensor
    num_levels: Tensor

    def __init__(self, levels: Sequence[int], channels: int) -> None:
        super().__init__()
        if not levels or min(levels) < 3:
            raise ValueError(f"levels are {list(levels)}: each must be at least 3, such as 8 8 8 5 5 5")
        self.num_codes, self.channels = math.prod(levels), channels
        bases = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("num_levels", torch.tensor(levels), persistent=False)
        self.register_buffer("bases", torch.tensor(bases), persistent=False)
        self.project_in = nn.Linear(channels, len(levels)) if channels != len(levels) else nn.Identity()
        self.project_out = nn.Linear(len(levels), channels) if channels != len(levels) else nn.Identity()

    def _bound(self, z: Tensor) -> Tensor:
        """Return values whose rounding gives all levels, for rows (positions, levels); 0 stays near 0."""
        half = (self.num_levels - 1) * (1 - 1e-3) / 2
        offset = (self.num_levels % 2 == 0) * 0.5  # an even number of levels is not symmetric around 0
        return (z + (offset / half).atanh()).tanh() * half - offset

    def _rounded(self, z: Tensor) -> Tensor:
        return self._bound(self.project_in(to_rows(z)))

    def _to_codes(self, values: Tensor) -> Tensor:
        return ((values + self.num_levels // 2).long() * self.bases).sum(-1)

    def encode(self, z: Tensor) -> Tensor:
        """See `Quantizer.encode`."""
        return self._to_codes(self._rounded(z).round()).view(z.shape[0], *z.shape[2:])

    def lookup(self, codes: Tensor) -> Tensor:
        """See `Quantizer.lookup`."""
        half = self.num_levels // 2
        values = (codes.unsqueeze(-1) // self.bases % self.num_levels - half) / half
        return self.project_out(values).movedim(-1, 1)

    def forward(self, z: Tensor, rng: np.random.RandomState | None = None) -> Quantized:
        """See `Quantizer.forward`."""
        bounded = self._rounded(z)
        rounded = bounded.round()
        codes = self._to_codes(rounded).view(z.shape[0], *z.shape[2:])
        values = straight_through(bounded, rounded) / (self.num_levels // 2)
        zero = bounded.new_zeros(())
        output = from_rows(self.project_out(values), z)
        return Quantized(output, codes, zero, zero, zero, *statistics(codes, self.num_codes))


class LookupFreeQuantizer(Quantizer):
    """LFQ: the signs of `bits` channels are a code; the least significant bit is the first channel.

    The entropy loss is the mean entropy of the positions' codes less the entropy of their mean distribution, times
    `entropy_weight`: each position is to be certain, all together are to use every code. Bits are independent given a
    latent, and the distribution of codes is computed in groups of at most `group_bits` bits, without all 2^bits.
    """

    def __init__(self, bits: int, channels: int, entropy_weight: float = 0.1, group_bits: int = 9) -> None:
        super().__init__()
        self.bits, self.num_codes, self.channels = bits, 1 << bits, channels
        self.entropy_weight, self.group_bits = entropy_weight, group_bits
        self.project_in = nn.Linear(channels, bits) if channels != bits else nn.Identity()
        self.project_out = nn.Linear(bits, channels) if channels != bits else nn.Identity()

    def _to_codes(self, values: Tensor) -> Tensor:
        return ((values > 0).long() << torch.arange(self.bits, device=values.device)).sum(-1)

    def encode(self, z: Tensor) -> Tensor:
        """See `Quantizer.encode`."""
        return self._to_codes(self.project_in(to_rows(z))).view(z.shape[0], *z.shape[2:])

    def lookup(self, codes: Tensor) -> Tensor:
        """See `Quantizer.lookup`."""
        bits = codes.unsqueeze(-1) >> torch.arange(self.bits, device=codes.device) & 1
        return self.project_out(bits.float() * 2 - 1).movedim(-1, 1)

    def entropy_loss(self, values: Tensor) -> Tensor:
        """Return the entropy loss, not weighted, of rows (positions, bits): ()."""
        p = torch.sigmoid(4 * values)  # softmax of -|v - 1|^2 and -|v + 1|^2
        loss = (_entropy(p) + _entropy(1 - p)).sum(1).mean()
        for group in p.split(self.group_bits, dim=1):
            joint = group.new_ones(len(group), 1)
            for bit in group.unbind(1):
                bit = bit.unsqueeze(1)
                joint = torch.cat([joint * (1 - bit), joint * bit], dim=1)  # (positions, 2^bits so far)
            loss = loss - _entropy(joint.mean(0)).sum()
        return loss

    def forward(self, z: Tensor, rng: np.random.RandomState | None = None) -> Quantized:
        """See `Quantizer.forward`."""
        values = self.project_in(to_rows(z))
        signs = torch.where(values > 0, 1.0, -1.0)
        codes = self._to_codes(values).view(z.shape[0], *z.shape[2:])
        commitment = COMMITMENT * (values - signs).square().mean()
        entropy = self.entropy_weight * self.entropy_loss(values)
        output = from_rows(self.project_out(straight_through(values, signs)), z)
        zero = values.new_zeros(())
        return Quantized(output, codes, commitment, zero, entropy, *statistics(codes, self.num_codes))


def _entropy(p: Tensor) -> Tensor:
    return -p * p.clamp(min=1e-10).log()


class ContinuousLatents(Quantizer):
    """Latents that are not quantized: there are no codes, so only systems that model latents can use them.

    In training, Gaussian noise of standard deviation `noise` is added, and mean squares of the latents cost `COST`, so
    that neighbouring latents decode to similar frames (Ghosh et al., "From Variational to Deterministic Autoencoders",
    ICLR 2020, section 3).
    """

    COST = 1e-4

    def __init__(self, channels: int, noise: float = 0.05) -> None:
        super().__init__()
        self.num_codes, self.channels, self.noise = 0, channels, noise

    def encode(self, z: Tensor) -> Tensor:
        """See `Quantizer.encode`; raises `ValueError`."""
        raise ValueError(
            "this tokenizer has continuous latents, no codes: use it for a system that models latents, such as river, "
            "or train one with codes (--quantizer)"
        )

    def lookup(self, codes: Tensor) -> Tensor:
        """See `Quantizer.lookup`; raises `ValueError`."""
        return self.encode(codes)

    def forward(self, z: Tensor, rng: np.random.RandomState | None = None) -> Quantized:
        """See `Quantizer.forward`; noise is the same on all devices."""
        zero, output = z.new_zeros(()), z
        if self.training and self.noise and rng is not None:
            drawn = torch.from_numpy(rng.standard_normal(tuple(z.shape)).astype(np.float32))
            output = z + self.noise * misc.upload(drawn, z.device).to(z.dtype)
        codes = torch.zeros(z.shape[0], *z.shape[2:], dtype=torch.int64, device=z.device)
        return Quantized(output, codes, self.COST * z.float().square().mean(), zero, zero, zero, zero)


# ----------------------------------------------------------------------------
# By name.

KINDS = ("ema", "vq", "cosine", "fsq", "lfq", "none")


def make_quantizer(
    num_codes: int, channels: int, kind: str = "vq", *, restart: bool = True, restart_below: float = 1.0,
    levels: Sequence[int] = (), projected: int = 32, noise: float = 0.05, legacy: bool = False,
) -> Quantizer:  # fmt: skip
    """Return the quantizer of a kind in `KINDS`; settings of other kinds are ignored.

    Raises `ValueError` for an unknown kind and for a number of codes that the kind cannot have.
    """
    if kind == "ema":
        return EMAQuantizer(num_codes, channels, restart, restart_below, legacy)
    if kind == "vq":
        return VectorQuantizer(num_codes, channels, legacy)
    if kind == "cosine":
        return CosineQuantizer(num_codes, channels, projected)
    if kind == "fsq":
        if math.prod(levels) != num_codes:
            raise ValueError(f"levels {list(levels)} make {math.prod(levels)} codes, but there are {num_codes} codes")
        return FiniteScalarQuantizer(levels, channels)
    if kind == "lfq":
        bits = num_codes.bit_length() - 1
        if 1 << bits != num_codes:
            raise ValueError(f"there are {num_codes} codes; LFQ needs a power of two, such as {1 << (bits + 1)}")
        return LookupFreeQuantizer(bits, channels)
    if kind == "none":
        return ContinuousLatents(channels, noise)
    raise ValueError(f"the quantizer {kind!r} is unknown: use one of {', '.join(KINDS)}")

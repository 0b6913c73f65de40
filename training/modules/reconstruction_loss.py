"""The losses of a tokenizer: pixels, perceptual distance, discriminators, their features and the codebook.

TATS (Ge et al., ECCV 2022, eq. 1 and 2, with weights of its release) trains with fixed weights; taming-transformers
(Esser et al., CVPR 2021, eq. 7) weighs its discriminator by the ratio of gradients at the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metrics.detectors.lpips import LPIPS
from training.modules.discriminators import Judged
from training.modules.quantizers import Quantized

# ----------------------------------------------------------------------------
# Terms.


def gan_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss for logits of real and generated inputs: ().

    "hinge": (mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2; "vanilla": the same of log(1 + exp(-real)) and
    log(1 + exp(fake)).
    """
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    if kind == "vanilla":
        return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
    raise ValueError(f"the GAN loss {kind!r} is unknown: use hinge or vanilla")


def feature_matching(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Return the sum over a discriminator's blocks, but for the logits, of mean |fake - real|; real is a constant."""
    pairs = zip(fake[:-1], real[:-1], strict=True)
    return torch.stack([(a - b.detach()).abs().mean() for a, b in pairs]).sum()


def adaptive_weight(reconstruction: Tensor, generator: Tensor, last_layer: Tensor) -> Tensor:
    """Return the weight that gives both losses gradients of equal norm at `last_layer`: (), in [0, 1e4].

    |d reconstruction| / (|d generator| + 1e-4), a constant (Esser et al. 2021, eq. 7).
    """
    norms = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, generator)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach()


class PerceptualLoss(nn.Module):
    """LPIPS as a loss, with the trunk and heads of a loaded `LPIPS`, which stays frozen.

    With `legacy` as TATS trained: features are dropped with probability 0.5 before each head, and images come in
    [-0.5, 0.5], though the network was made for [-1, 1].
    """

    def __init__(self, lpips: LPIPS, legacy: bool = False) -> None:
        super().__init__()
        self.lpips = lpips
        self.gain, self.dropout = (0.5, 0.5) if legacy else (1.0, 0.0)

    def forward(self, a: Tensor, b: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the distance of each pair of images (N, 1 or 3, H, W) in [-1, 1]: (N,).

        In training mode, features are dropped with random numbers of `generator`, which is on their device.
        """
        maps = self.lpips.maps(self.gain * a), self.lpips.maps(self.gain * b)
        distances = []
        for x, y, head in zip(*maps, self.lpips.heads, strict=True):
            difference = (x - y).square()
            if self.dropout and self.training:
                kept = torch.rand(x.shape, generator=generator, device=x.device) >= self.dropout
                difference = difference * kept / (1 - self.dropout)
            distances.append(torch.einsum("nchw,c->n", difference, head) / (x.shape[2] * x.shape[3]))
        return torch.stack(distances).sum(0)


# ----------------------------------------------------------------------------
# All together.


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms; those of discriminators and their features hold once the discriminators have started."""

    l1: float = 4.0
    l2: float = 0.0
    perceptual: float = 4.0
    image_gan: float = 1.0
    video_gan: float = 1.0
    feature_matching: float = 4.0
    gan_loss: str = "hinge"
    start: int = 10000  # step at which the discriminators join
    ramp: int = 0  # steps after it over which the generator's terms grow to their weights
    adaptive: bool = False  # multiply the generator's terms by `adaptive_weight`
    legacy: bool = False  # also run the discriminators before their start, with weight 0

    def share(self, step: int) -> float:
        """Return the share of the weights of the generator's GAN terms at a step, counted from 0."""
        if step < self.start:
            return 0.0
        return min((step - self.start + 1) / self.ramp, 1.0) if self.ramp else 1.0


Terms = dict[str, Tensor]
Judge = Callable[[Tensor], Judged]


class ReconstructionLoss(nn.Module):
    """The losses of generator and discriminators for clips in the units of the network, `scale` times [-1, 1].

    Discriminators that are None, or whose weight is 0, judge nothing. The perceptual loss and the frame discriminator
    see one frame of each clip.
    """

    def __init__(
        self, weights: LossWeights, perceptual: PerceptualLoss | None, image: nn.Module | None, video: nn.Module | None,
        scale: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.weights, self.scale = weights, scale
        self.perceptual, self.image, self.video = perceptual, image, video

    def _judges(self, x: Tensor, frames: Tensor) -> dict[str, tuple[float, nn.Module, Tensor]]:
        """Return, by name, the weight of each discriminator, itself, and what it sees of clips (N, C, T, H, W)."""
        w = self.weights
        found = {
            "image": (w.image_gan, self.image, pick_frames(x, frames)),
            "video": (w.video_gan, self.video, x),
        }
        return {
            name: (weight, judge, seen)
            for name, (weight, judge, seen) in found.items()
            if judge is not None and (weight or w.legacy)
        }

    def generator(
        self, x: Tensor, reconstruction: Tensor, quantized: Quantized, frames: Tensor, step: int,
        last_layer: Tensor | None = None, generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Terms]:  # fmt: skip
        """Return the loss of the autoencoder for clips (N, C, T, H, W), and its terms.

        `frames` (N,) is the frame of each clip that frame networks see. `last_layer` is the weight that an adaptive
        weight is computed at, `generator` that of the perceptual loss.
        """
        w, share = self.weights, self.weights.share(step)
        terms = {"recon_loss": self.distances(x, reconstruction).mean()}
        if self.perceptual is not None and w.perceptual:
            pair = pick_frames(x, frames) / self.scale, pick_frames(reconstruction, frames) / self.scale
            terms["perceptual_loss"] = w.perceptual * self.perceptual(*pair, generator).mean()
        fitted = torch.stack(list(terms.values())).sum()
        loss = fitted + quantized.loss
        terms |= {"commitment_loss": quantized.commitment_loss, "codebook_loss": quantized.codebook_loss}
        terms |= {"entropy_loss": quantized.entropy_loss} if quantized.entropy_loss.requires_grad else {}
        if share or w.legacy:
            adversarial, more = self._adversarial(x, reconstruction, frames, fitted, last_layer)
            terms |= more
            loss = loss + share * adversarial
        return loss, terms

    def distances(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        """Return the weighted absolute and squared differences of each clip (N, ...): (N,)."""
        difference = (reconstruction - x).flatten(1)
        found = self.weights.l1 * difference.abs().mean(1)
        return found + self.weights.l2 * difference.square().mean(1) if self.weights.l2 else found

    def _adversarial(
        self, x: Tensor, reconstruction: Tensor, frames: Tensor, fitted: Tensor, last_layer: Tensor | None
    ) -> tuple[Tensor, Terms]:
        """Return the sum of the weighted terms of the discriminators, and the single ones."""
        w, terms = self.weights, {}
        fakes = {
            name: (c, judge, judge(seen)) for name, (c, judge, seen) in self._judges(reconstruction, frames).items()
        }
        total = x.new_zeros(())
        for name, (weight, _, fake) in fakes.items():
            terms[f"g_{name}_loss"] = -fake.logits.mean()
            total = total + weight * terms[f"g_{name}_loss"]
        if w.adaptive and total.requires_grad:
            assert last_layer is not None, "an adaptive weight needs the last layer"
            terms["adaptive_weight"] = adaptive_weight(fitted, total, last_layer)
            total = total * terms["adaptive_weight"]
        for name, (weight, judge, real) in self._judges(x, frames).items():
            if weight and (w.feature_matching or w.legacy):
                with torch.no_grad():
                    judged = judge(real)
                terms[f"{name}_gan_feat_loss"] = feature_matching(fakes[name][2].features, judged.features)
                total = total + w.feature_matching * terms[f"{name}_gan_feat_loss"]
        return total, terms

    def discriminator(self, x: Tensor, reconstruction: Tensor, frames: Tensor, step: int) -> tuple[Tensor, Terms]:
        """Return the loss of the discriminators for clips and their reconstructions, which get no gradient.

        Before the start it is 0 without a graph, with `legacy` 0 with zero gradients.
        """
        w, terms = self.weights, {}
        total = x.new_zeros(())
        started = step >= w.start
        if not started and not w.legacy:
            return total, terms
        reals = {name: (c, judge, judge(seen)) for name, (c, judge, seen) in self._judges(x, frames).items()}
        for name, (_, judge, seen) in self._judges(reconstruction.detach(), frames).items():
            weight, _, real = reals[name]
            fake = judge(seen)
            terms[f"logits_{name}_real"], terms[f"logits_{name}_fake"] = real.logits.mean(), fake.logits.mean()
            terms[f"d_{name}_loss"] = gan_loss(w.gan_loss, real.logits, fake.logits)
            total = total + float(started) * weight * terms[f"d_{name}_loss"]
        return total, terms


def pick_frames(x: Tensor, frames: Tensor) -> Tensor:
    """Return one frame of each clip: (N, C, T, H, W) and numbers (N,) -> (N, C, H, W)."""
    return x[torch.arange(len(x), device=x.device), :, frames]

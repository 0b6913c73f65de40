"""The losses of tokenizers: published LPIPS, the formulas, the start of discriminators."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from metrics.detectors.lpips import ALEX, LPIPS, VGG
from tests import golden_files
from training.modules.discriminators import PatchDiscriminator
from training.modules.quantizers import EMAQuantizer
from training.modules.reconstruction_loss import (
    LossWeights,
    PerceptualLoss,
    ReconstructionLoss,
    adaptive_weight,
    feature_matching,
    gan_loss,
)

# Names of VGG16's convolutions in the release: slice and number in torchvision's list.
VGG_NAMES = [
    f"perceptual_model.net.slice{part}.{number}"
    for part, numbers in enumerate(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), 1)
    for number in numbers
]


def golden_lpips(salt=0):
    """LPIPS with the weights of the golden numbers."""
    lpips = LPIPS(VGG)
    state = {}
    for i, name in enumerate(VGG_NAMES):
        for leaf in ("weight", "bias"):
            value = lpips.get_parameter(f"convs.{i}.{leaf}")
            state[f"convs.{i}.{leaf}"] = golden_files.wave_values(f"{name}.{leaf}", value, salt)
    for i, head in enumerate(lpips.heads):
        name = f"perceptual_model.lin{i}.model.1.weight"
        state[f"heads.{i}"] = golden_files.wave_values(name, head.view(1, -1, 1, 1), salt).flatten()
    lpips.load_state_dict(state)
    return lpips


@golden_files.entries("tats", "lpips*")
@torch.no_grad()
def test_published_lpips(entry, golden):
    lpips = golden_lpips(golden_files.salt_of(golden))
    loss = PerceptualLoss(lpips, legacy=True).eval()
    a, b = (golden_files.wave_of(entry[name], entry["shape"]) for name in "ab")
    for found, expected in zip(lpips.features(a), entry["taps_a"], strict=True):
        golden_files.check(found, expected, where="tap")
    golden_files.check(loss(2 * a, 2 * b), entry["value"], where="value")
    if "value_1ch_32x32" in entry:
        a, b = (golden_files.wave_of(entry[name], (1, 1, 32, 32)) for name in "ab")
        golden_files.check(loss(2 * a, 2 * b), entry["value_1ch_32x32"], where="one channel")


@pytest.mark.parametrize("trunk", [ALEX, VGG], ids=["alex", "vgg"])
def test_perceptual_loss_is_the_metric(trunk):
    torch.manual_seed(0)
    lpips = LPIPS(trunk)
    for head in lpips.heads:
        head.copy_(torch.rand_like(head))
    a, b = torch.rand(2, 2, 3, 40, 40) * 2 - 1
    loss = PerceptualLoss(lpips).train()
    torch.testing.assert_close(loss(a, b), lpips.distance(a, b))
    a.requires_grad_(True)
    loss(a, b).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all() and a.grad.abs().sum() > 0
    assert torch.equal(PerceptualLoss(lpips, legacy=True).eval()(a, b), lpips(a / 2, b / 2))
    legacy = PerceptualLoss(lpips, legacy=True).train()
    assert not torch.equal(legacy(a, b), legacy(a, b)), "features are dropped"


def test_gan_losses():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.25])
    assert gan_loss("hinge", real, fake).item() == pytest.approx((2.5 / 3 + 1.25 / 2) / 2)
    vanilla = (np.log1p(np.exp(-real.numpy())).mean() + np.log1p(np.exp(fake.numpy())).mean()) / 2
    assert gan_loss("vanilla", real, fake).item() == pytest.approx(vanilla, rel=1e-6)
    with pytest.raises(ValueError, match="use hinge or vanilla"):
        gan_loss("wasserstein", real, fake)


def test_feature_matching_leaves_out_the_logits():
    fake = [torch.ones(2, 3), torch.zeros(4), torch.full((2,), 100.0)]
    real = [torch.zeros(2, 3), torch.full((4,), 2.0, requires_grad=True), torch.zeros(2)]
    assert feature_matching(fake, real) == 3
    assert not feature_matching(fake, real).requires_grad


def test_adaptive_weight_is_the_ratio_of_gradients():
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = adaptive_weight((3 * layer).sum(), (layer * torch.tensor([0.0, -0.5])).sum(), layer)
    assert weight.item() == pytest.approx(3 * 2**0.5 / (0.5 + 1e-4), rel=1e-5)
    assert not weight.requires_grad


def setting(**weights):
    """A loss with small discriminators, a clip, its reconstruction and its quantized latents."""
    torch.manual_seed(0)
    image, video = PatchDiscriminator(2, width=2), PatchDiscriminator(3, width=2)
    loss = ReconstructionLoss(LossWeights(start=5, **weights), None, image, video)
    x, z = torch.rand(2, 3, 4, 16, 16) - 0.5, torch.randn(2, 4, 3)
    rec = (x + 0.1 * torch.randn_like(x)).requires_grad_(True)
    quantized = EMAQuantizer(4, 4)(z, np.random.RandomState(0))
    return SimpleNamespace(loss=loss, x=x, rec=rec, quantized=quantized, frames=torch.tensor([3, 1]))


def generator(s, step, **more):
    return s.loss.generator(s.x, s.rec, s.quantized, s.frames, step, **more)


def test_discriminators_join_at_their_start():
    s = setting()
    loss, terms = generator(s, 4)
    assert terms.keys() == {"recon_loss", "commitment_loss", "codebook_loss"}
    torch.testing.assert_close(loss, 4 * (s.rec - s.x).abs().mean() + s.quantized.commitment_loss)
    assert not s.loss.discriminator(s.x, s.rec, s.frames, 4)[0].requires_grad
    counts = [v for k, v in s.loss.image.state_dict().items() if k.endswith("tracked")]
    assert not any(counts), "they are not even run"
    joined, terms = generator(s, 5)
    parts = [terms[f"g_{name}_loss"] + 4 * terms[f"{name}_gan_feat_loss"] for name in ("image", "video")]
    torch.testing.assert_close(joined, loss + sum(parts))
    d_loss, terms = s.loss.discriminator(s.x, s.rec, s.frames, 5)
    torch.testing.assert_close(d_loss, terms["d_image_loss"] + terms["d_video_loss"])
    d_loss.backward()
    assert s.rec.grad is None


def test_terms_of_discriminators_grow_over_the_ramp():
    assert [LossWeights(start=2, ramp=4).share(step) for step in range(7)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [LossWeights(start=2).share(step) for step in range(4)] == [0, 0, 1, 1]


def test_legacy_discriminators_run_before_their_start():
    s = setting(legacy=True)
    plain = setting()
    loss, terms = generator(s, 0)
    assert {"g_image_loss", "g_video_loss", "image_gan_feat_loss", "video_gan_feat_loss"} <= terms.keys()
    torch.testing.assert_close(loss, generator(plain, 0)[0])
    d_loss, _ = s.loss.discriminator(s.x, s.rec, s.frames, 0)
    d_loss.backward()
    assert d_loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in s.loss.parameters())


def test_frame_networks_see_one_frame_of_each_clip():
    s = setting()
    _, terms = generator(s, 9)
    assert s.loss.image is not None
    s.loss.eval()
    _, terms = generator(s, 9)
    frames = torch.stack([s.rec[0, :, 3], s.rec[1, :, 1]])
    torch.testing.assert_close(terms["g_image_loss"], -s.loss.image(frames).logits.mean())


def test_weights_of_zero_leave_discriminators_out():
    s = setting(image_gan=0.0, feature_matching=0.0)
    _, terms = generator(s, 9)
    assert terms.keys() == {"recon_loss", "commitment_loss", "codebook_loss", "g_video_loss"}
    _, terms = s.loss.discriminator(s.x, s.rec, s.frames, 9)
    assert "d_image_loss" not in terms


def test_adaptive_weight_multiplies_the_generators_term():
    s = setting(adaptive=True, image_gan=0.0, feature_matching=0.0, l2=1.0)
    layer = torch.ones(3, requires_grad=True)
    s.rec = s.rec.detach() * layer.view(3, 1, 1, 1)
    loss, terms = generator(s, 9, last_layer=layer)
    fitted = 4 * (s.rec - s.x).abs().mean() + F.mse_loss(s.rec, s.x)
    torch.testing.assert_close(terms["recon_loss"], fitted)
    torch.testing.assert_close(loss, fitted + s.quantized.loss + terms["adaptive_weight"] * terms["g_video_loss"])

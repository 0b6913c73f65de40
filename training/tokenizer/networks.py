"""Build the networks of a run from its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metrics.detectors import lpips
from training.modules.autoencoder import Autoencoder
from training.modules.conv_autoencoder import ConvAutoencoder
from training.modules.discriminators import PatchDiscriminator
from training.modules.reconstruction_loss import LossWeights, PerceptualLoss
from training.modules.vqgan2d import VQGAN2D, RiverVQVAE
from training.modules.vqgan3d import VQGAN3D

if TYPE_CHECKING:
    from training.tokenizer.options import TokenizerOptions

NETWORKS: dict[str, type[Autoencoder]] = {
    "vqgan3d": VQGAN3D, "vqgan2d": VQGAN2D, "river-vqvae": RiverVQVAE, "conv2d": ConvAutoencoder,
}  # fmt: skip


def make_tokenizer(options: TokenizerOptions) -> Autoencoder:
    """Return the autoencoder that the options describe; raises `ValueError` for arguments that make none."""
    arguments: dict[str, Any] = {
        "height": options.height,
        "width": options.width,
        "clip_frames": options.clip_frames,
        **options.arguments,
        "quantizer": {**options.quantizer, "legacy": options.legacy} if options.legacy else options.quantizer,
    }
    try:
        return NETWORKS[options.network](**arguments)
    except TypeError as error:
        raise ValueError(f"the network {options.network} does not take these arguments ({error})") from error


def make_discriminators(options: TokenizerOptions) -> tuple[PatchDiscriminator | None, PatchDiscriminator | None]:
    """Return the discriminators of frames and of clips, None where they have no weight; all with `legacy`."""
    channels = options.arguments.get("channels", 3)
    made = []
    for axes, weight in ((2, options.image_gan_weight), (3, options.video_gan_weight)):
        wanted = weight > 0 or options.legacy
        size = axes, channels, options.disc_channels, options.disc_layers
        made.append(PatchDiscriminator(*size) if wanted else None)
    return made[0], made[1]


def load_perceptual(options: TokenizerOptions) -> PerceptualLoss | None:
    """Return the perceptual loss with the weights in the cache; raises `ValueError` if they are not there."""
    if options.lpips == "none" or options.perceptual_weight == 0:
        return None
    network = lpips.load_vgg() if options.lpips == "vgg" else lpips.load_alex()
    return PerceptualLoss(network, options.legacy)


def loss_weights(options: TokenizerOptions) -> LossWeights:
    """Return the weights of the losses."""
    return LossWeights(
        l1=options.l1_weight, l2=options.l2_weight, perceptual=options.perceptual_weight, legacy=options.legacy,
        image_gan=options.image_gan_weight, video_gan=options.video_gan_weight, gan_loss=options.gan_loss,
        feature_matching=options.feature_weight, start=options.gan_start, ramp=options.gan_ramp,
        adaptive=options.adaptive,
    )  # fmt: skip

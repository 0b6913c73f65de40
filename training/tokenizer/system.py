"""Training of tokenizers: an autoencoder and its discriminators in turn.

TATS (Ge et al., ECCV 2022, section 3.1 and its release) for clips; with `adaptive`, taming-transformers (Esser et al.,
CVPR 2021, section 3.1) for frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import distributed, misc
from training import optim
from training.charts import ChartSpec
from training.command_line import Parsed
from training.config import TrainOptions
from training.contract import Batch, BatchSpec, Bundle, Flag, FrameClip, Info, Inputs, Run, System, option
from training.data.codes import MAX_VOCABULARY
from training.modules.quantizers import KINDS, Quantized
from training.modules.reconstruction_loss import LossWeights, ReconstructionLoss, pick_frames
from training.random import random_state
from training.sampling import Sampler
from training.tokenizer import networks
from training.tokenizer.sampling import Reconstruction

BETAS = (0.5, 0.9)  # of both optimisers, as published


def parse_integers(text: str) -> list[int]:
    """Parse "4,8,8" as a list."""
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"{text!r} is not a list of whole numbers, such as 4,8,8")
    return [int(part) for part in parts]


INTEGERS = Parsed("N,N,...", parse_integers)


def argument(help: str, name: str, kind: Any = int, low: float | None = 1) -> Flag:
    """Return the flag of an argument of the network."""
    return Flag(help, name=f"--{name.replace('_', '-')}", kind=kind, sets=(f"arguments.{name}",), low=low)


@dataclasses.dataclass
class TokenizerOptions:
    """Options of a run. The defaults are those of the published 3-D VQGAN of TATS."""

    network: str = option("vqgan3d", "Kind of network", kind=tuple(networks.NETWORKS))
    height: int = option(128, "Frame size, such as 128x128", name="--size", kind="size", sets=("height", "width"))
    width: int = option(128, "")
    clip_frames: int = option(16, "Frames of a clip, which are encoded together", low=1)
    frame_stride: int = option(1, "Take every n-th frame of the dataset", low=1)
    arguments: dict[str, Any] = option(
        dict, "",
        argument("Number of codes", "num_codes", low=2),
        argument("Width of a code", "embedding_dim"),
        argument("Strides of the 3-D network in frames, height and width", "downsample", INTEGERS, None),
        argument("Width of the 3-D network's first level", "hidden"),
        argument("Norm of the 3-D network", "norm", ("batch", "group"), None),
        argument("Width of the 2-D network's first level", "ch"),
        argument("Widths of the 2-D network's levels, in multiples of --ch", "ch_mult", INTEGERS, None),
        argument("Residual blocks at each level of the 2-D network", "num_res_blocks"),
        factory=True,
    )  # fmt: skip
    quantizer: dict[str, Any] = option(
        lambda: {"kind": "ema"}, "",
        Flag("Kind of codebook", name="--quantizer", kind=KINDS, sets=("quantizer.kind",)),
        Flag("Replace codes that are not used", name="--restart", kind=bool, sets=("quantizer.restart",)),
        Flag("Levels of FSQ, such as 8,8,8,5,5,5", name="--levels", kind=INTEGERS, sets=("quantizer.levels",)),
        factory=True,
    )  # fmt: skip
    lr: float = option(9e-5, "Learning rate of both optimisers", low=0)
    warmup_steps: int = option(0, "Steps over which it rises from 0", low=0)
    clip_norm: float = option(1.0, "Largest norm of each optimiser's gradient; 0: any", low=0)
    l1_weight: float = option(4.0, "Weight of absolute differences", low=0)
    l2_weight: float = option(0.0, "Weight of squared differences", low=0)
    perceptual_weight: float = option(4.0, "Weight of LPIPS", low=0)
    lpips: str = option("vgg", "Network of LPIPS", kind=("vgg", "alex", "none"))
    image_gan_weight: float = option(1.0, "Weight of the discriminator of frames", low=0)
    video_gan_weight: float = option(1.0, "Weight of the discriminator of clips", low=0)
    feature_weight: float = option(4.0, "Weight of matching the discriminators' features", low=0)
    gan_loss: str = option("hinge", "Loss of the discriminators", kind=("hinge", "vanilla"))
    gan_start: int = option(10000, "Step at which the discriminators join", low=0)
    gan_ramp: int = option(0, "Steps over which their terms then grow", low=0)
    adaptive: bool = option(False, "Weigh the generator's GAN terms by the ratio of gradients")
    disc_channels: int = option(64, "Width of the discriminators' first level", low=1)
    disc_layers: int = option(3, "Levels of the discriminators", low=1)
    legacy: bool = option(False, "Train exactly as published, with the faults that the README lists")

    def loss_weights(self) -> LossWeights:
        """Return the weights of the losses."""
        return LossWeights(
            l1=self.l1_weight, l2=self.l2_weight, perceptual=self.perceptual_weight, image_gan=self.image_gan_weight,
            video_gan=self.video_gan_weight, feature_matching=self.feature_weight, gan_loss=self.gan_loss,
            start=self.gan_start, ramp=self.gan_ramp, adaptive=self.adaptive, legacy=self.legacy,
        )  # fmt: skip


class TokenizerTraining(System):
    """Train a tokenizer: an autoencoder of frames or clips whose latents are codes.

    python train.py tokenizer --dataset=data/labdoom --preset=toy
    """

    Options = TokenizerOptions
    flips = True
    charts = (
        ChartSpec("Reconstruction", {"loss/recon_loss": "pixels", "loss/perceptual_loss": "LPIPS"}, log=True),
        ChartSpec("Perplexity of codes", {"codebook/perplexity": "perplexity"}, log=True),
        ChartSpec("Discriminators", {"loss/d_image_loss": "frames", "loss/d_video_loss": "clips"}),
    )

    def __init__(self, options: TokenizerOptions, run: Run):
        super().__init__(options, run)
        self.network = optim.seeded(run.seed, lambda: networks.make_tokenizer(options)).to(run.device)
        image, video = optim.seeded(run.seed + 1, lambda: networks.make_discriminators(options))
        perceptual = self.load_perceptual()
        self.loss = ReconstructionLoss(options.loss_weights(), perceptual, image, video, self.network.scale)
        self.loss.to(run.device)
        self.discriminators = nn.ModuleList([judge for judge in (image, video) if judge is not None])
        self.modules = {"tokenizer": self.network}
        self.modules |= {"image_discriminator": image} if image is not None else {}
        self.modules |= {"video_discriminator": video} if video is not None else {}
        self.optimizers = {"tokenizer": optim.make_adam(self.network, options.lr, BETAS)}
        if self.discriminators:
            self.optimizers["discriminators"] = optim.make_adam(self.discriminators, options.lr, BETAS)
        self.frozen = {"lpips": perceptual.lpips} if perceptual is not None else {}
        self.schedule = optim.Schedule(options.lr, warmup=options.warmup_steps)
        self.modules_of_training = [self.network, *self.discriminators]

    def load_perceptual(self):
        """Return the perceptual loss, None without."""
        return networks.load_perceptual(self.options)

    @classmethod
    def check(cls, options: TokenizerOptions, train_options: TrainOptions) -> None:
        """See `System.check`."""
        optim.check_options(options, above_zero=("lr",))
        with torch.device("meta"):
            network = networks.make_tokenizer(options)
        num_codes = network.vocabulary
        if num_codes > MAX_VOCABULARY:
            raise ValueError(f"--num-codes is {num_codes}; codes are stored as numbers below {MAX_VOCABULARY}")
        frames, pixels = network.stride
        if options.clip_frames % frames:
            raise ValueError(f"--clip-frames is {options.clip_frames}; the stride of {frames} frames must divide it")
        if options.height % pixels or options.width % pixels:
            raise ValueError(f"--size is {options.height}x{options.width}; the stride of {pixels} must divide it")
        strides = options.arguments.get("downsample")
        if strides and strides[1] != strides[2]:
            raise ValueError(f"--downsample is {strides}; the strides of height and width must be equal")

    def inputs(self) -> Inputs:
        """See `System.inputs`."""
        return Inputs(sizes=((self.options.height, self.options.width),))

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """See `System.batch_spec`."""
        o = self.options
        clip = FrameClip("clip", o.height, o.width, first=0, count=o.clip_frames, stride=o.frame_stride)
        return [BatchSpec((o.clip_frames - 1) * o.frame_stride + 1, (clip,))]

    # ---- Random numbers ---------------------------------------------------------------------------------------------

    def draw_frames(self, step: int, num_frames: int) -> np.ndarray:
        """Return the frame of each clip that frame networks see: (clips, 2), of the generator's pass and the other."""
        return np.array([rng.randint(num_frames, size=2) for rng in self.run.rngs("tokenizer-frames", step)])

    def codebook_rng(self, step: int, part: str) -> np.random.RandomState:
        """Return the generator of a codebook in one forward pass, the same on all ranks."""
        return random_state("train-codebook", self.run.seed, f"{step}:{part}")

    def dropout_generator(self, step: int, part: str) -> torch.Generator:
        """Return the generator of this rank's perceptual loss in one forward pass."""
        seed = random_state("train-lpips", self.run.seed, f"{step}:{part}:{distributed.get_rank()}").randint(1 << 30)
        return torch.Generator(self.run.device).manual_seed(int(seed))

    # ---- Steps ------------------------------------------------------------------------------------------------------

    def step(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """See `System.step`: in each round the autoencoder's pass, then that of the discriminators.

        Both share one forward of the autoencoder. With `legacy` the discriminators' pass has its own, in the last round
        after the autoencoder's optimiser step.
        """
        clips = next(batches)["clip"].to(next(self.network.parameters())) * self.network.scale
        drawn = self.draw_frames(step, clips.shape[2])
        frames = misc.upload(torch.from_numpy(drawn.astype(np.int64)), clips.device)  # (clips, 2)
        report, legacy = optim.Report(), self.options.legacy
        rate = self.schedule.at(step)
        for optimizer in self.optimizers.values():
            self.schedule.apply(optimizer, step)
            optimizer.zero_grad(set_to_none=True)
        for module in self.modules_of_training:
            module.train().requires_grad_(False)
        rounds, judged = self.run.rounds(), False
        for number, piece in enumerate(rounds):
            is_last = number == len(rounds) - 1
            made = self.generator_pass(clips[piece], frames[piece, 0], step, number, report)
            if is_last and legacy:
                self.apply("tokenizer", self.network, report)
            judged |= self.discriminator_pass(clips[piece], made, frames[piece, 1], step, number, report)
            if is_last and not legacy:
                self.apply("tokenizer", self.network, report)
            if is_last and judged:
                self.apply("discriminators", self.discriminators, report)
        report.add("progress", rate=torch.tensor(rate))
        return report.values()

    def reconstruct(self, x: Tensor, step: int, part: str) -> tuple[Tensor, Quantized]:
        """Return the reconstruction of clips and their codes, by a forward pass that also teaches the codebook."""
        return self.network(x, self.codebook_rng(step, part))

    def generator_pass(self, x: Tensor, frames: Tensor, step: int, number: int, report: optim.Report) -> Tensor:
        """Add the gradients of the autoencoder for the clips of a round; return their reconstruction."""
        self.network.requires_grad_(True)
        made, quantized = self.reconstruct(x, step, f"{number}")
        generator = self.dropout_generator(step, f"{number}") if self.options.legacy else None
        loss, terms = self.loss.generator(x, made, quantized, frames, step, self.network.last_layer, generator)
        loss.backward()
        self.network.requires_grad_(False)
        report.add("loss", **terms, loss=loss)
        report.add("codebook", perplexity=quantized.perplexity, usage=quantized.usage)
        return made.detach()

    def discriminator_pass(
        self, x: Tensor, made: Tensor, frames: Tensor, step: int, number: int, report: optim.Report
    ) -> bool:
        """Add the gradients of the discriminators for the clips of a round; return whether there are any."""
        if self.options.legacy:
            with torch.no_grad():
                made, _ = self.reconstruct(x, step, f"{number}-again")
        self.discriminators.requires_grad_(True)
        loss, terms = self.loss.discriminator(x, made, frames, step)
        if loss.requires_grad:
            loss.backward()
        self.discriminators.requires_grad_(False)
        report.add("loss", **(terms | {"d_loss": loss} if terms else {}))
        return loss.requires_grad

    def apply(self, name: str, module: nn.Module, report: optim.Report) -> None:
        """Take the step of one optimiser."""
        limit, gain = self.options.clip_norm or None, 1 / self.run.grad_accum
        num_nonfinite, norm = optim.apply_gradients(module.parameters(), self.optimizers[name], gain, limit)
        report.add("progress", **{f"{name}_grad_norm": norm, f"{name}_nonfinite_gradients": num_nonfinite.float()})

    @torch.no_grad()
    def validate(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """See `System.validate`."""
        x = next(batches)["clip"].to(next(self.network.parameters())) * self.network.scale
        for module in self.modules_of_training:
            module.eval()
        made, quantized = self.network(x)
        found = {"loss/recon_loss": self.options.l1_weight * (made - x).abs().mean((1, 2, 3, 4))}
        if self.loss.perceptual is not None:
            middle = torch.full((len(x),), x.shape[2] // 2, device=x.device)
            pair = (pick_frames(clips, middle) / self.network.scale for clips in (x, made))
            was = self.loss.perceptual.training
            self.loss.perceptual.eval()
            found["loss/perceptual_loss"] = self.options.perceptual_weight * self.loss.perceptual(*pair)
            self.loss.perceptual.train(was)
        found["loss/commitment_loss"] = quantized.commitment_loss.reshape(1)
        return found | {"perplexity": quantized.perplexity.reshape(1)}

    # ---- Results ----------------------------------------------------------------------------------------------------

    def init_from(self, weights: Bundle | Mapping[str, Mapping[str, Tensor]]) -> None:
        """See `System.init_from`: a file of a tokenizer leaves the discriminators as they are."""
        if isinstance(weights, Bundle):
            weights = {"tokenizer": next(iter(weights.networks.values())).state_dict()}
        optim.load_weights(self.modules, weights)

    def sampler(self) -> Sampler:
        """See `System.sampler`."""
        self.network.eval()
        return Reconstruction(self.network)

    def export(self) -> Bundle:
        """See `System.export`."""
        return Bundle({"tokenizer": self.network}, "tokenizer")

    def info(self) -> Info:
        """See `System.info`."""
        return Info(status=("codebook/perplexity",), charts=self.charts, preview_frames=32)

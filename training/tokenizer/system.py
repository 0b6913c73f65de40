"""Training of tokenizers: an autoencoder and its discriminators in turn.

TATS (Ge et al., ECCV 2022, section 3.1 and its release) for clips; with `adaptive`, taming-transformers (Esser et al.,
CVPR 2021, section 3.1) for frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import distributed, misc
from training import optim
from training.charts import ChartSpec
from training.config import TrainOptions
from training.contract import Batch, BatchSpec, Bundle, FrameClip, Info, Inputs, Part, Run, Stream, System
from training.data.codes import MAX_VOCABULARY
from training.data.spectrograms import SIZE as AUDIO_SIZE
from training.data.spectrograms import images_of
from training.modules.quantizers import Quantized
from training.modules.reconstruction_loss import ReconstructionLoss, pick_frames
from training.random import random_state
from training.sampling import Sampler
from training.tokenizer import networks
from training.tokenizer.options import AUDIO
from training.tokenizer.options import TokenizerOptions as TokenizerOptions
from training.tokenizer.sampling import make_sampler

BETAS = (0.5, 0.9)  # of both optimisers, as published


class TokenizerTraining(System):
    """Train a tokenizer: an autoencoder of frames or clips whose latents are codes.

    python train.py tokenizer --dataset=data/labdoom --preset=toy
    """

    Options = TokenizerOptions
    flips = True
    precisions = ("fp32", "bf16")
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
        self.loss = ReconstructionLoss(networks.loss_weights(options), perceptual, image, video, self.network.scale)
        self.loss.to(run.device)
        self.discriminators = nn.ModuleList([judge for judge in (image, video) if judge is not None])
        self.modules = {"tokenizer": self.network}
        self.modules |= {"image_discriminator": image} if image is not None else {}
        self.modules |= {"video_discriminator": video} if video is not None else {}
        self.optimizers = {"tokenizer": optim.make_adam(self.network, options.lr, BETAS)}
        if self.discriminators:
            self.optimizers["discriminators"] = optim.make_adam(self.discriminators, options.lr, BETAS)
        self.frozen = {"lpips": perceptual.lpips} if perceptual is not None else {}
        self.schedule = optim.Schedule(options.lr, options.schedule, options.warmup_steps, max(run.steps, 1))
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
        channels = options.arguments.get("channels", 3)
        if options.content == AUDIO and ((options.height, options.width) != AUDIO_SIZE or channels != 1):
            raise ValueError(
                f"--content=audio is of {AUDIO_SIZE[0]}x{AUDIO_SIZE[1]} and one channel, but the network takes "
                f"{options.height}x{options.width} and {channels}: begin with --preset=drums-audio or toy-audio"
            )
        if options.content != AUDIO and channels == 1:
            raise ValueError("frames have 3 channels, but the network takes one, as for sound: add --content=audio")

    def inputs(self) -> Inputs:
        """See `System.inputs`."""
        if self.options.content == AUDIO:
            return Inputs(streams=(AUDIO,))
        return Inputs(sizes=((self.options.height, self.options.width),))

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """See `System.batch_spec`."""
        o = self.options
        part: Part = FrameClip("clip", o.height, o.width, first=0, count=o.clip_frames, stride=o.frame_stride)
        if o.content == AUDIO:
            part = Stream(AUDIO, 0, o.clip_frames, o.frame_stride)
        return [BatchSpec((o.clip_frames - 1) * o.frame_stride + 1, (part,))]

    def clips(self, batch: Batch) -> Tensor:
        """Return the clips of a batch in the units of the network: (N, channels, T, height, width)."""
        clips = images_of(batch[AUDIO]) if self.options.content == AUDIO else batch["clip"]
        return clips.to(next(self.network.parameters())) * self.network.scale

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
        clips = self.clips(next(batches))
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
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.run.precision == "bf16"):
            made, quantized = self.network(x, self.codebook_rng(step, part))
        return made.float(), quantized

    def generator_pass(self, x: Tensor, frames: Tensor, step: int, number: int, report: optim.Report) -> Tensor:
        """Add the gradients of the autoencoder for the clips of a round; return their reconstruction."""
        self.network.requires_grad_(True)
        made, quantized = self.reconstruct(x, step, f"{number}")
        generator = self.dropout_generator(step, f"{number}") if self.options.legacy else None
        loss, terms = self.loss.generator(x, made, quantized, frames, step, self.network.last_layer, generator)
        loss.backward()
        self.network.requires_grad_(False)
        report.add("loss", **terms, loss=loss)
        if self.network.vocabulary:
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
        x = self.clips(next(batches))
        for module in self.modules_of_training:
            module.eval()
        made, quantized = self.network(x)
        found = {"loss/recon_loss": self.loss.distances(x, made)}
        if self.loss.perceptual is not None:
            middle = torch.full((len(x),), x.shape[2] // 2, device=x.device)
            pair = (pick_frames(clips, middle) / self.network.scale for clips in (x, made))
            was = self.loss.perceptual.training
            self.loss.perceptual.eval()
            found["loss/perceptual_loss"] = self.options.perceptual_weight * self.loss.perceptual(*pair)
            self.loss.perceptual.train(was)
        found["loss/commitment_loss"] = quantized.commitment_loss.reshape(1)
        return found | ({"perplexity": quantized.perplexity.reshape(1)} if self.network.vocabulary else {})

    # ---- Results ----------------------------------------------------------------------------------------------------

    def init_from(self, weights: Bundle | Mapping[str, Mapping[str, Tensor]]) -> None:
        """See `System.init_from`: a file that holds a tokenizer leaves the discriminators as they are."""
        if isinstance(weights, Bundle):
            first = next(iter(weights.networks.values()))
            weights = {"tokenizer": weights.networks.get("tokenizer", first).state_dict()}
        optim.load_weights(self.modules, weights)

    def sampler(self) -> Sampler:
        """See `System.sampler`."""
        self.network.eval()
        return make_sampler(self.network)

    def export(self) -> Bundle:
        """See `System.export`."""
        return Bundle({"tokenizer": self.network}, "tokenizer")

    def info(self) -> Info:
        """See `System.info`."""
        status = ("codebook/perplexity",) if self.network.vocabulary else ()
        return Info(status=status, charts=self.charts, preview_frames=32)

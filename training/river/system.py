"""Training of RIVER: flow matching of the next frame's latents (Davtyan et al., ICCV 2023, section 3.1)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_utils import distributed, misc
from torch_utils.precision import set_precision
from training import optim
from training.charts import ChartSpec
from training.config import TrainOptions
from training.contract import Batch, BatchSpec, Bundle, FrameClip, Info, Inputs, Run, Stream, System, option
from training.generation import flow
from training.modules.autoencoder import Autoencoder
from training.network_file import load_tokenizer
from training.random import random_state
from training.river import augment
from training.river.draws import ClipDropout, Sample, draw_sample, flow_losses, make_dropout, published_sample
from training.river.networks import HEADS, LatentScale, VectorField
from training.river.prediction import LatentVideo
from training.river.sampling import RiverSampler
from training.river.schedules import PublishedSchedule
from training.sampling import Sampler

BETAS = (0.9, 0.999)


@dataclasses.dataclass
class RiverTrainOptions:
    """Options of a run. The defaults are those of the release for 64x64."""

    tokenizer: str = option("", "File of the tokenizer in whose latents videos are predicted")
    clip_frames: int = option(16, "Frames of a clip, from which three are taken: old ones as far back are seen", low=2)
    frame_stride: int = option(1, "Take every n-th frame of the dataset", low=1)
    prompt_frames: int = option(1, "Frames that are given when a video is continued: targets come after them", low=1)
    context_frames: int = option(1, "Old frames that condition the field at once", low=1)
    inner_dim: int = option(768, "Width of the transformer", low=8)
    depth: int = option(4, "Blocks on either side of the middle, which are joined by skips", low=0)
    mid_depth: int = option(5, "Blocks in the middle", low=0)
    out_norm: str = option("ln", "Norm of the head: ln, or bn for large grids", kind=HEADS)
    num_actions: int = option(0, "Number of different actions, where the dataset has numbered ones", low=0)
    action_values: int = option(0, "Values of an action, where the dataset has vectors", low=0)
    action_dropout: float = option(0.1, "Share of clips whose action is hidden, for guidance", low=0)
    normalise: bool = option(True, "Normalise each channel of the latents by the first batch")
    time_law: str = option("uniform", "Distribution of t", kind=flow.TIME_LAWS)
    sigma: float = option(flow.SIGMA, "Standard deviation of the path's end", low=0)
    colours: bool = option(False, "Change the colours of clips at random")
    dropout: float = option(0.05, "Share of activations that are dropped", low=0)
    lr: float = option(1e-4, "Peak of the learning rate", low=0)
    warmup_steps: int = option(5000, "Steps over which it rises from 0", low=0)
    weight_decay: float = option(5e-6, "Weight decay of AdamW", low=0)
    clip_norm: float = option(0.0, "Largest norm of the gradient; 0: any", low=0)
    ema_beta: float = option(0.9999, "Decay of the moving average of weights, a step; 0: none", low=0)
    legacy: bool = option(False, "Draw as published: never the frame after the first, by torch's generator")


class River(System):
    """Train a predictor of the next frame's latents, given the newest frame and an older one.

    python train.py river --dataset=data/labdoom --preset=toy --tokenizer=tokenizer.pkl
    """

    Options = RiverTrainOptions
    flips = True
    precisions = ("fp32", "bf16")
    charts = (ChartSpec("Velocity", {"loss/flow_loss": "mean squared error"}, log=True),)

    def __init__(self, options: RiverTrainOptions, run: Run):
        super().__init__(options, run)
        tokenizer, self.tokenizer_hash = load_tokenizer(options.tokenizer, run.device)
        if not isinstance(tokenizer, Autoencoder) or tokenizer.stride[0] != 1:
            raise ValueError(
                f"{options.tokenizer} encodes several frames together, but frames are predicted one by one: give a "
                "tokenizer of frames, such as one of train.py tokenizer --network=vqgan2d"
            )
        self.tokenizer = tokenizer
        self.frozen = {"tokenizer": tokenizer}
        self.network = optim.seeded(run.seed, self.make_field).to(run.device)
        set_precision([self.network], run.precision or "fp32")
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        set_precision([self.average], "fp32")
        self.scale = LatentScale(tokenizer.quantizer.channels).to(run.device)
        self.latents = LatentVideo(tokenizer, self.scale)
        self.modules = {"field": self.network, "field_ema": self.average, "latents": self.scale}
        adam = optim.make_adam(self.network, options.lr, BETAS, options.weight_decay)
        self.optimizers = {"field": adam}
        self.schedule = PublishedSchedule(options.lr, options.warmup_steps, run.steps)

    def make_field(self) -> VectorField:
        """Return the network that the options and the tokenizer describe."""
        o, tokenizer = self.options, self.tokenizer
        grid = (tokenizer.height // tokenizer.stride[1], tokenizer.width // tokenizer.stride[1])
        return VectorField(
            tokenizer.quantizer.channels, grid, o.inner_dim, o.depth, o.mid_depth, o.out_norm,
            context_frames=o.context_frames, num_actions=o.num_actions, action_values=o.action_values,
        )  # fmt: skip

    @classmethod
    def check(cls, options: RiverTrainOptions, train_options: TrainOptions) -> None:
        """See `System.check`."""
        optim.check_options(options, above_zero=("lr",), shares=("dropout", "action_dropout", "ema_beta", "sigma"))
        if not options.tokenizer:
            raise ValueError("--tokenizer is missing: give the file of a tokenizer of frames")
        if options.prompt_frames >= options.clip_frames:
            raise ValueError(
                f"--prompt-frames is {options.prompt_frames}, but a clip has {options.clip_frames} frames: use longer "
                "clips"
            )
        if options.num_actions and options.action_values:
            raise ValueError("--num-actions and --action-values are two kinds of actions: give one")
        if options.legacy and (options.clip_frames < 3 or options.context_frames > 1):
            raise ValueError(
                "--legacy draws one old frame from clips of at least 3: change --clip-frames, or leave it out"
            )

    @property
    def has_actions(self) -> bool:
        """Return whether actions condition the field."""
        return bool(self.options.num_actions or self.options.action_values)

    # ---- Data -------------------------------------------------------------------------------------------------------

    def inputs(self) -> Inputs:
        """See `System.inputs`."""
        size = (self.tokenizer.height, self.tokenizer.width)
        return Inputs(sizes=(size,), streams=("actions",) if self.has_actions else ())

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """See `System.batch_spec`."""
        o, tokenizer = self.options, self.tokenizer
        clip = FrameClip("clip", tokenizer.height, tokenizer.width, 0, o.clip_frames, o.frame_stride)
        length = (o.clip_frames - 1) * o.frame_stride + 1
        streams = (Stream("actions", 0, o.clip_frames, o.frame_stride),) if self.has_actions else ()
        return [BatchSpec(length, (clip, *streams))]

    def draw(self, rngs: list[np.random.RandomState], step: int) -> Sample:
        """Return which frames of the clips of a step are used, with noise and time."""
        o, shape = self.options, (self.scale.mean.numel(), *self.network.state_res)
        if o.legacy:
            seed = random_state("river-legacy", self.run.seed, f"{step}:{distributed.get_rank()}").randint(1 << 31)
            return published_sample(torch.Generator().manual_seed(int(seed)), o.clip_frames, len(rngs), shape)
        return draw_sample(rngs, o.prompt_frames, o.clip_frames, o.context_frames, shape, o.time_law)

    def pick(self, batch: Batch, sample: Sample, rngs: list[np.random.RandomState]) -> Tensor:
        """Return the frames of a sample, with changed colours if asked for: (N, 2 + k, 3, H, W) in [-1, 1]."""
        picked = sample.pick(batch["clip"].transpose(1, 2))
        if not self.options.colours:
            return picked
        changed = [augment.change_clip(clip, augment.draw_change(rng)) for clip, rng in zip(picked, rngs, strict=True)]
        return torch.stack(changed)

    @torch.no_grad()
    def encode(self, picked: Tensor) -> Tensor:
        """Return the latents of frames, not normalised: (N, F, 3, H, W) -> (N, F, C, h, w)."""
        self.tokenizer.eval()
        return self.tokenizer.latents(picked.transpose(1, 2)).transpose(1, 2)

    @torch.no_grad()
    def measure(self, z: Tensor) -> None:
        """Set the scale of latents by those of the first batch, over all ranks: (N, F, C, h, w)."""
        values = z.movedim(2, 0).flatten(1).double()
        sums = torch.stack([values.sum(1), values.square().sum(1), torch.full_like(values[:, 0], values.shape[1])])
        total, squares, count = distributed.all_reduce_sum(sums)
        mean = total / count
        self.scale.mean.copy_(mean)
        self.scale.std.copy_((squares / count - mean.square()).clamp(min=1e-12).sqrt())
        self.scale.measured.fill_(1)

    # ---- Steps ------------------------------------------------------------------------------------------------------

    def step(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """See `System.step`."""
        o, batch, rngs, report = self.options, next(batches), self.run.rngs("river", step), optim.Report()
        device = next(self.network.parameters()).device
        sample = self.draw(rngs, step)
        picked, has_action = self.pick(batch, sample, rngs), self.draw_shown(rngs, device)
        drops = [make_dropout(o.dropout, rngs[piece], device) for piece in self.run.rounds()]
        sample = sample.to(device)
        z = torch.cat([self.encode(picked[piece]) for piece in self.run.rounds()])
        if o.normalise and step == 0 and not self.scale.measured:
            self.measure(z)
        z, actions = self.scale.normalise(z), self.actions_of(batch, sample)

        def loss(piece: slice) -> Tensor:
            drop = drops[self.run.rounds().index(piece)]
            losses = self.losses(self.network, z, sample, actions, has_action, piece, drop)
            report.add("loss", flow_loss=losses)
            return losses.mean()

        self.network.train()
        rate = self.schedule.apply(self.optimizers["field"], step)
        limit = o.clip_norm or None
        num_nonfinite, norm = optim.update(
            self.network, self.optimizers["field"], self.run.rounds(), loss, clip_norm=limit
        )
        optim.update_ema(self.average, self.network, o.ema_beta)
        report.add("progress", rate=torch.tensor(rate), grad_norm=norm, nonfinite_gradients=num_nonfinite.float())
        return report.values()

    def losses(
        self, field: VectorField, z: Tensor, sample: Sample, actions: Tensor | None, has_action: Tensor | None,
        piece: slice = slice(None), drop: ClipDropout | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the loss of each clip of a round: (N,)."""
        cut = [None if part is None else part[piece] for part in (actions, has_action)]
        return flow_losses(field, z[piece], sample[piece], self.options.sigma, *cut, drop=drop)[0]

    def draw_shown(self, rngs: list[np.random.RandomState], device: torch.device) -> Tensor | None:
        """Return whether the field sees the action of each clip: bool (N,)."""
        if not self.has_actions:
            return None
        shown = np.array([rng.random_sample() >= self.options.action_dropout for rng in rngs])
        return misc.upload(torch.from_numpy(shown), device)

    def actions_of(self, batch: Batch, sample: Sample) -> Tensor | None:
        """Return the actions that lead into the targets: int64 (N,) or float (N, values)."""
        if not self.has_actions:
            return None
        actions = batch["actions"].to(sample.targets.device)
        return actions[torch.arange(len(actions), device=actions.device), sample.targets]

    @torch.no_grad()
    def validate(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """See `System.validate`: the loss of the averaged weights, with the same draws every time."""
        batch, rngs = next(batches), self.run.rngs("river-validation", 0)
        device = next(self.network.parameters()).device
        sample = self.draw(rngs, 0)
        z = self.scale.normalise(self.encode(sample.pick(batch["clip"].transpose(1, 2))))
        sample = sample.to(device)
        return {"loss/flow_loss": self.losses(self.average, z, sample, self.actions_of(batch, sample), None)}

    # ---- Results ----------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Return what the sampler has to know besides the networks."""
        o = self.options
        return {"prompt_frames": o.prompt_frames, "past_horizon": max(o.clip_frames - 1, 2), "sigma": o.sigma}

    def init_from(self, weights: Bundle | Mapping[str, Mapping[str, Tensor]]) -> None:
        """See `System.init_from`."""
        if isinstance(weights, Bundle):
            state = weights.networks["field"].state_dict()
            weights = dict.fromkeys(("field", "field_ema"), state) | {
                "latents": weights.networks["latents"].state_dict()
            }
        optim.load_weights(self.modules, weights)

    def sampler(self) -> Sampler:
        """See `System.sampler`."""
        return RiverSampler(self.average, self.latents, facts=self.facts())

    def export(self) -> Bundle:
        """See `System.export`."""
        networks = {"field": self.average, "latents": self.scale, "tokenizer": self.tokenizer}
        return Bundle(networks, "river", self.facts(), self.tokenizer_hash)

    def info(self) -> Info:
        """See `System.info`."""
        return Info(charts=self.charts, preview_frames=16)

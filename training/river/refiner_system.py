"""Training of RIVER's refinement network: the true frame from its reconstruction and the frame before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metrics.detectors import i3d
from training import optim
from training.config import TrainOptions
from training.contract import Batch, BatchSpec, Bundle, FrameClip, Info, Inputs, Run, System, option
from training.network_file import load_tokenizer
from training.river.refiner import RCAN, psnr, ssim
from training.river.sampling import RefinedReconstruction
from training.river.schedules import RefinerSchedule
from training.sampling import Sampler

FULL_BATCH = 256  # clips for which the learning rate holds; it is proportional to the batch
FEATURE_SIDE = 224


@dataclasses.dataclass
class RefinerOptions:
    """Options of a run. The defaults are those of the release."""

    tokenizer: str = option("", "File of the tokenizer whose reconstructions are refined")
    clip_frames: int = option(17, "Frames of a clip, which give one pair less", low=2)
    groups: int = option(3, "Groups of residual blocks", low=1)
    blocks: int = option(3, "Residual blocks in a group", low=1)
    width: int = option(64, "Width of the network", low=1)
    reduction: int = option(8, "Reduction of channels in their attention", low=1)
    tanh: bool = option(False, "Bound the frames by a tanh")
    l1: bool = option(False, "Absolute differences of pixels instead of squared ones")
    perceptual_weight: float = option(0.1, "Weight of squared differences of I3D's logits; 0: without I3D", low=0)
    lr: float = option(3e-4, "Peak of the learning rate for a batch of 256", low=0)
    warmup_steps: int = option(0, "Steps over which it rises from 0", low=0)
    weight_decay: float = option(5e-4, "Weight decay of AdamW", low=0)


class RefinerTraining(System):
    """Train the refinement of decoded frames.

    python train.py river-refiner --dataset=data/labdoom --preset=toy --tokenizer=tokenizer.pkl
    """

    Options = RefinerOptions
    flips = True

    def __init__(self, options: RefinerOptions, run: Run):
        super().__init__(options, run)
        self.tokenizer, self.tokenizer_hash = load_tokenizer(options.tokenizer, run.device)
        self.frozen: dict[str, Any] = {"tokenizer": self.tokenizer}
        self.detector = None
        if options.perceptual_weight > 0:
            self.detector = i3d.load(run.device).requires_grad_(False)
        sizes = options.groups, options.blocks, options.width, options.reduction, options.tanh
        self.network = optim.seeded(run.seed, lambda: RCAN(*sizes)).to(run.device)
        self.modules = {"refiner": self.network}
        lr = options.lr * run.batch / FULL_BATCH
        self.optimizers = {"refiner": optim.make_adam(self.network, lr, weight_decay=options.weight_decay)}
        self.schedule = RefinerSchedule(lr, options.warmup_steps, run.steps)

    @classmethod
    def check(cls, options: RefinerOptions, train_options: TrainOptions) -> None:
        """See `System.check`."""
        optim.check_options(options, above_zero=("lr",))
        if not options.tokenizer:
            raise ValueError("--tokenizer is missing: give the file of the tokenizer whose reconstructions are refined")
        if options.perceptual_weight > 0 and options.clip_frames < 10:
            raise ValueError(
                f"--clip-frames is {options.clip_frames}, but I3D needs 9 frames after the first: use 10 or more, or "
                "--perceptual-weight=0"
            )
        with torch.device("meta"):
            RCAN(options.groups, options.blocks, options.width, options.reduction)

    def inputs(self) -> Inputs:
        """See `System.inputs`."""
        return Inputs(sizes=((self.tokenizer.height, self.tokenizer.width),))

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """See `System.batch_spec`."""
        count = self.options.clip_frames
        return [BatchSpec(count, (FrameClip("clip", self.tokenizer.height, self.tokenizer.width, 0, count),))]

    def refine(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Return the refined frames after the first and the true ones: (N, 3, T, H, W) -> (N * (T - 1), 3, H, W)."""
        with torch.no_grad():
            self.tokenizer.eval()
            decoded = self.tokenizer.decode(self.tokenizer.encode(clips[:, :, 1:]))
        parts = (clips[:, :, :-1], decoded, clips[:, :, 1:])
        previous, decoded, true = (part.transpose(1, 2).flatten(0, 1) for part in parts)
        return self.network(previous, decoded), true

    def logits(self, frames: Tensor) -> Tensor:
        """Return I3D's logits of clips: (N * (T - 1), 3, H, W) -> (N, 400)."""
        assert self.detector is not None
        frames = F.interpolate(frames, (FEATURE_SIDE, FEATURE_SIDE), mode="bilinear", align_corners=False)
        return self.detector(frames.unflatten(0, (-1, self.options.clip_frames - 1)).transpose(1, 2))

    def step(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """See `System.step`."""
        clips, report = next(batches)["clip"].to(next(self.network.parameters())), optim.Report()

        def loss(piece: slice) -> Tensor:
            refined, true = self.refine(clips[piece])
            errors = (refined - true).abs() if self.options.l1 else (refined - true).square()
            report.add("loss", pixel_loss=errors.mean((1, 2, 3)))
            total = errors.mean()
            if self.detector is not None:
                with torch.no_grad():
                    wanted = self.logits(true)
                distance = (self.logits(refined) - wanted).square()
                report.add("loss", perceptual_loss=distance.mean(1))
                total = total + self.options.perceptual_weight * distance.mean()
            return total

        self.network.train()
        optimizer = self.optimizers["refiner"]
        rate = self.schedule.apply(optimizer, step)
        num_nonfinite, norm = optim.update(self.network, optimizer, self.run.rounds(), loss)
        report.add("progress", rate=torch.tensor(rate), grad_norm=norm, nonfinite_gradients=num_nonfinite.float())
        return report.values()

    @torch.no_grad()
    def validate(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """See `System.validate`: also PSNR and SSIM of frames in [-1, 1], the true frames before them given."""
        refined, true = self.refine(next(batches)["clip"].to(next(self.network.parameters())))
        errors = (refined - true).abs() if self.options.l1 else (refined - true).square()
        return {"loss/pixel_loss": errors.mean((1, 2, 3)), "psnr": psnr(refined, true), "ssim": ssim(refined, true)}

    def init_from(self, weights: Bundle | Mapping[str, Mapping[str, Tensor]]) -> None:
        """See `System.init_from`."""
        if isinstance(weights, Bundle):
            weights = {"refiner": weights.networks["refiner"].state_dict()}
        optim.load_weights(self.modules, weights)

    def sampler(self) -> Sampler:
        """See `System.sampler`."""
        self.network.eval()
        return RefinedReconstruction(self.network, self.tokenizer)

    def export(self) -> Bundle:
        """See `System.export`."""
        return Bundle({"refiner": self.network, "tokenizer": self.tokenizer}, "river-refiner", {}, self.tokenizer_hash)

    def info(self) -> Info:
        """See `System.info`."""
        return Info(preview_frames=16)

"""Training of RIVER's refinement network: the true frame from its reconstruction and the frame before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metrics.detectors import i3d
from training.charts import ChartSpec
from training.config import TrainOptions
from training.contract import Batch, BatchSpec, FrameClip, Info, Inputs, Run
from training.modules.prior import Prior
from training.river.options import RefinerOptions
from training.river.refiner import RCAN, psnr, ssim
from training.river.sampling import RefinedReconstruction
from training.river.schedules import RefinerSchedule
from training.sampling import Sampler

FULL_BATCH = 256  # clips for which the learning rate holds; it is proportional to the batch
FEATURE_SIDE = 224
FEATURE_FRAMES = 9  # frames that I3D needs


class RefinerTraining(Prior):
    """Train the refinement of decoded frames.

    python train.py river-refiner --dataset=data/labdoom --preset=toy --tokenizer=tokenizer.pkl
    """

    Options = RefinerOptions
    role, system = "refiner", "river-refiner"
    charts = (ChartSpec("Refinement", {"loss/pixel_loss": "pixels", "loss/perceptual_loss": "I3D"}, log=True),)

    def __init__(self, options: RefinerOptions, run: Run):
        super().__init__(options, run)
        self.detector = i3d.load(run.device) if options.perceptual_weight > 0 else None
        self.schedule = RefinerSchedule(options.lr * run.batch / FULL_BATCH, options.warmup_steps, run.steps)

    def build(self) -> nn.Module:
        """See `Prior.build`."""
        o = self.options
        return RCAN(o.groups, o.blocks, o.width, o.reduction, o.tanh)

    @classmethod
    def check(cls, options: RefinerOptions, train_options: TrainOptions) -> None:
        """See `System.check`."""
        super().check(options, train_options)
        if options.perceptual_weight > 0 and options.clip_frames <= FEATURE_FRAMES:
            raise ValueError(
                f"--clip-frames is {options.clip_frames}, but I3D needs {FEATURE_FRAMES} frames after the first: use "
                f"{FEATURE_FRAMES + 1} or more, or --perceptual-weight=0"
            )
        with torch.device("meta"):
            RCAN(options.groups, options.blocks, options.width, options.reduction)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `Prior.parameter_groups`: all parameters decay, as published."""
        return [{"params": list(self.network.parameters())}]

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

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """See `Prior.losses`."""
        refined, true = self.refine(batch["clip"])
        errors = (refined - true).abs() if self.options.l1 else (refined - true).square()
        pixels = errors.mean((1, 2, 3)).unflatten(0, (len(batch["clip"]), -1)).mean(1)
        if self.detector is None:
            return {"loss": pixels, "pixel_loss": pixels}
        with torch.no_grad():
            wanted = self.logits(true)
        distances = (self.logits(refined) - wanted).square().mean(1)
        total = pixels + self.options.perceptual_weight * distances
        return {"loss": total, "pixel_loss": pixels, "perceptual_loss": distances}

    @torch.no_grad()
    def validate(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """See `System.validate`: also PSNR and SSIM of frames in [-1, 1], the true frames before them given."""
        refined, true = self.refine(next(batches)["clip"])
        return {"loss/pixel_loss": (refined - true).square(), "psnr": psnr(refined, true), "ssim": ssim(refined, true)}

    def make_sampler(self, network: nn.Module) -> Sampler:
        """See `Prior.make_sampler`."""
        assert isinstance(network, RCAN)
        return RefinedReconstruction(network, self.tokenizer)

    def info(self) -> Info:
        """See `System.info`."""
        return Info(status=("loss/loss",), charts=self.charts, preview_frames=16)

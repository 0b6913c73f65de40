"""Training of Recall: cross-entropy of the next token grids, on token shards and actions."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from tests.recall.networks import PAST, Predictor
from tests.recall.sampling import RecallSampler
from training import optim
from training.config import TrainOptions
from training.contract import Batch, BatchSpec, Bundle, CodeClip, Info, Inputs, Run, Stream, System, option
from training.network_file import content_hash, load_tokenizer
from training.sampling import Sampler


@dataclasses.dataclass
class RecallOptions:
    """Options of a run."""

    tokenizer: str = option("", "File of the tokenizer whose tokens the dataset has")
    channels: int = option(16, "Width of the network", low=1)
    num_actions: int = option(4, "Number of different actions", low=1)
    predicted: int = option(8, "Grids that are predicted in a clip", low=1)
    lr: float = option(0.003, "Peak of the learning rate", low=0)
    clip_norm: float = option(1.0, "Largest norm of the gradient", low=0)
    ema_beta: float = option(0.9, "Decay of the moving average, a step", low=0)


class Recall(System):
    """Predict the next frames from 36 past ones and the actions between them."""

    Options = RecallOptions

    def __init__(self, options: RecallOptions, run: Run):
        super().__init__(options, run)
        tokenizer, self.tokenizer_hash = load_tokenizer(options.tokenizer, run.device)
        self.tokenizer = tokenizer
        self.frozen = {"tokenizer": tokenizer}
        grid = (tokenizer.height // tokenizer.stride[1], tokenizer.width // tokenizer.stride[1])
        arguments = (grid, tokenizer.vocabulary, options.num_actions, options.channels)
        self.network = optim.seeded(run.seed, lambda: Predictor(*arguments)).to(run.device)
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.modules = {"predictor": self.network, "predictor_ema": self.average}
        self.optimizers = {"predictor": optim.make_adam(self.network, options.lr)}
        self.schedule = optim.Schedule(options.lr, "cosine", warmup=1, steps=max(run.steps, 2))

    @classmethod
    def check(cls, options: RecallOptions, train_options: TrainOptions) -> None:
        """See `System.check`."""
        if not options.tokenizer:
            raise ValueError("--tokenizer is missing: give the file of the tokenizer whose tokens the dataset has")

    def inputs(self) -> Inputs:
        """See `System.inputs`."""
        return Inputs(codes=self.tokenizer_hash, streams=("actions",))

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """See `System.batch_spec`."""
        count = PAST + self.options.predicted
        return [BatchSpec(count, (CodeClip("codes", 0, count), Stream("actions", 0, count)))]

    def losses(self, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of each clip: (N,)."""
        logits = self.network(batch["codes"], batch["actions"])
        loss = nn.functional.cross_entropy(logits.flatten(0, 3), batch["codes"][:, PAST:].flatten(), reduction="none")
        return loss.unflatten(0, (len(logits), -1)).mean(1)

    def step(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """See `System.step`."""
        batch, report, optimizer = next(batches), optim.Report(), self.optimizers["predictor"]

        def loss(piece: slice) -> Tensor:
            losses = self.losses(optim.cut(batch, piece))
            report.add("loss", token_loss=losses)
            return losses.mean()

        rate = self.schedule.apply(optimizer, step)
        rounds, limit = self.run.rounds(), self.options.clip_norm
        num_nonfinite, norm = optim.update(self.network, optimizer, rounds, loss, clip_norm=limit)
        optim.update_ema(self.average, self.network, self.options.ema_beta)
        report.add("progress", rate=torch.tensor(rate), grad_norm=norm, nonfinite_gradients=num_nonfinite.float())
        return report.values()

    def validate(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """See `System.validate`."""
        return {"loss/token_loss": self.losses(next(batches))}

    def init_from(self, weights: Bundle | Mapping[str, Mapping[str, Tensor]]) -> None:
        """See `System.init_from`."""
        if isinstance(weights, Bundle):
            state = weights.networks["predictor"].state_dict()
            weights = dict.fromkeys(self.modules, state)
        optim.load_weights(self.modules, weights)

    def sampler(self) -> Sampler:
        """See `System.sampler`."""
        return RecallSampler(self.average, self.tokenizer)

    def export(self) -> Bundle:
        """See `System.export`."""
        networks = {"predictor": self.average, "tokenizer": self.tokenizer}
        return Bundle(networks, "recall", tokenizer=content_hash(self.tokenizer))

    def info(self) -> Info:
        """See `System.info`."""
        return Info(preview_frames=16, preview_videos=2)


PRESETS = {
    "default": {"batch": 8, "steps": 1000, "model": {}},
    "toy": {"batch": 4, "steps": 6, "tick_steps": 1, "checkpoint_steps": 2, "sample_steps": 3, "model": {}},
}

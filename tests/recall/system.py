"""Training of Recall: cross-entropy of the next token grids, on token shards and actions."""

import dataclasses

from torch import Tensor, nn

from tests.recall.networks import PAST, Predictor
from tests.recall.sampling import RecallSampler
from training.contract import Batch, BatchSpec, CodeClip, Info, Inputs, Stream, option
from training.modules.prior import Prior, PriorOptions
from training.sampling import Sampler


@dataclasses.dataclass
class RecallOptions(PriorOptions):
    """Options of a run."""

    channels: int = option(16, "Width of the network", low=1)
    num_actions: int = option(4, "Number of different actions", low=1)
    predicted: int = option(8, "Grids that are predicted in a clip", low=1)
    lr: float = option(0.003, "Peak of the learning rate", low=0)
    schedule: str = option("cosine", "Course of the learning rate", kind=("constant", "cosine"))
    warmup_steps: int = option(1, "Steps over which it rises", low=0)
    clip_norm: float = option(1.0, "Largest norm of the gradient", low=0)
    ema_beta: float = option(0.9, "Decay of the moving average, a step", low=0)


class Recall(Prior):
    """Predict the next frames from 36 past ones and the actions between them."""

    Options = RecallOptions
    role, system = "predictor", "recall"
    precisions = ("fp32",)

    def build(self) -> nn.Module:
        """See `Prior.build`."""
        tokenizer, options = self.tokenizer, self.options
        grid = (tokenizer.height // tokenizer.stride[1], tokenizer.width // tokenizer.stride[1])
        return Predictor(grid, tokenizer.vocabulary, options.num_actions, options.channels)

    def inputs(self) -> Inputs:
        """See `System.inputs`."""
        return Inputs(codes=self.tokenizer_hash, streams=("actions",))

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """See `System.batch_spec`."""
        count = PAST + self.options.predicted
        return [BatchSpec(count, (CodeClip("codes", 0, count), Stream("actions", 0, count)))]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """See `Prior.losses`."""
        logits = self.network(batch["codes"], batch["actions"])
        loss = nn.functional.cross_entropy(logits.flatten(0, 3), batch["codes"][:, PAST:].flatten(), reduction="none")
        return {"loss": loss.unflatten(0, (len(logits), -1)).mean(1)}

    def make_sampler(self, network: nn.Module) -> Sampler:
        """See `Prior.make_sampler`."""
        assert isinstance(network, Predictor)
        return RecallSampler(network, self.tokenizer)

    def info(self) -> Info:
        """See `System.info`."""
        return Info(preview_frames=16, preview_videos=2)


PRESETS = {
    "default": {"batch": 8, "steps": 1000, "model": {}},
    "toy": {"batch": 4, "steps": 6, "tick_steps": 1, "checkpoint_steps": 2, "sample_steps": 3, "model": {}},
}

"""Training of TATS: cross-entropy of the codes of clips after a condition.

Ge et al., ECCV 2022, section 3.2 and the release. `tats` writes codes, or key frames with `--every`;
`tats-interpolation` writes the latent frames between two key frames.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from torch_utils import misc
from training.charts import ChartSpec
from training.config import TrainOptions
from training.contract import Batch, BatchSpec, CodeClip, Info, Inputs, Part, Run, Stream, option
from training.modules.prior import Prior, PriorOptions
from training.sampling import Sampler
from training.tats.networks import SEGMENT, TATSTransformer, parameter_groups
from training.tats.sampling import CONDITIONS, LABEL, NONE, TEXT, Between, Facts, LongVideos
from training.tats.text import LENGTH, VOCABULARY, BytePairs, read_descriptions, read_merges

TOP = 5  # of the second accuracy that is reported
MAX_EXAMPLES = 256  # descriptions in the exported file


def code_logits(network: TATSTransformer, condition: Tensor, codes: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return the logits of codes (N, M) after a condition (N, C): (N, M, vocabulary)."""
    ids = torch.cat([condition, codes + network.conditions], dim=1)
    return network(ids[:, :-1], rows)[:, condition.shape[1] - 1 :]


def code_losses(
    network: TATSTransformer, condition: Tensor, codes: Tensor, counted: slice = slice(None), rows: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the mean cross-entropy, in nats, and accuracies of the `counted` codes of each clip: (N,) each.

    Codes are (N, M), conditions (N, C). The cross-entropy is over the whole vocabulary, as published.
    """
    logits = code_logits(network, condition, codes, rows)[:, counted]
    targets = codes[:, counted] + network.conditions
    loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    with torch.no_grad():
        best = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices == targets.unsqueeze(-1)
    return {
        "loss": loss.mean(1),
        "top1_accuracy": best[..., 0].float().mean(1),
        f"top{TOP}_accuracy": best.any(-1).float().mean(1),
    }


@dataclasses.dataclass
class NetworkOptions(PriorOptions):
    """Options of both systems. The defaults are those of the published models: 8 GPUs x 3 clips."""

    lr: float = option(4.5e-6 * 24, "Peak of the learning rate", low=0)
    weight_decay: float = option(0.01, "Weight decay of the weights of linear layers", low=0)
    condition: str = option(NONE, "What videos are given", kind=(NONE, LABEL))
    classes: int = option(0, "Number of classes of --condition=label", low=0)
    layers: int = option(24, "Number of blocks", low=1)
    heads: int = option(16, "Heads of attention", low=1)
    width: int = option(1024, "Width of the network", low=1)
    legacy: bool = option(False, "Train exactly as published, with the faults that the README lists")


@dataclasses.dataclass
class TATSOptions(NetworkOptions):
    """Options of a run of `tats`."""

    condition: str = option(NONE, "What videos are given", kind=CONDITIONS)
    texts: str = option("", "For --condition=text: file of descriptions, whose line k is that of label k")
    text_length: int = option(LENGTH, "Ids of a description", low=3)
    merges: str = option("", "File of CLIP's list of merges; default: that in the cache")
    frames: int = option(16, "Frames of a clip", low=1)
    every: int = option(1, "Take every n-th latent frame of a clip: 4 for key frames", low=1)
    table: bool = option(False, "Add a table of positions in time, rows and columns")


class CodeModel(Prior):
    """What both systems share."""

    role = "transformer"
    betas = (0.9, 0.95)
    charts = (
        ChartSpec("Cross-entropy", {"loss/loss": "nats"}),
        ChartSpec("Accuracy", {"loss/top1_accuracy": "first", f"loss/top{TOP}_accuracy": f"first {TOP}"}),
    )
    counted: ClassVar[slice] = slice(None)

    network: TATSTransformer
    options: Any

    def __init__(self, options: Any, run: Run):
        super().__init__(options, run)
        self.labels_are_checked = options.condition == NONE

    @classmethod
    def check(cls, options: Any, train_options: TrainOptions) -> None:
        """See `System.check`."""
        super().check(options, train_options)
        if options.width % options.heads:
            raise ValueError(f"--width is {options.width}, which {options.heads} heads do not divide: use a multiple")
        if options.condition == LABEL and options.classes < 1:
            raise ValueError("--condition=label needs the number of classes of the dataset: give --classes")
        if options.condition != LABEL and options.classes:
            raise ValueError(f"--classes is {options.classes}, but there are no labels: add --condition=label")

    @property
    def grid(self) -> tuple[int, int]:
        """Return the rows and columns of codes of a latent frame."""
        edge = self.tokenizer.stride[1]
        return self.tokenizer.height // edge, self.tokenizer.width // edge

    @property
    def latent_codes(self) -> int:
        """Return the number of codes of a latent frame."""
        return self.grid[0] * self.grid[1]

    def sizes(self) -> dict[str, Any]:
        """Return arguments of the network that do not depend on the system.

        The released unconditional models have no id for the start: it is that of code 0.
        """
        o = self.options
        conditions = {LABEL: o.classes, TEXT: VOCABULARY}.get(o.condition, 0 if o.legacy else 1)
        return {
            "num_codes": self.tokenizer.vocabulary, "conditions": conditions, "layers": o.layers, "heads": o.heads,
            "width": o.width,
        }  # fmt: skip

    def inputs(self) -> Inputs:
        """See `System.inputs`."""
        return Inputs(codes=self.tokenizer_hash, streams=() if self.options.condition == NONE else (LABEL,))

    def spec(self, clip: CodeClip) -> list[BatchSpec]:
        """Return the batch of a clip, with its label."""
        parts: list[Part] = [clip]
        if self.options.condition != NONE:
            parts.append(Stream(LABEL, 0, 1))
        steps = (clip.count - 1) * clip.stride + 1
        return [BatchSpec(steps * self.tokenizer.stride[0], tuple(parts))]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `Prior.parameter_groups`: as published."""
        return parameter_groups(self.network, self.options.weight_decay)

    def condition_ids(self, batch: Batch) -> Tensor:
        """Return the ids of the condition of each clip: int64 (N, C); raises `ValueError` for an unknown class."""
        if self.options.condition == NONE:
            return batch["codes"].new_zeros(len(batch["codes"]), 1)
        self.check_labels(batch[LABEL], self.options.classes, "--classes is {}: raise it")
        return batch[LABEL]

    def check_labels(self, labels: Tensor, count: int, words: str) -> None:
        """Raise `ValueError` for a label that is not below `count`; once, as it waits for the device."""
        highest = 0 if self.labels_are_checked else int(labels.max())
        if highest >= count and not self.labels_are_checked:
            raise ValueError(f"the dataset has class {highest}, but {words.format(count)}")
        self.labels_are_checked = True

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """See `Prior.losses`."""
        codes, network = batch["codes"].flatten(1), self.network
        return code_losses(network, self.condition_ids(batch), codes, self.counted_codes(), network.table_rows())

    def counted_codes(self) -> slice:
        """Return which codes of a clip the loss is over."""
        return slice(None)

    def export_options(self) -> dict[str, Any]:
        """See `Prior.export_options`."""
        return dataclasses.asdict(self.facts())

    def facts(self) -> Facts:
        """Return what a sampler needs to know besides the networks."""
        return Facts(self.options.condition)

    def info(self) -> Info:
        """See `System.info`."""
        return Info(status=("loss/top1_accuracy",), charts=self.charts, preview_frames=32)


class TATS(CodeModel):
    """Train a transformer that writes the codes of clips; with --every=4 those of key frames.

    python train.py tats --dataset=data/labdoom --preset=toy --tokenizer=TOKENIZER
    """

    Options = TATSOptions
    system = "tats"

    def __init__(self, options: TATSOptions, run: Run):
        super().__init__(options, run)
        self.texts: list[list[str]] = []
        self.lines: list[str] = []
        if options.condition == TEXT:
            self._read_texts()

    def _read_texts(self) -> None:
        """Encode all descriptions: ids (lines, alternatives, text_length), of which a line may have fewer."""
        self.texts, self.lines = read_descriptions(self.options.texts), read_merges(self.options.merges or None)
        pairs, length = BytePairs(self.lines), self.options.text_length
        ids = np.zeros((len(self.texts), max(map(len, self.texts)), length), np.int64)
        for number, line in enumerate(self.texts):
            ids[number, : len(line)] = [pairs.ids_of(text, length) for text in line]
        counts = np.array([len(line) for line in self.texts])
        self.text_ids = misc.upload(torch.from_numpy(ids), self.run.device)
        self.text_counts = misc.upload(torch.from_numpy(counts), self.run.device)

    @classmethod
    def check(cls, options: TATSOptions, train_options: TrainOptions) -> None:
        """See `System.check`."""
        super().check(options, train_options)
        if options.condition == TEXT and not options.texts:
            raise ValueError("--condition=text needs the descriptions of the clips: give a file of them as --texts")
        if options.condition != TEXT and (options.texts or options.merges):
            raise ValueError("--texts and --merges are for descriptions: add --condition=text, or leave them out")
        if options.condition == TEXT and options.table:
            raise ValueError("--table needs a condition of one id, and a description has more: leave it out")

    def draw(self, rngs: list[np.random.RandomState], step: int) -> dict[str, np.ndarray]:
        """See `Prior.draw`: which description of a clip is taken."""
        return {"choice": np.array([rng.random_sample() for rng in rngs])} if self.texts else {}

    def condition_ids(self, batch: Batch) -> Tensor:
        """See `CodeModel.condition_ids`."""
        if not self.texts:
            return super().condition_ids(batch)
        lines = batch[LABEL][:, 0]
        self.check_labels(lines, len(self.texts), "--texts has {} lines: add the descriptions of the others")
        counts = self.text_counts[lines]
        return self.text_ids[lines, (batch["choice"] * counts).long().clamp(max=counts - 1)]

    @property
    def latent_frames(self) -> int:
        """Return the number of latent frames that the network sees of a clip."""
        return self.options.frames // (self.tokenizer.stride[0] * self.options.every)

    def build(self) -> TATSTransformer:
        """See `Prior.build`; raises `ValueError` for a clip without a latent frame."""
        if self.latent_frames < 1 or self.options.frames % self.tokenizer.stride[0]:
            raise ValueError(
                f"--frames is {self.options.frames}, but a latent frame is {self.tokenizer.stride[0]} frames and every "
                f"{self.options.every} is taken: use a multiple of {self.tokenizer.stride[0] * self.options.every}"
            )
        table = [self.latent_frames, *self.grid] if self.options.table else None
        length = self.options.text_length if self.options.condition == TEXT else 1
        block_size = length + self.latent_frames * self.latent_codes - 1
        return TATSTransformer(condition_length=length, block_size=block_size, table=table, **self.sizes())

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """See `System.batch_spec`."""
        return self.spec(CodeClip("codes", 0, self.latent_frames, self.options.every))

    def facts(self) -> Facts:
        """See `CodeModel.facts`."""
        examples = [line[0] for line in self.texts[:MAX_EXAMPLES]]
        return Facts(self.options.condition, self.options.every, examples, "\n".join(self.lines))

    def make_sampler(self, network: Any) -> Sampler:
        """See `Prior.make_sampler`."""
        return LongVideos(network, self.tokenizer, self.facts())


class TATSInterpolation(CodeModel):
    """Train a transformer that writes the latent frames between two key frames.

    python train.py tats-interpolation --dataset=data/labdoom --preset=toy --tokenizer=TOKENIZER
    """

    Options = NetworkOptions
    system = "tats-interpolation"

    def build(self) -> TATSTransformer:
        """See `Prior.build`."""
        n = self.latent_codes
        return TATSTransformer(block_size=SEGMENT * n, unmasked=n, **self.sizes())

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """See `System.batch_spec`."""
        return self.spec(CodeClip("codes", 0, SEGMENT))

    def counted_codes(self) -> slice:
        """See `CodeModel.counted_codes`: those between, as the network sees the others; all of them as published."""
        n = self.latent_codes
        return slice(None) if self.options.legacy else slice(n, (SEGMENT - 1) * n)

    def make_sampler(self, network: Any) -> Sampler:
        """See `Prior.make_sampler`."""
        return Between(network, self.tokenizer, self.facts())

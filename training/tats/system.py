"""Training of TATS: cross-entropy of the codes of clips after a condition.

Ge et al., ECCV 2022, section 3.2 and the release. `tats` writes codes, or key frames with `--every`;
`tats-interpolation` writes the latent frames between two key frames.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.charts import ChartSpec
from training.config import TrainOptions
from training.contract import Batch, BatchSpec, Bundle, CodeClip, DataFacts, Info, Inputs, Part, Run, Stream, TextClip
from training.modules.prior import Prior
from training.network_file import load_tokenizer
from training.sampling import Sampler
from training.tats.conditions import check_sound, num_ids, sound_ids
from training.tats.networks import SEGMENT, TATSTransformer, parameter_groups
from training.tats.options import AUDIO, LABEL, TEXT, NetworkOptions, TATSOptions
from training.tats.sampling import AUDIO_TOKENIZER, Between, Facts, LongVideos
from training.tats.text import VOCABULARY, BytePairs, read_merges

TOP = 5  # of the second accuracy that is reported


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


class CodeModel(Prior):
    """What both systems share."""

    role = "transformer"
    betas = (0.9, 0.95)
    charts = (
        ChartSpec("Cross-entropy", {"loss/loss": "nats"}),
        ChartSpec("Accuracy", {"loss/top1_accuracy": "first", f"loss/top{TOP}_accuracy": f"first {TOP}"}),
    )

    preview_frames = 32

    network: TATSTransformer
    options: Any

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
        return Inputs(codes=self.tokenizer_hash, streams=(LABEL,) if self.options.condition == LABEL else ())

    def use_facts(self, facts: DataFacts) -> None:
        """See `System.use_facts`."""
        found = facts.num_values.get(LABEL, 0)
        if self.options.condition == LABEL and found > self.options.classes:
            raise ValueError(f"the dataset has {found} classes, but --classes is {self.options.classes}: raise it")

    def spec(self, clip: CodeClip) -> list[BatchSpec]:
        """Return the batch of a clip, with its condition."""
        steps = (clip.count - 1) * clip.stride + 1
        return [BatchSpec(steps * self.tokenizer.stride[0], (clip, *self.condition_parts()))]

    def condition_parts(self) -> list[Part]:
        """Return the parts of a batch that make the condition."""
        return [Stream(LABEL, 0, 1)] if self.options.condition == LABEL else []

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `Prior.parameter_groups`: as published."""
        return parameter_groups(self.network, self.options.weight_decay)

    def condition_ids(self, batch: Batch) -> Tensor:
        """Return the ids of the condition of each clip: int64 (N, C)."""
        codes = batch["codes"]
        return batch[LABEL] if self.options.condition == LABEL else codes.new_zeros(len(codes), 1)

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
        return Info(status=("loss/top1_accuracy",), charts=self.charts, preview_frames=self.preview_frames)


class TATS(CodeModel):
    """Train a transformer that writes the codes of clips; with --every=4 those of key frames.

    python train.py tats --dataset=data/labdoom --preset=toy --tokenizer=TOKENIZER
    """

    Options = TATSOptions
    system = "tats"

    def __init__(self, options: TATSOptions, run: Run):
        self.audio: Any = None
        if options.condition == AUDIO:
            self.audio, _ = load_tokenizer(options.audio_tokenizer, run.device)
            check_sound(self.audio, options.audio_tokenizer)
        super().__init__(options, run)
        if self.audio is not None:
            self.frozen = {**self.frozen, AUDIO_TOKENIZER: self.audio}
        self.texts: Sequence[str] = ()
        self.merges: list[str] = read_merges(options.merges or None) if options.condition == TEXT else []
        self.pairs = BytePairs(self.merges)

    @classmethod
    def check(cls, options: TATSOptions, train_options: TrainOptions) -> None:
        """See `System.check`."""
        super().check(options, train_options)
        if options.condition != TEXT and options.merges:
            raise ValueError("--merges is for descriptions: add --condition=text, or leave it out")
        if options.condition in (TEXT, AUDIO) and options.table:
            noun = "a description" if options.condition == TEXT else "sound"
            raise ValueError(f"--table needs a condition of one id, and {noun} has more: leave it out")
        if options.condition == AUDIO and not options.audio_tokenizer:
            raise ValueError("--condition=audio needs the file of a tokenizer of sound: give --audio-tokenizer")
        if options.condition != AUDIO and options.audio_tokenizer:
            raise ValueError("--audio-tokenizer is for sound: add --condition=audio, or leave it out")

    def inputs(self) -> Inputs:
        """See `System.inputs`."""
        inputs = super().inputs()
        if self.options.condition == AUDIO:
            return dataclasses.replace(inputs, streams=(AUDIO,))
        ids = functools.partial(self.pairs.ids_of, length=self.options.text_length)
        return dataclasses.replace(inputs, text_ids=ids if self.options.condition == TEXT else None)

    def sizes(self) -> dict[str, Any]:
        """See `CodeModel.sizes`."""
        return super().sizes() | ({} if self.audio is None else {"conditions": self.audio.vocabulary})

    def use_facts(self, facts: DataFacts) -> None:
        """See `System.use_facts`: previews and generation without a text take one of the dataset."""
        super().use_facts(facts)
        self.texts = facts.texts

    def condition_parts(self) -> list[Part]:
        """See `CodeModel.condition_parts`."""
        if self.options.condition == AUDIO:
            return [Stream(AUDIO, 0, self.span)]
        is_text = self.options.condition == TEXT
        return [TextClip(TEXT, self.options.text_length)] if is_text else super().condition_parts()

    def condition_ids(self, batch: Batch) -> Tensor:
        """See `CodeModel.condition_ids`."""
        if self.options.condition == AUDIO:
            return sound_ids(self.audio, batch[AUDIO])
        return batch[TEXT] if self.options.condition == TEXT else super().condition_ids(batch)

    @property
    def span(self) -> int:
        """Return the number of frames of a clip, from the first that the network sees to the last."""
        return ((self.latent_frames - 1) * self.options.every + 1) * self.tokenizer.stride[0]

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
        if self.audio is not None:
            length = num_ids(self.audio, self.span)
        block_size = length + self.latent_frames * self.latent_codes - 1
        return TATSTransformer(condition_length=length, block_size=block_size, table=table, **self.sizes())

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """See `System.batch_spec`."""
        return self.spec(CodeClip("codes", 0, self.latent_frames, self.options.every))

    def facts(self) -> Facts:
        """See `CodeModel.facts`."""
        return Facts(self.options.condition, self.options.every, list(self.texts), "\n".join(self.merges))

    def make_sampler(self, network: Any) -> Sampler:
        """See `Prior.make_sampler`."""
        return LongVideos(network, self.tokenizer, self.facts(), sound=self.audio)

    def export(self) -> Bundle:
        """See `System.export`."""
        bundle = super().export()
        more = {} if self.audio is None else {AUDIO_TOKENIZER: self.audio}
        return dataclasses.replace(bundle, networks={**bundle.networks, **more})


class TATSInterpolation(CodeModel):
    """Train a transformer that writes the latent frames between two key frames.

    python train.py tats-interpolation --dataset=data/labdoom --preset=toy --tokenizer=TOKENIZER
    """

    Options = NetworkOptions
    system = "tats-interpolation"
    preview_frames = 16  # a preview also takes the key frames after it, and clips may be short

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

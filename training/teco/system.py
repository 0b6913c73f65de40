"""Training of TECO on the codes of a frozen tokenizer, with actions.

Yan et al., "Temporally Consistent Transformers for Video Generation", ICML 2023, section 3.4 and appendix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import distributed, sharding
from training import optim
from training.charts import ChartSpec
from training.config import TrainOptions
from training.contract import (
    Batch,
    BatchSpec,
    CodeClip,
    DataFacts,
    FrameClip,
    Info,
    Inputs,
    Part,
    Run,
    Stream,
)
from training.modules.autoencoder import Autoencoder
from training.modules.prior import Prior
from training.random import random_state
from training.sampling import Sampler
from training.teco.layers import ResBlock, Transformer, TransformerLayer
from training.teco.losses import Draws, losses, num_kept, num_masked
from training.teco.networks import TECO, Decoder, PosteriorEncoder
from training.teco.options import TecoOptions
from training.teco.parallel import check_groups, divide
from training.teco.sampling import ROLE, TecoSampler, check_actions

UNKNOWN_SHARE = 0.5  # of clips whose actions are hidden, with `dropout_actions`


class Schedule(optim.Schedule):
    """The learning rate of the release: the first step has rate 0, the cosine ends `warmup` steps before the run."""

    def at(self, step: int) -> float:
        """See `optim.Schedule.at`."""
        return self.peak * step / self.warmup if step < self.warmup else super().at(step)


class TecoTraining(Prior):
    """Train TECO: predict frames from all frames before them, under actions.

    python train.py teco --dataset=data/labdoom --preset=toy --tokenizer=tokenizer.pkl
    """

    Options = TecoOptions
    role, system = ROLE, "teco"
    free_options = ("shard", "tensor_parallel", "recompute")
    betas = (0.9, 0.95)
    charts = (
        ChartSpec("Cross-entropy", {"loss/recon_loss": "codes of frames", "loss/trans_loss": "codes of z"}, log=True),
        ChartSpec("Codebook", {"loss/commitment_loss": "commitment", "loss/codebook_loss": "codebook"}, log=True),
    )

    network: TECO

    def __init__(self, options: TecoOptions, run: Run):
        super().__init__(options, run)
        steps, warmup = max(run.steps, 1), options.warmup_steps
        warmup = warmup if 2 * warmup < steps else steps // 4  # of a run of few steps, to try something
        self.schedule = Schedule(options.lr, options.schedule, warmup, steps - warmup)

    @classmethod
    def check(cls, options: TecoOptions, train_options: TrainOptions) -> None:
        """See `System.check`."""
        super().check(options, train_options)
        optim.check_options(options, shares=("drop_loss_rate",))
        num_masked(options.mask_schedule, np.zeros(1), 4)
        if not options.n_cond <= options.context < options.seq_len:
            raise ValueError(
                f"Option context is {options.context}; it must be from n_cond, {options.n_cond}, to below seq_len, "
                f"{options.seq_len}"
            )
        if options.ema_beta and (options.shard or options.tensor_parallel > 1):
            name = "--shard" if options.shard else "--tensor-parallel"
            raise ValueError(f"a network that is divided has no moving average: leave out {name} or --ema-beta")
        check_groups(options)
        if options.dropout_actions and not options.use_actions:
            raise ValueError("dropout_actions hides actions, but there are none without use_actions: set it to false")

    @classmethod
    def tensor_parallel(cls, options: TecoOptions) -> int:
        """See `System.tensor_parallel`."""
        return options.tensor_parallel

    def build(self) -> nn.Module:
        """See `Prior.build`."""
        tokenizer, o = self.tokenizer, self.options
        if not isinstance(tokenizer, Autoencoder) or tokenizer.stride[0] != 1:
            raise ValueError(
                f"{o.tokenizer} is a {type(tokenizer).__name__}, but TECO needs a tokenizer of single frames, such as "
                "a 2-D VQGAN: train one (python train.py tokenizer --preset=labdoom-2d)"
            )
        edge = tokenizer.stride[1]
        grid = (tokenizer.height // edge, tokenizer.width // edge)
        largest = math.gcd(*(size >> (len(o.encoder["depths"]) - 1) for size in grid))
        network = TECO(
            grid, tokenizer.vocabulary, tokenizer.quantizer.channels, o.seq_len, o.encoder, o.decoder, o.embedding_dim,
            o.num_codes, o.proj_dim, o.z_ds or max(largest, 1), o.temporal, o.prior, o.n_cond, o.use_actions,
            o.action_dim, o.action_embed_dim, o.positions, o.context,
        )  # fmt: skip
        for part in network.modules():
            if isinstance(part, PosteriorEncoder | Decoder | Transformer):
                part.recompute = o.recompute
        mesh = None
        if o.tensor_parallel > 1 and distributed.get_world_size() > 1:
            mesh = sharding.make_mesh(self.run.device, o.tensor_parallel)
            divide(network.to(self.run.device), mesh)
        if o.shard:
            blocks = [part for part in network.modules() if isinstance(part, ResBlock | TransformerLayer)]
            sharding.shard(network.to(self.run.device), blocks, mesh)
        return network

    def gather(self) -> None:
        """See `System.gather`: until the next step each rank has a whole network."""
        if sharding.is_sharded(self.network):
            state = sharding.whole_state(self.network)
            self.average = TECO(**self.network.options).to(self.device)
            self.average.load_state_dict(state)

    def step(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """See `System.step`."""
        self.forget()
        return super().step(batches, step)

    def forget(self) -> None:
        """Leave only the sizes of a whole network, if this one is divided."""
        if sharding.is_sharded(self.network):
            with torch.device("meta"):
                self.average = TECO(**self.network.options)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `Prior.parameter_groups`: all parameters decay."""
        return [{"params": list(self.network.parameters())}]

    # ---- Inputs -----------------------------------------------------------------------------------------------------

    def inputs(self) -> Inputs:
        """See `System.inputs`."""
        streams = ("actions",) if self.options.use_actions else ()
        if self.options.encode_frames:
            return Inputs(sizes=((self.tokenizer.height, self.tokenizer.width),), streams=streams)
        return Inputs(codes=self.tokenizer_hash, streams=streams)

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """See `System.batch_spec`."""
        count, size = self.options.seq_len, (self.tokenizer.height, self.tokenizer.width)
        is_encoded = not self.options.encode_frames
        parts: list[Part] = [CodeClip("codes", 0, count) if is_encoded else FrameClip("frames", *size, 0, count)]
        parts += [Stream("actions", 0, count)] if self.options.use_actions else []
        return [BatchSpec(count, tuple(parts))]

    def draw(self, rngs: list[np.random.RandomState], step: int) -> dict[str, np.ndarray]:
        """See `Prior.draw`.

        Ratios of masks and kept frames are those of the global batch, so that every rank knows how many codes are
        hidden in all of it.
        """
        o, cells = self.options, int(np.prod(self.network.cells))
        bound = o.seq_len - o.n_cond
        readers, reader = self.run.num_readers, self.run.reader
        shared = random_state("train-teco", self.run.seed, step)
        count = num_kept(o.drop_loss_rate, bound)
        frames = np.arange(bound)
        if o.drop_loss_rate:
            frames = shared.randint(0, bound + o.n_cond if o.legacy else bound, count)
        ratios = shared.random_sample((len(rngs) * readers, count)).astype(np.float32)
        counts = num_masked(o.mask_schedule, ratios, cells)
        own = counts[reader * len(rngs) : (reader + 1) * len(rngs)]
        order = np.array([[rng.permutation(cells) for _ in range(count)] for rng in rngs])  # (N, F, cells)
        unknown = np.array([o.dropout_actions and rng.random_sample() < UNKNOWN_SHARE for rng in rngs])
        return {
            "unknown": unknown,
            "frames_kept": np.repeat(frames[None], len(rngs), 0).astype(np.int64),
            "hidden": order < own[:, :, None],
            "num_hidden": np.full(len(rngs), counts.sum() / len(counts), np.float32),
        }

    def use_facts(self, facts: DataFacts) -> None:
        """See `System.use_facts`: actions must be those that the network knows."""
        count = facts.num_values.get("actions")
        if self.options.use_actions and count is not None:
            is_vector = "actions" in facts.vectors
            example = torch.zeros(1, 1, count) if is_vector else torch.tensor([count - 1])
            check_actions(example, self.options.action_dim)

    # ---- Loss -------------------------------------------------------------------------------------------------------

    def codes_of(self, batch: Batch) -> Tensor:
        """Return the tokenizer's codes of a batch: int64 (N, T, H, W)."""
        if not self.options.encode_frames:
            return batch["codes"]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.tokenizer.encode(batch["frames"].to(next(self.tokenizer.parameters())))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """See `Prior.losses`."""
        codes = self.codes_of(batch)
        actions = self.actions_of(batch, codes)
        frames, bound = batch["frames_kept"][0], self.options.seq_len - self.options.n_cond
        detached = frames >= bound if self.options.legacy else None
        draws = Draws(batch["unknown"], frames.clamp(max=bound - 1), detached, batch["hidden"], batch["num_hidden"][0])
        with torch.no_grad():
            x = self.tokenizer.quantizer.lookup(codes).transpose(1, 2)

        def terms(network: TECO) -> dict[str, Tensor]:
            found = losses(network, x, codes, actions, draws)
            quantized = found.quantized
            return {
                "loss": found.total,
                "recon_loss": found.recon_loss,
                "trans_loss": found.trans_loss,
                "commitment_loss": quantized.commitment_loss,
                "codebook_loss": quantized.codebook_loss,
                "perplexity": quantized.perplexity,
            }

        return self.network(terms)

    def actions_of(self, batch: Batch, codes: Tensor) -> Tensor:
        """Return the actions (N, T) of a batch, zeros without any."""
        if not self.options.use_actions:
            return torch.zeros(codes.shape[:2], dtype=torch.int64, device=codes.device)
        return batch["actions"]

    # ---- Results ----------------------------------------------------------------------------------------------------

    def make_sampler(self, network: nn.Module) -> Sampler:
        """See `Prior.make_sampler`."""
        assert isinstance(network, TECO)
        return TecoSampler(network, self.tokenizer)

    def info(self) -> Info:
        """See `System.info`."""
        return Info(preview_frames=min(64, self.options.seq_len), charts=self.charts)

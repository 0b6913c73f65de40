"""Open published checkpoints of TATS: a Lightning file of a transformer, which holds its tokenizers.

    python -m training.checkpoint convert uncond_gpt_sky_128_488.ckpt sky.pkl

Sizes are read from the tensors. The kind of the condition, the number of heads and which latent frames were taken are
in the hyper-parameters. Nothing in the file is run (torch_utils.safe_archive).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torch_utils.safe_archive import Archive, Stored
from training.contract import Bundle
from training.modules import published
from training.modules.vqgan3d import VQGAN3D
from training.network_file import content_hash
from training.network_format import build_network, is_torch_archive
from training.tats.conditions import num_ids
from training.tats.networks import TATSTransformer, infill_mask
from training.tats.sampling import AUDIO_TOKENIZER, Facts

PREFIX = "transformer."
MARKS = ("pos_emb", "tok_emb.weight", "head.weight", "blocks.0.attn.key.weight")
HEAD_WIDTH = 64  # of the published models, if a file does not say how many heads there are
AUDIO_FRAMES = 16  # whose sound a published model is given
STORED_CODES = 16384  # vocabulary of models that were trained on stored codes, which have no tokenizer


def open_published(path: str) -> Bundle | None:
    """Return the transformer and the tokenizer in a published checkpoint, None if the file is none.

    Raises `ValueError` naming the file if it is damaged, lacks a part, or has an attention that is not known.
    """
    if not os.path.isfile(path) or not is_torch_archive(path):
        return None
    with Archive(path) as archive:
        state = published.state_of(archive.content)
        if not all(PREFIX + mark in state for mark in MARKS):
            return None
        settings = published.settings_of(archive.content)
        tokenizer = published.find_tokenizer(archive.content)
        networks: dict[str, nn.Module] = {}
        num_codes = STORED_CODES
        if tokenizer is not None and tokenizer.cls is VQGAN3D:
            networks["tokenizer"] = published.build(tokenizer, archive)
            num_codes = tokenizer.size("codebook.embeddings")
        sound = published.find_tokenizer(archive.content, published.AUDIO_PREFIXES)
        if sound is not None and sound.cls is VQGAN3D:
            networks[AUDIO_TOKENIZER] = published.build(sound, archive)
        entries = {name.removeprefix(PREFIX): entry for name, entry in state.items() if name.startswith(PREFIX)}
        masks = [name for name in entries if name.endswith(".attn.mask")]
        mask = archive.tensor(entries[masks[0]]) if masks else None
        wanted = {name: entry for name, entry in entries.items() if not name.endswith(".attn.mask")}
        facts = facts_of(settings)
        options = options_of(wanted, settings, num_codes, mask, facts, path)
        if AUDIO_TOKENIZER in networks:
            frames = settings.get("sequence_length")
            frames = frames if type(frames) is int and frames > 0 else AUDIO_FRAMES
            options["condition_length"] = num_ids(networks[AUDIO_TOKENIZER], frames)
        network = build_network(TATSTransformer, options, archive.tensors(wanted), path)
    system = "tats-interpolation" if options["unmasked"] else "tats"
    digest = content_hash(networks["tokenizer"]) if "tokenizer" in networks else None
    return Bundle({"transformer": network, **networks}, system, dataclasses.asdict(facts), digest)


def facts_of(settings: Mapping[str, Any]) -> Facts:
    """Return what the hyper-parameters say about the condition and about latent frames."""
    kind = "none" if settings.get("unconditional") else str(settings.get("cond_stage_key") or "none")
    every = settings.get("sample_every_n_latent_frames")
    return Facts({"stft": "audio"}.get(kind, kind), every if type(every) is int and every > 0 else 1)


def options_of(
    entries: Mapping[str, Stored], settings: Mapping[str, Any], num_codes: int, mask: torch.Tensor | None,
    facts: Facts, path: str,
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments of the network; raises `ValueError` for sizes that make none."""
    vocabulary, width = entries["tok_emb.weight"].shape
    block_size = entries["pos_emb"].shape[1]
    heads = settings.get("n_head")
    if vocabulary < num_codes:
        raise ValueError(
            f"{path} has a transformer of {vocabulary} ids, but its tokenizer has {num_codes} codes: download it again"
        )
    table = entries.get("vtokens_pos_emb")
    return {
        "num_codes": num_codes,
        "conditions": vocabulary - num_codes,
        "condition_length": {"text": 256, "audio": 64}.get(facts.condition, 1),
        "block_size": block_size,
        "layers": 1 + max(int(name.split(".")[1]) for name in entries if name.startswith("blocks.")),
        "heads": heads if type(heads) is int and heads > 0 else max(width // HEAD_WIDTH, 1),
        "width": width,
        "unmasked": unmasked_of(mask, block_size, settings, path),
        "table": list(table.shape[1:4]) if table is not None else None,
    }


def unmasked_of(mask: torch.Tensor | None, block_size: int, settings: Mapping[str, Any], path: str) -> int:
    """Return the number of codes of a latent frame of an in-filling model, by its mask (1, 1, P, P); 0: causal."""
    if mask is None:
        return int(settings.get("n_unmasked") or 0)
    seen = mask.reshape(mask.shape[-2:]) != 0
    unmasked = int(seen[0].to(torch.uint8).argmin()) - 1 if not bool(seen[0].all()) else block_size
    causal = torch.ones(block_size, block_size, dtype=torch.bool).tril()
    wanted = infill_mask(block_size, unmasked) if 0 < unmasked < block_size else causal
    if seen.shape != wanted.shape or not torch.equal(seen, wanted):
        raise ValueError(f"{path} has a transformer whose attention is neither causal nor that of in-filling")
    return unmasked if unmasked < block_size else 0

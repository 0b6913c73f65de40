"""Open checkpoints of published tokenizers: TATS, MeBT, taming-transformers, latent diffusion, RIVER and TECO.

    python -m training.checkpoint convert vqgan_ucf_128_488.ckpt tokenizer.pkl

Nothing in the files is run (torch_utils.safe_archive). A file of a whole model gives the tokenizer in it.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch_utils.safe_archive import Archive
from training.contract import Bundle
from training.modules import published
from training.network_format import is_torch_archive


def open_published(path: str) -> Bundle | None:
    """Return the tokenizer in a published checkpoint, for TECO its folder, None if the file is none.

    Raises `ValueError` naming the file if it is damaged or lacks a part of its tokenizer.
    """
    folder = Path(path)
    if folder.is_dir() and (folder / "args").is_file():
        checkpoint = published.newest_checkpoint(folder)
        network = published.read_flax(folder, checkpoint) if checkpoint is not None else None
        return None if network is None else Bundle({"tokenizer": network}, "tokenizer")
    if not os.path.isfile(path) or not is_torch_archive(path):
        return None
    with Archive(path) as archive:
        found = published.find_tokenizer(archive.content)
        return None if found is None else Bundle({"tokenizer": published.build(found, archive)}, "tokenizer")

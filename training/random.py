"""Random generators keyed by purpose, seed and index, so that nothing depends on the order of draws.

NumPy guarantees that the stream of a `RandomState` over a given bit generator never changes, which torch does not,
and Philox takes a 128-bit key, so `(purpose, seed, index)` hashed to 128 bits selects an independent stream.
"""

import hashlib

import numpy as np

NOISE_BLOCK = 256  # samples in one block of noise; defines the meaning of a seed, so it must never change


def random_state(purpose: str, seed: int, index: int | str) -> np.random.RandomState:
    """Return the generator for draw number `index` of `purpose` under `seed`: the same numbers on every machine."""
    digest = hashlib.blake2b(f"{purpose}:{seed}:{index}".encode(), digest_size=16).digest()
    return np.random.RandomState(np.random.Philox(key=int.from_bytes(digest, "little")))


def noise_blocks(purpose: str, seed: int, num_channels: int, start: int, num_samples: int) -> np.ndarray:
    """Return white noise samples [start, start + num_samples) of an endless stream: float32 (channels, samples).

    The stream consists of blocks of 256 samples, keyed by a signed block number, each with its own generator, so a
    window computes only its own blocks, and overlapping windows agree bit for bit.
    """
    first, last = start // NOISE_BLOCK, -(-(start + num_samples) // NOISE_BLOCK)
    blocks = [
        random_state(purpose, seed, block).standard_normal((num_channels, NOISE_BLOCK)).astype(np.float32)
        for block in range(first, last)
    ]
    if not blocks:
        return np.zeros((num_channels, 0), np.float32)
    offset = start - first * NOISE_BLOCK
    return np.concatenate(blocks, axis=1)[:, offset : offset + num_samples]

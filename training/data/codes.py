"""Read token shards, which hold the tokens of a dataset's clips, encoded by a tokenizer.

Layout: `<root>/codes-<first 12 hex digits of the tokenizer's SHA-256>/<shard>.zip` as `training.data.grids` describes,
with arrays uint16 (T, h, w).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dnnlib.json_file import whole
from training.data.grids import GridKind, GridManifest, GridStore

MAX_VOCABULARY = 1 << 16  # tokens are stored as uint16
DTYPE = np.dtype("<u2")
CODES = GridKind("codes", "tokens", DTYPE)


def codes_folder(root: Path, tokenizer: str) -> Path:
    """Return the folder of a dataset's tokens, given the SHA-256 of their tokenizer as hex digits."""
    return CODES.folder(root, tokenizer)


def encode_command(root: Path) -> str:
    """Return the command that encodes a dataset."""
    return CODES.command(root)


@dataclass(frozen=True)
class CodesManifest(GridManifest):
    """The manifest of token shards."""

    vocabulary: int  # tokens are 0 ... vocabulary - 1

    kind = CODES
    checks = {"vocabulary": whole(1, MAX_VOCABULARY)}


def read_codes_manifest(folder: Path) -> CodesManifest:
    """Read the manifest of a folder of tokens; raise `ValueError` if it is missing or invalid."""
    return CodesManifest.read(folder)


class CodeStore(GridStore[CodesManifest]):
    """The tokens of all clips of a dataset: uint16 (T, h, w) a clip. See `GridStore`."""

    Manifest = CodesManifest

    @property
    def vocabulary(self) -> int:
        """Return the size of the codebook."""
        return self.manifest.vocabulary

    def check_values(self, values: np.ndarray) -> str:
        """See `GridStore.check_values`."""
        highest = int(values.max())
        return "" if highest < self.vocabulary else f"token {highest} of a vocabulary of {self.vocabulary}"

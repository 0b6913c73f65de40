"""Networks with the weights of the golden numbers."""

from typing import Any

import torch

from tests import golden_files
from training.tats.networks import TATSTransformer


def fill(network: TATSTransformer, salt: int) -> TATSTransformer:
    """Load the made-up weights of a set of golden numbers."""
    network.load_state_dict(golden_files.wave_fill(network.state_dict(), salt))
    return network


def make(golden: Any, salt: int | None = None, **arguments: Any) -> TATSTransformer:
    """Return a network with the weights of a golden file."""
    return fill(TATSTransformer(**arguments), golden_files.salt_of(golden) if salt is None else salt).eval()


def ids(text: str, vocabulary: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return ids of a formula such as "(7i+0) mod V" over the flat index i."""
    count = int(torch.tensor(shape).prod())
    inner = text[text.index("(") + 1 : text.index(")")]
    return torch.tensor([golden_files.number(inner, i=i) % vocabulary for i in range(count)]).view(shape)

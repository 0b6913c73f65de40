"""Networks of the golden file of TECO, and the inputs that its entries share."""

import re
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import golden_files
from training.modules.published import flax_names, from_flax
from training.modules.vqgan2d import VQGAN2D
from training.teco.losses import Draws, num_masked
from training.teco.networks import TECO, TRANSFORMER
from training.teco.published import leaves
from training.teco.sampling import Drawing

SINGLE = 5e-5  # absolute tolerance of single values


def sizes_of(config: dict[str, Any], vqgan: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of TECO for a configuration of the release and that of its VQGAN."""
    grid = vqgan["resolution"] >> (len(vqgan["ch_mult"]) - 1)
    names = "seq_len encoder decoder embedding_dim z_ds n_cond use_actions action_dim action_embed_dim".split()
    prior = config["z_git"]
    return {name: config[name] for name in names} | {
        "grid": (grid, grid),
        "vocabulary": vqgan["n_embed"],
        "code_channels": vqgan["embed_dim"],
        "num_codes": config["codebook"]["n_codes"],
        "proj_dim": config["codebook"]["proj_dim"],
        "temporal": {name: config["z_tfm_kwargs"][name] for name in TRANSFORMER},
        "prior": {"vocab_dim": prior["vocab_dim"], **{name: prior["tfm_kwargs"][name] for name in TRANSFORMER}},
        "context": config["open_loop_ctx"],
    }


def make_teco(golden: dict[str, Any], **changes: Any) -> TECO:
    """Return the network of a golden file, with its weights and some other arguments."""
    config = golden["config"]
    network = TECO(**sizes_of(config["teco"], config["vqgan"]) | changes)
    state, places = network.state_dict(), leaves(network)
    assert places.keys() == state.keys()
    shapes = {leaf.path: tuple(leaf.to_flax(state[name]).shape) for name, leaf in places.items()}
    arrays = golden_files.normal_fill(shapes, golden["about"]["base"], golden_files.teco_scale)
    network.load_state_dict(
        {name: leaf.from_flax(torch.from_numpy(arrays[leaf.path])) for name, leaf in places.items()}
    )
    return network.eval()


def make_vqgan(golden: dict[str, Any]) -> VQGAN2D:
    """Return the VQGAN of a golden file, with its weights."""
    config = golden["config"]["vqgan"]
    names = "resolution ch ch_mult num_res_blocks attn_resolutions z_channels double_z".split()
    network = VQGAN2D(
        height=config["resolution"], width=config["resolution"], embedding_dim=config["embed_dim"],
        num_codes=config["n_embed"], quantizer={"kind": "vq", "legacy": True}, **{name: config[name] for name in names},
    )  # fmt: skip
    state, names = network.state_dict(), flax_names(network)
    permuted = {names[n]: x.permute(2, 3, 1, 0) if x.ndim == 4 else x for n, x in state.items()}
    shapes = {name: tuple(x.shape) for name, x in permuted.items()}
    arrays = golden_files.normal_fill(shapes, golden["about"]["base_vq"], golden_files.teco_scale)
    network.load_state_dict({ours: from_flax(torch.from_numpy(arrays[flax])) for ours, flax in names.items()})
    return network.eval()


@lru_cache(maxsize=1)
def golden_file() -> dict[str, Any]:
    """Return the golden file."""
    return golden_files.read("teco")


def random(text: str, kind: str, index: int = 0) -> Tensor:
    """Return the numbers of the term of a text that calls a method such as "randint"; see `golden_files.draws`."""
    seed = golden_file()["about"]["seed"]
    terms = [match[0] for match in re.finditer(r"(?:[\d.]+\*)?RS\(\d+\)\.\w+\((?:[^()]|\([^()]*\))*\)", text)]
    term = [term for term in terms if f".{kind}(" in term][index]
    return torch.from_numpy(golden_files.draws(term, seed)[0])


def generators(text: str) -> list[np.random.RandomState]:
    """Return the generators of all RS(i) in a text, in its order."""
    seed = golden_file()["about"]["seed"]
    return [np.random.RandomState(seed + int(number)) for number in re.findall(r"RS\((\d+)\)", text)]


def embed(vqgan: VQGAN2D, codes: Tensor) -> Tensor:
    """Return embedded frames (N, T, D, H, W) of codes (N, T, H, W)."""
    return vqgan.quantizer.lookup(codes).transpose(1, 2)


def shared_inputs() -> tuple[Tensor, Tensor]:
    """Return the codes and the actions that most entries take."""
    golden = golden_file()
    return random(golden["posterior"]["input"], "randint"), random(golden["temporal"]["input"], "randint")


def training_draws(network: TECO, indices: Tensor, schedule: str, text: str, dropout: bool, legacy: bool) -> Draws:
    """Return the draws of a training entry, whose text gives the ratios; those of all entries are in "train"."""
    golden = golden_file()
    batch, frames = golden["about"]["batch"], len(indices)
    bound = network.seq_len - network.n_cond
    number = re.search(r"(?:RandomState|permutations) RS\((\d+)\)", text)
    ratios = re.search(r"RS\((\d+)\)\.uniform", text)
    assert number is not None and ratios is not None, text
    seed = golden["about"]["seed"]
    cells = network.cells[0] * network.cells[1]
    ratio = np.random.RandomState(seed + int(ratios[1])).uniform(size=(frames, batch)).astype(np.float32)
    rng, counts = np.random.RandomState(seed + int(number[1])), num_masked(schedule, ratio, cells)
    order = np.array([[rng.permutation(cells) for _ in range(batch)] for _ in range(frames)])
    hidden = torch.from_numpy(order < counts[..., None]).transpose(0, 1)
    unknown = torch.zeros(batch, dtype=torch.bool)
    unknown[0] = dropout
    return Draws(
        unknown,
        indices.clamp(max=bound - 1),
        indices >= bound if legacy else None,
        hidden,
        torch.tensor(counts.sum() / batch, dtype=torch.float32),
    )


class GoldenNoise:
    """The release's random numbers: permutations that all videos share, and Gumbel noise for every cell of a call."""

    def __init__(self, cells: int, num_codes: int, orders: np.random.RandomState, gumbel: np.random.RandomState):
        self.cells, self.num_codes, self.orders, self.gumbel = cells, num_codes, orders, gumbel
        self.num_orders = self.num_calls = 0
        self.num_videos = golden_file()["about"]["batch"]

    def step(self, label: str) -> None:
        pass

    def race(self, positions: Tensor, num_codes: int, codes: Tensor | None = None) -> Tensor:
        """argmax(logits + g) is the winner of p / exp(-g)."""
        self.num_calls += 1
        assert codes is None and num_codes == self.num_codes
        noise = self.gumbel.gumbel(size=(len(positions), self.cells, num_codes)).astype(np.float32)
        drawn = torch.from_numpy(noise).gather(1, positions.unsqueeze(2).expand(-1, -1, num_codes))
        return (-drawn).exp()

    def permutations(self, count: int) -> Tensor:
        self.num_orders += 1
        assert count == self.cells
        return torch.from_numpy(self.orders.permutation(count)).expand(self.num_videos, -1)

    def exponential(self, positions: Tensor) -> Tensor:
        raise AssertionError("no position is chosen by its confidence")

    normal = exponential


def make_noise(network: TECO, orders: np.random.RandomState, gumbel: np.random.RandomState) -> GoldenNoise:
    """Return the random numbers of an entry for a network."""
    return GoldenNoise(network.cells[0] * network.cells[1], network.prior.num_codes, orders, gumbel)


def drawing() -> Drawing:
    """Return the options of the golden file's sampler."""
    config = golden_file()["config"]["teco"]
    return Drawing(draft=config["T_draft"], revise=config["T_revise"], rounds=config["M"])

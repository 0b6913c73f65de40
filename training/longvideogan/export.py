"""Export generators as graphs of plain PyTorch operations for a fixed length, which run without this package.

    program = export_generator(load_network("lres.pkl", "cpu"), num_frames=128)
    torch.export.save(program, "lres-128.pt2")
    frames = torch.export.load("lres-128.pt2").module()(noise)

`torch.export` writes them; other runtimes and languages read them.
"""

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sres.generator import SuperResGenerator


class _Synthesis(nn.Module):
    """A low-resolution generator as a function of its noise only."""

    def __init__(self, network: LowResGenerator, num_frames: int):
        super().__init__()
        self.network, self.num_frames = network, num_frames

    def forward(self, noise: Tensor) -> Tensor:
        return self.network.synthesize(noise, self.num_frames)


def export_generator(
    network: LowResGenerator | SuperResGenerator, num_frames: int, batch_size: int = 1
) -> ExportedProgram:
    """Return the program that generates `num_frames` frames of `batch_size` videos, on the device of the network.

    For a low-resolution generator its input is noise (N, noise_channels, num_noise_frames(num_frames)), which
    `training.longvideogan.latents.noise_blocks` draws for a seed. For a super-resolution generator its inputs are
    low-resolution frames (N, 3, num_frames + 2 temporal_context, h, w) and z (N, z_channels). It returns
    (N, 3, num_frames, H, W), nominally in [-1, 1]. The weights are included in their precision.
    """
    if num_frames < 1 or batch_size < 1:
        raise ValueError(f"{num_frames} frames of {batch_size} videos cannot be exported: give at least one of each")
    like = next(network.parameters())
    if isinstance(network, LowResGenerator):
        shapes = [(batch_size, network.noise_channels, network.num_noise_frames(num_frames))]
        module = _Synthesis(network, num_frames)
    else:
        length = num_frames + 2 * network.temporal_context
        shapes = [
            (batch_size, 3, length, network.lres_height, network.lres_width),
            (batch_size, network.z_channels),
        ]
        module = network
    inputs = tuple(like.new_zeros(shape) for shape in shapes)
    with torch.no_grad():
        return torch.export.export(module, inputs)

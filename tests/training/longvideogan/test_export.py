"""Exported programs contain only plain operations and generate the frames of the network."""

import io

import pytest
import torch

from training.longvideogan.export import export_generator
from training.longvideogan.latents import noise_blocks


def reload(program):
    """As another process would get it."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    namespaces = {
        node.target.namespace
        for node in loaded.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    }
    assert namespaces == {"aten"}
    return loaded.module()


@pytest.mark.parametrize("num_frames", [8, 13])
def test_low_resolution_program_makes_the_frames_of_the_network(tiny_lres, num_frames):
    network = reload(export_generator(tiny_lres, num_frames))
    noise = torch.from_numpy(noise_blocks(3, tiny_lres.noise_channels, 0, tiny_lres.num_noise_frames(num_frames)))[None]
    frames = network(noise)
    assert frames.shape == (1, 3, num_frames, 18, 32)
    assert torch.allclose(frames, tiny_lres.synthesize(noise, num_frames), atol=1e-5)


def test_super_resolution_program_makes_the_frames_of_the_network(tiny_sres, seeded):
    network = reload(export_generator(tiny_sres, 3, batch_size=2))
    inputs = seeded(0, 2, 3, 11, 18, 32) * 0.5, seeded(1, 2, 16)
    frames = network(*inputs)
    assert frames.shape == (2, 3, 3, 36, 64)
    assert torch.allclose(frames, tiny_sres(*inputs), atol=1e-5)


def test_nothing_cannot_be_exported(tiny_sres):
    with pytest.raises(ValueError, match="0 frames of 1 videos cannot be exported: give at least one of each"):
        export_generator(tiny_sres, 0)

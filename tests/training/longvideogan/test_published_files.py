"""Files in the published format load into our classes; ours load as the published ones do."""

import importlib.util
import pickle
import pickletools
import sys
from typing import Any

import numpy as np
import pytest
import torch

from training.checkpoint import load_network, save_network
from training.longvideogan.lres.discriminator import LowResDiscriminator
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sres.discriminator import SuperResDiscriminator
from training.longvideogan.sres.generator import SuperResGenerator

# The source that a published file carries is of no consequence to the reader: here it is a bare tree of tensors.
FOREIGN_SOURCE = """
import torch
from torch_utils import persistence

raise_if_executed_by_a_reader = True


@persistence.persistent_class
class Branch(torch.nn.Module):
    pass


@persistence.persistent_class
class VideoGenerator(torch.nn.Module):
    pass


@persistence.persistent_class
class VideoDiscriminator(torch.nn.Module):
    pass
"""
PUBLISHED = {
    "lres_generator": (LowResGenerator, "VideoGenerator", {"out_height": 36, "out_width": 64, "output_scale": 0.25}),
    "lres_discriminator": (LowResDiscriminator, "VideoDiscriminator", {"max_edge": 64}),
    "sres_generator": (
        SuperResGenerator,
        "VideoGenerator",
        {
            "hr_height": 144,
            "hr_width": 256,
            "lr_height": 36,
            "lr_width": 64,
            "temporal_context": 4,
            "margin_size": 10,
            "num_fp16_res": 4,
        },
    ),
    "sres_discriminator": (SuperResDiscriminator, "VideoDiscriminator", {"num_fp16_res": 4}),
}
LISTS = ("temporal_layers", "spatial_layers", "blocks", "resamples")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Return a module with the class names of the published code."""
    path = tmp_path_factory.mktemp("foreign") / "foreign_networks.py"
    path.write_text(FOREIGN_SOURCE)
    spec = importlib.util.spec_from_file_location("foreign_networks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["foreign_networks"] = module
    spec.loader.exec_module(module)
    return module


def build_tree(foreign, listing, class_name, attributes):
    """Return a tree of modules that holds a random tensor under each published name."""
    root = getattr(foreign, class_name)()
    generator = torch.Generator().manual_seed(0)
    for name, entry in listing.items():
        *path, leaf = name.split(".")
        module = root
        for position, part in enumerate(path):
            children = module._modules
            if isinstance(module, torch.nn.ModuleList):
                while len(module) <= int(part):  # where there is no resampler the published list holds an identity
                    expected = len(module) == int(part)
                    module.append(foreign.Branch() if expected else torch.nn.Identity())
            elif part not in children:
                is_list = part in LISTS and path[position + 1].isdigit()
                module.add_module(part, torch.nn.ModuleList() if is_list else foreign.Branch())
            module = children[part]
        tensor = torch.rand(entry["shape"], generator=generator)
        if entry["kind"] == "parameter":
            module.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
        else:
            module.register_buffer(leaf, tensor)
    if "temporal_emb" in root._modules:
        root.temporal_emb.blur_filters[0, 0, :-125] = 0  # the first filter is as short as the published one
    for name, value in attributes.items():
        setattr(root, name, value)
    root.scale_of_numpy = np.float64(0.25)  # published files hold a few NumPy scalars
    return root.eval()


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_file_loads_into_our_class(kind, foreign, golden, tmp_path):
    cls, class_name, attributes = PUBLISHED[kind]
    tree = build_tree(foreign, golden("longvideogan_state")[kind], class_name, attributes)
    path = tmp_path / f"{kind}.pkl"
    with open(path, "wb") as file:
        pickle.dump(tree, file, protocol=4)
    network = load_network(path)
    assert type(network) is cls
    assert network.options == cls().options
    expected, found = tree.state_dict(), network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("fixture", ["tiny_lres", "tiny_sres"])
def test_our_file_is_the_published_container_and_opens_both_ways(fixture, request, tmp_path, seeded, capsys):
    network = request.getfixturevalue(fixture)
    path = tmp_path / "network.pkl"
    save_network(network, path)
    assert next(pickletools.genops(path.read_bytes()))[1] == 4
    for trust in (False, True):
        loaded: Any = load_network(path, trust=trust)
        assert type(loaded).__name__ == type(network).__name__
        found, expected = loaded.state_dict(), network.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        if isinstance(network, LowResGenerator):
            noise = seeded(0, 1, network.noise_channels, network.num_noise_frames(9))
            assert torch.equal(loaded.synthesize(noise, 9), network.synthesize(noise, 9))
        if isinstance(network, SuperResGenerator):
            arguments = seeded(0, 1, 3, 10, 18, 32), seeded(1, 1, 16)
            assert torch.equal(loaded(*arguments), network(*arguments))
    assert "code" in capsys.readouterr().out.lower(), "--trust says what it does"

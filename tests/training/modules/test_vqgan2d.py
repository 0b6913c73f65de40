"""The 2-D autoencoders: published numbers and sizes."""

import re

import pytest
import torch

from tests import golden_files
from training.modules.published import flax_names, from_flax
from training.modules.vqgan2d import VQGAN2D, RiverVQVAE

# Nominal side, side with attention, multiples of the width, width of codes.
PUBLISHED = {
    "f8_small": (64, 16, [1, 2, 2, 4], 4),
    "f8": (256, 32, [1, 2, 2, 4], 4),
    "f16": (256, 16, [1, 1, 2, 2, 4], 8),
}


def river_network(entry):
    """The autoencoder of an entry, with its weights, in eval mode."""
    config = entry["config"]
    if "vector_quantizer" in config:
        codebook, encoder = config["vector_quantizer"], config["encoder"]
        network = RiverVQVAE(
            embedding_dim=codebook["embedding_dimension"], num_codes=codebook["num_embeddings"],
            channels=encoder["in_channels"], quantizer={"legacy": True},
        )  # fmt: skip
    else:
        network = taming_network(config)
    golden_files.fill_river(network, entry["base"])
    return network.eval()


def taming_network(config):
    return VQGAN2D(
        resolution=config["resolution"], ch=config["ch"], ch_mult=config["ch_mult"],
        num_res_blocks=config["num_res_blocks"], attn_resolutions=config["attn_resolutions"],
        z_channels=config["z_channels"], embedding_dim=config["embed_dim"], num_codes=config["n_embed"],
        channels=config.get("in_channels", 3), double_z=config["double_z"], quantizer={"legacy": True},
    )  # fmt: skip


def close(found, expected, where=""):
    golden_files.check(found, expected, single=5e-5, where=where)


@golden_files.entries("river", "own_vqvae*")
def test_own_vqvae(entry, golden):
    network = river_network(entry)
    assert [[name, list(v.shape)] for name, v in sorted(network.state_dict().items())] == sorted(entry["names"])
    assert sum(p.numel() for p in network.parameters()) == entry["total"]
    (images,) = golden_files.normals(entry["input"], golden["about"]["seed"])
    z = network.features(images.unsqueeze(2))
    close(z.squeeze(2), entry["latents"], "latents")
    quantized = network.quantizer(z)
    assert quantized.codes.flatten().tolist() == entry["codes"]["values"]
    close(quantized.output.squeeze(2), entry["quantized"], "quantized")
    assert quantized.loss.item() == pytest.approx(entry["vq_loss"], rel=1e-4)
    video = network.generate(quantized.output)
    close(video.squeeze(2), entry["reconstruction"], "reconstruction")
    close(network.decode_latents(z).squeeze(2), entry["decode_from_latents"])
    ((video.squeeze(2) - images).square().mean() + quantized.loss).backward()
    gradients = {name: p.grad.norm().item() for name, p in network.named_parameters() if p.grad is not None}
    for name, norm in entry["grad_norms"].items():
        assert gradients[name] == pytest.approx(norm, rel=1e-3), name
    network.train()
    with torch.no_grad():
        close(network(images.unsqueeze(2))[0].squeeze(2), entry["train_mode_reconstruction"], "train mode")
    means = [v for name, v in network.state_dict().items() if name.endswith("running_mean")]
    (mean,) = (v for v in means if list(v.shape) == entry["running_mean_after"]["shape"])
    close(mean, entry["running_mean_after"])


@golden_files.entries("river", "ldm_vq*")
@torch.no_grad()
def test_latent_diffusion_vq(entry, golden):
    network = river_network(entry)
    assert [[name, list(v.shape)] for name, v in sorted(network.state_dict().items())] == sorted(entry["names"])
    (images,) = golden_files.normals(entry["input"], golden["about"]["seed"])
    z = network.features(images.unsqueeze(2))
    close(z.squeeze(2), entry["pre_quant"], "pre_quant")
    quantized = network.quantizer(z)
    assert quantized.codes.flatten().tolist() == entry["codes"]["values"]
    close(quantized.output.squeeze(2), entry["quant"], "quant")
    assert quantized.loss.item() == pytest.approx(entry["loss_legacy"], rel=1e-4)
    close(network.decode_latents(z).squeeze(2), entry["decode"], "decode")
    close(network.generate(z).squeeze(2), entry["decode_not_quantised"], "decode_not_quantised")
    for name, published in entry.get("published_configs", {}).items():
        resolution, attention, ch_mult, width = PUBLISHED[name]
        with torch.device("meta"):
            network = VQGAN2D(
                resolution=resolution, attn_resolutions=[attention], ch_mult=ch_mult, z_channels=width,
                embedding_dim=width, num_codes=16384,
            )  # fmt: skip
        assert sum(p.numel() for p in network.parameters()) == published["total"]
        assert len(network.state_dict()) == published["entries"]
        modules = dict(network.named_modules())
        assert all(type(modules[place]).__name__ == "AttnBlock" for place in published["attention"])


@golden_files.entries("river", "small_inputs*")
@torch.no_grad()
def test_small_inputs_of_river(entry, golden):
    """Norms and their epsilons, at inputs of about the same size; those of vector fields are not tested here."""
    networks = {key: river_network(golden[key]) for key in golden if "vq" in key and "config" in golden[key]}
    for names, places, network, numbers, shape, trains in small_inputs(entry["input"]):
        if network not in networks:
            assert network.startswith("vector_field")
            continue
        for name, place, offset in zip(names, places, numbers, strict=True):
            module = networks[network].get_submodule(place).train(trains)
            channels = entry[name]["shape"][1]
            rng = golden_files.generator(f"RS({offset})", golden["about"]["seed"])
            x = rng.standard_normal(golden_files.number(shape, C=channels)) * 1e-3
            close(module(torch.from_numpy(x.astype("float32"))), entry[name], name)


def small_inputs(text):
    """Read which module gets which input: names, modules, network, numbers of generators, shape, train mode."""
    pattern = r"([\w, ]+): ([\w.]+(?: and [\w.]+)*) of (\w+)(.*?)(?:on )((?:RS\(\d+\)(?:, )?)+) (\([\d,C]+\))"
    for match in re.finditer(pattern, text):
        names = [name for name in match[1].split(", ") if name.strip()]
        numbers = re.findall(r"RS\((\d+)\)", match[5])
        yield [n.strip() for n in names], match[2].split(" and "), match[3], numbers, match[6], "train" in match[4]


@golden_files.entries("teco", "vqgan*")
@torch.no_grad()
def test_vqgan_of_teco(entry, golden):
    network, shapes = teco_network(golden)
    assert sorted([name, list(shape)] for name, shape in shapes.items()) == sorted(entry["names"])
    (images,) = golden_files.normals(entry["input"], golden["about"]["seed"])
    images = images.movedim(-1, 1)
    close(network.encoder(images).movedim(1, -1), entry["encoder_out"], "encoder_out")
    z = network.features(images.unsqueeze(2))
    close(z.squeeze(2).movedim(1, -1), entry["pre_quant"], "pre_quant")
    codes = network.quantizer.encode(z)
    assert codes.flatten().tolist() == entry["codes"]["values"]
    close(network.quantizer.lookup(codes).squeeze(2).movedim(1, -1), entry["embeddings"], "embeddings")
    close(network.decode(codes).squeeze(2).movedim(1, -1), entry["decode"], "decode")


@golden_files.entries("teco", "small_inputs*")
@torch.no_grad()
def test_small_inputs_of_teco(entry, golden):
    network, _ = teco_network(golden)
    names = {flax.rpartition("/")[0]: ours.rpartition(".")[0] for ours, flax in flax_names(network).items()}
    match = re.search(
        r"(vqgan_\w+), (vqgan_\w+): (\S+) on RS\((\d+)\) (\S+), (\S+) on RS\((\d+)\) (\S+)", entry["input"]
    )
    assert match is not None
    for name, path, offset, shape in ((match[1], *match.group(3, 4, 5)), (match[2], *match.group(6, 7, 8))):
        module = network.get_submodule(names[f"{path}/GroupNorm_0"].rpartition(".")[0])
        rng = golden_files.generator(f"RS({offset})", golden["about"]["seed"])
        x = rng.standard_normal(golden_files.number(shape, C=entry[name]["shape"][-1])) * 1e-3
        y = module(torch.from_numpy(x.astype("float32")).movedim(-1, 1))
        close(y.movedim(1, -1), entry[name], name)


def teco_network(golden):
    """TECO's VQGAN in eval mode, with its weights, which follow flax names and layouts; and the shapes of these."""
    network = taming_network(golden["config"]["vqgan"])
    state, names = network.state_dict(), flax_names(network)
    assert names.keys() == state.keys()
    permuted = {
        flax: state[ours].permute(2, 3, 1, 0) if state[ours].ndim == 4 else state[ours] for ours, flax in names.items()
    }
    shapes = {flax: tuple(value.shape) for flax, value in permuted.items()}
    arrays = golden_files.normal_fill(shapes, golden["about"]["base_vq"], golden_files.teco_scale)
    network.load_state_dict({ours: from_flax(torch.from_numpy(arrays[flax])) for ours, flax in names.items()})
    return network.eval(), shapes

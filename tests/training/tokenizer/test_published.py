"""Files in the published formats open without running anything in them, and give the tokenizer that was saved."""

import argparse
import os
import pickle
import struct
import sys
import types

import pytest
import torch

from tests import golden_files
from torch_utils.safe_archive import Archive, Inert
from training.checkpoint import load_network
from training.contract import Tokenizer
from training.modules import published
from training.modules.discriminators import PatchDiscriminator
from training.modules.vqgan2d import VQGAN2D, RiverVQVAE
from training.modules.vqgan3d import VQGAN3D
from training.network_file import load_bundle, load_tokenizer, save_bundle
from training.sampling import open_sampler

# What the release of TATS has beside its VQGAN: names of the perceptual network with sizes of weights.
LPIPS_NAMES = [
    *(f"perceptual_model.scaling_layer.{name}" for name in ("shift", "scale")),
    *(
        f"perceptual_model.net.slice{part}.{number}.{leaf}"
        for part, numbers in enumerate(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), 1)
        for number in numbers
        for leaf in ("weight", "bias")
    ),
    *(f"perceptual_model.lin{i}.model.1.weight" for i in range(5)),
]


def tats_network(**options):
    return VQGAN3D(32, 32, 8, [4, 8, 8], hidden=2, embedding_dim=6, num_codes=10, **options)


def tats_state(network):
    """All tensors that the release saves of a VQGAN: 242 of the published size."""
    state = dict(golden_files.wave_fill(network.state_dict()))
    del state["codebook.initialised"]  # the release does not save it
    for axes, name in ((2, "image_discriminator"), (3, "video_discriminator")):
        judge = PatchDiscriminator(axes, width=2)
        state |= {f"{name}.{key}": value for key, value in judge.state_dict().items()}
    return state | {name: torch.ones(2) for name in LPIPS_NAMES}


ARGS = {
    "n_hiddens": 2, "embedding_dim": 6, "n_codes": 10, "downsample": [4, 8, 8], "norm_type": "batch", "resolution": 32,
    "padding_type": "replicate", "sequence_length": 16, "sample_every_n_frames": 2, "image_channels": 3, "gpus": 8,
    "no_random_restart": True, "restart_thres": 0.5,
}  # fmt: skip


@pytest.fixture
def foreign(monkeypatch):
    """A module of classes that are not here when the file is read."""
    module = types.ModuleType("pytorch_lightning_gone")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def make(name, **methods):
        cls = type(name, (), {"__module__": module.__name__, **methods})
        setattr(module, name, cls)
        return cls

    return make


def save(path, content):
    torch.save(content, path)
    return str(path)


def lightning(state, arguments, callback):
    """The dictionary that Lightning 1.5 writes; older versions have classes as keys of callbacks."""
    return {
        "epoch": 1, "global_step": 30000, "pytorch-lightning_version": "1.5.4", "state_dict": state,
        "callbacks": {callback: {"monitor": "val/recon_loss", "best_model_score": torch.tensor(0.1)}},
        "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 9e-5}]}],
        "lr_schedulers": [], "hparams_name": "kwargs", "hyper_parameters": {"args": argparse.Namespace(**arguments)},
    }  # fmt: skip


def check_network(found, expected):
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    for name, value in found.state_dict().items():
        if name != "codebook.initialised":
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_tats(prefix, foreign, tmp_path):
    network = tats_network()
    state = tats_state(network)
    network.load_state_dict({name: state.get(name, value) for name, value in network.state_dict().items()})
    state = {prefix + name: value for name, value in state.items()}
    arguments = ARGS
    if prefix:
        state |= {"transformer.tok_emb.weight": torch.ones(5, 4), "transformer.blocks.0.attn.mask": torch.ones(3, 3)}
        arguments = {"resolution": 32, "sequence_length": 8, "n_layer": 2}  # no word of the VQGAN
    content = lightning(state, arguments, foreign("ModelCheckpoint"))
    found = load_network(save(tmp_path / "vqgan.ckpt", content))
    assert isinstance(found, VQGAN3D) and isinstance(found, Tokenizer)
    check_network(found, network)
    assert found.codebook.initialised == 1, "resuming from a published file keeps its codebook"
    assert (found.height, found.width, found.clip_frames, found.stride) == (32, 32, 8, (4, 8))
    if not prefix:
        assert found.options["quantizer"] == {"kind": "ema", "restart": False, "restart_below": 0.5}
    video = golden_files.wave((1, 3, 8, 32, 32), 0.05, a=1.0)
    assert torch.equal(found.encode(video), network.eval().encode(video))


def test_converted_files_are_ours(foreign, tmp_path):
    path = save(tmp_path / "vqgan.ckpt", lightning(tats_state(tats_network()), ARGS, foreign("ModelCheckpoint")))
    save_bundle(load_bundle(path), tmp_path / "ours.pkl")
    theirs, theirs_hash = load_tokenizer(path)
    ours, ours_hash = load_tokenizer(tmp_path / "ours.pkl")
    assert ours_hash == theirs_hash
    check_network(ours, theirs)
    assert open_sampler([path]).size == (32, 32)


def test_size_and_settings_are_inferred():
    state = tats_state(tats_network(channels=1))
    entries = {name: types.SimpleNamespace(shape=tuple(value.shape)) for name, value in state.items()}
    found = published.Found(VQGAN3D, entries, {})  # pyright: ignore[reportArgumentType]
    options = published.options_of(found)
    assert (options["channels"], options["norm"], options["downsample"]) == (1, "batch", [4, 8, 8])
    assert (options["height"], options["width"], options["clip_frames"]) == (64, 16, 16), "one channel: sound"


def taming_network():
    return VQGAN2D(
        ch=32, ch_mult=[1, 2, 2], num_res_blocks=1, attn_resolutions=[64], z_channels=4, embedding_dim=6, num_codes=11,
        quantizer={"kind": "vq", "legacy": True},
    )  # fmt: skip


def test_taming_transformers(foreign, tmp_path):
    network = taming_network()
    golden_files.fill_river(network, 5)
    others = {"loss.discriminator.main.0.weight": torch.ones(2, 3, 4, 4), "loss.perceptual_loss.lin0": torch.ones(1)}
    content = {"state_dict": network.state_dict() | others, "epoch": 3, "callbacks": {foreign("Early"): {}}}
    found = load_network(save(tmp_path / "last.ckpt", content))
    assert isinstance(found, VQGAN2D)
    check_network(found, network)
    assert found.options | {"attn_resolutions": [64]} == found.options
    images = golden_files.wave((1, 3, 2, 32, 32), 0.05, a=1.0)
    assert torch.equal(found.encode(images), network.eval().encode(images))


@pytest.mark.parametrize(("prefix", "key"), [("module.", "model"), ("module.ae.backbone.", "model"), ("", "model")])
def test_own_vqvae_of_river(prefix, key, tmp_path):
    network = RiverVQVAE(num_codes=12)
    golden_files.fill_river(network, 7)
    state = {prefix + name: value for name, value in network.state_dict().items()}
    if "ae" in prefix:
        state["module.vector_field_regressor.project_in.1.weight"] = torch.ones(3, 3)
    found = load_network(save(tmp_path / "vqvae.pth", {key: state, "optimizer": {"state": {}}, "global_step": 3}))
    assert isinstance(found, RiverVQVAE)
    check_network(found, network)


def test_latent_diffusion_in_a_file_of_river(tmp_path):
    network = taming_network()
    golden_files.fill_river(network, 9)
    state = {f"module.ae.{name}": value for name, value in network.state_dict().items()}
    check_network(load_network(save(tmp_path / "model.pth", {"model": state})), network)


def test_settings_in_cyclic_configurations(foreign, tmp_path):
    """MeBT's files hold nodes of OmegaConf, whose parents refer back to the whole configuration."""
    node, leaf = foreign("DictConfig"), foreign("AnyNode")

    def wrap(value, parent=None):
        one = node() if isinstance(value, dict) else leaf()
        one.__dict__ |= {"_parent": parent, "_metadata": None}
        if isinstance(value, dict):
            one.__dict__["_content"] = {key: wrap(item, one) for key, item in value.items()}
        else:
            one.__dict__["_val"] = value
        return one

    config = wrap({"model": {"params": {"resolution": 32, "sequence_length": 8}}, "downsample": [4, 8, 8]})
    network = tats_network()
    state = {f"first_stage_model.{name}": value for name, value in tats_state(network).items()}
    content = {"state_dict": state, "hyper_parameters": {"transformer_config": config, "ckpt_path": None}}
    found = load_network(save(tmp_path / "mebt.ckpt", content))
    assert (found.height, found.clip_frames, found.stride) == (32, 8, (4, 8))


def test_hostile_globals_stay_inert(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    content = lightning(tats_state(tats_network()), {**ARGS, "downsample": [4, 8, 8]}, "callback")
    content["hyper_parameters"]["more"] = Hostile()
    path = save(tmp_path / "vqgan.ckpt", content)
    assert isinstance(load_network(path), VQGAN3D)
    with Archive(path) as archive:
        record = archive.content["hyper_parameters"]["more"]
        assert isinstance(record, Inert) and record.kind.endswith(".mkdir")
        assert record.args == (str(tmp_path / "ran"),)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("codebook.embeddings"), "missing part: 'codebook.embeddings'"),
        (lambda state: state.pop("decoder.conv_last.conv.bias"), "missing .decoder.conv_last.conv.bias"),
        (lambda state: state.update({"encoder.extra.weight": torch.ones(1)}), "unknown .encoder.extra.weight"),
        (
            lambda state: state.update({"pre_vq_conv.conv.bias": torch.ones(3)}),
            r"another shape .pre_vq_conv.conv.bias \[3\]",
        ),
    ],
)
def test_files_with_other_tensors_are_refused(change, words, tmp_path):
    state = tats_state(tats_network())
    change(state)
    path = save(tmp_path / "vqgan.ckpt", lightning(state, ARGS, "callback"))
    with pytest.raises(ValueError, match=words) as error:
        load_network(path)
    assert "vqgan.ckpt" in str(error.value) and "\n" not in str(error.value)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "vqgan.ckpt"
    save(path, lightning(tats_state(tats_network()), ARGS, "callback"))
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="vqgan.ckpt"):
            load_network(str(path))


def test_other_archives_are_not_opened_as_tokenizers(tmp_path):
    path = save(tmp_path / "ckpt-00000001-train.pt", {"modules": {"tokenizer": {"encoder.a": torch.ones(1)}}})
    with pytest.raises(ValueError, match="whole training state"):
        load_network(path)
    assert published.find_tokenizer([1, 2]) is None
    assert published.find_tokenizer({"state_dict": {"a": 3}}) is None


def packed(value):
    """What flax writes, in the formats of msgpack that it needs here."""
    if isinstance(value, dict):
        return struct.pack(">BH", 0xDE, len(value)) + b"".join(packed(k) + packed(v) for k, v in value.items())
    if isinstance(value, str):
        return struct.pack(">BB", 0xD9, len(value)) + value.encode()
    if isinstance(value, int):
        return struct.pack(">BI", 0xCE, value)
    shape = b"".join(packed(size) for size in value.shape)
    inner = struct.pack(">BB", 0x93, 0x90 + value.ndim) + shape + packed(str(value.dtype))
    inner += struct.pack(">BI", 0xC6, value.nbytes) + value.tobytes()
    return struct.pack(">BIb", 0xC9, len(inner), 1) + inner


def teco_run(network, folder):
    """A run of TECO's code with two checkpoints, of which the second holds the network."""
    tree = {"params": {}, "model_state": {}, "step": 3}
    for ours, path in published.flax_names(network).items():
        value = network.state_dict()[ours]
        node = tree["model_state" if path.startswith("stats") else "params"]
        *parts, leaf = path.split("/")
        for part in parts:
            node = node.setdefault(part, {})
        node[leaf] = (value.permute(2, 3, 1, 0) if value.ndim == 4 else value).contiguous().numpy()
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "checkpoint_9").write_bytes(packed({"step": 9}))
    (folder / "checkpoints" / "checkpoint_100001").write_bytes(packed(tree))
    options = network.options
    names = ("resolution", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels", "double_z")
    arguments = {name: options[name] for name in names} | {"embed_dim": options["embedding_dim"], "model": "vqgan"}
    arguments = argparse.Namespace(**arguments, n_embed=options["num_codes"], output_dir="logs/x")
    (folder / "args").write_bytes(pickle.dumps(arguments))
    return tree


def test_teco(tmp_path):
    network = taming_network()
    golden_files.fill_river(network, 11)
    tree = teco_run(network, tmp_path)
    found = load_network(str(tmp_path))
    assert isinstance(found, VQGAN2D) and (found.height, found.width) == (256, 256)
    check_network(found, network)
    del tree["params"]["quant_conv"]
    (tmp_path / "checkpoints" / "checkpoint_100001").write_bytes(packed(tree))
    with pytest.raises(ValueError, match="checkpoint_100001 is a tokenizer with a missing part: 'quant_conv"):
        load_network(str(tmp_path))
    (tmp_path / "checkpoints" / "checkpoint_100001").write_bytes(packed(tree)[:-9])
    with pytest.raises(ValueError, match="checkpoint_100001 is damaged"):
        load_network(str(tmp_path))

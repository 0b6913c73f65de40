"""Folders of the release: built from the list of its parameters, read back, and refused when a part is missing."""

import argparse
import io
import pickle
import shutil

import msgpack
import numpy as np
import pytest
import torch

from tests.training.teco import tiny
from tests.training.teco.models import golden_file, make_teco, make_vqgan
from training.modules.published import flax_names
from training.modules.vqgan2d import VQGAN2D
from training.network_file import load_bundle, save_bundle
from training.sampling import Request, open_sampler
from training.teco.networks import TECO
from training.teco.published import leaves


def packed(tree):
    """Return a tree as flax writes it: arrays are extensions that hold shape, dtype and bytes."""

    def encode(value):
        array = np.ascontiguousarray(value)
        return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True))

    return msgpack.packb(tree, default=encode, use_bin_type=True)


def nested(arrays):
    """Return the nested dictionaries of paths joined by "/"."""
    tree = {}
    for path, array in arrays.items():
        *parts, leaf = path.split("/")
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        node[leaf] = array
    return tree


def write_run(folder, arguments, params, state):
    """Write a run of the release's code."""
    (folder / "checkpoints").mkdir(parents=True)
    tree = {"step": 1, "params": nested(params), "opt_state": {}, "model_state": nested(state)}
    (folder / "checkpoints" / "checkpoint_100001").write_bytes(packed(tree))
    (folder / "args").write_bytes(pickle.dumps(argparse.Namespace(**arguments, output_dir="logs/x")))


@pytest.fixture
def release(tmp_path):
    """Return folders of TECO and, where its arguments say, of its VQGAN, with the golden file's sizes and weights."""
    golden = golden_file()
    network, vqgan = make_teco(golden), make_vqgan(golden)
    params = {leaf.path: leaf.to_flax(network.state_dict()[name]).numpy() for name, leaf in leaves(network).items()}
    arguments = {**golden["config"]["teco"], "vqvae_ckpt": "/home/somebody/logs/my_vqgan"}
    write_run(tmp_path / "dmlab", arguments, params, {})
    arrays = {}
    for ours, path in flax_names(vqgan).items():
        value = vqgan.state_dict()[ours]
        arrays[path] = (value.permute(2, 3, 1, 0) if value.ndim == 4 else value).numpy()
    table = {path.removeprefix("stats/"): arrays.pop(path) for path in list(arrays) if path.startswith("stats/")}
    write_run(tmp_path / "my_vqgan", golden["config"]["vqgan"], arrays, {"stats": table})
    return tmp_path


def test_folders_of_the_release_open(release):
    bundle = load_bundle(release / "dmlab")
    network, tokenizer = bundle.networks["teco"], bundle.networks["tokenizer"]
    assert isinstance(network, TECO) and isinstance(tokenizer, VQGAN2D) and bundle.tokenizer is not None
    for found, expected in ((network, make_teco(golden_file())), (tokenizer, make_vqgan(golden_file()))):
        state = expected.state_dict()
        assert found.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())
    config = golden_file()["config"]["teco"]
    assert (network.context, network.seq_len) == (config["open_loop_ctx"], config["seq_len"])
    assert load_bundle(release / "my_vqgan").networks.keys() == {"tokenizer"}


def test_what_is_opened_generates_and_can_be_kept_as_one_file(release):
    save_bundle(load_bundle(release / "dmlab"), release / "model.pkl")
    videos = []
    for path in (release / "dmlab", release / "model.pkl"):
        sampler = open_sampler([str(path)], {"rounds": "0"})
        prompt = tiny.RandomPrompt()
        prompt.stream = lambda name, start, count: torch.zeros(1, count, dtype=torch.int64)
        videos.append(next(sampler.frames(Request([0], 0, 2, prompt)))["video"])
    assert torch.equal(*videos) and videos[0].isfinite().all()


def test_the_tokenizer_may_lie_inside(release):
    shutil.move(release / "my_vqgan", release / "dmlab" / "vqgan")
    assert load_bundle(release / "dmlab").networks.keys() == {"teco", "tokenizer"}


def test_a_model_without_its_tokenizer_is_refused(release):
    shutil.rmtree(release / "my_vqgan")
    with pytest.raises(
        ValueError, match="dmlab is a model of TECO without its VQGAN: copy the folder .* to .*dmlab/vqgan"
    ):
        load_bundle(release / "dmlab")


def change(path, edit):
    """Change the parameters in a checkpoint."""
    tree = msgpack.unpackb(path.read_bytes(), raw=False, ext_hook=msgpack.ExtType)
    edit(tree["params"])
    path.write_bytes(msgpack.packb(tree, use_bin_type=True))


def test_damaged_checkpoints_are_refused(release):
    path = release / "dmlab" / "checkpoints" / "checkpoint_100001"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="checkpoint_100001 is damaged, or is no checkpoint of flax"):
        load_bundle(release / "dmlab")
    path.write_bytes(whole)
    change(path, lambda params: params["z_git"].pop("token_embed"))
    with pytest.raises(
        ValueError, match="checkpoint_100001 is a model of TECO with a missing part: 'z_git/token_embed'"
    ):
        load_bundle(release / "dmlab")
    path.write_bytes(whole)
    change(path, lambda params: params.update(sos=params["sos_post"]))
    with pytest.raises(ValueError, match="temporal.sos"):
        load_bundle(release / "dmlab")


@pytest.mark.parametrize("name", ["z_tfm_kwargs", "codebook", "seq_len"])
def test_arguments_that_lack_a_part_are_refused(release, name):
    path = release / "dmlab" / "args"
    arguments = vars(pickle.loads(path.read_bytes()))
    del arguments[name]
    path.write_bytes(pickle.dumps(argparse.Namespace(**arguments)))
    with pytest.raises(ValueError, match=f"is a model of TECO with a missing part: '{name}'"):
        load_bundle(release / "dmlab")


def test_arguments_run_no_code(release, capsys):
    class Harmful:
        def __reduce__(self):
            return print, ("this ran",)

    buffer = io.BytesIO()
    pickle.dump(argparse.Namespace(model="teco", seq_len=Harmful()), buffer)
    (release / "dmlab" / "args").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError):
        load_bundle(release / "dmlab")
    assert "this ran" not in capsys.readouterr().out

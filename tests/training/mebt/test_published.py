"""Checkpoints and configurations of the release: read without running anything, or refused in one sentence."""

import collections
import sys
import types
import typing

import pytest
import torch

from tests import golden_files
from train import make_options
from training.mebt import config_file
from training.mebt.modes import PUBLISHED_MODES
from training.mebt.networks import MeBT
from training.modules.discriminators import PatchDiscriminator
from training.modules.vqgan3d import VQGAN3D
from training.network_file import content_hash, load_bundle
from training.sampling import Request, open_sampler

MODES = ["latent_enc", "latent_self", "latent_enc", "latent_dec", "lt2l", "latent_dec"]
SHAPE = [2, 2, 2]


@pytest.fixture
def omegaconf(monkeypatch):
    """Classes of the names and the state that OmegaConf 2.1 pickles, which are gone when a file is read."""
    modules = {name: types.ModuleType(f"omegaconf.{name}") for name in ("dictconfig", "listconfig", "nodes", "base")}
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"omegaconf.{name}", module)
    classes = {}
    for name, module in (
        ("DictConfig", "dictconfig"), ("ListConfig", "listconfig"), ("AnyNode", "nodes"), ("ContainerMetadata", "base"),
    ):  # fmt: skip
        classes[name] = type(name, (), {"__module__": modules[module].__name__})
        setattr(modules[module], name, classes[name])

    def make(kind, parent, **state):
        node = classes[kind]()
        metadata = classes["ContainerMetadata"]()
        metadata.__dict__.update(ref_type=typing.Any, resolver_cache=collections.defaultdict(dict), key=None)
        node.__dict__.update(_metadata=metadata, _parent=parent, **state)
        return node

    def build(value, parent=None):
        if isinstance(value, dict):
            node = make("DictConfig", parent)
            node.__dict__["_content"] = {key: build(item, node) for key, item in value.items()}
        elif isinstance(value, list):
            node = make("ListConfig", parent)
            node.__dict__["_content"] = [build(item, node) for item in value]
        else:
            node = make("AnyNode", parent, _val=value)
        return node

    return build


def configuration(modes=MODES):
    return {
        "model": {
            "target": "tats.modules.gpt.Net2NetTransformer",
            "params": {
                "unconditional": True, "vocab_size": 16384, "first_stage_vocab_size": 16384, "block_size": 8,
                "n_layer": 6, "n_head": 2, "n_embd": 8, "n_unmasked": 0, "embd_pdrop": 0.1, "resid_pdrop": 0.1,
                "attn_pdrop": 0.1, "sos_emb": 3, "avg_loss": True, "mode": list(modes), "vtokens": False,
            },
            "mask": {"params": {"iid": False, "schedule": "linear", "max_token": 8, "shape": SHAPE, "budget": 8}},
            "vqvae": {"params": {"ckpt_path": "/gone/vqgan.ckpt", "ignore_keys": ["loss"]}},
        },
        "data": {"data_path": "/gone/data", "sequence_length": 8, "batch_size": 6},
        "exp": {"exact_lr": 1.08e-05},
    }  # fmt: skip


@pytest.fixture
def parts():
    """A transformer and its tokenizer with filled weights."""
    tokenizer = VQGAN3D(16, 16, 8, [4, 8, 8], hidden=2, embedding_dim=6, num_codes=10)
    tokenizer.load_state_dict(golden_files.wave_fill(tokenizer.state_dict()))
    network = MeBT(10, SHAPE, 8, 2, 3, MODES, residual="normalised")
    network.load_state_dict(golden_files.wave_fill(network.state_dict()))
    return network.eval(), tokenizer.eval()


def checkpoint(parts, config, hyper=("transformer_config", "first_stage_config", "mask_config")):
    """The dictionary that Lightning 1.7.5 writes."""
    network, tokenizer = parts
    stage = {name: value for name, value in tokenizer.state_dict().items() if name != "codebook.initialised"}
    stage |= {
        f"image_discriminator.{name}": value for name, value in PatchDiscriminator(2, width=2).state_dict().items()
    }
    state = network.state_dict() | {f"first_stage_model.{name}": value for name, value in stage.items()}
    model = config.__dict__["_content"]["model"].__dict__["_content"]
    nodes = dict(zip(hyper, (model["params"], model["vqvae"], model["mask"]), strict=False))
    return {
        "epoch": 3, "global_step": 50000, "pytorch-lightning_version": "1.7.5", "state_dict": state,
        "loops": {"fit_loop": {}}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {**nodes, "ckpt_path": None, "ignore_keys": [], "first_stage_key": "video"},
    }  # fmt: skip


def test_a_published_checkpoint_opens(tmp_path, omegaconf, parts):
    network, tokenizer = parts
    torch.save(checkpoint(parts, omegaconf(configuration())), tmp_path / "epoch=3.ckpt")
    bundle = load_bundle(str(tmp_path / "epoch=3.ckpt"))
    assert bundle.system == "mebt" and set(bundle.networks) == {"prior", "tokenizer"}
    found = bundle.networks["prior"]
    assert isinstance(found, MeBT)
    assert found.options == {**network.options, **dict.fromkeys(
        ("embedding_dropout", "attention_dropout", "residual_dropout"), 0.1)}  # fmt: skip
    for name, value in network.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    opened = bundle.networks["tokenizer"]
    assert isinstance(opened, VQGAN3D)
    assert (opened.height, opened.width, opened.clip_frames) == (16, 16, 8)
    codes = torch.arange(8).view(1, *SHAPE) % 10
    assert torch.equal(opened.decode(codes), tokenizer.decode(codes))
    assert bundle.tokenizer == content_hash(opened)
    options = {"steps": "3", "bootstrap": "1", "revise_rounds": "1", "top_k": "4"}
    sampler = open_sampler([str(tmp_path / "epoch=3.ckpt")], options)
    video = next(sampler.frames(Request([0], num_frames=8)))["video"]
    assert video.shape == (1, 3, 8, 16, 16)


def test_modes_beside_a_checkpoint_without_them(tmp_path, omegaconf, parts):
    yaml = pytest.importorskip("yaml")
    torch.save(checkpoint(parts, omegaconf(configuration()), hyper=()), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="without the modes of its layers: put the YAML file .* beside it, as a.yaml"):
        load_bundle(str(tmp_path / "a.ckpt"))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(configuration()))
    network = load_bundle(str(tmp_path / "a.ckpt")).networks["prior"]
    assert isinstance(network, MeBT) and network.options["modes"] == MODES


@pytest.mark.parametrize("modes", [[], ["latent_enc", "nonsense"]])
def test_a_checkpoint_with_impossible_modes_is_refused(tmp_path, omegaconf, parts, modes):
    torch.save(checkpoint(parts, omegaconf(configuration(modes))), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt") as caught:
        load_bundle(str(tmp_path / "a.ckpt"))
    assert "\n" not in str(caught.value)


def test_hostile_records_stay_inert(tmp_path, omegaconf, parts):
    """A record that contains itself many times, and a global that would run a command."""

    class Command:
        def __reduce__(self):
            return print, ("run",)

    content = checkpoint(parts, omegaconf(configuration()))
    node = content["hyper_parameters"]["transformer_config"]
    inner = node.__dict__["_content"]
    inner["again"] = inner["once"] = node
    content["hyper_parameters"]["harm"] = Command()
    torch.save(content, tmp_path / "a.ckpt")
    assert isinstance(load_bundle(str(tmp_path / "a.ckpt")).networks["prior"], MeBT)


def test_other_files_are_left_to_others(tmp_path, parts):
    from training.mebt.published import open_published

    torch.save({"state_dict": parts[1].state_dict()}, tmp_path / "vqgan.ckpt")
    assert open_published(str(tmp_path / "vqgan.ckpt")) is None
    assert open_published(str(tmp_path / "gone.ckpt")) is None
    assert load_bundle(str(tmp_path / "vqgan.ckpt")).system == "tokenizer"


# ----------------------------------------------------------------------------
# Configurations.

UCF = """
model:
  target: mebt.transformer.Net2NetTransformer
  params:
    unconditional: True
    vocab_size: 16384
    block_size: 8192
    n_layer: 24
    n_head: 16
    n_embd: 1024
    n_unmasked: 0
    embd_pdrop: 0.1
    sos_emb: 256
    avg_loss: True
    t_prior: gaussian100000_2
    beta_params: [2.0, 3.0]
    beta_iter: 1000
    mode: [{modes}]
  mask:
    params: {{iid: False, schedule: linear, max_token: 8192, shape: [32, 16, 16], t_range: [0.0, 0.9], budget: 4096}}
  vqvae:
    params: {{ckpt_path: gone.ckpt}}
data: {{data_path: /d, sequence_length: 128, resolution: 128, batch_size: 6, num_workers: 8, image_folder: True}}
exp: {{exact_lr: 3e-5, weight_decay: 1e-4, warmup_steps: 10, cosine_lr: True, accumulate_grad_batches: 2}}
"""


def write(path, text=None):
    path.write_text(UCF.format(modes=", ".join(PUBLISHED_MODES)) if text is None else text)
    return str(path)


def test_a_configuration_becomes_options(tmp_path, capsys):
    pytest.importorskip("yaml")
    config = write(tmp_path / "ucf.yaml")
    given = {"field_config": config, "dataset": "d", "outdir": "o", "field_tokenizer": "t.pkl", "field_heads": 8}
    options = make_options("mebt", "toy", given)
    model = options.model
    assert (options.batch, options.grad_accum, options.workers) == (12, 2, 8)
    wanted = {
        "num_frames": 128, "width": 1024, "latents": 256, "layers": 24, "embedding_dropout": 0.1, "average": 1.0,
        "window_prior": "gaussian100000_2", "beta_a": 2.0, "beta_b": 3.0, "beta_steps": 1000, "t_max": 0.9,
        "budget": 4096, "lr": 3e-5, "weight_decay": 1e-4, "warmup_steps": 10, "schedule": "cosine",
        "modes": PUBLISHED_MODES,
    }  # fmt: skip
    assert {name: model[name] for name in wanted} == wanted
    assert model["heads"] == 8  # what the command line says comes first
    assert model["config"] == ""  # the run is the same wherever the file lies
    said = capsys.readouterr().err
    for name in (
        "model.params.n_unmasked",
        "data.data_path",
        "model.vqvae.params.ckpt_path",
        "model.params.vocab_size",
    ):
        assert name in said
    for name in ("n_head", "budget", "exact_lr", "batch_size"):
        assert name not in said


def test_the_tokenizer_of_a_configuration_is_used_if_it_is_there(tmp_path):
    pytest.importorskip("yaml")
    (tmp_path / "vqgan.ckpt").touch()
    text = UCF.format(modes="latent_enc, latent_dec").replace("gone.ckpt", str(tmp_path / "vqgan.ckpt"))
    model, run, ignored = config_file.convert(config_file.load(write(tmp_path / "a.yaml", text)), "a.yaml")
    assert model["tokenizer"] == str(tmp_path / "vqgan.ckpt") and run["batch"] == 12
    assert "model.vqvae.params.ckpt_path" not in ignored


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("n_head: 16", "n_head: many"), "model.params.n_head is 'many': use a whole number"),
        (("[32, 16, 16]", "[16, 16, 16]"), "block_size is 8192, but model.mask.params.shape makes 4096"),
        (("unconditional: True", "unconditional: False"), "unconditional only"),
        (("schedule: linear", "schedule: root"), "mask.params.schedule is 'root': use one of cosine"),
        (("gaussian100000_2", "gaussian5"), "prior of windows"),
        (("latent_enc,", "latent_end,"), "use a list of latent_enc"),
        (("batch_size: 6", "batch_size: 0"), "data.batch_size is 0"),
        (("t_range: [0.0, 0.9]", "t_range: 0.5"), "t_range"),
        (("model:\n", "net:\n"), "no section model"),
        (("model:\n", "model: [\n"), "cannot be read as YAML"),
    ],
)
def test_a_bad_configuration_is_refused(tmp_path, change, words):
    pytest.importorskip("yaml")
    text = UCF.format(modes=", ".join(PUBLISHED_MODES)).replace(*change)
    with pytest.raises(ValueError, match=r"a\.yaml.*") as caught:
        config_file.convert(config_file.load(write(tmp_path / "a.yaml", text)), str(tmp_path / "a.yaml"))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_configuration_is_refused(tmp_path):
    pytest.importorskip("yaml")
    with pytest.raises(ValueError, match="gone.yaml cannot be read"):
        config_file.load(str(tmp_path / "gone.yaml"))

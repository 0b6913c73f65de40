"""Network files: formats and their conversion, wrong and malicious files, damage of any kind."""

import builtins
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import operator
import os
import pickle
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.storage import _load_from_bytes

from tests.training.longvideogan.tiny import TINY
from torch_utils import persistence, safe_pickle
from training import checkpoint, network_file, network_format, registry
from training.config import TrainOptions
from training.contract import Run
from training.longvideogan.lres.discriminator import LowResDiscriminator
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sres.discriminator import SuperResDiscriminator
from training.longvideogan.sres.generator import SuperResGenerator
from training.modules.conv_autoencoder import ConvAutoencoder
from training.sampling import open_sampler

LRES_SIZE = {"height": 16, "width": 16}
SRES_SIZE = {"height": 36, "width": 64, "lres_height": 18, "lres_width": 32}
LRES_WIDTHS = TINY["longvideogan-lres"]["generator"]
SRES_WIDTHS = {"num_layers": 8, "channel_base": 256, "channel_max": 4, "z_channels": 6, "w_channels": 6}
CLASSES: dict[str, tuple[type, dict[str, Any]]] = {
    "lres": (LowResGenerator, {**LRES_SIZE, **LRES_WIDTHS}),
    "lres-D": (
        LowResDiscriminator,
        {"num_frames": 16, **LRES_SIZE, "channels": (3, 4, 4, 4, 4), "epilogue_channels": 6},
    ),
    "sres": (SuperResGenerator, {**SRES_SIZE, **SRES_WIDTHS}),
    "sres-D": (SuperResDiscriminator, {**SRES_SIZE, "num_frames": 2, "channel_base": 256, "channel_max": 6}),
}
needs_safetensors = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="needs the package safetensors"
)


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    torch.manual_seed(0)
    return {name: cls(**options) for name, (cls, options) in CLASSES.items()}


@pytest.fixture(scope="module")
def files(networks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("networks")
    for name, network in networks.items():
        checkpoint.save_network(network, folder / f"{name}.pkl")
    return {name: folder / f"{name}.pkl" for name in networks}


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(checkpoint.main, [str(argument) for argument in arguments])


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected) and found.options == expected.options
    ours, theirs = found.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)


@pytest.fixture
def models(networks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a pair among the included models."""
    monkeypatch.setattr(network_file, "MODELS", tmp_path / "models")
    (tmp_path / "models").mkdir()
    for role in ("lres", "sres"):
        checkpoint.save_network(networks[role], tmp_path / "models" / f"doom-small-{role}.pkl")
    return tmp_path / "models"


def test_included_models_have_names(models: Path, networks: dict[str, Any], tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    assert_same(checkpoint.load_network("doom-small-lres"), networks["lres"])
    for role in ("lres", "sres"):
        (network,) = open_sampler([network_file.ModelPath("doom-small", role)]).networks
        assert_same(network, networks[role])
    assert len(network_file.expand("doom-small")) == 2 and network_file.list_models().keys() == {"doom-small"}
    assert str(models / "doom-small-sres.pkl") in run("info", "doom-small-sres").output
    options = TrainOptions("runs", "data", "longvideogan-lres", init_from="doom-small-lres")
    assert options.init_from == str(models / "doom-small-lres.pkl")
    with pytest.raises(ValueError, match="there is no file doom.*an included model: doom-small-lres, doom-small-sres"):
        checkpoint.load_network("doom")
    # What lies here goes before a name.
    checkpoint.save_network(networks["lres-D"], tmp_path / "doom-small")
    assert_same(checkpoint.load_network("doom-small"), networks["lres-D"])


# ----------------------------------------------------------------------------
# Conversion.


@needs_safetensors
@pytest.mark.parametrize("name", CLASSES)
def test_conversion_there_and_back_changes_no_bit(name: str, networks: Any, files: dict[str, Path], tmp_path: Path):
    there, back = tmp_path / "net.safetensors", tmp_path / "net.pkl"
    for source, target in ((files[name], there), (there, back)):
        result = run("convert", source, target)
        assert result.exit_code == 0 and "Next: python -m training.checkpoint info" in result.output, result.output
        assert_same(checkpoint.load_network(target), networks[name])


@pytest.mark.parametrize("stage", ["lres", "sres"])
def test_the_ema_generator_is_exported_from_a_training_state(stage: str, tmp_path: Path):
    system = f"longvideogan-{stage}"
    generator, discriminator = CLASSES[stage][1], CLASSES[f"{stage}-D"][1]
    size = LRES_SIZE if stage == "lres" else SRES_SIZE
    widths = [
        {key: value for key, value in options.items() if key not in (*size, "num_frames")}
        for options in (generator, discriminator)
    ]
    options = {**size, "num_frames": discriminator["num_frames"], "generator": widths[0], "discriminator": widths[1]}
    cls = registry.resolve(registry.spec(system).system)
    model = cls(cls.Options(**options), Run(batch=4))
    options |= {"batch": 4, "grad_accum": 1}  # as earlier versions wrote them
    for parameter in model.G_ema.parameters():
        parameter.add_(1)
    state = {name: {} for name in checkpoint.STATE_ENTRIES}
    state["modules"] = {name: module.state_dict() for name, module in model.modules.items()}
    state["options"] = json.loads(json.dumps({"system": system, "batch": 4, "grad_accum": 1, "model": options}))
    source, target = checkpoint.train_state_path(tmp_path, 7), tmp_path / "net.pkl"
    source.parent.mkdir()
    checkpoint.save_train_state(source, state)
    assert run("convert", source, target).exit_code == 0
    assert_same(checkpoint.load_network(target), model.G_ema)

    with pytest.raises(
        ValueError, match=r"whole training state.*pass the file beside it.*checkpoint convert .*train.pt"
    ):
        checkpoint.load_network(source)
    checkpoint.save_network(model.G_ema, checkpoint.network_path(tmp_path, 7))
    with pytest.raises(ValueError, match="pass .*ckpt-00000007-G-ema.pkl, or take"):
        checkpoint.load_network(source)
    state["options"]["model"]["height"] = 72
    checkpoint.save_train_state(source, state)
    result = run("convert", source, target)
    assert result.exit_code == 1 and "does not fit its own options" in result.output
    widths[0]["w_channels"] = 6_000
    state["options"]["model"] = options | {"generator": widths[0]}
    checkpoint.save_train_state(source, state)
    with bounded_memory(100 << 20):
        assert "does not fit its own options" in run("convert", source, target).output


def test_info_says_what_a_file_holds(files: dict[str, Path]):
    result = run("info", files["sres"])
    assert result.exit_code == 0
    facts = dict(re.split(r" {2,}", line, maxsplit=1) for line in result.output.splitlines()[:-1])
    assert facts["network"] == "SuperResGenerator, a super-resolution generator"
    assert facts["sha256"] == hashlib.sha256(files["sres"].read_bytes()).hexdigest()
    assert facts["option channel_base"] == "256"


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("lres", "net.pt", "does not end in .pkl or .safetensors"),
        ("lres", "absent/net.pkl", "there is no folder"),
        (None, "net.pkl", "there is no file"),
    ],
)
def test_conversion_that_cannot_be_is_one_sentence(
    source: str | None, target: str, message: str, files: dict[str, Path], tmp_path: Path
):
    result = run("convert", files[source] if source else tmp_path / "absent.pkl", tmp_path / target)
    assert result.exit_code == 1 and message in result.output and list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------
# Not the network that is wanted.


def test_networks_of_another_kind_are_named(files: dict[str, Path]):
    assert type(checkpoint.load_network(files["lres"], expect=LowResGenerator)) is LowResGenerator
    for name, words in (("sres", "super-resolution generator"), ("lres-D", "low-resolution discriminator")):
        for trust in (False, True):
            message = rf"{name}.pkl is a {words}, expected a low-resolution generator$"
            with pytest.raises(checkpoint.WrongNetworkError, match=message) as caught:
                checkpoint.load_network(files[name], trust=trust, expect=LowResGenerator)
            assert caught.value.found is CLASSES[name][0]


def bad_file(kind: str, path: Path, networks: dict[str, Any]) -> None:
    if kind == "folder":
        (path / "checkpoints").mkdir(parents=True)
        checkpoint.save_network(networks["lres"], checkpoint.network_path(path, 3))
    elif kind == "empty":
        path.touch()
    elif kind == "page":
        path.write_text("\n<!doctype HTML>\n<html><title>403</title></html>")
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("net.pkl", b"x")
    elif kind == "broken zip":
        path.write_bytes(b"PK\x03\x04 and no more")
    elif kind == "torch.save":
        torch.save(networks["lres"].state_dict(), path)
    elif kind == "old torch.save":
        torch.save(networks["lres"].state_dict(), path, _use_new_zipfile_serialization=False)
    elif kind == "text":
        path.write_text('{"error": "not found"}')
    elif kind == "git-lfs":
        path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n")
    elif kind == "gzip":
        path.write_bytes(b"\x1f\x8b\x08" + bytes(20))
    elif kind == "huge header":
        path.write_bytes((1 << 40).to_bytes(8, "little") + b'{"a":1}')
    elif kind == "lying header":
        entry = {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
        header = json.dumps(entry).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "long words":
        path.write_bytes(b"c" + b"a\x1b" * 50_000 + b"\nb\n.")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("folder", "is a folder, expected a network: pass .*ckpt-00000003-G-ema.pkl"),
        ("empty", "is empty; copy or download it again"),
        ("page", "is a web page, expected a network"),
        ("zip", "is a zip archive"),
        ("broken zip", "is a zip archive"),
        ("torch.save", "whole training state"),
        ("old torch.save", "not one of a network|is damaged|holds a int"),
        ("text", "is text, expected a network: it begins with '{.*not found"),
        ("git-lfs", r"is a pointer of git-lfs, expected a network: fetch .*\(git lfs pull\)"),
        ("gzip", "is compressed by gzip, expected a network: unpack it"),
        ("huge header", "is damaged, or is no .safetensors file"),
        ("lying header", "is damaged, or is no .safetensors file"),
        ("pipe", "there is no file"),
        ("long words", r"asks for a\?a\?|does not run here|the package"),
    ],
)
@pytest.mark.parametrize("trust", [False, True])
def test_other_files_are_one_sentence(kind: str, message: str, trust: bool, networks: Any, tmp_path: Path):
    if "header" in kind:
        pytest.importorskip("safetensors")
    path = tmp_path / "a.pkl"
    bad_file(kind, path, networks)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load_network(path, trust=trust)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and "\x1b" not in text and len(text) < 600


def test_file_that_may_not_be_read_is_one_sentence(files: dict[str, Path], tmp_path: Path):
    path = tmp_path / "net.pkl"
    path.write_bytes(files["lres"].read_bytes())
    path.chmod(0)
    is_root = os.geteuid() == 0
    for folder in (tmp_path, *tmp_path.parents) if is_root else ():
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 1:
            folder.chmod(folder.stat().st_mode | 0o011)
    if is_root:
        os.seteuid(65534)
    try:
        with pytest.raises(ValueError, match="net.pkl may not be read: change its permissions"):
            checkpoint.load_network(path)
    finally:
        if is_root:
            os.seteuid(0)


def test_what_a_link_gives_instead_is_said(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("dnnlib.util._cache_dir", None)
    (tmp_path / "net.bin").write_bytes(files["lres"].read_bytes())
    (tmp_path / "cut.pkl").write_bytes(files["lres"].read_bytes()[:-1000])
    server = HTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert type(checkpoint.load_network(f"{address}/net.bin")) is LowResGenerator
        with pytest.raises(ValueError, match=f"is damaged.*it came from {address}/cut.pkl: to fetch it again, delete"):
            checkpoint.load_network(f"{address}/cut.pkl")
        with pytest.raises(ValueError, match="the server sent a web page"):
            checkpoint.load_network(f"{address}/")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# ----------------------------------------------------------------------------
# Hostile files. Each payload would make the file CANARY.

CANARY = "the-canary-sings"


class Call:
    """Pickles as the call of a function, with a state if there is one."""

    def __init__(self, function: Any, *args: Any, state: Any = None):
        self.function, self.args, self.state = function, args, state

    def __reduce__(self) -> Any:
        return (self.function, self.args) if self.state is None else (self.function, self.args, self.state)


def payloads() -> dict[str, Any]:
    command = f"touch {CANARY}"
    system = Call(os.system, command)
    partial = functools.partial(os.system, command)
    old, new = io.BytesIO(), io.BytesIO()
    torch.save(system, old, _use_new_zipfile_serialization=False)
    torch.save(system, new)
    tensor = torch.zeros(2)
    rebuild, args = tensor.__reduce_ex__(2)[:2]
    return {
        "system": system,
        "partial": Call(partial),
        "eval": Call(builtins.eval, f"__import__('os').system({command!r})"),
        "getattr": Call(builtins.getattr, Call(builtins.__import__, "os"), "system"),
        "attrgetter": Call(operator.attrgetter, "system"),
        "methodcaller": Call(operator.methodcaller, "system", command),
        "popen": Call(subprocess.Popen, ["touch", CANARY]),
        "setstate": Call(torch.nn.Identity, state={"__setstate__": system}),
        "state of an allowed class": Call(torch.nn.ModuleList, state=system),
        "torch.load": Call(torch.load, "x"),
        "in a tensor, as once": Call(_load_from_bytes, old.getvalue()),
        "in a tensor, as now": Call(_load_from_bytes, new.getvalue()),
        "in the hooks of a tensor": Call(rebuild, *args[:-1], system),
        "in the key of a dict": {("a", system): 1},
        "bomb in a tensor": Call(_load_from_bytes, zip_bomb()),
    }


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        archive.writestr("archive/data/0", bytes(64 << 20))
    return buffer.getvalue()


@pytest.mark.parametrize("name", payloads())
def test_payloads_are_not_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    payload = payloads()[name]
    meta = {"type": "class", "version": 6, "module_src": "", "class_name": "LowResGenerator"}
    state = torch.nn.Module().__dict__ | {"x": payload, "_buffers": {"y": payload}}
    for place, obj in {
        "alone": payload,
        "among attributes": Call(persistence._reconstruct_persistent_obj, {**meta, "state": state}),
        "as the state": Call(persistence._reconstruct_persistent_obj, {**meta, "state": payload}),
    }.items():
        for protocol in (2, 4):
            Path("net.pkl").write_bytes(pickle.dumps(obj, protocol=protocol))
            with pytest.raises(ValueError, match="net.pkl"):
                checkpoint.load_network("net.pkl")
            assert os.listdir(tmp_path) == ["net.pkl"], place


def test_the_payload_works_when_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("system", "partial", "eval", "popen", "in a tensor, as once", "in a tensor, as now"):
        result = pickle.loads(pickle.dumps(payloads()[name], protocol=4))
        if isinstance(result, subprocess.Popen):
            result.wait()
        assert os.path.exists(CANARY), name
        os.unlink(CANARY)


def test_training_states_that_unpack_to_more_are_refused(tmp_path: Path):
    path = tmp_path / "ckpt-00000001-train.pt"
    path.write_bytes(zip_bomb())
    with pytest.raises(ValueError, match="unpacks to more than it holds"):
        checkpoint.load_train_state(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.")
    with pytest.raises(ValueError, match="more than 20000 tuples"):
        checkpoint.load_train_state(path)


# ----------------------------------------------------------------------------
# Lies and damage.


def memory(kind: str) -> int:
    """Return bytes of memory this process has ("VmRSS"), or has had at most since the mark was reset ("VmHWM")."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{kind}:\s+(\d+) kB", status)[0]) << 10


@contextlib.contextmanager
def bounded_memory(num_bytes: int) -> Iterator[None]:
    """Fail where the process has meanwhile been larger than before by more than this."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    yield
    grown = memory("VmHWM") - before
    assert grown < num_bytes, f"{grown >> 20} MiB more"


LIES = [
    ("lres", {"input_channels": 1 << 30}),
    ("lres", {"input_channels": 20_000, "w_channels": 30_000}),
    ("lres", {"max_filter_taps": 10**12}),
    ("lres", {"num_filters": 10**6, "max_filter_taps": 10**6, "embedding_channels": 10**6}),
    ("lres", {"height": 1 << 20, "width": 1 << 20}),
    ("lres", {"spatial_channels": [1000] * 1000}),
    ("lres", {"spatial_channels": "many"}),
    ("lres", {"temporal_channels": None}),
    ("lres", {"unheard_of": 1}),
    ("sres", {"num_layers": 10**8}),
    ("sres", {"num_layers": 10**6}),
    ("sres", {"channel_base": 1 << 40, "channel_max": 1 << 40}),
    ("sres", {"channel_base": 10**6, "channel_max": 10**6}),
    ("sres", {"z_channels": -1}),
    ("lres-D", {"num_frames": 10**9}),
    ("lres-D", {"epilogue_channels": 10**6}),
    ("sres-D", {"channel_max": 10**5, "channel_base": 10**6}),
]


@pytest.mark.parametrize(("name", "lie"), LIES)
def test_false_options_cost_neither_memory_nor_time(name: str, lie: dict[str, Any], networks: Any, tmp_path: Path):
    network = networks[name]
    tensors = network.state_dict()
    with bounded_memory(200 << 20), pytest.raises(ValueError, match="net.pkl"):
        network_format.build_network(type(network), network.options | lie, tensors, "net.pkl")


class Chain(torch.nn.Module):
    """Layers whose values are few; those of some constructors are needed while it is made."""

    def __init__(self, num_layers: int, size: int, computes: bool = False):
        super().__init__()
        self.options = {"num_layers": num_layers, "size": size, "computes": computes}
        widths = [int(size) for size in torch.full((3,), float(size))] if computes else [size] * 3
        self.layers = torch.nn.ModuleList([torch.nn.Linear(1, 1) for _ in range(num_layers)])
        self.last = torch.nn.Linear(widths[0], widths[1])
        self.register_buffer("fixed", torch.arange(4.0), persistent=False)


@pytest.mark.parametrize("small_bytes", [0, 64 << 20])
@pytest.mark.parametrize("computes", [False, True])
def test_networks_are_compared_with_their_tensors_before_they_take_memory(
    computes: bool, small_bytes: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(network_format, "SMALL_BYTES", small_bytes)
    network = Chain(3, 8, computes)
    found = network_format.build_network(Chain, network.options, network.state_dict(), "net.pkl")
    assert_same(found, network)
    assert torch.equal(found.get_buffer("fixed"), torch.arange(4.0))
    for lie, message in (
        ({"num_layers": 100_000}, "far larger than its tensors"),
        ({"num_layers": 4}, "do not fit a Chain: 2 missing"),
        ({"size": 900}, "do not fit a Chain: 2 of another shape"),
    ):
        with bounded_memory(100 << 20), pytest.raises(ValueError, match=f"net.pkl .*{message}"):
            network_format.build_network(Chain, network.options | lie, network.state_dict(), "net.pkl")


def test_the_same_tensor_in_many_places_is_counted_once():
    layer = torch.nn.Linear(1, 1).state_dict()
    tensors = {f"layers.{i}.{name}": tensor for i in range(60) for name, tensor in layer.items()}
    wide = torch.zeros(1).expand(1 << 22)
    with pytest.raises(ValueError, match="far larger than its tensors"):
        network_format.build_network(Chain, {"num_layers": 60, "size": 2048}, tensors | {"last.bias": wide[:2]}, "x")


@pytest.mark.parametrize("protocol", [2, 3, 5])
@pytest.mark.parametrize("name", ["lres", "sres-D"])
def test_pickles_of_other_versions_of_the_format_open(name: str, protocol: int, networks: Any, tmp_path: Path):
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(networks[name], protocol=protocol))
    assert_same(checkpoint.load_network(tmp_path / "net.pkl"), networks[name])


def open_damaged(data: bytes, path: Path) -> Any:
    """Open `data` as a network: the network, or None if it is refused in one sentence that names the file."""
    path.write_bytes(data)
    try:
        return checkpoint.load_network(path)
    except ValueError as error:
        assert path.name in str(error) and "\n" not in str(error)
        return None


def damaged_copies(data: bytes, count: int) -> Iterator[bytes]:
    """Return copies that are cut, have bits flipped or bytes replaced, half of them where a file says what it holds."""
    rng = np.random.RandomState(0)
    for trial in range(count):
        copy = bytearray(data)
        if trial % 3 == 0:
            del copy[rng.randint(len(data)) :]
        for _ in range(rng.randint(1, 4) if trial % 3 else 0):
            position = [rng.randint(len(data)), rng.randint(6000), len(data) - 1 - rng.randint(6000)][rng.randint(3)]
            copy[position] = copy[position] ^ (1 << rng.randint(8)) if trial % 3 == 1 else rng.randint(256)
        yield bytes(copy)


@pytest.mark.parametrize("suffix", [".pkl", pytest.param(".safetensors", marks=needs_safetensors)])
@pytest.mark.parametrize("name", ["lres", "sres-D"])
def test_damage_is_noticed(name: str, suffix: str, networks: Any, tmp_path: Path):
    path = tmp_path / f"net{suffix}"
    checkpoint.save_network(networks[name], path)
    num_refused = 0
    with bounded_memory(300 << 20):
        for data in damaged_copies(path.read_bytes(), 300):
            found = open_damaged(data, path)
            num_refused += found is None
            if found is not None:
                assert_same(found, networks[name])
    assert num_refused > 280 and [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["lres", "sres-D"])
def test_damage_to_a_pickle_without_a_checksum_is_refused_or_fits(name: str, files: Any, networks: Any, tmp_path: Path):
    data = files[name].read_bytes()[: -network_format.SEAL_BYTES]
    assert data.endswith(b"R\x94.")
    wanted = {key: value.shape for key, value in networks[name].state_dict().items()}
    with bounded_memory(300 << 20):
        for copy in damaged_copies(data, 250):
            found = open_damaged(copy, tmp_path / "net.pkl")
            assert found is None or {key: value.shape for key, value in found.state_dict().items()} == wanted
            assert found is None or len(copy) == len(data), "a part of a file"


@needs_safetensors
def test_a_wrong_value_in_safetensors_is_noticed(files: dict[str, Path], tmp_path: Path):
    path = tmp_path / "net.safetensors"
    checkpoint.save_network(checkpoint.load_network(files["lres"]), path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    assert open_damaged(bytes(data), path) is None
    with pytest.raises(ValueError, match="its checksum is wrong"):
        checkpoint.load_network(path)


@pytest.mark.timeout(60)
def test_false_lengths_in_the_pickle_are_refused(tmp_path: Path):
    path = tmp_path / "net.pkl"
    for data in (
        b"\x80\x04\x8e" + (1 << 45).to_bytes(8, "little") + b"x.",  # bytes
        b"\x80\x04\x8d" + (1 << 33).to_bytes(8, "little") + b"x.",  # text
        b"\x80\x05\x96" + (1 << 33).to_bytes(8, "little") + b"x.",  # bytearray
        b"\x80\x04\x95" + (1 << 33).to_bytes(8, "little") + b"N.",  # frame
        b"\x80\x02\x8b" + (1 << 30).to_bytes(4, "little") + b"x.",  # whole number
        b"\x80\x04" + b"]" * 3_000_000 + b".",
        b"\x80\x04" + b"N0" * 3_000_000 + b"N.",
    ):
        path.write_bytes(data)
        with bounded_memory(400 << 20), pytest.raises(ValueError, match="net.pkl"):
            safe_pickle.load(path)


def test_a_file_is_converted_by_the_name_of_its_reader(repo, tmp_path):
    command = [sys.executable, "-m", "training.network_file", "convert", "models/labdoom-tiny-lres.pkl"]
    target = tmp_path / "network.safetensors"
    subprocess.run([*command, str(target)], cwd=repo, check=True, capture_output=True)
    assert_same(
        network_file.load_network(str(target)), network_file.load_network(str(repo / "models/labdoom-tiny-lres.pkl"))
    )


def test_opening_a_small_network_does_not_import_the_compiler(repo):
    code = "import sys; from training.network_file import load_network; load_network('models/labdoom-tiny-sres.pkl')"
    code += "; assert 'torch._dynamo' not in sys.modules and 'sympy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=repo, check=True)


def test_half_of_the_space_holds_the_same_network_up_to_rounding(tmp_path):
    torch.manual_seed(0)
    source, target = tmp_path / "source.pkl", tmp_path / "half.pkl"
    options = {"height": 8, "width": 8, "widths": [16], "blocks": 1}
    network = ConvAutoencoder(**options)
    checkpoint.save_network(network, source)
    found = CliRunner().invoke(checkpoint.main, ["convert", str(source), str(target), "--half"])
    assert found.exit_code == 0, found.output
    assert target.stat().st_size < 0.6 * source.stat().st_size
    for name, value in network_file.load_network(str(target)).state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, network.state_dict()[name], rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        next(network.parameters())[0] = 1e6
    checkpoint.save_network(network, source)
    found = CliRunner().invoke(checkpoint.main, ["convert", str(source), str(tmp_path / "other.pkl"), "--half"])
    assert found.exit_code == 1 and "has values above 65504" in found.output and not (tmp_path / "other.pkl").exists()

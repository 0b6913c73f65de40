"""Checkpoints: networks in three formats, training states, and run directories after crashes."""

import dataclasses
import fractions
import importlib.util
import os
import pickle
import pickletools
import signal
import subprocess
import sys
import time
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torch_utils import safe_pickle
from training import checkpoint, network_file, registry
from training.contract import Bundle

SOURCE = """
import torch
from torch import nn

from torch_utils import persistence


class Options:
    @classmethod
    def matches(cls, record):
        return record.class_name == cls.__name__

    @classmethod
    def options_from_record(cls, record):
        return record.attributes["options"]


@persistence.persistent_class
class Small(Options, nn.Module):
    def __init__(self, size, depth=1):
        super().__init__()
        self.options = dict(size=size, depth=depth)
        self.layers = nn.ModuleList([nn.Identity() for _ in range(depth)])
        self.weight = nn.Parameter(torch.randn(size, size))
        self.register_buffer("taps", torch.randn(3).half())


@persistence.persistent_class
class Other(Options, nn.Module):
    def __init__(self, size):
        super().__init__()
        self.options = dict(size=size)
        self.bias = nn.Parameter(torch.randn(size))


class Ordinary(nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.options = dict(size=size, heads=heads)
        self.layers = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size), nn.GELU(), nn.BatchNorm1d(size))
        self.attention = nn.MultiheadAttention(size, heads)
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    name = f"nets_{uuid.uuid4().hex}"
    path = tmp_path / f"{name}.py"
    path.write_text(f'"""{name}"""\n{SOURCE}')
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    networks = {f"{name}:{kind}": f"{kind.lower()} thing" for kind in ("Other", "Small", "Ordinary")}
    monkeypatch.setattr(module, "SPEC", registry.Spec("nets", "", "", "", networks, ""), raising=False)
    monkeypatch.setattr(registry, "SYSTEMS", {"nets": f"{name}:SPEC"})
    return module


def assert_same_network(module: torch.nn.Module, original: torch.nn.Module) -> None:
    assert type(module) is type(original)
    assert list(module.state_dict()) == list(original.state_dict())
    for name, tensor in original.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor) and module.state_dict()[name].dtype == tensor.dtype
    assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())


# ----------------------------------------------------------------------------
# Networks.


@pytest.mark.parametrize("trust", [False, True])
def test_network_comes_back_bit_for_bit(nets: Any, tmp_path: Path, trust: bool, capsys: pytest.CaptureFixture[str]):
    net = nets.Small(4, depth=2)
    path = tmp_path / "net.pkl"
    checkpoint.save_network(net, path)
    assert net.training and net.weight.requires_grad
    assert_same_network(checkpoint.load_network(path, trust=trust), net)
    assert_same_network(checkpoint.load_network(path.as_uri(), trust=trust), net)
    assert ("runs with all your rights" in capsys.readouterr().out) == trust
    assert sorted(entry.suffix for entry in tmp_path.iterdir()) == [".pkl", ".py"]


def test_second_network_class_is_found(nets: Any, tmp_path: Path):
    net = nets.Other(5)
    checkpoint.save_network(net, tmp_path / "net.pkl")
    assert_same_network(checkpoint.load_network(tmp_path / "net.pkl"), net)


def test_opening_runs_nothing_unless_trusted(nets: Any, tmp_path: Path):
    marker = tmp_path / "ran"
    function, (meta,), *_ = nets.Small(4).__reduce__()
    meta["module_src"] = f"open({str(marker)!r}, 'w').close()\n{meta['module_src']}"

    class Tampered:
        def __reduce__(self) -> Any:
            return function, (meta,)

    path = tmp_path / "tampered.pkl"
    path.write_bytes(pickle.dumps(Tampered(), protocol=4))
    assert isinstance(checkpoint.load_network(path), nets.Small)
    assert not marker.exists()
    checkpoint.load_network(path, trust=True)
    assert marker.exists()


def test_network_that_could_not_be_opened_safely_is_not_written(nets: Any, tmp_path: Path):
    net = nets.Small(4)
    path = tmp_path / "net.pkl"
    checkpoint.save_network(net, path)
    before = path.read_bytes()
    net.extra = fractions.Fraction(1, 2)
    with pytest.raises(ValueError, match="fractions.Fraction"):
        checkpoint.save_network(net, path)
    assert path.read_bytes() == before and len(list(tmp_path.glob("*.pkl"))) == 1


def test_ordinary_layers_are_written_and_read(nets: Any, tmp_path: Path):
    """Also inside a network of a persistent class, which is then written as plain values and tensors."""
    ordinary = nets.Ordinary(4, heads=2)
    mixed = nets.Small(4)
    for name, net in (("ordinary", ordinary), ("mixed", mixed)):
        if net is mixed:
            net.layers[0] = torch.nn.LayerNorm(4)
            with pytest.raises(ValueError, match="do not fit a Small: 2 unknown"):  # its options do not make it
                path = tmp_path / "mixed.pkl"
                checkpoint.save_network(net, path)
                checkpoint.load_network(path)
            continue
        for suffix in ("pkl", "safetensors"):
            path = tmp_path / f"{name}.{suffix}"
            checkpoint.save_network(net, path)
            assert_same_network(checkpoint.load_network(path), net)
            assert b"LayerNorm" not in path.read_bytes()


def test_bundles_hold_networks_and_facts(nets: Any, tmp_path: Path):
    networks = {"prior": nets.Ordinary(4, heads=1), "tokenizer": nets.Other(3)}
    facts = {"options": {"steps": 3, "names": ["a"]}, "tokenizer": "ab" * 32, "fps": 12.5}
    bundle = Bundle(networks, "nets", **facts, vocabularies={"actions": ["none", "left"]})
    for suffix in ("pkl", "safetensors"):
        path = tmp_path / f"bundle.{suffix}"
        network_file.save_bundle(bundle, path)
        found = network_file.load_bundle(path)
        for role, network in networks.items():
            assert_same_network(found.networks[role], network)
        assert dataclasses.replace(found, networks={}, path="") == dataclasses.replace(bundle, networks={})
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            network_file.load_bundle(path)
    with pytest.raises(ValueError, match="holds 2 networks, expected one"):
        network_file.save_bundle(bundle, tmp_path / "two.pkl")
        network_file.load_network(tmp_path / "two.pkl")


def test_a_network_without_its_arguments_is_not_written(tmp_path: Path):
    with pytest.raises(ValueError, match="Linear cannot be written: it has no attribute `options`"):
        checkpoint.save_network(torch.nn.Linear(2, 2), tmp_path / "net.pkl")
    assert not list(tmp_path.iterdir())


def test_training_pickle_is_refused_with_advice(nets: Any, tmp_path: Path):
    path = tmp_path / "train.pkl"
    path.write_bytes(pickle.dumps({"G": nets.Small(4), "D": nets.Other(3), "G_opt": {}}, protocol=4))
    for trust in (False, True):
        with pytest.raises(ValueError, match=r"train.pkl holds a whole training state \(G, D\).*-G-ema.pkl"):
            checkpoint.load_network(path, trust=trust)


@pytest.mark.parametrize("trust", [False, True])
def test_network_written_on_a_gpu_opens_without_one(nets: Any, tmp_path: Path, trust: bool):
    net = nets.Other(5)
    data = pickle.dumps(net, protocol=4)
    # The longer name of the place makes the frame and the bytes around the storage longer as well.
    cpu, cuda = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    words = [value for _, value, _ in pickletools.genops(data)]
    (argument,) = [value for value in words if isinstance(value, bytes) and cpu in value]
    other = argument.replace(cpu, cuda)
    lengths = [len(value).to_bytes(4, "little") for value in (argument, other)]
    data = (data[:2] + data[11:]).replace(b"B" + lengths[0] + argument, b"B" + lengths[1] + other)
    assert cuda in data
    path = tmp_path / "net.pkl"
    path.write_bytes(data)
    assert_same_network(checkpoint.load_network(path, trust=trust), net)


def test_unknown_network_is_refused_by_name(nets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint.save_network(nets.Small(4), tmp_path / "net.pkl")
    only = dict(list(nets.SPEC.networks.items())[:1])
    monkeypatch.setattr(nets, "SPEC", registry.Spec("nets", "", "", "", only, ""))
    with pytest.raises(ValueError, match=r"net.pkl holds a Small, .*known here \(Other\)"):
        checkpoint.load_network(tmp_path / "net.pkl")


def test_tensors_that_do_not_fit_are_named(nets: Any, tmp_path: Path):
    net = nets.Small(4)
    net.options["size"] = 5
    net.surplus = torch.nn.Parameter(torch.ones(1))
    del net.taps
    checkpoint.save_network(net, tmp_path / "net.pkl")
    with pytest.raises(ValueError) as caught:
        checkpoint.load_network(tmp_path / "net.pkl")
    message = str(caught.value)
    assert "net.pkl do not fit a Small" in message
    assert "1 missing (taps), 1 unknown (surplus)" in message
    assert "1 of another shape (weight [4, 4], expected [5, 5])" in message


@pytest.mark.parametrize("name", ["absent.pkl", "absent.safetensors"])
def test_missing_network_is_a_clear_error(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"there is no file .*{name}"):
        checkpoint.load_network(tmp_path / name)


@pytest.mark.parametrize("trust", [False, True])
def test_damaged_network_is_a_clear_error(nets: Any, tmp_path: Path, trust: bool):
    path = tmp_path / "net.pkl"
    checkpoint.save_network(nets.Small(4), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="net.pkl is damaged"):
        checkpoint.load_network(path, trust=trust)


def test_safetensors_round_trip(nets: Any, tmp_path: Path):
    pytest.importorskip("safetensors")
    net = nets.Small(4, depth=2)
    path = tmp_path / "net.safetensors"
    checkpoint.save_network(net, path)
    assert_same_network(checkpoint.load_network(path), net)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="net.safetensors is damaged"):
        checkpoint.load_network(path)


def test_safetensors_of_another_origin_is_refused(nets: Any, tmp_path: Path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "net.safetensors"
    safetensors.save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="does not say which network"):
        checkpoint.load_network(path)
    safetensors.save_file({"x": torch.zeros(2)}, path, metadata={"longtake": '{"class": "Huge", "options": {}}'})
    with pytest.raises(ValueError, match="holds a Huge, expected one of Other, Small"):
        checkpoint.load_network(path)


@pytest.mark.skipif(importlib.util.find_spec("safetensors") is not None, reason="the package is there")
def test_absent_safetensors_names_the_extra(nets: Any, tmp_path: Path):
    path = tmp_path / "net.safetensors"
    with pytest.raises(ValueError, match=r"pip install 'longtake\[safetensors\]'"):
        checkpoint.save_network(nets.Small(4), path)
    assert not path.exists()
    path.touch()
    with pytest.raises(ValueError, match=r"pip install 'longtake\[safetensors\]'"):
        checkpoint.load_network(path)


# ----------------------------------------------------------------------------
# Training states.


def example_state(step: int = 0) -> dict[str, Any]:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    values = {"text": "a", "list": [1, 2.5, None, True], "tuple": (1, b"x"), "order": OrderedDict(b=1, a=2)}
    return {
        "step": step,
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "values": values,
        "half": torch.randn(3).bfloat16(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_train_state_comes_back_bit_for_bit(tmp_path: Path):
    path, state = tmp_path / "train.pt", example_state(5)
    checkpoint.save_train_state(path, state)
    assert same(state, checkpoint.load_train_state(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.pt"]


@pytest.mark.parametrize("value", [np.float64(1.0), np.zeros(2), torch.nn.Identity(), lambda: 0, Path("x")])
def test_state_that_could_not_be_read_back_is_not_written(tmp_path: Path, value: Any):
    with pytest.raises(AssertionError, match=r"state\['a'\]\[1\]"):
        checkpoint.save_train_state(tmp_path / "train.pt", {"a": [0, value]})
    assert list(tmp_path.iterdir()) == []


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {
            "truncated": data[:middle],
            "last byte": data[:-1],
            "empty": b"",
            "foreign": b"not a checkpoint at all",
            "pickle": pickle.dumps({"step": 1}),
            "flipped": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :],
        }[how]
    )


DAMAGES = ["truncated", "last byte", "empty", "foreign", "pickle", "flipped"]


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_state_names_the_file(tmp_path: Path, how: str):
    path = tmp_path / "train.pt"
    checkpoint.save_train_state(path, {"x": torch.randn(10_000)})
    damage(path, how)
    with pytest.raises(ValueError, match="train.pt is not a whole training state"):
        checkpoint.load_train_state(path)


def test_states_of_other_kinds_name_the_file(tmp_path: Path):
    path = tmp_path / "train.pt"
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="train.pt holds a list"):
        checkpoint.load_train_state(path)
    torch.save({"x": os.system}, path)
    with pytest.raises(ValueError, match="train.pt is not a whole"):
        checkpoint.load_train_state(path)
    with pytest.raises(ValueError, match="absent.pt is not a whole"):
        checkpoint.load_train_state(tmp_path / "absent.pt")


WRITER = """
import itertools, os, sys, torch
from pathlib import Path
from training import checkpoint

path = Path(sys.argv[1])
state = {"x": torch.arange(2_000_000)}
for n in itertools.count(1):
    state["n"] = n
    checkpoint.save_train_state(path, state)
    print(n, flush=True)
"""


def test_writer_killed_in_the_middle_leaves_a_whole_file(tmp_path: Path):
    path = checkpoint.train_state_path(tmp_path, 7)
    path.parent.mkdir()
    root = Path(checkpoint.__file__).parent.parent
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        cwd=root,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    while True:
        # Held still for each look: otherwise a part could become whole between the look and the kill.
        writer.send_signal(signal.SIGSTOP)
        os.waitpid(writer.pid, os.WUNTRACED)
        parts = [entry for entry in path.parent.glob(".*") if 0 < entry.stat().st_size < 15_000_000]
        if parts:
            break
        writer.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    (part,) = parts
    writer.send_signal(signal.SIGKILL)
    num_written = 1 + len(writer.stdout.read().split())
    writer.wait()
    state = checkpoint.load_train_state(path)
    assert state["n"] in (num_written, num_written + 1) and torch.equal(state["x"], torch.arange(2_000_000))
    with pytest.raises(ValueError, match="not a whole"):
        checkpoint.load_train_state(part)
    assert checkpoint.prune_checkpoints(tmp_path, keep=1) == [part]
    assert list(path.parent.iterdir()) == [path]


# ----------------------------------------------------------------------------
# The folder of a run.


def fill(run_dir: Path, steps: list[int]) -> None:
    (run_dir / "checkpoints").mkdir()
    for step in steps:
        state = {name: {} for name in checkpoint.STATE_ENTRIES} | {"step": step, "x": torch.randn(5000)}
        checkpoint.save_train_state(checkpoint.train_state_path(run_dir, step), state)
        checkpoint.network_path(run_dir, step).write_bytes(pickle.dumps(step))


def steps_left(run_dir: Path) -> tuple[list[int], list[int]]:
    networks = sorted(int(path.name[5:13]) for path in run_dir.glob("checkpoints/*-G-ema.pkl"))
    return [step for step, _ in checkpoint.list_checkpoints(run_dir)], networks


def test_names_and_order(tmp_path: Path):
    fill(tmp_path, [500, 20, 123456789])
    names = [path.name for _, path in checkpoint.list_checkpoints(tmp_path)]
    assert names == ["ckpt-00000020-train.pt", "ckpt-00000500-train.pt", "ckpt-123456789-train.pt"]
    assert checkpoint.network_path(tmp_path, 20).name == "ckpt-00000020-G-ema.pkl"
    for stranger in (
        "ckpt-00000999-train.pt.bak",
        "ckpt-best-train.pt",
        ".ckpt-00000999-train.1-a.tmp.pt",
        "notes.txt",
    ):
        (tmp_path / "checkpoints" / stranger).touch()
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [20, 500, 123456789]


@pytest.mark.parametrize("how", DAMAGES)
def test_newest_whole_checkpoint_is_found_behind_broken_ones(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fill(tmp_path, [10, 20, 30])
    checkpoint.network_path(tmp_path, 20).unlink()
    damage(checkpoint.train_state_path(tmp_path, 30), how)
    found = checkpoint.latest_whole_checkpoint(tmp_path)
    assert found is not None
    step, path, state = found
    assert step == state["step"] == 20 and path == checkpoint.train_state_path(tmp_path, 20)
    assert "Warning" in (out := capsys.readouterr().out) and "ckpt-00000030-train.pt" in out


def test_a_broken_or_foreign_state_is_refused_by_name_and_the_one_before_is_offered(tmp_path: Path):
    fill(tmp_path, [10, 20, 30])
    damage(checkpoint.train_state_path(tmp_path, 20), "empty")
    path = checkpoint.train_state_path(tmp_path, 30)
    for state, message in [(None, "is not a whole"), ({"G": {}}, "is no training state of a run: it has no entry")]:
        if state is None:
            damage(path, "truncated")
        else:
            checkpoint.save_train_state(path, state)
        with pytest.raises(ValueError, match=f"ckpt-00000030-train.pt {message}.*; before it.*ckpt-00000010-train.pt$"):
            checkpoint.load_run_state(path)
    found = checkpoint.latest_whole_checkpoint(tmp_path)
    assert found is not None and found[0] == 10


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from training import checkpoint

path, folder = Path(sys.argv[1]), Path(sys.argv[1]).parent
network = torch.nn.Linear(300, 300)
network.options = {"in_features": 300, "out_features": 300}
checkpoint.save_train_state(path, {"x": torch.zeros(10)})
before = path.read_bytes()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for save in (
    lambda: checkpoint.save_train_state(path, {"x": torch.zeros(100_000)}),
    lambda: checkpoint.save_network(network, folder / "net.pkl"),
):
    try:
        save()
    except OSError as error:
        assert error.strerror == "File too large", error
    else:
        raise AssertionError("more was written than the disk takes")
    assert [entry.name for entry in folder.iterdir()] == [path.name]
assert path.read_bytes() == before
"""


def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new(tmp_path: Path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "train.pt")]
    root = Path(checkpoint.__file__).parent.parent
    subprocess.run(command, check=True, cwd=root, env=os.environ | {"PYTHONPATH": "."})


def test_no_checkpoint_is_none(tmp_path: Path):
    assert checkpoint.latest_whole_checkpoint(tmp_path) is None
    fill(tmp_path, [10])
    damage(checkpoint.train_state_path(tmp_path, 10), "empty")
    assert checkpoint.latest_whole_checkpoint(tmp_path) is None


def test_pruning_keeps_the_newest_and_the_protected(tmp_path: Path):
    fill(tmp_path, [10, 20, 30, 40, 50])
    checkpoint.train_state_path(tmp_path, 40).unlink()
    notes = tmp_path / "checkpoints" / "notes.txt"
    left_over = tmp_path / "checkpoints" / ".ckpt-00000010-train.123-abcd.tmp.pt"
    notes.touch()
    left_over.touch()
    deleted = checkpoint.prune_checkpoints(tmp_path, keep=2, protect=[10])
    assert steps_left(tmp_path) == ([10, 30, 50], [10, 40, 50])
    assert notes.exists() and not left_over.exists()
    assert len(deleted) == 4 and not any(path.exists() for path in deleted)
    assert checkpoint.prune_checkpoints(tmp_path, keep=9) == []


@pytest.mark.parametrize("how", ["truncated", "empty", "foreign"])
def test_broken_files_do_not_push_out_good_ones(how: str, tmp_path: Path):
    fill(tmp_path, [10, 20, 30])
    damage(checkpoint.train_state_path(tmp_path, 30), how)
    damage(checkpoint.network_path(tmp_path, 30), how)
    checkpoint.prune_checkpoints(tmp_path, keep=1)
    assert steps_left(tmp_path) == ([20, 30], [20, 30])
    found = checkpoint.latest_whole_checkpoint(tmp_path)
    assert found is not None and found[0] == 20
    assert pickle.loads(checkpoint.network_path(tmp_path, 20).read_bytes()) == 20
    damage(checkpoint.train_state_path(tmp_path, 20), "empty")
    checkpoint.prune_checkpoints(tmp_path, keep=1)
    assert steps_left(tmp_path)[0] == [20, 30]


def test_network_on_disk_is_the_published_container(nets: Any, tmp_path: Path):
    checkpoint.save_network(nets.Small(4), tmp_path / "net.pkl")
    record = safe_pickle.load(tmp_path / "net.pkl")
    assert record.class_name == "Small" and record.attributes["options"] == {"size": 4, "depth": 1}
    assert "class Small" in record.module_src

"""Persistent pickles: the layout of the container, round trips, and execution of the embedded source text."""

import copy
import dataclasses
import importlib.util
import inspect
import io
import pickle
import pickletools
import sys
import types
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torch_utils import persistence

SOURCE = '''
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from torch_utils import persistence


@persistence.persistent_class
class Layer(nn.Module):
    """One layer."""

    def __init__(self, size, *, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))
        self.bias = nn.Parameter(torch.randn(size)) if bias else None
        self.register_buffer("taps", torch.randn(3, dtype=torch.float64))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.gain = np.float32(0.3)
        self.steps = np.int64(7)

    def forward(self, x):
        return x @ self.weight * float(self.gain)


@persistence.persistent_class
class Wide(Layer):
    def __init__(self):
        super().__init__(5, bias=False)


@persistence.persistent_class
@dataclass(eq=False)
class Net(nn.Module):
    size: int
    depth: int = 2

    def __post_init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(self.size) for _ in range(self.depth)])
        self.skip = nn.Identity()
        self.table = np.arange(6.0).reshape(2, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.skip(x)


@persistence.persistent_class
@dataclass(frozen=True)
class Frozen:
    width: int
    names: tuple = ("a",)


@persistence.persistent_class
class Forgetful:
    _record_init_args = False

    def __init__(self, value):
        self.value = value


@persistence.persistent_class
class Unpicklable:
    def __init__(self):
        self.function = lambda: 0


class Plain(Layer):
    pass
'''

ALLOWED_GLOBALS = {
    "torch_utils.persistence _reconstruct_persistent_obj",
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    "torch.storage _load_from_bytes",
    "torch.nn.modules.container ModuleList",
    "torch.nn.modules.linear Identity",
    "numpy dtype",
    "numpy ndarray",
    "numpy._core.multiarray scalar",
    "numpy._core.multiarray _reconstruct",
}


@pytest.fixture
def nets(tmp_path: Path) -> Any:
    # A text of its own for each test, so that no module of another test is taken for it.
    name = f"nets_{uuid.uuid4().hex}"
    path = tmp_path / f"{name}.py"
    path.write_text(f'"""{name}"""\n{SOURCE}')
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def round_trip(obj: Any) -> Any:
    return pickle.loads(pickle.dumps(obj, protocol=4))


def globals_of(data: bytes) -> set[str]:
    # STACK_GLOBAL takes the two texts that were pushed last; a pushed text may come from the memo.
    names, pushed, memo = set(), [], {}
    for opcode, argument, _ in pickletools.genops(data):
        if "UNICODE" in opcode.name:
            pushed.append(argument)
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = pushed[-1] if pushed else None
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            pushed.append(memo[argument])
        elif opcode.name == "STACK_GLOBAL":
            names.add(f"{pushed[-2]} {pushed[-1]}")
            pushed.append(None)
        elif opcode.name == "GLOBAL":
            names.add(argument)
        else:
            pushed.append(None)
    return names


def test_round_trip_keeps_every_bit_and_the_class(nets: Any):
    net = nets.Net(4, depth=3).eval().requires_grad_(False)
    other = round_trip(net)
    assert type(other) is nets.Net
    assert list(other.state_dict()) == list(net.state_dict())
    for name, tensor in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
        assert other.state_dict()[name].dtype == tensor.dtype
    assert not other.training and not any(parameter.requires_grad for parameter in other.parameters())
    assert torch.equal(other.layers[0].scratch, torch.ones(2)) and "layers.0.scratch" not in other.state_dict()
    assert other.layers[1].gain == np.float32(0.3) and type(other.layers[1].gain) is np.float32
    assert type(other.layers[1].steps) is np.int64
    assert np.array_equal(other.table, net.table)
    assert isinstance(other.layers, torch.nn.ModuleList) and isinstance(other.skip, torch.nn.Identity)
    assert other.init_args == (4,) and other.init_kwargs == {"depth": 3}
    x = torch.randn(2, 4)
    assert torch.equal(other(x), net(x))


def test_container_is_version_6(nets: Any):
    data = pickle.dumps(nets.Net(4), protocol=4)
    metas = []

    class Peek(pickle.Unpickler):
        def find_class(self, module_name: str, global_name: str, /) -> Any:
            if global_name == "_reconstruct_persistent_obj":
                return lambda meta: metas.append(meta) or torch.nn.Identity()
            return super().find_class(module_name, global_name)

    Peek(io.BytesIO(data)).load()
    layer, root = metas[0], metas[-1]
    assert [meta["class_name"] for meta in metas] == ["Layer", "Layer", "Net"]
    for meta in metas:
        assert type(meta) is dict and list(meta) == ["type", "version", "module_src", "class_name", "state"]
        assert meta["type"] == "class" and meta["version"] == 6
        assert meta["module_src"] == inspect.getsource(nets)
        assert meta["module_src"] is root["module_src"]
    assert {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"} <= set(root["state"])
    assert root["state"]["_init_args"] == (4,) and root["state"]["_init_kwargs"] == {}
    assert layer["state"]["_non_persistent_buffers_set"] == {"scratch"}
    assert next(pickletools.genops(data))[1] == 4
    assert data.count(b"One layer.") == 1
    assert globals_of(data) == ALLOWED_GLOBALS


def test_the_text_in_the_file_runs_when_the_class_is_gone(nets: Any):
    net = nets.Net(4)
    data = pickle.dumps(net, protocol=4)
    x = torch.randn(2, 4)
    expected = net(x)
    del nets.Net
    other = pickle.loads(data)
    assert type(other).__module__.startswith("_imported_module_") and type(other).__module__ in sys.modules
    assert torch.equal(other(x), expected)
    assert dataclasses.asdict(round_trip(nets.Frozen(3))) == {"width": 3, "names": ("a",)}
    again = round_trip(other)
    assert type(again) is type(other) and torch.equal(again(x), expected)


def test_deep_copy_keeps_the_class(nets: Any):
    net = nets.Net(4)
    other = copy.deepcopy(net)
    assert type(other) is nets.Net and type(other.layers[0]) is nets.Layer
    with torch.no_grad():
        other.layers[0].weight.zero_()
    assert net.layers[0].weight.abs().sum() > 0


def test_decorating_twice_changes_nothing(nets: Any):
    assert persistence.persistent_class(nets.Layer) is nets.Layer


def test_decorated_class_looks_like_the_original(nets: Any):
    assert nets.Layer.__name__ == nets.Layer.__qualname__ == "Layer" and nets.Layer.__module__ == nets.__name__
    assert nets.Layer.__doc__ == "One layer."
    assert list(inspect.signature(nets.Layer).parameters) == ["size", "bias"]


def test_inherited_class_is_recorded_as_itself(nets: Any):
    wide = round_trip(nets.Wide())
    assert type(wide) is nets.Wide and wide.init_args == () and wide.bias is None
    assert persistence.is_persistent(wide) and persistence.is_persistent(nets.Wide)


def test_dataclasses_work_frozen_too(nets: Any):
    frozen = round_trip(nets.Frozen(3, names=("b", "c")))
    assert type(frozen) is nets.Frozen and frozen == nets.Frozen(3, names=("b", "c"))
    assert frozen.init_args == (3,) and frozen.init_kwargs.names == ("b", "c")


def test_arguments_are_copies_and_can_be_left_out(nets: Any):
    names = ["a"]
    frozen = nets.Frozen(1, names=names)
    names.append("b")
    assert frozen.init_kwargs == {"names": ["a"]}
    forgetful = round_trip(nets.Forgetful(5))
    assert forgetful.__dict__ == {"value": 5}


def test_unpicklable_object_fails_at_construction(nets: Any):
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        nets.Unpicklable()


def test_plain_subclass_is_not_taken_for_its_parent(nets: Any):
    assert not persistence.is_persistent(nets.Plain)
    with pytest.raises(AssertionError, match="Plain must be decorated"):
        pickle.dumps(nets.Plain(3))


def test_import_hook_sees_and_changes_records(nets: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(persistence, "_import_hooks", [])
    seen = []

    @persistence.import_hook
    def rename(meta: Any) -> Any:
        seen.append(meta.class_name)
        meta.state.value += 1
        return meta

    assert round_trip(nets.Forgetful(5)).value == 6
    assert seen == ["Forgetful"] and callable(rename)


def test_other_versions_are_refused(nets: Any):
    _, (meta,), *_ = nets.Forgetful(5).__reduce__()
    with pytest.raises(ValueError, match="version 7, expected 6"):
        persistence._reconstruct_persistent_obj(meta | {"version": 7})


def test_is_persistent_is_false_for_other_classes():
    assert not persistence.is_persistent(torch.nn.Identity()) and not persistence.is_persistent(types.ModuleType)

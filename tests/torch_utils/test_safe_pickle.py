"""The safe reader returns the written data and rejects everything else that a pickle can request."""

import builtins
import io
import os
import pickle
import re
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._utils import _rebuild_tensor_v2

from dnnlib import EasyDict
from torch_utils import persistence, safe_pickle, training_stats

MARKER = "the-payload-ran"


class Call:
    """Pickles as the call of a function, as attacks do."""

    def __init__(self, function: Any, *args: Any):
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def persistent(state: dict[str, Any], class_name: str = "Net", module_src: str = "", version: int = 6) -> Call:
    meta = {"type": "class", "version": version, "module_src": module_src, "class_name": class_name, "state": state}
    return Call(persistence._reconstruct_persistent_obj, meta)


def module_state(**attributes: Any) -> dict[str, Any]:
    return torch.nn.Module().__dict__ | attributes


def read(obj: Any) -> safe_pickle.Record:
    return safe_pickle.load(io.BytesIO(obj if isinstance(obj, bytes) else pickle.dumps(obj, protocol=4)))


@pytest.fixture
def net_data() -> bytes:
    layer = module_state(gain=np.float32(0.5), skip=None)
    layer["_parameters"] = OrderedDict(weight=torch.nn.Parameter(torch.randn(3, 4).t()), bias=None)
    layer["_buffers"] = OrderedDict(taps=torch.randn(5, dtype=torch.float64)[1:4], scratch=torch.ones(2))
    layer["_non_persistent_buffers_set"] = {"scratch"}
    half = module_state()
    half["_buffers"] = {"value": torch.randn(()).half()}
    root = module_state(width=8, names=("a", "b"), options={"sizes": [1, 2.5, None]}, table=np.arange(6).reshape(2, 3))
    root["secret"] = torch.zeros(3)
    root["own"] = EasyDict(text="t")
    root["order"] = np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3))
    layers = torch.nn.ModuleList()
    layers.__dict__["_modules"] = OrderedDict({"0": persistent(layer, "Layer"), "1": persistent(half, "Half")})
    root["_modules"] = OrderedDict(layers=layers, skip=torch.nn.Identity(), absent=None)
    return pickle.dumps(persistent(root, module_src="raise SystemExit('never')"), protocol=4)


def test_record_holds_names_tensors_and_attributes(net_data: bytes):
    record = read(net_data)
    assert record.class_name == "Net" and record.module_src == "raise SystemExit('never')"
    assert list(record.children) == ["layers", "skip"]
    assert record.children["layers"].class_name == "ModuleList" and record.children["skip"].class_name == "Identity"
    layer = record.children["layers"].children["0"]
    assert layer.class_name == "Layer" and layer.attributes == {"gain": np.float32(0.5), "skip": None}
    plain = {name: value for name, value in record.attributes.items() if name not in ("table", "order")}
    assert plain == {"width": 8, "names": ("a", "b"), "options": {"sizes": [1, 2.5, None]}, "own": {"text": "t"}}
    assert np.array_equal(record.attributes["table"], [[0, 1, 2], [3, 4, 5]])
    assert np.array_equal(record.attributes["order"], [[0, 1, 2], [3, 4, 5]])

    state = record.state_dict()
    assert list(state) == ["layers.0.weight", "layers.0.taps", "layers.1.value"]
    assert state["layers.0.weight"].shape == (4, 3) and state["layers.0.weight"].stride() == (1, 4)
    assert [tensor.dtype for tensor in state.values()] == [torch.float32, torch.float64, torch.float16]


def test_tensors_equal_those_of_the_ordinary_pickle(net_data: bytes):
    class Inert(pickle.Unpickler):
        def find_class(self, module_name: str, global_name: str, /) -> Any:
            if global_name == "_reconstruct_persistent_obj":
                return lambda meta: meta["state"]
            return super().find_class(module_name, global_name)

    root = Inert(io.BytesIO(net_data)).load()
    layer, half = root["_modules"]["layers"].__dict__["_modules"].values()
    state = read(net_data).state_dict()
    assert torch.equal(state["layers.0.weight"], layer["_parameters"]["weight"])
    assert torch.equal(state["layers.0.taps"], layer["_buffers"]["taps"])
    assert torch.equal(state["layers.1.value"], half["_buffers"]["value"])


def test_spelling_of_numpy_1_is_read(net_data: bytes):
    # The old spelling is one letter shorter, in the text and in its length byte. So is the one frame, which goes.
    new, old = b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray"
    assert net_data.count(new) == 1
    data = (net_data[:2] + net_data[11:]).replace(new, old)
    assert np.array_equal(read(data).attributes["table"], [[0, 1, 2], [3, 4, 5]])


def test_train_pickle_gives_its_networks_as_children():
    training_stats.report("Safe/x", torch.ones(3))
    collector = training_stats.Collector("Safe/.*")
    collector.update()
    g_state = module_state(width=3)
    g_state["_parameters"] = {"weight": torch.nn.Parameter(torch.ones(2))}
    adam = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    train = {"G_opt": adam, "collector": collector, "G": persistent(g_state, "G"), "D": persistent({}, "D")}
    record = read(train)
    assert record.class_name == "dict" and list(record.children) == ["collector", "G", "D"]
    assert record.children["G"].class_name == "G" and record.children["G"].attributes == {"width": 3}
    assert torch.equal(record.state_dict()["G.weight"], torch.ones(2))
    assert record.children["collector"].attributes["_regex"] == "Safe/.*"


def test_tensors_written_on_a_gpu_come_to_the_cpu():
    storage = io.BytesIO()
    typed = torch.storage.TypedStorage(
        wrap_storage=torch.arange(3.0).untyped_storage(), dtype=torch.float32, _internal=True
    )
    torch.save(typed, storage, _use_new_zipfile_serialization=False)
    cpu, cuda = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    assert storage.getvalue().count(cpu) == 1
    stored = Call(torch.storage._load_from_bytes, storage.getvalue().replace(cpu, cuda))
    tensor = Call(_rebuild_tensor_v2, stored, 1, (2,), (1,), False, OrderedDict())
    state = read(persistent({"_buffers": {"x": tensor}})).state_dict()
    assert torch.equal(state["x"], torch.tensor([1.0, 2.0]))


# ----------------------------------------------------------------------------
# What must not happen.


def evil_calls() -> dict[str, tuple[str, Any]]:
    touch = f"open({MARKER!r}, 'w').close()"
    inner = io.BytesIO()
    torch.save(Call(os.system, f"touch {MARKER}"), inner, _use_new_zipfile_serialization=False)
    raw = pickle.dumps(Call(os.system, f"touch {MARKER}"), protocol=2)
    load_from_bytes = torch.storage._load_from_bytes
    return {
        "os.system": ("os.system", b"cos\nsystem\n(S'touch " + MARKER.encode() + b"'\ntR."),
        "posix.system": ("posix.system", Call(os.system, f"touch {MARKER}")),
        "eval": ("builtins.eval", Call(eval, touch)),
        "exec": ("builtins.exec", Call(exec, touch)),
        "open": ("io.open", Call(open, MARKER, "w")),
        "getattr": ("builtins.getattr", Call(getattr, Call(__import__, "os"), "system")),
        "getattr alone": ("builtins.getattr", Call(getattr, "text", "upper")),
        "import": ("builtins.__import__", Call(builtins.__import__, "os")),
        "mkdir by INST": ("os.mkdir", b"(S'" + MARKER.encode() + b"'\nios\nmkdir\n."),
        "nested name": (
            "collections.OrderedDict.fromkeys",
            b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
        ),
        "torch.load": ("torch.serialization.load", Call(torch.load, "x")),
        "in a tensor": ("posix.system", Call(load_from_bytes, inner.getvalue())),
        "bare in a tensor": ("posix.system", Call(load_from_bytes, raw)),
    }


@pytest.mark.parametrize("name", evil_calls())
@pytest.mark.parametrize("place", ["root", "attribute", "submodule", "key"])
def test_payloads_are_refused_by_name_and_without_effect(
    name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    named, payload = evil_calls()[name]
    if isinstance(payload, bytes):
        data = payload
    elif place == "root":
        data = pickle.dumps(payload, protocol=4)
    elif place == "attribute":
        data = pickle.dumps(persistent(module_state(x=[payload])), protocol=4)
    elif place == "submodule":
        data = pickle.dumps(persistent(module_state(_modules={"x": payload})), protocol=4)
    else:
        data = pickle.dumps({("x", payload): persistent(module_state())}, protocol=4)
    path = tmp_path / "evil.pkl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f"asks for {named}")) as caught:
        safe_pickle.load(path)
    assert "evil.pkl" in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["evil.pkl"]


def test_the_payloads_would_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "posix.system", "eval", "exec", "open", "mkdir by INST", "in a tensor"):
        payload = evil_calls()[name][1]
        pickle.loads(payload if isinstance(payload, bytes) else pickle.dumps(payload, protocol=4))
        marker = tmp_path / MARKER
        assert marker.exists(), name
        marker.rmdir() if marker.is_dir() else marker.unlink()


def test_embedded_source_and_regular_expressions_stay_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    broken = Call(re._compile, "(((", 0)  # type: ignore[attr-defined]
    state = {"pattern": re.compile("a(b|c)*"), "broken": broken}
    record = read(persistent(state, module_src=f"open({MARKER!r}, 'w')"))
    assert record.attributes == {"pattern": "a(b|c)*", "broken": "((("}
    assert set(sys.modules) == modules and list(tmp_path.iterdir()) == []


OPCODE_ATTACKS = {
    # Setting attributes of what the list offers would poison every later reading.
    "state of a function": b"cre\n_compile\n}(S'_function'\nNub.",
    "slots of a function": b"cre\n_compile\n(N}(S'_function'\nNutb.",
    "state of a class": b"ccollections\nOrderedDict\n}(S'items'\nNub.",
    "slots of a class": b"ctorch.nn.modules.linear\nIdentity\n(N}(S'stands_for'\nS'x'\nutb.",
    "slots of a dtype class": b"cnumpy\ndtype\n(N}(S'decode'\nNutb.",
    "state of a pattern": b"cre\n_compile\n(S'a'\nI0\ntR}(S'content'\nNub.",
    "persistent id": b"Psomething\n.",
    "extension": b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("name", OPCODE_ATTACKS)
def test_stand_ins_cannot_be_changed(name: str, net_data: bytes):
    with pytest.raises(ValueError):
        read(OPCODE_ATTACKS[name])
    test_record_holds_names_tensors_and_attributes(net_data)


def test_tensor_state_cannot_be_set():
    class Stateful(Call):
        def __reduce__(self) -> Any:
            return self.function, self.args, {"x": 1}

    tensor = torch.zeros(2)
    function, args = tensor.__reduce_ex__(4)
    with pytest.raises(ValueError, match="sets the state of a Tensor"):
        read(persistent({"x": Stateful(function, *args)}))


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (5,), (1,)),
        (3, (2,), (1,)),
        (0, (2, 2), (3, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2**50,), (0,)),
        (0, (2**61, 2**61), (0, 0)),
        (0, ("2",), (1,)),
        (0, (2,), (1, 1)),
    ],
)
def test_tensors_stay_within_their_storage(offset: int, shape: Any, stride: Any):
    storage = torch.zeros(4).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    tensor = Call(_rebuild_tensor_v2, typed, offset, shape, stride, False, OrderedDict())
    with pytest.raises(ValueError, match="pickle"):
        read(persistent({"_buffers": {"x": tensor}}))


@pytest.mark.parametrize(
    "array",
    [np.array([Call(os.getpid)], dtype=object), np.zeros(2, dtype=[("a", "i4"), ("b", object)]), np.datetime64("2020")],
)
def test_numpy_objects_are_refused(array: Any):
    with pytest.raises(ValueError, match=r"NumPy values of type|asks for posix.getpid"):
        read(persistent({"x": array}))


def test_numpy_bytes_must_fit_the_shape():
    reconstruct, args, (version, _, dtype, fortran, data) = np.zeros(4).__reduce__()  # type: ignore[misc]

    class Grown(Call):
        def __reduce__(self) -> Any:
            return reconstruct, args, (version, (1000,), dtype, fortran, data)

    with pytest.raises(ValueError, match="do not fit"):
        read(persistent({"x": Grown(None)}))


# ----------------------------------------------------------------------------
# Damage.


def test_truncation_anywhere_is_an_error_that_names_the_file(net_data: bytes, tmp_path: Path):
    path = tmp_path / "cut.pkl"
    for length in [*range(0, len(net_data), 97), len(net_data) - 1]:
        path.write_bytes(net_data[:length])
        with pytest.raises(ValueError, match="cut.pkl"):
            safe_pickle.load(path)


def test_garbage_is_an_error_that_names_the_file(net_data: bytes, tmp_path: Path):
    path = tmp_path / "garbage.pkl"
    random = np.random.RandomState(0)
    outcomes = set()
    for _ in range(300):
        data = bytearray(net_data)
        for position in random.randint(len(data), size=8):
            data[position] = random.randint(256)
        path.write_bytes(data)
        try:
            outcomes.add(type(safe_pickle.load(path)))
        except ValueError as error:
            assert "garbage.pkl" in str(error)
            outcomes.add(ValueError)
    assert ValueError in outcomes
    path.write_bytes(random.bytes(1000))
    with pytest.raises(ValueError, match="garbage.pkl"):
        safe_pickle.load(path)


# A persistent object in the pickle's own words, before and after its state.
HEAD = (
    b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
    b"(}(S'type'\nS'class'\nS'version'\nI6\nS'module_src'\nS''\nS'class_name'\nS'N'\nS'state'\n"
)
TAIL = b"utR"


def nested_modules(depth: int) -> bytes:
    return b"\x80\x04" + (HEAD + b"}S'_modules'\n}S'x'\n") * depth + b"N" + (b"ss" + TAIL) * depth + b"."


def with_attribute(value: bytes) -> bytes:
    return b"\x80\x04" + HEAD + b"}q\x00S'x'\n" + value + b"s" + TAIL + b"."


DEEP = {
    "modules": (nested_modules(5_000), "RecursionError"),
    "more modules": (nested_modules(30_000), "more than 20000 tuples"),
    "attribute": (with_attribute(b"]" * 100_000 + b"a" * 99_999), "RecursionError"),
    "list": (b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".", "holds a list"),
    "hashed tuples": (b"\x80\x04})" + b"\x85" * 1_000_000 + b"Ns.", "more than 20000 tuples"),
    "large memo": (b"\x80\x02}r\x00\x00\x00\x40.", "numbers an object 1073741824"),
    "itself": (with_attribute(b"h\x00"), "RecursionError"),
    # Each tuple holds the one before it twice: forty steps unfold to 2^40 parts.
    "unfolding": (with_attribute(b")" + b"2\x86" * 40), "unfold to more"),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_structures_end_in_an_error(name: str):
    data, message = DEEP[name]
    with pytest.raises(ValueError, match=message):
        read(data)


def test_nested_modules_are_built_rightly():
    record = read(nested_modules(3))
    assert list(record.children["x"].children["x"].children) == []


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ([1, 2], "holds a list"),
        ({"a": 1}, "without networks, with the keys 'a'"),
        (torch.zeros(2), "expected a network"),
        (persistent({}, version=5), "version 5, expected 6"),
        (Call(persistence._reconstruct_persistent_obj, {"type": "class"}), "lacks its type or its class name"),
        (persistent({"_modules": {"x": 3}}), "sub-module 'x' of Net is not a module"),
        (persistent({"_buffers": {"x": 3}}), "'x' in it is not a tensor"),
    ],
)
def test_other_pickles_are_distinguished(obj: Any, message: str):
    with pytest.raises(ValueError, match=message):
        read(obj)

"""What opening a file takes follows from its bytes: small files that would unfold are refused, quickly."""

import io
import pickle
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.torch_utils.test_safe_pickle import HEAD, TAIL, Call, module_state, persistent, read
from torch_utils import safe_pickle, torch_file
from torch_utils.unpickler import BYTES_PER_BYTE, FREE_BYTES, MAX_NUMERIC_KEYS, Budget, ForeignError

PRIME = (1 << 61) - 1  # Python's hash of a whole number is its remainder


def storage(num_values: int) -> bytes:
    file = io.BytesIO()
    values = torch.zeros(num_values).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=values, dtype=torch.float32, _internal=True)
    torch.save(typed, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def spread(num_values: int) -> torch.Tensor:
    return torch.zeros(1).expand(num_values)


def array_again(count: int) -> Any:
    make, args, state = np.zeros(1 << 14).__reduce__()  # type: ignore[misc]

    class Again:
        def __reduce__(self) -> Any:
            return make, args, state

    return [Again() for _ in range(count)]


def numbers(keys: list[int]) -> bytes:
    parts = [b"\x8a" + bytes([len(data)]) + data + b"N" for key in keys if (data := pickle.encode_long(key))]
    return b"\x80\x04}(" + b"".join(parts) + b"u."


def twice(depth: int) -> bytes:
    """Return a tuple whose parts number 2 ** depth."""
    return b")" + b"2\x86" * depth


def nested_names(num_letters: int, depth: int) -> bytes:
    name = b"X" + num_letters.to_bytes(4, "little") + b"n" * num_letters + b"q\x00"
    start = b"\x80\x04" + name + b"0"
    return start + (HEAD + b"}S'_modules'\n}h\x00") * depth + b"N" + (b"ss" + TAIL) * depth + b"."


def sharing(count: int) -> Any:
    """Objects with the same dict of as many parameters, all None."""
    shared = {f"n{index}": None for index in range(count * 2)}
    parts = {str(index): persistent({"_parameters": shared}) for index in range(count)}
    return persistent({"_modules": parts})


UNFOLDING = {
    "a value as a tensor of 16 MB": (persistent({"_buffers": {"x": spread(4 << 20)}}), "unfold to far more"),
    "many such tensors": (persistent({"_buffers": {f"x{i}": spread(4096) for i in range(400)}}), "unfold to far more"),
    "one storage, read 100 times": (
        [Call(torch.storage._load_from_bytes, data) for data in [storage(50_000)] for _ in range(100)],
        "unfold to far more",
    ),
    "one array, made 100 times": (persistent({"x": array_again(100)}), "unfold to far more"),
    "text as bytes, 100 times": (
        b"\x80\x02X" + (100_000).to_bytes(4, "little") + b"a" * 100_000 + b"q\x000("
        b"c_codecs\nencode\nq\x01" + b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R" * 100 + b"l.",
        "unfold to far more",
    ),
    "type of many bytes": (
        b"\x80\x04cnumpy\nndarray\n)R(K\x01K\x00\x85cnumpy\ndtype\nS'S999999999'\n\x85R\x89C\x00tb.",
        "unfold to far more",
    ),
    "colliding keys": (numbers([i * PRIME for i in range(2, 3_000)]), f"more than {MAX_NUMERIC_KEYS} keys"),
    "colliding keys of 32 bits": (numbers([(i << 18) + 1 for i in range(1, 3_000)]), "keys that are large numbers"),
    "hash of a tuple": (b"\x80\x04}" + twice(18) + b"Ns.", "is a key in it"),
    "hash of a wide tuple": (b"\x80\x04}(" + b"K\x01" * 50 + b"tNs.", "is a key in it"),
    "hash of a tuple in a set": (b"\x80\x04\x8f(" + twice(18) + b"\x90.", "is a key in it"),
    "hash of a tuple in a frozenset": (b"\x80\x04(" + twice(18) + b"\x91.", "is a key in it"),
    "text of a pattern": (
        b"\x80\x04cre\n_compile\n" + twice(18) + b"K\x00\x86R.",
        "regular expression in it is a tuple",
    ),
    "text of a version": (HEAD.replace(b"I6\n", twice(18)) + b"}" + TAIL + b".", r"persistent format version \(\("),
    "text of a source": (HEAD.replace(b"S''\n", twice(18), 1) + b"}" + TAIL + b".", "source text .* is no text"),
    "text of a type": (b"\x80\x04cnumpy\ndtype\n" + twice(18) + b"\x85R.", "NumPy values of type"),
    "product of a shape": (
        b"\x80\x04cnumpy\ndtype\nS'f8'\n\x85R0cnumpy\nndarray\n)R(K\x01U\x01xJ\xff\xff\xff\x7f\x86"
        b"cnumpy\ndtype\nS'f8'\n\x85R\x89C\x00tb.",
        "do not fit its shape",
    ),
    "long names": (nested_names(300, 2), "expected at most 256 letters"),
    "long path": (nested_names(200, 30), "add up to more than"),
    "one dict for many objects": (sharing(1200), "share 2000000 items"),
    "false bytearray": (b"\x80\x05\x96" + (1 << 33).to_bytes(8, "little") + b"x.", "ends before 8589934592 bytes"),
    "false bytes": (b"\x80\x04\x8e" + (1 << 33).to_bytes(8, "little") + b"x.", "ends before 8589934592 bytes"),
    "bytearray by name": (b"\x80\x04cbuiltins\nbytearray\nJ\x00\x00\x00\x01\x85R.", "asks for builtins.bytearray"),
}


@pytest.mark.parametrize("name", UNFOLDING)
def test_small_files_that_unfold_are_refused(name: str, tmp_path: Path):
    content, message = UNFOLDING[name]
    data = content if isinstance(content, bytes) else pickle.dumps(content, protocol=4)
    assert len(data) < 450_000
    (tmp_path / "net.pkl").write_bytes(data)
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
        safe_pickle.load(tmp_path / "net.pkl")
    assert time.process_time() - start < 2


def test_the_budget_is_a_multiple_of_the_file():
    budget = Budget(1000)
    budget.charge(1000 * BYTES_PER_BYTE + FREE_BYTES)
    with pytest.raises(ForeignError, match="far more than its 1000 bytes"):
        budget.charge(1)


def test_repeated_tensors_of_a_network_are_within_it():
    shared = torch.nn.Parameter(torch.randn(1000))
    state = module_state()
    state["_parameters"] = OrderedDict(a=shared, b=shared)
    state["_buffers"] = OrderedDict(c=torch.ones(1).expand(5), d=torch.randn(4, 6).t()[1:, ::2])
    found = read(persistent(state)).state_dict()
    assert torch.equal(found["a"], shared) and found["a"] is found["b"]
    assert torch.equal(found["c"], torch.ones(5)) and torch.equal(found["d"], state["_buffers"]["d"])


# ----------------------------------------------------------------------------
# Older versions of the format.


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_all_versions_of_the_format_give_the_same(protocol: int):
    layer = module_state(
        gain=np.float32(0.5), table=np.arange(6.0).reshape(2, 3), options={"s": {1, 2}, "b": b"\xe9\0"}
    )
    layer["_parameters"] = OrderedDict(weight=torch.nn.Parameter(torch.arange(6.0).view(2, 3).t()))
    layer["_buffers"] = OrderedDict(x=torch.tensor([1.5, float("nan")]), empty=torch.empty(0))
    layer |= {"z": 1 + 2j, "f": frozenset("ab"), "none": b"", "flag": True, "big": 1 << 70}
    root = module_state(_modules=OrderedDict(a=torch.nn.ModuleList([torch.nn.Identity()]), b=persistent(layer, "L")))
    expected = safe_pickle.load(io.BytesIO(pickle.dumps(persistent(root), protocol=4)))
    record = safe_pickle.load(io.BytesIO(pickle.dumps(persistent(root), protocol=protocol)))
    found, wanted = record.children["b"], expected.children["b"]
    assert found.attributes.keys() == wanted.attributes.keys()
    assert np.array_equal(found.attributes.pop("table"), wanted.attributes.pop("table"))
    assert found.attributes == wanted.attributes and found.attributes["options"] == {"s": {1, 2}, "b": b"\xe9\0"}
    assert all(torch.equal(found.tensors[name], wanted.tensors[name]) for name in ("weight", "empty"))
    assert str(record.children["a"]) == str(expected.children["a"])


# ----------------------------------------------------------------------------
# Files of torch.save.


def state(is_zip: bool = True) -> dict[str, Any]:
    base = torch.arange(12.0)
    module = torch.nn.Linear(2, 3)
    return {
        "modules": {"a": module.state_dict(), "p": torch.nn.Parameter(torch.ones(2), requires_grad=False)},
        "views": [base, base[2:6], base.view(3, 4).t(), torch.ones(1).expand(4)],
        "types": [torch.zeros(2, dtype=t) for t in (torch.bfloat16, torch.bool, torch.int64, torch.cfloat)],
        "new type": torch.zeros(2, dtype=torch.uint16 if is_zip else torch.uint8),
        "plain": (None, True, 3, -1.5, 2 + 1j, "text", b"\xff\0", {1, 2}, OrderedDict(x=1), 1 << 80),
        "empty": [torch.empty(0), torch.empty(0, 3), torch.tensor(7)],
        "optimizer": {i: {"step": torch.tensor(float(i))} for i in range(300)},
    }


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.stride() == expected.stride() and torch.equal(found, expected)
        assert found.requires_grad == expected.requires_grad
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert all(assert_equal(found[key], expected[key]) is None for key in expected)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        assert all(assert_equal(a, b) is None for a, b in zip(found, expected, strict=True))
    else:
        assert found == expected


@pytest.mark.parametrize("is_zip", [True, False])
def test_states_are_read_as_torch_reads_them(is_zip: bool, tmp_path: Path):
    torch.save(state(is_zip), tmp_path / "s.pt", _use_new_zipfile_serialization=is_zip)
    found = torch_file.load(tmp_path / "s.pt")
    assert_equal(found, torch.load(tmp_path / "s.pt", weights_only=True))
    assert found["modules"]["a"]._metadata == {"": {"version": 1}}
    found["views"][0][3] = 100
    assert found["views"][1][1] == 100, "views share their values"


def archive(pickled: bytes, **members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as content:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", **members}.items():
            content.writestr(f"archive/{name}", data)
    return file.getvalue()


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


STATES = {
    "bytearray": (archive(b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x01\x85R."), "builtins.bytearray"),
    "colliding keys": (archive(numbers([i * PRIME for i in range(2, 3000)])), "keys that are large numbers"),
    "spread tensor": (saved({"a": spread(4 << 20)}), "unfold to far more"),
    "parts of parts": (archive(b"\x80\x02" + twice(21) + b"."), "unfold"),
    "itself": (archive(b"\x80\x02]q\x00h\x00a."), "levels"),
    "big endian": (archive(b"\x80\x02N.", byteorder=b"big"), "order of bytes"),
    "no data": (archive(b"\x80\x02N.").replace(b"data.pkl", b"data.pkx"), "no data.pkl"),
    "a function": (archive(b"\x80\x02ccollections\nOrderedDict\n."), "holds a Function"),
    "text": (b"not a state", "is damaged"),
    "nothing": (b"", "is damaged"),
    "cut": (saved(state())[:-200], "is damaged"),
}


@pytest.mark.parametrize("name", STATES)
def test_states_that_lie_are_refused(name: str, tmp_path: Path):
    data, message = STATES[name]
    (tmp_path / "s.pt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        torch_file.load(tmp_path / "s.pt")


@pytest.mark.parametrize("is_zip", [True, False])
def test_damage_to_a_state_is_refused_or_harmless(is_zip: bool, tmp_path: Path):
    file = io.BytesIO()
    torch.save(state(is_zip), file, _use_new_zipfile_serialization=is_zip)
    data, random = file.getvalue(), np.random.RandomState(0)
    for trial in range(150):
        copy = bytearray(data)
        for position in random.randint(len(copy) if trial % 2 else 3000, size=4):
            copy[position] = random.randint(256)
        (tmp_path / "s.pt").write_bytes(copy if trial % 3 else copy[: random.randint(len(copy))])
        try:
            torch_file.load(tmp_path / "s.pt")
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 500

"""Read golden files: numbers that published networks gave for made-up weights, and the conventions that they follow.

Files come from the folder in the environment variable LONGTAKE_GOLDEN, else, and where one is missing there, from
tests/golden. Both conventions describe weights by a rule of names, inputs by formulas, and results by digests:

| files | weights | inputs | digest |
|---|---|---|---|
| tats, mebt | `wave_fill`: sines, by the CRC of the name | `wave`: a sin(f i + p) | sum, abssum, w, ends, or all |
| river, teco | `normal_fill`: a generator for each name, sorted | `draws` | sum, abssum, first, or values |
"""

import ast
import fnmatch
import json
import math
import operator
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent / "golden"

# Kinds of entries without a test yet: they belong to systems that are not here.
NOT_TESTED = {
    "tats": "",
    "mebt": "",
    "river": "",
    "teco": "",
}
DESCRIPTIONS = ("_about", "about", "config")


def read(name: str) -> dict[str, Any]:
    """Return the contents of a golden file, such as "tats"."""
    folders = [Path(folder) for folder in [os.environ.get("LONGTAKE_GOLDEN")] if folder]
    paths = [folder / f"{name}.json" for folder in [*folders, FOLDER]]
    return json.loads(next(path for path in paths if path.is_file()).read_text())


def search(pattern: str, text: str) -> re.Match[str]:
    """Return the first match of a pattern in the description of an entry; fail if there is none."""
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in {text!r}"
    return found


def entries(name: str, *kinds: str) -> Any:
    """Parametrise a test over the entries of a file whose names match any of `kinds`; it gets `entry` and `golden`.

    `golden` is the whole file.
    """
    golden = read(name)
    found = [key for key in golden if any(fnmatch.fnmatchcase(key, kind) for kind in kinds)]
    return _parametrise([(key, golden[key], golden) for key in found])


def cases(name: str, *kinds: str) -> Any:
    """Parametrise a test over the cases of such entries, where an entry is a dict of cases."""
    golden = read(name)
    keys = [key for key in golden if any(fnmatch.fnmatchcase(key, kind) for kind in kinds)]
    return _parametrise([(f"{key}-{case}", golden[key][case], golden) for key in keys for case in golden[key]])


def _parametrise(found: list[tuple[str, Any, Any]]) -> Any:
    # An empty list of parameters would be reported as a skipped test: an absent entry makes no test.
    if not found:
        return lambda test: None
    return pytest.mark.parametrize(("entry", "golden"), [pytest.param(e, g, id=f"golden-{key}") for key, e, g in found])


def unknown_entries(name: str, tested: Iterable[str]) -> list[str]:
    """Return the entries of a file that are of none of the kinds `tested`, and not listed as not tested."""
    kinds = [*tested, *NOT_TESTED[name].split(), *DESCRIPTIONS]
    return [key for key in read(name) if not any(fnmatch.fnmatchcase(key, kind) for kind in kinds)]


# ----------------------------------------------------------------------------
# Weights.


def salt_of(golden: Mapping[str, Any]) -> int:
    """Return the number that distinguishes the weights of one set of golden numbers from those of others."""
    return int(golden["_about"].get("salt", 0))


def wave_fill(state: Mapping[str, torch.Tensor], salt: int = 0) -> dict[str, torch.Tensor]:
    """Return the weights of TATS and MeBT for a state of published names; integer entries keep their values."""
    return {name: wave_values(name, value, salt) for name, value in state.items()}


def wave_values(name: str, value: torch.Tensor, salt: int = 0) -> torch.Tensor:
    """Return the weights of one name."""
    if not value.is_floating_point() or name.endswith("attn.mask") or ".scaling_layer." in name:
        return value
    i = np.arange(value.numel(), dtype=np.float64)
    # The sums of a codebook have the same values as its vectors.
    k = (zlib.crc32(name.replace("codebook.z_avg", "codebook.embeddings").encode()) + salt) % 997
    h = np.sin(12.9898 * (i + 1) + 78.233 * (k + 1)) * 43758.5453
    b = 2 * (h - np.floor(h)) - 1
    if name.endswith("running_var"):
        b = 1 + 0.5 * b
    elif name.endswith("running_mean"):
        b = 0.1 * b
    elif name.endswith("codebook.N"):
        b = np.ones_like(b)
    elif name.endswith(("codebook.embeddings", "codebook.z_avg")):
        b = 1.5 * b
    elif name.startswith("perceptual_model.lin"):
        b = np.abs(b) * math.sqrt(4 / (value.numel() / value.shape[0]))
    elif value.ndim == 1:
        b = 1 + 0.1 * b if name.endswith("weight") else 0.1 * b
    elif "emb" in name:
        b = 0.5 * b
    else:
        b = b * math.sqrt(4 / (value.numel() / value.shape[0]))
    return torch.from_numpy(b.astype(np.float32)).view(value.shape)


def normal_fill(
    shapes: Mapping[str, tuple[int, ...]], base: int, scale: Callable[[str, np.ndarray], np.ndarray]
) -> dict[str, np.ndarray]:
    """Return arrays by name: the k-th of the sorted names is RandomState(base + k)'s normals, scaled by its kind."""
    found = {}
    for k, name in enumerate(sorted(shapes)):
        n = np.random.RandomState(base + k).standard_normal(shapes[name]).astype(np.float32)
        found[name] = scale(name, n).astype(np.float32)
    return found


def river_scale(name: str, n: np.ndarray) -> np.ndarray:
    """Return RIVER's weights of a name from normal numbers."""
    last = name.rpartition(".")[2]
    if last == "num_batches_tracked":
        return np.zeros_like(n)
    if last == "running_var":
        return 1 + 0.2 * np.abs(n)
    if n.ndim >= 2:
        return n / np.float32(math.sqrt(math.prod(n.shape[1:])))
    return 1 + 0.1 * n if last == "weight" else 0.1 * n


def teco_scale(name: str, n: np.ndarray) -> np.ndarray:
    """Return TECO's weights of a flax path from normal numbers."""
    if n.ndim == 1:
        return 1 + 0.1 * n if name.endswith("/scale") else 0.1 * n
    fan = {2: n.shape[0], 3: max(n.shape)}.get(n.ndim, math.prod(n.shape[:-1]))
    return n / np.float32(math.sqrt(fan))


def fill_river(network: torch.nn.Module, base: int) -> None:
    """Load RIVER's weights into a network whose state has the published names."""
    state = network.state_dict()
    arrays = normal_fill({name: tuple(value.shape) for name, value in state.items()}, base, river_scale)
    network.load_state_dict({name: torch.from_numpy(array).to(state[name].dtype) for name, array in arrays.items()})


# ----------------------------------------------------------------------------
# Inputs.

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def _value(node: ast.AST, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_value(item, names) for item in node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, names)
    assert isinstance(node, ast.BinOp), ast.dump(node)
    return _OPERATORS[type(node.op)](_value(node.left, names), _value(node.right, names))


def number(text: str, **names: Any) -> Any:
    """Evaluate arithmetic of numbers, names, tuples and lists, such as "700 + 10*rank + step" or "0.05+0.003n"."""
    return _value(ast.parse(re.sub(r"(\d)([a-z])", r"\1*\2", text.strip()), mode="eval").body, names)


def wave(shape: Iterable[int], f: float, p: float = 0.0, a: float = 0.5) -> torch.Tensor:
    """Return a sin(f i + p) over the flat index i, computed in float64: float32 of `shape`."""
    shape = tuple(shape)
    i = np.arange(math.prod(shape), dtype=np.float64)
    return torch.from_numpy((a * np.sin(f * i + p)).astype(np.float32)).view(shape)


def wave_of(text: str, shape: Iterable[int], **names: Any) -> torch.Tensor:
    """Return the wave of a formula such as "0.5 sin((0.05+0.003n) i + 0.1n)", the first in the text."""
    match = re.search(r"([\d.]+) sin\((.+?) i(?: \+ ([^)]+))?\)", text)
    assert match is not None, text
    return wave(shape, number(match[2], **names), number(match[3] or "0", **names), number(match[1]))


def _closing(text: str, start: int) -> int:
    """Return the position of the bracket that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise AssertionError(text)


def draws(text: str, seed: int = 0, **names: Any) -> list[np.ndarray]:
    """Return the arrays of all terms such as "0.5*RS(7).standard_normal((2,3))" in a text, float64 or int64.

    RS(i) is RandomState(seed + i).
    """
    found = []
    for match in re.finditer(r"(?:([\d.]+)\*)?(RS|RandomState)\(", text):
        end = _closing(text, match.end() - 1)
        method = re.match(r"\.(\w+)\(", text[end + 1 :])
        if method is None:
            continue
        rng = generator(text[match.start(2) :], seed, **names)
        start = end + 1 + method.end()
        call = ast.parse(f"f({text[start : _closing(text, start - 1)]})", mode="eval").body
        assert isinstance(call, ast.Call)
        arguments = [_value(item, names) for item in call.args]
        keywords = {str(item.arg): _value(item.value, names) for item in call.keywords}
        values = getattr(rng, method[1])(*arguments, **keywords)
        found.append(float(match[1]) * values if match[1] else values)
    return found


def normals(text: str, seed: int = 0, **names: Any) -> list[torch.Tensor]:
    """Return the arrays of `draws` as float32 tensors."""
    return [torch.from_numpy(np.asarray(values, np.float32)) for values in draws(text, seed, **names)]


def generator(text: str, seed: int = 0, **names: Any) -> np.random.RandomState:
    """Return the first generator in a text, such as "RandomState(11+step), draws in the listed order"."""
    match = re.search(r"(RS|RandomState)\(", text)
    assert match is not None, text
    own = number(text[match.end() : _closing(text, match.end() - 1)], **names)
    return np.random.RandomState(own + (seed if match[1] == "RS" else 0))


# ----------------------------------------------------------------------------
# Results.


def check(found: Any, expected: Any, tolerance: float = 1e-4, single: float | None = None, where: str = "") -> None:
    """Assert that a tensor or number agrees with its digest.

    `tolerance` is relative for sums, to the sum of absolute values, and for single numbers absolute or relative;
    `single` is an absolute tolerance for single numbers instead.
    """
    x = np.asarray(found.detach().cpu() if isinstance(found, torch.Tensor) else found)
    flat = x.astype(np.float64).ravel()
    if not isinstance(expected, dict):
        wanted = np.asarray(expected, np.float64).ravel()
        return _close(flat, wanted, tolerance, single, where)
    if "shape" in expected:
        assert list(x.shape) == expected["shape"], f"{where}: shape {x.shape}"
    if "abssum" in expected:
        total = max(expected["abssum"], 1e-12)
        sums = {
            "sum": flat.sum(),
            "abssum": np.abs(flat).sum(),
            "w": (flat * np.cos(0.37 * np.arange(flat.size))).sum(),
        }
        for name in sums.keys() & expected.keys():
            error = abs(sums[name] - expected[name])
            assert error <= tolerance * total, f"{where}: {name} is {sums[name]}, expected {expected[name]}"
    for name in ("all", "values"):
        if name in expected:
            _close(flat, np.asarray(expected[name], np.float64).ravel(), tolerance, single, f"{where} {name}")
    if "first" in expected:
        wanted = np.asarray(expected["first"], np.float64)
        _close(flat[: wanted.size], wanted, tolerance, single, f"{where} first")
    if "last" in expected:
        wanted = np.asarray(expected["last"], np.float64)
        _close(flat[flat.size - wanted.size :], wanted, tolerance, single, f"{where} last")


def _close(found: np.ndarray, wanted: np.ndarray, tolerance: float, single: float | None, where: str) -> None:
    assert found.shape == wanted.shape, f"{where}: {found.shape} values, expected {wanted.shape}"
    allowed = np.maximum(1, np.abs(wanted)) * tolerance if single is None else np.full(wanted.shape, single)
    worst = np.abs(found - wanted) - allowed
    assert (worst <= 0).all(), f"{where}: {found[worst.argmax()]}, expected {wanted[worst.argmax()]}"

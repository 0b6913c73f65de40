"""The inspector and the loader say the same of every file: both accept a dataset, or both refuse it in one sentence."""

import io
import json
import shutil
import struct
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from dataset_tools import archive, inspect_dataset
from dataset_tools.frames import encode_at_sizes
from training.data.dataset import ClipDataset
from training.data.streams import stored_streams

SIZE = (16, 16)
SHARD = "0016x0016/partition_0000.zip"
FRAME = "a/frame_000001.jpg"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good") / "data"
    with archive.ShardWriter(root, [SIZE], 0) as writer:
        for name in ("a", "b/c"):
            with writer.clip(name, actions=["none", "left", "left"]) as clip:
                for seed in range(3):
                    noise = np.random.RandomState(seed + len(name)).randint(0, 256, (*SIZE, 3), np.uint8)
                    clip(encode_at_sizes(noise, [SIZE]))
    archive.describe_dataset(root, [writer.report({24: 2})], 1, ("pillow",), source="x")
    return root


def load(root):
    """Read all that training could, and return the error if it refuses."""
    try:
        labels = ["label"] if (root / "labels.json").exists() else []
        streams = [name for path in root.glob("*/*.zip") for name in stored_streams(path)]
        dataset = ClipDataset(root, [SIZE], streams=[*dict.fromkeys(streams), *labels])
        dataset.eligible(2)
        for number, clip in enumerate(dataset.clips):
            dataset.read(number, SIZE, range(clip.num_frames))
    except ValueError as error:
        return str(error)
    return None


def inspect(root):
    arguments = [str(root), "--num-frames", "2", "--workers", "1"]
    return CliRunner().invoke(inspect_dataset.main, arguments, catch_exceptions=False)


# What is done to a dataset: text of a file in it, or a change of the members of its zip.


def described(**changes):
    def write(root):
        content = json.loads((root / "dataset.json").read_text())
        (root / "dataset.json").write_text(json.dumps({**content, **changes}))

    return write


def written(name, content):
    data = content if isinstance(content, bytes) else content.encode()
    return lambda root: (root / name).write_bytes(data)


def zipped(change, compression=zipfile.ZIP_STORED):
    def write(root):
        with zipfile.ZipFile(root / SHARD) as old:
            content = {name: old.read(name) for name in old.namelist()}
        change(content)
        with zipfile.ZipFile(root / SHARD, "w", compression) as new:
            for name, data in content.items():
                new.writestr(name, data)
        (root / "dataset.json").unlink()  # whose hashes are another matter
        (root / "manifest.json").unlink()

    return write


def member(name, data, compression=zipfile.ZIP_STORED):
    return zipped(lambda content: content.update({name: data}), compression)


def jpeg(mode="RGB", size=SIZE, header=None):
    buffer = io.BytesIO()
    Image.new(mode, size[::-1], 99).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    if header is not None:
        place = data.find(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", *header)
    return bytes(data)


def frame_paths(value):
    return member("frame_paths.json", json.dumps(value).encode())


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
DEEP = "[" * 100_000

REFUSED = {
    **{f"fps {fps}": described(fps=fps) for fps in (0, -3, 1e9, float("inf"), float("nan"), "30", [30], True, None)},
    "no fps": written("dataset.json", "{}"),
    **{
        f"description {text[:8]!r}": written("dataset.json", text)
        for text in ("", "[]", "null", "3", '"x"', "\0" * 50, '{"fps": ', '{"fps": 24, "a": "\\ud800"}', DEEP)
    },
    "description in latin-1": written("dataset.json", b'{"fps": 24, "source": "\xe9"}'),
    "description by git-lfs": written("dataset.json", LFS),
    "description with a long number": written("dataset.json", '{"fps": ' + "9" * 5000 + "}"),
    "many partitions": described(num_partitions=10**15),
    "no partitions": described(num_partitions=0),
    "hashes in a list": described(hashes=["0016x0016/partition_0000.zip"]),
    "hashes outside": described(hashes={"../../x": "0" * 64}),
    "partitions of nothing": described(partitions={"0000": None}),
    "versions as text": described(versions="1"),
    "actions that repeat": described(actions=["none", "none"]),
    "actions without left": described(actions=["none", "right"]),
    "shard by git-lfs": written(SHARD, LFS),
    "shard empty": written(SHARD, b""),
    "shard cut": lambda root: (root / SHARD).write_bytes((root / SHARD).read_bytes()[:-100]),
    "shard without its beginning": lambda root: (root / SHARD).write_bytes((root / SHARD).read_bytes()[100:]),
    "paths missing": zipped(lambda content: content.pop("frame_paths.json")),
    **{
        f"paths {value!r}": frame_paths(value)
        for value in ([], None, {"a": None}, {"a": "x"}, {"a": [1]}, {"a": {}}, {})
    },
    "paths deep": member("frame_paths.json", DEEP.encode()),
    "paths that inflate": member("frame_paths.json", b'{"a": []' + b" " * (3 << 20) + b"}", zipfile.ZIP_DEFLATED),
    "frame missing": zipped(lambda content: content.pop(FRAME)),
    "frame empty": member(FRAME, b""),
    "frame of text": member(FRAME, b"<html>"),
    "frame of another size": member(FRAME, jpeg(size=(16, 24))),
    "frame grey": member(FRAME, jpeg("L")),
    "frame with a large header": member(FRAME, jpeg(header=(65500, 65500))),
    "first frame with a large header": member("a/frame_000000.jpg", jpeg(header=(65500, 65500))),
    "frame that inflates": member(FRAME, jpeg() + bytes(3 << 20), zipfile.ZIP_DEFLATED),
    "actions of text": member("actions.json", b'{"a": "non", "b/c": "non"}'),
    "actions in a list": member("actions.json", b"[]"),
    "actions too few": member("actions.json", b'{"a": [0, 1], "b/c": [0, 1, 1]}'),
    "actions of NaN": member("actions.json", b'{"a": [0, 1.5, NaN], "b/c": [0, 1, 1]}'),
    "actions mixed": member("actions.json", b'{"a": [0, "left", [1]], "b/c": [0, 1, 1]}'),
    "actions cut": member("actions.json", b'{"a": [0, '),
    "a command to mend it": described(source="\x1b[31mred", fps=0),
    "labels in a list": written("labels.json", "[]"),
    "labels missing": written("labels.json", '{"a": 1}'),
    "labels of lists": written("labels.json", '{"a": [1], "b": [2]}'),
    "labels deep": written("labels.json", DEEP),
}

ACCEPTED = {
    "nothing": lambda root: None,
    "other facts": described(more={"a": [None, 1e300]}, source="\x1b[31mred"),
    "byte order mark": lambda root: (root / "dataset.json").write_text(
        (root / "dataset.json").read_text(), "utf-8-sig"
    ),
    "manifest damaged": written("manifest.json", "\0" * 20),
    "manifest in a list": written("manifest.json", "[]"),
    "compressed": zipped(lambda content: None, zipfile.ZIP_DEFLATED),
    "index of nothing": written("0016x0016/partition_0000.index.npz", b"\0" * 50),
    "labels": written("labels.json", '{"a": "walk", "b": "ride"}'),
}


@pytest.mark.parametrize("name", [*REFUSED, *ACCEPTED])
def test_inspector_and_loader_agree(name, good, tmp_path):
    root = shutil.copytree(good, tmp_path / "data")
    {**REFUSED, **ACCEPTED}[name](root)
    refusal, result = load(root), inspect(root)
    assert (refusal is not None) == (name in REFUSED), refusal
    assert (result.exit_code != 0) == (name in REFUSED), result.output
    for text in (refusal or "", result.output):
        assert text.isprintable() or "\n" in text
        assert "\x1b[31mred" not in text and "\0" not in text and "Traceback" not in text
    assert refusal is None or ("\n" not in refusal and len(refusal) < 900)

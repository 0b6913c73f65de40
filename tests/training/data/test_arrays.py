"""Arrays and members of zips take memory for bytes that are there; index files that lie are made again."""

import io
import struct
import zipfile

import numpy as np
import pytest

from dnnlib import zips
from tests.training.data.clips import write_dataset
from training.data import arrays
from training.data.dataset import ClipDataset
from training.data.shards import FrameStore


def header(shape, descr="|u1"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3), np.array("text"), np.zeros((0, 3)), np.arange(4).T])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_those_of_numpy(array, save, tmp_path):
    save(tmp_path / "a.npz", x=array, y=np.asfortranarray(np.arange(6).reshape(2, 3)))
    np.save(tmp_path / "a.npy", array)
    with arrays.open_npz(tmp_path / "a.npz") as found:
        assert list(found) == ["x", "y"] and np.array_equal(found["y"](), np.arange(6).reshape(2, 3))
        for read in (found["x"](), arrays.load_npy(tmp_path / "a.npy")):
            assert read.dtype == array.dtype and read.shape == array.shape and np.array_equal(read, array)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header((1000, 1000, 1000, 3)), "its header gives uint8"),
        (header((1 << 62, 1 << 62)), "its header gives uint8"),
        (header((2,), "|O") + b"\x80\x04N.", "expected numbers or text"),
        (header((-1,)) + b"ab", "expected numbers or text"),
        (header((3,)) + b"ab", "ends within its values|its header gives"),
        (b"\x93NUMPY\x03\x00" + bytes(10), "version"),
        (b"no array", "magic string"),
    ],
)
def test_headers_that_lie_are_refused(data, message, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("videos.npy", data)
    with pytest.raises(ValueError, match=f"a.npz cannot be read as an npz file of videos: .*{message}"):
        arrays.load_array(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="a.npz cannot be read"):
        list(arrays.iter_array(tmp_path / "a.npz"))


def test_arrays_that_inflate_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "MIN_LIMIT", 1 << 20)
    np.savez_compressed(tmp_path / "a.npz", videos=np.zeros((1, 8, 512, 512, 3), np.uint8))
    with pytest.raises(ValueError, match=r"videos.npy unpacks to 6291584 bytes, expected at most 1048576: .*np.savez"):
        arrays.load_array(tmp_path / "a.npz")


@pytest.mark.parametrize("size_said", [None, 10])
def test_members_that_inflate_are_refused(size_said, tmp_path):
    """Also those whose directory gives a smaller size than they have."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.json", b" " * (8 << 20))
    data = bytearray(path.read_bytes())
    if size_said is not None:
        place = data.find(b"PK\x01\x02") + 24
        data[place : place + 4] = struct.pack("<I", size_said)
        path.write_bytes(data)
    with zipfile.ZipFile(path) as archive, pytest.raises(zips.FAULTS, match="unpacks to 8388608 bytes|Bad CRC"):
        zips.read_member(archive, "a.json")


def lie(name, value):
    return lambda content: content.update({name: value})


LIES = {
    "members beyond the zip": lambda content: content["members"].__setitem__((0, 1), 1 << 60),
    "members before it": lambda content: content["members"].__setitem__((0, 0), -5),
    "too few members": lambda content: content.update(members=content["members"][:-1]),
    "members of another type": lambda content: content.update(members=content["members"].astype(np.float64)),
    "negative lengths": lambda content: content["num_frames"].__setitem__(0, -1),
    "clips of another kind": lie("clips", np.frombuffer(b"[1, 2]", np.uint8)),
    "clips that are no JSON": lie("clips", np.frombuffer(b"[" * 9999, np.uint8)),
    "digests of another shape": lie("digests", np.zeros((1, 3), np.uint8)),
}


@pytest.mark.parametrize("name", [*LIES, "compressed"])
def test_index_files_that_lie_are_made_again(name, tmp_path):
    root = write_dataset(tmp_path, [(8, 16)])
    expected = ClipDataset(root, [(8, 16)])
    (path,) = list(root.glob("0008x0016/*.index.npz"))[:1]
    with np.load(path) as stored:
        content = {key: stored[key].copy() for key in stored.files}
    LIES.get(name, lambda content: None)(content)
    (np.savez_compressed if name == "compressed" else np.savez)(path, **content)
    found = ClipDataset(root, [(8, 16)])
    assert found.clips == expected.clips and np.array_equal(found.read(0, (8, 16), [0]), expected.read(0, (8, 16), [0]))
    store = expected.store((8, 16))
    assert isinstance(store, FrameStore)
    with np.load(path) as stored:
        assert np.array_equal(stored["members"], store.members[: len(stored["members"])])

"""Shards return the frames of a plain zip reader, for any gaps between them, and report damage."""

import concurrent.futures
import io
import itertools
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training.data import shards
from training.data.shards import FrameStore, decode_rgb, open_index

SIZE = (8, 16)


def encode(pixels, kind="JPEG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **({"quality": 100, "subsampling": 0} | options))
    return buffer.getvalue()


def noise(seed, size=SIZE, channels=3):
    return np.random.RandomState(seed).randint(0, 256, (*size, channels)).astype(np.uint8).squeeze()


def write(path, clips, compressed=()):
    """Write a shard of {clip: [(frame name, file)]}; `compressed` numbers the members to deflate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = itertools.count()
    with zipfile.ZipFile(path, "w") as archive:
        for clip, frames in clips.items():
            for name, data in frames:
                method = zipfile.ZIP_DEFLATED if next(count) in compressed else zipfile.ZIP_STORED
                archive.writestr(f"{clip}/{name}", data, method)
        names = {clip: [name for name, _ in frames] for clip, frames in clips.items()}
        archive.writestr("frame_paths.json", json.dumps(names))
    return path


def frames_of(num_frames, seed=0):
    return [(f"{frame}.jpg", encode(noise(100 * seed + frame))) for frame in range(num_frames)]


def read(root, clip, frames, size=SIZE):
    out = np.empty((len(frames), *size, 3), np.uint8)
    FrameStore(root, size, None).read(clip, frames, out)
    return out


@pytest.fixture
def shard(tmp_path):
    """Return a shard of two clips, of which the tests may damage what they like; its root is two folders up."""
    return write(tmp_path / "0008x0016" / "s.zip", {"a": frames_of(3), "b/c": frames_of(4, seed=1)})


# ----------------------------------------------------------------------------
# Frames.


@pytest.fixture(scope="module")
def odd_shard(tmp_path_factory):
    """Members stored and deflated in turns, with other members of all lengths and long heads between them."""
    root = tmp_path_factory.mktemp("odd")
    path = root / "0008x0016" / "s.zip"
    path.parent.mkdir()
    pixels, names = [], []
    with zipfile.ZipFile(path, "w") as archive:
        for frame in range(24):
            names.append(f"{'n' * (400 * (frame % 3))}{frame}.jpg")
            data = encode(noise(frame))
            pixels.append(np.asarray(Image.open(io.BytesIO(data))))
            # A zip64 entry carries an extra field in its local head alone.
            info = zipfile.ZipInfo(f"a/{names[-1]}")
            info.compress_type = zipfile.ZIP_DEFLATED if frame % 5 == 4 else zipfile.ZIP_STORED
            with archive.open(info, "w", force_zip64=frame % 2 == 1) as file:
                file.write(data)
            archive.writestr(f"other/{frame}", bytes(3000 * (frame % 8)))
        archive.writestr("frame_paths.json", json.dumps({"a": names}))
    return root, np.stack(pixels)


@pytest.mark.parametrize("read_bytes", [1, 5000, 8 << 20])
def test_any_frames_in_any_order_are_those_of_a_plain_reader(odd_shard, read_bytes, monkeypatch):
    monkeypatch.setattr(shards, "_READ_BYTES", read_bytes)
    root, pixels = odd_shard
    store = FrameStore(root, SIZE, None)

    @settings(max_examples=60)
    @given(st.lists(st.integers(0, 23), min_size=1, max_size=30))
    def check(frames):
        out = np.empty((len(frames), *SIZE, 3), np.uint8)
        store.read(0, frames, out)
        assert np.array_equal(out, pixels[frames])

    check()
    every_third = np.empty((8, *SIZE, 3), np.uint8)
    store.read(0, range(0, 24, 3), every_third)
    assert np.array_equal(every_third, pixels[::3])


@pytest.mark.parametrize("size", [(8, 16), (9, 17), (36, 64)])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"keep_rgb": True}, {"progressive": True}])
def test_both_decoders_give_the_same_pixels(size, options, monkeypatch):
    pytest.importorskip("simplejpeg")
    data = encode(noise(0, size), **options)
    fast, plain = np.empty((2, *size, 3), np.uint8)
    decode_rgb(data, fast)
    monkeypatch.setattr(shards, "fast_decoder", lambda: None)
    decode_rgb(memoryview(data), plain)
    assert np.array_equal(fast, plain) and np.array_equal(fast, np.asarray(Image.open(io.BytesIO(data))))


def with_sampling(data, factors):
    """Return a JPEG whose components, coded alike, are declared as luma and chroma of other sampling factors."""
    data, place = bytearray(data), 2
    while data[place + 1] != 0xDA:
        if data[place + 1] == 0xC0:
            for component, factor in enumerate(factors):
                data[place + 10 + 3 * component : place + 12 + 3 * component] = component + 1, factor
        if data[place + 1] == 0xEE:
            data[place + 15] = 1  # YCbCr
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    for component in range(3):
        data[place + 5 + 2 * component] = component + 1
    return bytes(data)


@pytest.mark.parametrize(
    "factors", ["11 22 11", "11 11 21", "21 21 11", "22 21 21", "22 11 21", "14 11 11", "31 11 11"]
)
def test_unusual_chroma_sampling_is_read_as_by_pillow(factors):
    """The fast decoder knows none of these, or finds that there are more blocks than it needs."""
    data = with_sampling(encode(noise(0, (48, 64)), keep_rgb=True), [int(factor, 16) for factor in factors.split()])
    with Image.open(io.BytesIO(data)) as image:
        assert image.info["adobe_transform"] == 1
        expected = np.asarray(image)
    found = np.zeros((48, 64, 3), np.uint8)
    decode_rgb(data, found)
    np.testing.assert_array_equal(found, expected)


def test_a_store_is_shared_by_threads_and_by_a_forked_process(shard):
    root = shard.parent.parent
    store = FrameStore(root, SIZE, None)
    expected = [read(root, clip, range(length)) for clip, length in ((0, 3), (1, 4))]

    def right(job):
        clip, frame = job
        out = np.empty((1, *SIZE, 3), np.uint8)
        store.read(clip, [frame], out)
        return np.array_equal(out[0], expected[clip][frame])

    jobs = [(job % 2, job % 3) for job in range(300)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, jobs))
    child = os.fork()
    if child == 0:
        os._exit(0 if all(map(right, jobs)) else 1)
    assert all(map(right, jobs))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    store = pickle.loads(pickle.dumps(store))
    assert all(map(right, jobs))


# ----------------------------------------------------------------------------
# The kept index.


def test_the_index_beside_the_zip_is_what_is_used(shard):
    root = shard.parent.parent
    first, second = read(root, 0, [0, 1])
    path = shard.with_name("s.index.npz")
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["members"][[0, 1]] = arrays["members"][[1, 0]]
    np.savez(path, **arrays)
    assert np.array_equal(read(root, 0, [0, 1]), np.stack([second, first]))
    # A zip written anew makes it stale, also if it has as many bytes as before.
    status = shard.stat()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert np.array_equal(read(root, 0, [0, 1]), np.stack([first, second]))
    assert [entry.name for entry in shard.parent.iterdir() if entry.name != "s.zip"] == ["s.index.npz"]


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "foreign", "of another version"])
def test_a_damaged_index_is_built_again_in_silence(shard, damage, capsys):
    root, path = shard.parent.parent, shard.with_name("s.index.npz")
    expected = read(root, 1, range(4))
    whole = path.read_bytes()
    if damage == "of another version":
        with np.load(path) as stored:
            arrays = dict(stored)
        np.savez(path, **arrays | {"key": arrays["key"] + [1, 0, 0, 0, 0], "members": arrays["members"] * 0})
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
        path.write_bytes({"empty": b"", "half": whole[:middle], "flipped": flipped, "foreign": b"PK not a zip"}[damage])
    assert np.array_equal(read(root, 1, range(4)), expected)
    assert path.read_bytes() == whole
    assert capsys.readouterr() == ("", "")


def test_a_folder_that_takes_no_index_is_read_all_the_same(shard, capsys):
    shard.with_name("s.index.npz").mkdir()  # nothing can be renamed onto a folder, not even by root
    assert read(shard.parent.parent, 1, range(4)).shape == (4, *SIZE, 3)
    assert sorted(path.name for path in shard.parent.iterdir()) == ["s.index.npz", "s.zip"]
    assert capsys.readouterr() == ("", "")


def test_many_may_build_the_index_at_once(shard):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: open_index(shard, SIZE, shard.parent.parent), range(16)))
    assert all(index.clips == ["a", "b/c"] and np.array_equal(index.members, found[0].members) for index in found)
    assert sorted(path.name for path in shard.parent.iterdir()) == ["s.index.npz", "s.zip"]


# ----------------------------------------------------------------------------
# Refusals.


FOREIGN = {
    "grey": (encode(noise(0, channels=1)), "its colour mode is L"),
    "with alpha": (encode(noise(0, channels=4), "PNG"), "its colour mode is RGBA"),
    "for print": (encode(Image.fromarray(noise(0)).convert("CMYK")), "its colour mode is CMYK"),
    "too wide": (encode(noise(0, (8, 18))), "its size is 8x18"),
    "turned": (encode(noise(0, (16, 8))), "its size is 16x8"),
    "not an image": (b"nothing", "it is no image file"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("fast", [False, True])
def test_foreign_frames_are_refused_by_name(tmp_path, kind, fast, monkeypatch):
    if not fast:
        monkeypatch.setattr(shards, "fast_decoder", lambda: None)
    data, reason = FOREIGN[kind]
    good = encode(noise(0))
    write(tmp_path / "0008x0016" / "s.zip", {"a": [("0.jpg", good)], "b": [("0.jpg", good), ("bad.jpg", data)]})
    assert read(tmp_path, 1, [0]).shape == (1, *SIZE, 3)
    message = rf"frame bad.jpg of clip b in .*s.zip is not an RGB image of 8x16 .*{reason}"
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, 1, [0, 1])
    assert f"python -m dataset_tools.inspect_dataset {tmp_path}" in str(error.value)
    assert "\n" not in str(error.value)
    # At the head of a clip it is found before training starts.
    write(tmp_path / "0008x0016" / "s.zip", {"a": [("0.jpg", good)], "b": [("bad.jpg", data), ("0.jpg", good)]})
    with pytest.raises(ValueError, match=message):
        FrameStore(tmp_path, SIZE, None)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("compressed", [(), (1,)])
def test_damaged_frames_are_refused_by_name(shard, fast, compressed, monkeypatch):
    if not fast:
        monkeypatch.setattr(shards, "fast_decoder", lambda: None)
    root = shard.parent.parent
    write(shard, {"a": frames_of(3)}, compressed)
    offset, num_bytes = open_index(shard, SIZE, root).members[1, :2].tolist()
    status = shard.stat()
    with open(shard, "r+b") as file:  # as a failing disk does: nothing else of the file changes
        file.seek(offset + num_bytes - 20)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert read(root, 0, [0, 2]).shape == (2, *SIZE, 3)
    with pytest.raises(ValueError, match=r"frame 1.jpg of clip a in .*s.zip is not an RGB image"):
        read(root, 0, range(3))


def test_broken_shards_are_refused_by_name(shard):
    root = shard.parent.parent
    FrameStore(root, SIZE, None)
    whole = shard.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:-1], b"", whole[1000:]):
        shard.write_bytes(broken)
        with pytest.raises(ValueError, match=r"s.zip is not a whole dataset shard .*copy it again"):
            FrameStore(root, SIZE, None)
    with zipfile.ZipFile(shard, "w") as archive:
        archive.writestr("frame_paths.json", '{"a": ["x.jpg"]}')
    with pytest.raises(ValueError, match=r"s.zip lists a/x.jpg but does not contain it"):
        FrameStore(root, SIZE, None)
    with zipfile.ZipFile(shard, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a/x.jpg", bytes(100))
        archive.writestr("frame_paths.json", '{"a": ["x.jpg"]}')
    with pytest.raises(ValueError, match=r"compresses a/x.jpg in a way that is not read"):
        FrameStore(root, SIZE, None)


def test_no_damage_to_a_byte_goes_unseen(tmp_path):
    shard = write(tmp_path / "0008x0016" / "s.zip", {"a": frames_of(3), "b/c": frames_of(2, seed=1)}, compressed=(1, 4))
    expected = {"a": read(tmp_path, 0, range(3)), "b/c": read(tmp_path, 1, range(2))}
    index = shard.with_name("s.index.npz")
    whole = {path: path.read_bytes() for path in (shard, index)}

    @settings(max_examples=100)
    @given(st.sampled_from([shard, index]), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
    def check(path, place, flips):
        data = bytearray(whole[path])
        data[int(place * len(data))] ^= flips
        path.write_bytes(data)
        try:
            store = FrameStore(tmp_path, SIZE, None)
            for clip, pixels in expected.items():
                out = np.empty_like(pixels)
                store.read(store.index[clip], range(len(out)), out)
                assert np.array_equal(out, pixels)
        except ValueError as error:
            assert path == shard and str(shard) in str(error), "a damaged index mends itself"
        path.write_bytes(whole[path])

    check()


def test_shards_must_be_those_that_are_listed(tmp_path):
    for name in ("p0", "p1"):
        write(tmp_path / "0008x0016" / f"{name}.zip", {name: frames_of(1)})
    listed = ["0008x0016/p0.zip", "0008x0016/p1.zip", "0016x0032/p0.zip"]
    assert len(FrameStore(tmp_path, SIZE, listed).clips) == 2
    merge = f"python -m dataset_tools.merge {tmp_path}"
    with pytest.raises(ValueError, match=rf"0008x0016/p2.zip is missing, though dataset.json lists it; .*{merge}"):
        FrameStore(tmp_path, SIZE, [*listed, "0008x0016/p2.zip"])
    with pytest.raises(ValueError, match=rf"0008x0016/p0.zip is there, and 1 more, though .* not list it; .*{merge}"):
        FrameStore(tmp_path, SIZE, [])

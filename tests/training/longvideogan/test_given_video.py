"""A low-resolution video from a file is enlarged as the same frames from a network are."""

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_tools.frames import center_crop_and_resize
from dnnlib.frames_out import open_writer
from training.longvideogan.given_video import GivenVideo, frame_rate, iter_frames
from training.longvideogan.sampling import SuperResSource, latent_z

FRAMES = np.random.RandomState(0).randint(0, 256, (20, 18, 32, 3)).astype(np.uint8)


def write(path, frames=FRAMES):
    with open_writer(path, *frames.shape[1:3], fps=12) as writer:
        writer.write(frames)
    return path


def both(path, sres, seeds, start, num_frames):
    chunks = list(GivenVideo(path, SuperResSource(sres)).both(seeds, start, num_frames))
    return tuple(torch.cat(part, dim=2) for part in zip(*chunks, strict=True))


@pytest.mark.parametrize(("start", "num_frames"), [(0, None), (0, 20), (0, 3), (2, 9), (13, None), (19, 1), (17, 30)])
def test_any_window_equals_the_network_on_frames_with_repeated_ends(tiny_sres, tmp_path, start, num_frames):
    path = write(tmp_path / "a.npz")
    context = tiny_sres.temporal_context
    last = min(20, start + (num_frames or 20))
    indices = np.arange(start - context, last + context).clip(0, 19)
    video = torch.from_numpy(FRAMES[indices]).permute(3, 0, 1, 2)[None] / 127.5 - 1
    z = torch.from_numpy(latent_z([5, 6], tiny_sres.z_channels))
    expected = tiny_sres(video.expand(2, -1, -1, -1, -1), z)
    lres, sres = both(path, tiny_sres, [5, 6], start, num_frames)
    assert torch.equal(lres, video[:, :, context : context + last - start].expand(2, -1, -1, -1, -1))
    assert torch.allclose(sres, expected, atol=1e-5)


def test_frames_of_other_sizes_are_cut_and_resized_like_those_of_a_dataset(tiny_sres, tmp_path):
    frames = np.random.RandomState(1).randint(0, 256, (3, 50, 70, 3)).astype(np.uint8)
    lres, sres = both(write(tmp_path / "a", frames), tiny_sres, [0], 0, None)
    expected = np.stack([center_crop_and_resize(frame, 18, 32) for frame in frames])
    assert np.array_equal(((lres + 1) * 127.5).round().byte()[0].permute(1, 2, 3, 0).numpy(), expected)
    assert sres.shape == (1, 3, 3, 36, 64)


def test_every_kind_of_file_gives_its_frames_in_order(tmp_path):
    smooth = np.linspace(0, 200, 11).astype(np.uint8)[:, None, None, None].repeat(18, 1).repeat(32, 2).repeat(3, 3)
    for name in ("a.npz", "a", "a.mp4"):
        found = np.stack(list(iter_frames(write(tmp_path / name, smooth))))
        assert np.abs(found.astype(int) - smooth).max() <= (4 if name == "a.mp4" else 0)
    assert [frame_rate(tmp_path / name) for name in ("a.mp4", "a", "a.npz")] == [12, None, None]
    (tmp_path / "unpadded").mkdir()
    for index in (10, 9, 2):
        Image.fromarray(np.full((4, 4), index, np.uint8)).save(tmp_path / "unpadded" / f"frame{index}.png")
    assert [frame[0, 0].tolist() for frame in iter_frames(tmp_path / "unpadded")] == [[2] * 3, [9] * 3, [10] * 3]


def test_pictures_of_any_kind_are_read_as_those_of_a_dataset_are(tmp_path):
    (tmp_path / "a").mkdir()
    deep = np.arange(0, 6 * 257 * 40, 257 * 40).astype(np.uint16).reshape(2, 3)
    Image.fromarray(deep).save(tmp_path / "a" / "0.png")
    sideways = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    sideways.getexif()[0x0112] = 6  # to be turned clockwise
    sideways.save(tmp_path / "a" / "1.png", exif=sideways.getexif())
    first, second = iter_frames(tmp_path / "a")
    assert first[..., 0].tolist() == [[0, 40, 80], [120, 160, 200]]
    assert np.array_equal(second, np.rot90(np.asarray(sideways), -1))


def test_what_cannot_be_read_is_refused_by_name(tiny_sres, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no zip file")
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3)))
    whole = write(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    write(tmp_path / "broken").joinpath("000004.png").write_bytes(b"not a picture")
    for name in ("empty", "text.npz", "floats.npz", "cut.npz", "broken"):
        with pytest.raises(ValueError, match=name):
            list(iter_frames(tmp_path / name))
    with pytest.raises(ValueError, match=r"whole.npz has 20 frames, none at 20 or later"):
        both(tmp_path / "whole.npz", tiny_sres, [0], 20, None)


def test_no_more_of_a_file_is_read_than_is_needed(tiny_sres, tmp_path):
    folder = write(tmp_path / "a")
    (folder / f"{2 + tiny_sres.temporal_context + 1:06d}.png").write_bytes(b"not a picture")
    assert both(folder, tiny_sres, [0], 0, 2)[1].shape[2] == 2

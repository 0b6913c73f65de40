"""Prompts return exactly the frames and values that samplers request, and report missing ones."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.data import clips
from tests.training.data.clips import VIDEO, to_float, write
from training.data.dataset import ClipDataset
from training.data.footage import Arrays
from training.data.pictures import center_crop_and_resize
from training.data.prompts import (
    ClipPrompt,
    FilePrompt,
    followed_frames,
    open_prompt,
    with_streams,
)
from training.sampling import Needs, Prompt, Sampler

SIZE = (16, 24)


def to_bytes(frames: torch.Tensor) -> np.ndarray:
    return ((frames + 1) * 127.5).round().to(torch.uint8).movedim(-4, -1).numpy()


class Fake(Sampler):
    """Takes a prompt and makes frames whose value is 1000 * seed + number, up to `num_frames` if that is given."""

    def __init__(self, fps: float | None = None, size: tuple[int, int] = SIZE, num_frames: int | None = None, **needs):
        self.outputs, self.needs, self.fps = {"video": size}, Needs(**needs), fps
        self.num_frames, self.num_streams, self.num_made = num_frames, 0, 0

    def frames(self, request):
        self.num_streams += 1
        total = request.num_frames if self.num_frames is None else self.num_frames - request.starts[0]
        for done in itertools.count(0, 5):
            if total is not None and done >= total:
                return
            numbers = torch.arange(done, done + 5 if total is None else min(done + 5, total))
            self.num_made += len(numbers)
            video = [1000 * seed + s + numbers for seed, s in zip(request.seeds, request.starts, strict=True)]
            yield {"video": torch.stack(video).float()[:, None, :, None, None].expand(-1, 3, -1, *self.size)}


# ----------------------------------------------------------------------------
# Clips.


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> ClipDataset:
    return ClipDataset(clips.write_dataset(tmp_path_factory.mktemp("tiny"), [SIZE, (8, 12)]), [SIZE, (8, 12)])


def test_a_clip_gives_the_frames_around_its_window(dataset):
    prompt = ClipPrompt(dataset, [(0, 10), (2, 5)])
    assert prompt.fps == 30
    expected = np.stack([dataset.read(0, SIZE, range(6, 14)), dataset.read(2, SIZE, range(1, 9))])
    frames = prompt.frames(-4, 8, SIZE)
    assert frames.dtype == torch.float32 and torch.equal(frames, to_float(expected))
    small = prompt.frames([0, 3], 2, (8, 12))
    expected = np.stack([dataset.read(0, (8, 12), range(10, 12)), dataset.read(2, (8, 12), range(8, 10))])
    assert torch.equal(small, to_float(expected))


def test_one_window_serves_videos_that_start_at_several_frames(dataset):
    frames = ClipPrompt(dataset, [(0, 10)]).frames([0, 3], 2, SIZE)
    assert torch.equal(frames, to_float(np.stack([dataset.read(0, SIZE, range(s, s + 2)) for s in (10, 13)])))


def test_a_clip_that_is_followed_repeats_its_first_frame_and_ends():
    prompt = ClipPrompt(Arrays([VIDEO], "a"), [(0, 0)], repeats_edges=True)
    assert torch.equal(prompt.frames(-2, 4, SIZE)[0], to_float(VIDEO[[0, 0, 0, 1]]))
    assert torch.equal(prompt.frames(18, 4, SIZE)[0], to_float(VIDEO[18:]))
    assert prompt.frames(20, 4, SIZE).shape == (1, 3, 0, *SIZE)


def test_streams_are_read_beside_the_frames(dataset):
    def actions(clip, start, count):
        return np.arange(start, start + count, dtype=np.int32) + 100 * clip

    def poses(clip, start, count):
        return np.full((count, 2), float(clip), np.float64)

    prompt = ClipPrompt(dataset, [(0, 10), (2, 5)], {"actions": actions, "poses": poses})
    assert prompt.stream("actions", -2, 3).tolist() == [[8, 9, 10], [203, 204, 205]]
    assert prompt.stream("actions", 0, 1).dtype == torch.int64
    assert prompt.stream("poses", 0, 4).shape == (2, 4, 2) and prompt.stream("poses", 0, 4).dtype == torch.float32
    with pytest.raises(ValueError, match="the stream 'text' is needed for 3 frames: give --text"):
        prompt.stream("text", 0, 3)
    with pytest.raises(ValueError, match="context too short: clip b/middle of .* has 25 frames, but 30 from frame 5"):
        prompt.stream("actions", 0, 30)


@pytest.mark.parametrize(
    ("window", "start", "count", "message"),
    [
        ((1, 0), -4, 8, "clip a/short of tiny.* has 12 frames, but 8 from frame -4 on are needed: give a longer clip"),
        ((1, 6), 0, 8, "clip a/short of tiny.* has 12 frames, but 8 from frame 6 on are needed: give a longer clip"),
    ],
)
def test_frames_outside_of_a_clip_are_refused(dataset, window, start, count, message):
    with pytest.raises(ValueError, match=f"context too short: {message}"):
        ClipPrompt(dataset, [window]).frames(start, count, SIZE)


# ----------------------------------------------------------------------------
# Files.


@pytest.mark.parametrize("name", ["a", "a.npz"])
def test_any_order_of_requests_gives_the_frames_of_the_file(tmp_path, name):
    prompt = FilePrompt(write(tmp_path / name))
    for start, count in [(0, 8), (4, 8), (4, 8), (12, 3), (2, 5), (-3, 2), (-3, 5), (-3, 3), (15, 9), (0, 1), (19, 2)]:
        expected = VIDEO[np.arange(start, min(start + count, 20)).clip(0)]
        assert torch.equal(prompt.frames(start, count, SIZE)[0], to_float(expected)), (start, count)
    assert prompt.frames(20, 4, SIZE).shape == (1, 3, 0, *SIZE) and prompt.frames(99, 4, SIZE).shape[2] == 0
    assert prompt.num_frames == 20
    assert torch.equal(FilePrompt(tmp_path / name).frames(-4, 3, SIZE)[0], to_float(VIDEO[[0, 0, 0]]))


def test_a_file_is_held_no_longer_than_it_is_needed_and_read_no_further(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "000013.png").write_bytes(b"not a picture")
    prompt = FilePrompt(folder)
    for start in range(0, 10):
        prompt.frames(start, 4, SIZE)
        assert len(prompt._readers[SIZE]._held) == 4
    with pytest.raises(ValueError, match=r"000013.png cannot be a frame"):
        prompt.frames(10, 4, SIZE)


def test_frames_of_other_sizes_are_cut_and_resized_like_those_of_a_dataset(tmp_path):
    frames = np.random.RandomState(1).randint(0, 256, (3, 50, 70, 3)).astype(np.uint8)
    prompt = FilePrompt(write(tmp_path / "a", frames))
    for size in (SIZE, (60, 80)):
        expected = np.stack([center_crop_and_resize(frame, *size) for frame in frames])
        assert np.array_equal(to_bytes(prompt.frames(0, 3, size))[0], expected)


@pytest.mark.parametrize("name", ["a", "a.npz"])
@pytest.mark.parametrize("origin", [None, 20, 7])
def test_a_video_is_continued_from_its_last_frames(tmp_path, name, origin):
    prompt = open_prompt(str(write(tmp_path / name)), Fake(past=4), origin=origin)
    end = origin or 20
    assert torch.equal(prompt.frames(-4, 4, SIZE)[0], to_float(VIDEO[end - 4 : end]))
    assert torch.equal(prompt.frames(-3, 2, SIZE)[0], to_float(VIDEO[end - 3 : end - 1]))
    assert torch.equal(prompt.frames(-6, 6, SIZE)[0], to_float(VIDEO[end - 6 : end])), "read again, from further back"
    if origin is None:
        assert prompt.frames(0, 4, SIZE).shape[2] == 0, "the video has ended"


@pytest.mark.parametrize(
    ("origin", "past", "message"),
    [
        (None, 36, "a.npz has 20 frames, but the last 36 are needed: give a longer video"),
        (
            10,
            12,
            "a.npz has 10 frames before the one that the video is to begin at, but 12 are needed: begin at frame 12",
        ),
        (30, 12, "a.npz has 20 frames, but the video is to begin at its frame 30: begin at frame 20 or earlier"),
        (22, 1, "a.npz has 20 frames, but the video is to begin at its frame 22: begin at frame 20 or earlier"),
    ],
)
def test_too_short_a_context_is_refused(tmp_path, origin, past, message):
    prompt = open_prompt(str(write(tmp_path / "a.npz")), Fake(past=past), origin=origin)
    with pytest.raises(ValueError, match=f"context too short: .*{message}"):
        prompt.frames(-past, past, SIZE)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("a.mp4", (32, 48), "are 16x24, the model takes 32x48: give a video of at least that size"),
        ("a", (32, 16), "are 16x24, the model takes 32x16: give a video of at least that size"),
        ("a.npz", (32, 48), "are 16x24, the model takes 32x48: give an array of that size"),
        ("a.npz", (8, 12), "are 16x24, the model takes 8x12: give an array of that size"),
    ],
)
def test_a_video_that_is_continued_has_the_size_of_the_model(tmp_path, name, size, message):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        open_prompt(str(tmp_path / name), Fake(past=4, size=size)).frames(-4, 4, size)
    assert open_prompt(str(tmp_path / name), Fake(follows=True, size=size)).frames(0, 4, size).shape[3:] == size


def test_a_video_of_another_rate_is_continued_only_at_a_rate_that_was_asked_for(tmp_path):
    path = str(write(tmp_path / "a.mp4"))
    with pytest.raises(
        ValueError, match="a.mp4 has 12 frames per second, the model was trained at 6: give --fps=6, at"
    ):
        open_prompt(path, Fake(past=4, fps=6))
    slow = open_prompt(path, Fake(past=4, fps=6), fps=6)
    whole = open_prompt(path, Fake(past=4))
    assert (slow.fps, whole.fps) == (6, 12)
    assert torch.equal(slow.frames(-3, 3, SIZE), whole.frames(-6, 6, SIZE)[:, :, ::2])
    for sampler in (Fake(past=4, fps=12.05), Fake(follows=True, past=4, fps=6)):
        assert open_prompt(path, sampler).fps == 12


def test_a_file_is_the_context_of_all_videos(tmp_path):
    prompt = FilePrompt(write(tmp_path / "a"))
    assert prompt.frames([3, 3], 2, SIZE).shape == (1, 3, 2, *SIZE)
    with pytest.raises(ValueError, match=r"is the context of all videos, which start at \[0, 3\]: give one start"):
        prompt.frames([0, 3], 2, SIZE)


# ----------------------------------------------------------------------------
# Following.


@pytest.mark.parametrize("piece", [1, 3, 8])
@pytest.mark.parametrize(("start", "num_frames"), [(0, None), (0, 20), (0, 3), (2, 9), (13, None), (19, 1), (17, 30)])
def test_a_prompt_is_followed_with_repeated_ends(tmp_path, start, num_frames, piece):
    past, future = 3, 2
    prompts = [FilePrompt(write(tmp_path / "a.npz")), ClipPrompt(Arrays([VIDEO], "a"), [(0, 0)], repeats_edges=True)]
    last = min(20, start + (num_frames or 20))
    expected = to_float(VIDEO[np.arange(start - past, last + future).clip(0, 19)])
    for prompt in prompts:
        pieces = list(followed_frames(prompt, start, num_frames, Needs(past, future, follows=True), SIZE, piece))
        assert torch.equal(torch.cat(pieces, dim=2)[0], expected)
        assert all(frames.shape[2] <= piece for frames in pieces)


@pytest.mark.parametrize("start", [20, 22, 40])
def test_a_start_behind_the_end_is_refused(tmp_path, start):
    path = write(tmp_path / "whole.npz")
    for prompt in (FilePrompt(path), with_streams(FilePrompt(path), {"actions": np.zeros(3, int)}, 0)):
        with pytest.raises(
            ValueError, match=f"whole.npz has 20 frames, none at {start} or later: use a smaller --start"
        ):
            list(followed_frames(prompt, start, None, Needs(3, 3, follows=True), SIZE))


# ----------------------------------------------------------------------------
# Given streams.


def test_given_streams_replace_those_of_a_prompt(dataset):
    base = ClipPrompt(dataset, [(0, 10)], {"poses": lambda clip, start, count: np.zeros((count, 3))})
    prompt = with_streams(base, {"actions": np.arange(52)}, past=36, num_frames=16)
    assert prompt.stream("actions", -36, 3).tolist() == [[0, 1, 2]]
    assert prompt.stream("actions", [0, 14], 2).tolist() == [[36, 37], [50, 51]]
    assert prompt.stream("poses", 0, 2).shape == (1, 2, 3)
    assert torch.equal(prompt.frames(-4, 4, SIZE), base.frames(-4, 4, SIZE)) and prompt.fps == 30
    assert with_streams(base, {}, 36) is base


@pytest.mark.parametrize(
    ("values", "options", "request_", "message"),
    [
        (
            np.zeros(40, int),
            {"num_frames": 16},
            None,
            "actions.json has actions for 40 frames, 36 for the context and 16 for the video are needed",
        ),
        (
            np.zeros(40, int),
            {},
            (0, 16),
            "actions.json has actions for 40 frames, 36 for the context and 16 for the video are",
        ),
        (np.zeros(60, int), {}, (-40, 4), "actions.json begins 36 frames before the video, but 40 are needed: put the"),
        (
            np.array([0, 1, 5]),
            {"num_values": {"actions": 5}},
            None,
            "actions.json has 5 at entry 2, but actions are numbers from 0 to 4",
        ),
        (np.array([0, -1]), {}, None, "actions.json has -1 at entry 1, but actions are whole numbers from 0 on"),
        (np.array([[0.0, 1.0], [2.0, np.nan]]), {}, None, "actions.json has nan at entry 1: give finite numbers"),
    ],
)
def test_wrong_streams_are_refused(values, options: dict[str, Any], request_, message):
    with pytest.raises(ValueError, match=message):
        prompt = with_streams(Prompt(), {"actions": values}, 36, sources={"actions": "actions.json"}, **options)
        prompt.stream("actions", *request_)


# ----------------------------------------------------------------------------
# Opening.


def window(prompt: Prompt) -> tuple[str, int]:
    assert isinstance(prompt, ClipPrompt)
    ((clip, first),) = prompt.windows
    return prompt.footage.clips[clip].path, first


@pytest.mark.parametrize(
    ("clip", "options", "needs", "expected"),
    [
        ("", {}, {"past": 4}, ("a/long", 40)),
        (":a/short", {}, {"past": 4}, ("a/short", 12)),
        ("", {"clip": "b/middle"}, {"past": 4}, ("b/middle", 25)),
        ("", {"origin": 30}, {"past": 4}, ("a/long", 30)),
        (":b/middle", {}, {"past": 4, "streams": ("actions",)}, ("b/middle", 4)),
        (":b/middle", {}, {"past": 4, "future": 4, "follows": True}, ("b/middle", 0)),
    ],
)
def test_a_dataset_gives_the_clip_that_is_named_or_the_first_that_is_long_enough(
    dataset, clip, options, needs, expected
):
    opened = open_prompt(f"{dataset.path}{clip}", Fake(**needs), **options)
    assert window(opened) == expected


def test_streams_of_a_dataset_are_opened_for_a_model_that_needs_them(dataset):
    def streams(opened):
        return {"actions": lambda clip, start, count: np.arange(start, start + count)}

    prompt = open_prompt(f"{dataset.path}", Fake(past=4, streams=("actions",)), streams=streams)
    assert prompt.stream("actions", -4, 8).tolist() == [list(range(8))]


@pytest.mark.parametrize(
    ("path", "sampler", "options", "message"),
    [
        ("ROOT", Fake(), {}, "was given as context, but this model takes none: leave out --context"),
        ("nothing.mp4", Fake(past=4), {}, "there is no nothing.mp4: give a video or npz file, a folder of images"),
        ("FILE", Fake(past=4), {"clip": "a"}, "a.npz is no dataset, so it has no clip a: give the root of one"),
        ("FILE", Fake(streams=("actions",)), {}, "has frames, but the model needs actions alone: give a dataset, or"),
        ("ROOT:c", Fake(past=4), {}, "has no clip c: give one of its 3, which are a/long, a/short, b/middle"),
        ("ROOT", Fake(past=41), {}, "has no clip of 41 frames, which are needed; the longest of its 3 clips has 40"),
        ("ROOT", Fake(past=4, size=(32, 48)), {}, "has no frames of 32x48; sizes found: 0008x0012, 0016x0024"),
        ("ROOT", Fake(past=4, fps=24), {}, "has 30 frames per second, the model was trained at 24: give a dataset of"),
        ("ROOT", Fake(past=4), {"fps": 24}, "has 30 frames per second, but --fps asks for 24: make a dataset of it"),
    ],
)
def test_wrong_contexts_are_refused(dataset, tmp_path, path, sampler, options: dict[str, Any], message):
    path = path.replace("ROOT", str(dataset.path)).replace("FILE", str(write(tmp_path / "a.npz")))
    with pytest.raises(ValueError, match=message):
        open_prompt(path, sampler, **options)


def test_a_rate_that_is_asked_for_lets_a_dataset_of_another_one_pass(dataset):
    assert open_prompt(str(dataset.path), Fake(past=4, fps=24), fps=30).fps == 30


def test_a_clip_too_short_is_refused_when_frames_are_asked_for(dataset):
    prompt = open_prompt(f"{dataset.path}:a/short", Fake(past=36))
    with pytest.raises(ValueError, match="context too short: clip a/short of .* has 12 frames, but 36 from frame -24"):
        prompt.frames(-36, 36, SIZE)

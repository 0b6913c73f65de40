"""Prompts that seeds choose: the right one for each video, few of them open, and the end of the shortest."""

import pytest
import torch

from tests.explorer.steered import write_dataset
from training.data import given_prompt, prompts
from training.data.prompts import JoinedPrompt, SeededPrompt
from training.sampling import Needs, Prompt, Sampler


class Counted(Prompt):
    """Frames and values that are a number plus the frame's."""

    is_closed = False

    def __init__(self, number: int, limit: int | None = None):
        self.number, self.limit, self.fps = number, limit, 30.0

    def frames(self, start, count, size):
        assert isinstance(start, int)
        return (self.number + start + torch.arange(count).float()).view(1, 1, -1, 1, 1).expand(1, 3, -1, *size)

    def stream(self, name, start, count):
        assert isinstance(start, int)
        return (self.number + start + torch.arange(count)).unsqueeze(0)

    def close(self):
        self.is_closed = True


def test_each_video_has_the_prompt_of_its_seed():
    prompt = SeededPrompt(lambda number: Counted(100 * number), 3)
    joined = prompt.of([4, -1, 4])
    assert joined.frames([0, 5, 2], 2, (1, 1))[:, 0, :, 0, 0].tolist() == [[100, 101], [205, 206], [102, 103]]
    for read in (joined.stream, joined.padded_stream):
        assert read("actions", 7, 1).tolist() == [[107], [207], [107]]
    for read in (prompt.stream, prompt.padded_stream):
        assert read("actions", 7, 1).tolist() == [[7]]
    assert prompt.frames(1, 1, (2, 2)).shape == (1, 3, 1, 2, 2) and prompt.fps == joined.fps == 30


@pytest.mark.parametrize(("seeds", "limit"), [([0], 9), ([1], None), ([0, 1], 9), ([5, 3], 4)])
def test_the_shortest_of_the_seeds_ends_all(seeds, limit):
    limits = [9, None, 4]
    prompt = SeededPrompt(lambda number: Counted(number, limits[number]), 3, seeds)
    assert prompt.limit == prompt.of(seeds).limit == limit


def test_few_are_open_and_those_are_closed(monkeypatch):
    monkeypatch.setattr(prompts, "MAX_OPEN", 2)
    made = []

    def make(number):
        made.append(Counted(number))
        return made[-1]

    prompt = SeededPrompt(make, 10)
    assert prompt.of([0]).stream("actions", 0, 1).item() == 0 and len(made) == 1
    values = prompt.of([3, 4, 3, 0]).stream("actions", 0, 1)
    assert values.flatten().tolist() == [3, 4, 3, 0] and [one.number for one in made] == [0, 3, 4, 0]
    prompt.close()
    assert [one.is_closed for one in made] == [False, True, False, True]


class Continuing(Sampler):
    needs = Needs(past=3, size=(4, 4))


class Following(Sampler):
    needs = Needs(past=3, size=(4, 4), follows=True)


def test_starts_are_for_models_that_continue(tmp_path):
    write_dataset(tmp_path / "m.starts")
    model = str(tmp_path / "m.pkl")
    assert given_prompt.starts_beside([model], Continuing()) == str(tmp_path / "m.starts")
    assert given_prompt.starts_beside([model], Following()) is None
    assert given_prompt.starts_beside([model], Sampler()) is None


def test_joined_prompts_keep_what_is_known_of_the_first():
    first = Counted(0)
    first.label, first.text = 3, "a walk"
    joined = JoinedPrompt([first, Counted(1, 5)])
    assert (joined.label, joined.text, joined.limit) == (3, "a walk", 5)

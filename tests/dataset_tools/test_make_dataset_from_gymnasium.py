"""Environments become datasets: action t leads into frame t, and the same seed makes the same bytes."""

import json
import re
import shlex
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from dataset_tools import make_dataset_from_gymnasium
from dataset_tools.inspect_findings import command_again
from training.data.dataset import ClipDataset

SIZE = (12, 16)
ENV = "tests.dataset_tools.toy_env:Toy-v0"


def run(out, *arguments, env=ENV, code=0):
    command = [env, str(out), "--num-partitions=2", *map(str, arguments)]
    result = CliRunner().invoke(make_dataset_from_gymnasium.main, command)
    assert result.exit_code == code, result.output
    return result.output


def levels(dataset, clip):
    frames = dataset.read(clip, SIZE, range(dataset.clips[clip].num_frames))
    return frames.astype(int).mean((1, 2, 3)).round().tolist()


def content(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_actions_lead_into_frames_and_have_names(tmp_path):
    output = run(tmp_path / "toy", "--clips=5", "--frames=20")
    assert "5 clips, 100 frames are in" in output
    dataset = ClipDataset(tmp_path / "toy", [SIZE], streams=["actions", "rewards"])
    assert dataset.fps == 15 and dataset.vocabularies() == {"actions": ["none", "left", "right", "forward"]}
    seen = set()
    for clip in range(5):
        actions = dataset.read_stream(clip, "actions", 0, 20).tolist()
        assert actions[0] == 0 and 0 not in actions[1:]
        assert levels(dataset, clip) == [10, *(40 + 25 * (action - 1) for action in actions[1:])]
        assert dataset.read_stream(clip, "rewards", 0, 3).tolist() == [[0.0], [0.5], [0.5]]
        seen |= set(actions)
    assert seen == {0, 1, 2, 3}
    assert json.loads((tmp_path / "toy" / "dataset.json").read_text())["hold"] == 4


@pytest.mark.parametrize(("kind", "width"), [("vectors", 2), ("dict", 3)])
def test_other_actions_are_vectors(tmp_path, kind, width):
    run(tmp_path / "toy", "--clips=2", "--frames=10", f"--env-arg=kind={kind}", "--hold=1")
    dataset = ClipDataset(tmp_path / "toy", [SIZE], streams=["actions"])
    values = dataset.read_stream(0, "actions", 0, 10)
    assert values.shape == (10, width) and not values[0].any()
    expected = 40 + 25 * np.clip(values[1:], 0, 1).sum(1)
    np.testing.assert_allclose(levels(dataset, 0)[1:], expected, atol=1.1)


def test_numbers_are_names_where_there_are_no_others(tmp_path):
    run(tmp_path / "toy", "--clips=2", "--frames=30", "--env-arg=kind=numbers", "--hold=1")
    dataset = ClipDataset(tmp_path / "toy", [SIZE], streams=["actions"])
    assert dataset.vocabularies() == {"actions": ["none", "2", "3", "4", "5"]}
    actions = dataset.read_stream(1, "actions", 0, 30)
    assert levels(dataset, 1)[1:] == (40 + 25 * (actions[1:] + 1)).tolist()


def test_the_same_seed_makes_the_same_bytes_in_any_partition(tmp_path):
    run(tmp_path / "one", "--clips=5", "--frames=12")
    for index in (1, 0):
        run(tmp_path / "two", "--clips=5", "--frames=12", f"--partition={index}", "--workers=1")
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert "2 of 2 partitions were made before" in run(tmp_path / "one", "--clips=5", "--frames=12", "--skip-made")
    run(tmp_path / "other", "--clips=5", "--frames=12", "--seed=1")
    assert content(tmp_path / "one") != content(tmp_path / "other")
    run(tmp_path / "val", "--clips=5", "--frames=12", "--split=val")
    zips = [content(tmp_path / name)["0012x0016/partition_0000.zip"] for name in ("one", "val")]
    assert zips[0] != zips[1]


def test_policies_episodes_and_skipped_frames(tmp_path):
    policy = "--policy=tests.dataset_tools.toy_env:turn_always"
    run(tmp_path / "toy", policy, "--clips=2", "--frames=10", "--env-arg=length=7", "--frame-skip=2")
    dataset = ClipDataset(tmp_path / "toy", [SIZE], streams=["actions", "rewards"])
    assert dataset.lengths.tolist() == [5, 5] and dataset.fps == 7.5
    assert dataset.read_stream(0, "actions", 0, 5).tolist() == [0, 1, 2, 1, 2]
    assert dataset.read_stream(0, "rewards", 0, 5)[:, 0].tolist() == [0, 1, 1, 1, 0.5]
    output = run(tmp_path / "short", policy, "--clips=2", "--env-arg=length=3", "--min-frames=9", code=1)
    assert "no clip came of 2 sources" in output


def test_an_environment_of_gymnasium(tmp_path):
    """CartPole, which pygame draws."""
    pytest.importorskip("pygame")
    run(tmp_path / "cartpole", "--clips=2", "--frames=8", "--sizes=32x48", env="CartPole-v1")
    dataset = ClipDataset(tmp_path / "cartpole", [(32, 48)], streams=["actions"])
    assert dataset.fps == 50 and dataset.lengths.tolist() == [8, 8]
    assert set(dataset.read_stream(0, "actions", 1, 7).tolist()) <= {1, 2}
    assert len(np.unique(dataset.read(0, (32, 48), [0]))) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--env-arg=kind=sequence",), "have no fixed number of values"),
        (("--env-arg=size",), "--env-arg is 'size'; give NAME=VALUE"),
        (("--env-arg=nonsense=1",), "cannot be made"),
        (("--env-arg=renders=7",), "Toy-v0 renders 7, expected uint8 of shape"),
        (("--policy=nothing:make",), "--policy is nothing:make, which cannot be imported"),
        (("--policy=json",), "--policy is json, which cannot be imported"),
        (("--policy=json:__doc__",), "which is no function; give MODULE:FUNCTION"),
        (("--fps=5",), "give --frame-skip to store fewer frames"),
        (("--env-arg=fails_at=3",), "clip 0 of .*Toy-v0 failed .RuntimeError: the engine is gone"),
    ],
)
def test_what_cannot_be_played_is_refused(tmp_path, arguments, message):
    output = run(tmp_path / "toy", "--clips=1", "--frames=6", *arguments, code=1)
    assert re.search(message, output), output
    assert not list((tmp_path / "toy").rglob("*.zip"))


def test_an_unknown_environment_is_refused(tmp_path):
    assert "the environment Nothing-v0 cannot be made" in run(tmp_path / "toy", env="Nothing-v0", code=1)


def test_without_gymnasium_one_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    assert "needs the package gymnasium; install it with: pip install" in run(tmp_path / "toy", code=1)


def test_the_inspector_prints_the_command_that_made_it(tmp_path):
    made, again = tmp_path / "made", tmp_path / "again"
    run(made, "--clips=3", "--frames=9", "--env-arg=length=7", "--frame-skip=2", "--seed=5", "--split=val")
    facts = json.loads((made / "dataset.json").read_text())
    command = command_again(again, facts, {"0012x0016": sorted((made / "0012x0016").glob("*.zip"))}, [])
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "dataset_tools.make_dataset_from_gymnasium"]
    result = CliRunner().invoke(make_dataset_from_gymnasium.main, words[3:])
    assert result.exit_code == 0, result.output
    assert content(again) == content(made)

"""Scores of actions against formulas worked out here, and the network on a world whose turns can be seen."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dataset_tools.archive import ShardWriter, describe_dataset
from dataset_tools.frames import encode_stream
from metrics import action_network, metric_main
from metrics.action_following import confusion, factors_of, scores
from metrics.detectors import registry
from metrics.detectors.actions import ActionNetwork, load, mirrored_actions
from tests.metrics.walks import NAMES, SIZE, Walks, headings, random_walks, sides, views
from training.contract import Bundle
from training.network_file import save_bundle


def test_names_are_taken_apart():
    turn, move = factors_of(NAMES)
    assert (turn.name, turn.classes, move.name, move.classes) == (
        "turn", ("none", "left", "right"), "move", ("none", "forward", "back")
    )  # fmt: skip
    for number, name in enumerate(NAMES):
        assert turn.classes[turn.table[number]] == next((w for w in ("left", "right") if w in name), "none")
        assert move.classes[move.table[number]] == next((w for w in ("forward", "back") if w in name), "none")
    (turn, move) = factors_of(["none", "forward", "left", "right"])
    assert turn.classes == ("none", "left", "right") and move.classes == ("none", "forward")
    (alone,) = factors_of(["none", "jump", "left"])
    assert alone.name == "action" and alone.classes == ("none", "jump", "left") and alone.table.tolist() == [0, 1, 2]


def test_scores_equal_their_definition():
    factors = factors_of(NAMES)
    random = np.random.RandomState(0)
    actions, predicted = random.randint(len(NAMES), size=200), random.randint(3, size=(200, 2))
    found = scores(confusion(predicted, actions, factors), factors)
    means = []
    for place, factor in enumerate(factors):
        given, by_class = factor.table[actions], []
        for number, name in enumerate(factor.classes):
            hits = sum(g == p == number for g, p in zip(given, predicted[:, place], strict=True))
            precision, recall = hits / (predicted[:, place] == number).sum(), hits / (given == number).sum()
            f1 = 2 * precision * recall / (precision + recall)
            values = [found[f"{factor.name}_{name}_{kind}"] for kind in ("precision", "recall", "f1")]
            assert values == pytest.approx([precision, recall, f1])
            by_class.append(f1)
        assert found[f"f1_{factor.name}"] == pytest.approx(np.mean(by_class))
        means.append(np.mean(by_class))
    assert found["f1"] == pytest.approx(np.mean(means))


def test_classes_that_were_not_given_do_not_count():
    factors = factors_of(["none", "left", "right"])
    found = scores(np.array([[[3, 0, 1], [0, 0, 0], [0, 0, 0]]]), factors)
    assert found["f1"] == found["turn_none_f1"] == pytest.approx(6 / 7) and "turn_left_f1" not in found
    assert found["recall"] == 0.75 and found["precision"] == 1


def test_actions_are_mirrored():
    found = mirrored_actions(NAMES)
    assert found is not None
    mirrored = [NAMES[number] for number in found]
    assert mirrored == ["none", "forward", "back", "right", "left", "forward_right", "forward_left", "back_right",
                        "back_left"]  # fmt: skip
    assert mirrored_actions(["none", "jump"]) is None and mirrored_actions(["none", "left"]) is None


@pytest.fixture(scope="module")
def turning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a dataset of walks that only turn, with names of all actions."""
    root = tmp_path_factory.mktemp("turning")
    with ShardWriter(root, [SIZE], 0) as writer:
        for number in range(8):
            actions = np.array([0, 3, 4])[random_walks(8, 40, 3)[number]]
            frames = views(number, headings(actions))
            names = [NAMES[action] for action in actions]
            with writer.clip(f"walk/{number}", facts={}, actions=names) as add:
                for files in encode_stream(iter(frames), [SIZE], num_threads=1):
                    add(files)
        report = writer.report({30: 8})
    describe_dataset(root, [report], 1, ("numpy",), actions=NAMES)
    return root


@pytest.fixture(scope="module")
def trained(turning: Path) -> Path:
    """Train a small network by the command line."""
    out = turning / "network.pkl"
    arguments = [
        "train",
        f"--dataset={turning}",
        f"--out={out}",
        "--steps=150",
        "--batch=4",
        "--channels=8",
        "--lr=0.01",
    ]
    result = CliRunner().invoke(action_network.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "step 150 of 150" in result.output and "-m action_following" in result.output
    return out


def test_turns_are_learned_and_the_file_is_passive(trained: Path):
    detector = load("cpu", trained)
    facts = detector.identity["trained"]
    assert facts["held_out"]["f1_turn"] > 0.9 and facts["steps"] == 150 and not detector.identity["verified"]
    frames = torch.from_numpy(views(20, headings(np.array([0, 3, 3, 4, 0])))).permute(0, 3, 1, 2)
    assert detector.predict(frames[:-1], frames[1:])[:, 0].tolist() == [1, 1, 2, 0]
    assert detector.network.names == NAMES and detector.network.size == SIZE


def measure(way: str, trained: Path):
    footage = Walks([np.array([0, 3, 4])[row] for row in random_walks(6, 40, 3)])
    real, fake, _ = sides(way, footage)
    paths = {"action-network": str(trained)}
    (result,) = metric_main.calc_metrics(
        ["action_following"], real, fake, num_videos=6, num_frames=30, detector_paths=paths
    )
    return result


def test_a_model_that_obeys_reaches_the_ceiling_and_others_do_not(trained: Path):
    obeying, mirrored, still = (measure(way, trained) for way in ("obey", "mirror", "still"))
    assert obeying["results"] == pytest.approx(obeying["floors"]) and obeying["results"]["action_f1_turn"] > 0.9
    assert mirrored["results"]["action_turn_left_f1"] < 0.1 and mirrored["results"]["action_turn_none_f1"] > 0.8
    assert still["results"]["action_turn_left_recall"] == 0 and still["results"]["action_turn_none_recall"] > 0.95
    assert mirrored["floors"]["action_f1"] == obeying["floors"]["action_f1"], "real video does not depend on the model"
    assert obeying["detector"]["name"] == "action-network" and obeying["errors"]["action_f1"] >= 0
    (lines,) = (chart["lines"] for chart in obeying["curves"])
    assert lines[0]["x"] == list(range(1, 30)) and np.mean(lines[0]["y"]) > 0.9
    assert json.dumps(obeying)


def test_what_does_not_fit_is_refused(trained: Path, turning: Path, tmp_path: Path):
    real, fake, _ = sides("obey", Walks(random_walks(3, 40), ["none", *(f"act{i}" for i in range(8))]))
    options: dict[str, Any] = {"num_videos": 2, "num_frames": 10, "detector_paths": {"action-network": str(trained)}}
    with pytest.raises(
        ValueError, match="are none, act0.*, and the network for action_following was trained on none, f"
    ):
        metric_main.calc_metrics(["action_following"], real, fake, **options)
    real, fake, _ = sides("obey", Walks(random_walks(3, 40)))
    with pytest.raises(ValueError, match=r"make one with  python -m metrics.action_network train"):
        metric_main.calc_metrics(["action_following"], real, fake, num_videos=2, num_frames=10)
    large = tmp_path / "large.pkl"
    save_bundle(Bundle({"actions": ActionNetwork(NAMES, 20, 30)}, "action-network"), large)
    with pytest.raises(ValueError, match="the frames are 12x16, and the network for .* was trained on 20x30"):
        options["detector_paths"] = {"action-network": str(large)}
        metric_main.calc_metrics(["action_following"], real, fake, **options)
    other = tmp_path / "other.pkl"
    save_bundle(Bundle({"other": ActionNetwork(NAMES, 20, 30)}, "action-network"), other)
    with pytest.raises(ValueError, match="is not an inverse-dynamics network"):
        load("cpu", other)


def test_datasets_without_names_are_refused(make_dataset: Callable, tmp_path: Path):
    root = make_dataset(tmp_path / "plain", [SIZE])
    for more, message in (
        (["--size=12"], "'12' is not a size"),
        ([], "has no actions beside its frames"),
    ):
        arguments = ["train", f"--dataset={root}", f"--out={tmp_path / 'x.pkl'}", *more]
        result = CliRunner().invoke(action_network.main, arguments)
        assert result.exit_code == 1 and message in result.output, result.output
    assert not (tmp_path / "x.pkl").exists()


def test_the_cache_never_answers_for_it():
    assert registry.FILES["action-network"].sha256 is None
    with pytest.raises(ValueError, match="make one with"):
        registry.path("action-network")
    assert list(itertools.islice(registry.LOADERS, 1)) and "action-network" in registry.LOADERS
